# Sourced by what makes an environment beside .venv, from the project's root, with $name and with
# $described, the files beside the script itself that say what it holds.

environment=.venv-$name
log=build/${name}_env.log

say() { printf '%s: %s\n' "$name" "$*" >&2; }
give_up() {
    say "not built: $*"
    exit 3
}

# The folder is part of the stamp: an environment that was moved or copied does not work.
stamp=$({
    pwd
    # shellcheck disable=SC2086 -- several names
    cat $described scripts/environment.sh "scripts/${name}_env.sh"
} | cksum)

ready() {
    [ "$(cat "$environment/.stamp" 2>/dev/null)" = "$stamp" ] &&
        "$environment/bin/python" -c '' 2>/dev/null
}

. scripts/lock.sh

# Return where nobody else makes it, and only if it has to be made.
begin() {
    ready && exit 0
    take_lock "$environment.lock"
    ready && exit 0
    mkdir -p build
    : >"$log"
}
