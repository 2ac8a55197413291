"""Which engine a model runs on where the settings leave it open, in how many bits, and why.

    CUDA and vLLM for it  ->  vllm, else hf;  16 bit where they fit, nf4 if only that fits

Whether something fits is judged by what the device has in all, never by what is free at the
moment: the same model on the same machine has to give the same answers tomorrow.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from engine.config import ComputeDtype
from engine.devices import Device, Memory, discover_visible, read_memory
from engine.memory import ModelSize, Need, WeightKind, estimate, read_size
from engine.paths import expand
from engine.tuning import HF_BATCH_TOKENS, HF_SLOTS, VLLM_BATCH_TOKENS, VLLM_SLOTS
from jobs.domain.errors import EngineMisconfigured, EngineOutOfMemory

LocalEngine = Literal["hf", "vllm"]

# A batch needs room for one sequence of this length at least, or of the context that was asked for.
_COMMON_CONTEXT_TOKENS = 4096
# The rest is for whoever else uses the device, and for what an estimate does not see.
_GPU_SHARE = 0.9
_MEMORY_SHARE = 0.8
_WEIGHT_KINDS: Mapping[str, WeightKind] = {
    "none": "16 bit",
    "int8": "int8",
    "nf4": "nf4",
    "fp4": "fp4",
}
_HUB_FOLDER = Path("~/.cache/huggingface/hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to run a model on and with; the GPUs are those that this process may see."""

    gpus: tuple[Device, ...] = ()
    memory: Memory
    has_vllm: bool = False
    has_cuda: bool = False
    """Whether torch was built for CUDA."""
    has_bitsandbytes: bool = False

    @property
    def usable_gpus(self) -> tuple[Device, ...]:
        """The GPUs that the installed torch can use."""
        return self.gpus if self.has_cuda else ()

    @property
    def best_engine(self) -> LocalEngine:
        """The engine of models that leave it open."""
        return "vllm" if self.has_vllm and self.usable_gpus else "hf"


def look_around() -> Machine:
    """Return what this machine and its installation have; imports none of it."""
    return Machine(
        gpus=tuple(discover_visible()),
        memory=read_memory(),
        has_vllm=find_spec("vllm") is not None,
        has_cuda=_torch_has_cuda(),
        has_bitsandbytes=find_spec("bitsandbytes") is not None,
    )


