#!/bin/sh
# Make .venv-llamacpp: what .venv holds, and llama.cpp, which its package has to compile.
# The wheel is kept in build/wheels, so that happens once; a second call finds its stamp and
# returns at once. Ends with 3 where it cannot be built.
set -eu

cd "$(dirname "$0")/.."
llama_cpp_python=0.3.36
wheels=build/wheels

name=llamacpp
described="pyproject.toml constraints.txt"
. scripts/environment.sh

begin

sh scripts/bootstrap.sh test
mkdir -p "$wheels"

# Portable and no more than is needed: -march=native has made builds that die of SIGILL at the
# first step on quantized weights, -O2 compiles faster than -O3, and of the tools, the server and
# what only they use nothing is built.
flags="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS_RELEASE='-O2 -DNDEBUG' -DCMAKE_CXX_FLAGS_RELEASE='-O2 -DNDEBUG'"
wheel_stamp="$llama_cpp_python $(uname -sm) $flags"

wheel() { ls "$wheels"/llama_cpp_python-"$llama_cpp_python"-*.whl 2>/dev/null | head -1; }

if [ -z "$(wheel)" ] || [ "$(cat "$wheels/llama_cpp_python.stamp" 2>/dev/null)" != "$wheel_stamp" ]; then
    command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
        give_up "there is no C++ compiler (Debian, Ubuntu: apt install g++)"
    say "compiling llama.cpp; this happens once, and takes minutes"
    rm -f "$wheels"/llama_cpp_python-*
    # The package switches llama.cpp's common library on, which its Python part never uses.
    hook=$PWD/build/llamacpp.cmake
    echo 'set(LLAMA_BUILD_COMMON OFF)' >"$hook"
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$cores} \
        CMAKE_ARGS="$flags '-DCMAKE_PROJECT_llama.cpp_INCLUDE=$hook'" \
        .venv/bin/python -m pip wheel --disable-pip-version-check --no-input -v --no-deps \
        --no-binary llama-cpp-python -w "$wheels" "llama-cpp-python==$llama_cpp_python" \
        >>"$log" 2>&1 ||
        give_up "it does not compile here; see $log"
    printf '%s\n' "$wheel_stamp" >"$wheels/llama_cpp_python.stamp"
fi

rm -rf "$environment"
.venv/bin/python -m venv "$environment" ||
    give_up ".venv/bin/python cannot make a virtual environment"
"$environment/bin/python" -m pip install --disable-pip-version-check --no-input -qq --no-deps \
    -c constraints.txt "$(wheel)" diskcache gguf >>"$log" 2>&1 ||
    give_up "pip could not install it; its output is in $log"
# All else comes from .venv, whose packages are seen here too.
"$environment/bin/python" - <<'PYTHON'
import subprocess
import sysconfig
from pathlib import Path

ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
main = subprocess.run(
    [".venv/bin/python", "-c", ask], check=True, capture_output=True, text=True
).stdout.strip()
line = f"import site; site.addsitedir({main!r})\n"
(Path(sysconfig.get_path("purelib")) / "main.pth").write_text(line)
PYTHON

"$environment/bin/python" -c '
import llama_cpp, gguf, pytest, torch
import engine.llamacpp.engine
assert llama_cpp.llama_print_system_info()
' >>"$log" 2>&1 || give_up "it does not import on this machine; see $log"
printf '%s\n' "$stamp" >"$environment/.stamp"
