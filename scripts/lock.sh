# Read by the other scripts: `take_lock FOLDER` waits until this process alone may install.
# They define `say`; the lock goes when the process that holds it ends, and is taken from one that
# is gone.
take_lock() {
    lock=$1
    said=
    until mkdir "$lock" 2>/dev/null; do
        owner=$(cat "$lock/pid" 2>/dev/null || true)
        if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; then
            rm -rf "$lock"
            continue
        fi
        [ -n "$said" ] || say "waiting for another installation (process ${owner:-unknown})"
        said=yes
        sleep 1
    done
    trap 'rm -rf "$lock"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    echo $$ >"$lock/pid"
}