def _torch_has_cuda() -> bool:
    """Return whether torch is a build for CUDA, by the file in which it says so."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            told = (Path(folder) / "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        found = re.search(r"^cuda\b[^=]*=\s*(.*)$", told, re.MULTILINE)
        return found is not None and found[1].strip() != "None"
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model is to be run: what its settings say, whichever engine it gets."""

    device: str = "auto"
    is_placed: bool = False
    """Whether the settings say where the parts of a model lie on hf."""
    compute_dtype: ComputeDtype = "bfloat16"
    context_tokens: int | None = None
    hf_slots: int = HF_SLOTS
    hf_batch_tokens: int = HF_BATCH_TOKENS
    vllm_slots: int = VLLM_SLOTS
    vllm_batch_tokens: int = VLLM_BATCH_TOKENS
    gpus_per_engine: int = 1
    gpu_share: float = _GPU_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the weights would lie."""

    device: str
    """As torch calls it: cuda:0, cpu."""
    name: str
    total_bytes: int
    usable_bytes: int
    num_gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to run a model, with what each of its devices would have to hold."""

    engine: LocalEngine
    quantization: str
    kind: WeightKind
    place: Place
    need: Need

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.need.total <= self.place.usable_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen, and why in one line."""

    engine: str
    quantization: str
    device: str
    reason: str
    is_notable: bool = False
    """Whether a person would not expect it, and should be told."""


def find_size(source: str, *, cache_folder: str | None = None) -> ModelSize | None:
    """Return the size of a model in a folder, or of a hub's model that is in the cache.

    None where its files are not here, or do not tell.

    Raises:
        EngineMisconfigured: its files are damaged or incomplete.
    """
    folder: Path | None = expand(source)
    if folder is not None and not folder.is_dir():
        folder = _cached_folder(source, cache_folder)
    return read_size(folder) if folder is not None else None


def _cached_folder(source: str, cache_folder: str | None) -> Path | None:
    """Return where the hub library keeps the newest snapshot of a model that has a config."""
    if source.count("/") != 1:
        return None
    cache = Path(cache_folder) if cache_folder else _HUB_FOLDER
    snapshots = expand(cache) / f"models--{source.replace('/', '--')}" / "snapshots"
    found = [path for path in snapshots.glob("*") if (path / "config.json").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def list_options(
    size: ModelSize,
    engine: LocalEngine,
    machine: Machine,
    plan: Plan,
    *,
    words: Sequence[str] = ("none", "nf4"),
) -> list[Option]:
    """Return the ways to run a model on an engine, the one with the most bits first.

    Args:
        words: quantizations to look at; only "none" where the weights are stored quantized.
    """
    place = _place(engine, machine, plan)
    if place is None:
        return []
    found = []
    for word in ("none",) if size.stored_quantization else words:
        kind = _WEIGHT_KINDS[word]
        if size.stored_quantization:
            kind = "as stored"
        elif word == "none" and engine == "hf" and plan.compute_dtype == "float32":
            kind = "32 bit"
        need = _need(size, kind, engine, place, plan)
        found.append(Option(engine=engine, quantization=word, kind=kind, place=place, need=need))
    return found


def _place(engine: LocalEngine, machine: Machine, plan: Plan) -> Place | None:
    """Return where the engine would load a model; None where that is not there."""
    gpus = machine.usable_gpus
    if engine == "vllm" and gpus:
        num_gpus = plan.gpus_per_engine
        total = min(gpu.total_bytes for gpu in gpus[:num_gpus])
        return Place(
            device="cuda:0" if num_gpus == 1 else "cuda",
            name=_name(gpus[0]) if num_gpus == 1 else f"each of {num_gpus} GPUs",
            total_bytes=total,
            usable_bytes=int(total * plan.gpu_share),
            num_gpus=num_gpus,
        )
    asked = "auto" if engine == "vllm" else plan.device
    if asked.startswith("cuda") or (asked == "auto" and gpus):
        number = int(asked.partition(":")[2] or 0)
        if number >= len(gpus):
            return None
        return Place(
            device=f"cuda:{number}",
            name=_name(gpus[number]),
            total_bytes=gpus[number].total_bytes,
            usable_bytes=int(gpus[number].total_bytes * _GPU_SHARE),
            num_gpus=1,
        )
    return Place(
        device="cpu" if asked == "auto" else asked,
        name="main memory",
        total_bytes=machine.memory.total_bytes,
        usable_bytes=int(machine.memory.total_bytes * _MEMORY_SHARE),
    )


def _name(gpu: Device) -> str:
    return f"GPU {gpu.index} ({gpu.name})"


def _need(size: ModelSize, kind: WeightKind, engine: LocalEngine, place: Place, plan: Plan) -> Need:
    """Return what one device would have to hold."""
    tokens = plan.context_tokens or min(size.context_tokens, _COMMON_CONTEXT_TOKENS)
    need = estimate(
        size,
        kind,
        engine=engine,
        on_cpu=place.num_gpus == 0,
        cache_tokens=tokens,
        slots=plan.hf_slots if engine == "hf" else plan.vllm_slots,
        batch_tokens=plan.hf_batch_tokens if engine == "hf" else plan.vllm_batch_tokens,
    )
    shares = max(1, place.num_gpus)
    return Need(
        weights=need.weights // shares,
        cache=need.cache // shares,
        activations=need.activations,
        overhead=need.overhead,
    )


def choose(
    name: str,
    size: ModelSize | None,
    machine: Machine,
    plan: Plan,
    *,
    engine: LocalEngine,
    quantization: str = "auto",
) -> Choice:
    """Return how the model `name` runs here; a quantization that is not "auto" stays as it is.

    Args:
        size: None where nobody can tell: then 16 bit are taken to fit.

    Raises:
        EngineOutOfMemory: it does not fit, in 16 bit or in 4.
        EngineMisconfigured: only nf4 fits, and its library is not installed.
    """
    place = _place(engine, machine, plan)
    device = place.device if place is not None else plan.device
    if quantization != "auto":
        return Choice(
            engine=engine,
            quantization=quantization,
            device=device,
            reason=f"{name} runs on {engine} with quantization {quantization}, as was asked for.",
        )
    if plan.is_placed and engine == "hf":
        return Choice(
            engine=engine,
            quantization="none",
            device=device,
            reason=f"{name} runs on hf at 16 bit, with its parts where device_map and max_memory "
            "put them.",
        )
    if size is None or place is None:
        return Choice(
            engine=engine,
            quantization="none",
            device=device,
            reason=f"{name} runs on {engine} at 16 bit: how much memory it needs is not known.",
        )
    return _choose_bits(name, list_options(size, engine, machine, plan), machine)


def check_group(name: str, machine: Machine, *, num_gpus: int) -> None:
    """Check that the GPUs are there over which vLLM is to spread a model.

    Not a part of choosing: whoever hands out the GPUs of a machine sees all of them, and its
    workers their group.

    Raises:
        EngineMisconfigured: there are fewer; without any, vLLM runs on the CPU.
    """
    if 0 < len(machine.usable_gpus) < num_gpus:
        raise EngineMisconfigured(
            f"The model {name} is to run on {num_gpus} GPUs (tensor_parallel_size x "
            f"pipeline_parallel_size), and this process sees {len(machine.usable_gpus)}."
        )


def _choose_bits(name: str, options: list[Option], machine: Machine) -> Choice:
    fitting = next((option for option in options if option.fits), None)
    first = options[0]
    place = first.place
    if fitting is None:
        raise EngineOutOfMemory(_too_large(name, options, machine))
    unused = machine.gpus[0] if machine.gpus and place.num_gpus == 0 else None
    where = f"of {gigabytes(place.total_bytes)} in {place.name}"
    reason = (
        f"{name} runs on {fitting.engine} at {_bits(fitting)}: it needs "
        f"{gigabytes(fitting.need.total)} {where}"
    )
    if fitting is not first:
        if not machine.has_bitsandbytes:
            raise EngineMisconfigured(
                f"The model {name} fits {place.name} only in 4 bits (nf4): at {_bits(first)} it "
                f"needs {gigabytes(first.need.total)} of {gigabytes(place.usable_bytes)}. nf4 "
                "needs bitsandbytes, which is not installed: pip install 'batchctl[hf]'."
            )
        reason += (
            f"; at {_bits(first)} it would need {gigabytes(first.need.total)}, more than the "
            f"{gigabytes(place.usable_bytes)} that may be used (quantization none insists)"
        )
    if unused is not None and place.device == "cpu" and not machine.has_cuda:
        reason += f"; {_name(unused)} is not used, since this torch has no CUDA"
    return Choice(
        engine=fitting.engine,
        quantization=fitting.quantization,
        device=place.device,
        reason=f"{reason}.",
        is_notable=fitting is not first or (unused is not None and not machine.has_cuda),
    )


def _too_large(name: str, options: list[Option], machine: Machine) -> str:
    place = options[0].place
    needs = " and ".join(f"{gigabytes(o.need.total)} at {_bits(o)}" for o in options)
    said = (
        f"The model {name} does not fit {place.name}: it needs {needs}, and "
        f"{gigabytes(place.usable_bytes)} of {gigabytes(place.total_bytes)} may be used"
    )
    if place.num_gpus and options[-1].need.total <= machine.memory.total_bytes * _MEMORY_SHARE:
        return f"{said}. Main memory has room for it (slowly): set `hf.device` to cpu."
    return f"{said}. Use a smaller model, a larger device, or a server that has it (`url`)."


def _bits(option: Option) -> str:
    return {
        "nf4": "4 bits (nf4)",
        "fp4": "4 bits (fp4)",
        "int8": "8 bits (int8)",
        "as stored": "the bits it is stored in",
    }.get(option.kind, option.kind)


def gigabytes(num_bytes: int) -> str:
    """Return a number of bytes as people give the sizes of models: 13.5 GB, 0.004 GB."""
    value = num_bytes / 1e9
    return f"{value:.1f} GB" if value >= 0.1 else f"{value:.3f} GB"  # noqa: PLR2004
