"""From our settings to vLLM's engine arguments, and what is refused before anything is loaded."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import PoolerConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from engine import checkpoint
from engine.config import DROPPED_BY_VLLM, VllmConfig
from engine.encoders import PoolingMode, is_scoring, read_pooling_settings
from engine.memory import WeightKind, read_size, weight_bytes
from engine.paths import expand
from engine.trust import trusts_code
from engine.tuning import choose_vllm
from jobs.domain.errors import EngineMisconfigured, EngineOutOfMemory

_CPU_CACHE_BYTES = 4 << 30
_IN_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the model in vLLM's core process, by its full name: as "uni" a CPU does not get it, since
threads are bound to cores as a worker process starts. Where they are not bound, all that is left of
a worker is a second process, for which the core spins through every step.
"""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can make room for. Source: `MaxLoRARanks` of vllm/config/lora.py, 0.32."""

_POOLING: dict[PoolingMode, Any] = {"cls": "CLS", "mean": "MEAN", "last": "LAST"}

# Arguments that a setting of ours stands for, since more than vLLM has to know the value.
_SPELLED = {
    "model": "the model's `source`",
    "revision": "the model's `revision`",
    "trust_remote_code": "the model's `trusted_code`",
    "code_revision": "the model's `trusted_code`",
    "tokenizer_revision": "the model's `revision`",
    "hf_config_path": "a folder that holds the model and its config.json as the `source`",
    "tokenizer": "a folder that holds model and tokenizer as the `source`",
    "max_model_len": "`context_tokens`",
    "max_num_seqs": "`slots`",
    "tensor_parallel_size": "`tensor_parallel_size` of the vllm settings",
    "pipeline_parallel_size": "`pipeline_parallel_size` of the vllm settings",
    "enable_lora": "`adapter`",
    "structured_outputs_config": "`asking.backend`",
    "disable_log_stats": "the metrics of the worker",
}
# With these, code could come from elsewhere than where the operator read it.
_UNTRUSTED = ("hf_overrides", "speculative_config")
_REFUSED = {
    "skip_tokenizer_init": "stop strings and constraints need the tokenizer",
    "data_parallel_size": "each group of GPUs has a worker of its own",
    "worker_cls": "code from elsewhere is never run",
    "worker_extension_cls": "code from elsewhere is never run",
    "scheduler_cls": "code from elsewhere is never run",
    "logits_processors": "code from elsewhere is never run",
}


def engine_arguments(config: VllmConfig, folder: Path) -> AsyncEngineArgs:
    """Return what vLLM is started with.

    On a CPU, "auto" is float32 and nothing is compiled: bfloat16 kernels have ended the process
    with SIGILL on processors without them, and compiling took minutes for no gain. The cache is
    bounded there too, since vLLM would take 90 % of the machine's memory for it.

    Args:
        folder: the folder with the model's describing files.

    Raises:
        EngineMisconfigured: an argument or quantization that vLLM does not have.
    """
    _check_names(config.engine_args)
    if config.engine_args.get("quantization") == "squeezellm":
        raise EngineMisconfigured(f"squeezellm is not possible: {DROPPED_BY_VLLM['squeezellm']}.")
    described = read_object(folder / "config.json")
    path = expand(config.model)
    slots, batch_tokens = _amounts(config, folder)
    arguments: dict[str, Any] = {
        "model": str(path) if path.is_dir() else config.model,
        "revision": config.revision,
        "trust_remote_code": trusts_code(config, folder, described),
        "dtype": config.dtype,
        "quantization": _quantization(config.quantization, described),
        "max_model_len": config.context_tokens,
        "max_num_seqs": slots,
        "max_num_batched_tokens": batch_tokens,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": config.prefix_caching,
        "enforce_eager": config.enforce_eager,
        "download_dir": config.cache_folder,
        "hf_token": config.token,
        "structured_outputs_config": _structured_outputs(config),
        # What the model's own file asks for is resolved by us, as for every other engine.
        "generation_config": "vllm",
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():
        arguments |= _cpu_arguments(config)
    if arguments["trust_remote_code"]:
        for name in _UNTRUSTED:
            if name in config.engine_args:
                raise EngineMisconfigured(
                    f"engine_args.{name} is refused for a model whose own code is trusted."
                )
    if config.trusted_code is not None and not path.is_dir():
        arguments["code_revision"] = config.revision
    if config.adapter is not None:
        arguments |= _adapter_arguments(expand(config.adapter))
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        return AsyncEngineArgs(**given | config.engine_args)
    except (TypeError, ValueError, AssertionError) as error:
        raise EngineMisconfigured(f"vLLM refuses its arguments: {first_line(error)}") from error


def pooling_arguments(config: VllmConfig, folder: Path) -> AsyncEngineArgs:
    """Return what vLLM is started with for a model that embeds or scores; see `engine_arguments`.

    How vectors are pooled is said by us, so that each engine does the same.

    Raises:
        EngineMisconfigured: besides, the model pools in a way that vLLM has not.
    """
    settings = read_pooling_settings(folder)
    if settings.mode not in _POOLING:
        raise EngineMisconfigured(f"vLLM does not pool by {settings.mode}; use the hf engine.")
    arguments = engine_arguments(config, folder)
    if config.adapter is not None:
        raise EngineMisconfigured("A model that embeds or scores takes no adapter in vLLM.")
    longest = config.context_tokens or settings.max_tokens
    scores = is_scoring(read_object(folder / "config.json"))
    return dataclasses.replace(
        arguments,
        runner="pooling",
        pooler_config=PoolerConfig(use_activation=False)
        if scores
        else PoolerConfig(
            seq_pooling_type=_POOLING[settings.mode], use_activation=settings.normalize
        ),
        max_model_len=longest,
        # An encoder's tokens all see each other: a text is one piece, and begins at no other.
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        max_num_batched_tokens=None
        if config.batch_tokens is None
        else max(config.batch_tokens, longest or 0),
    )


def _amounts(config: VllmConfig, folder: Path) -> tuple[int, int | None]:
    """Return how many sequences, and how many tokens in a step (None: vLLM's own choice)."""
    if config.slots is not None and config.batch_tokens is not None:
        return config.slots, config.batch_tokens
    size = read_size(folder)
    kind: WeightKind = "nf4" if config.quantization == "nf4" else "16 bit"
    if size is not None and size.stored_quantization:
        kind = "as stored"
    is_gpu = current_platform.is_cuda()
    slots, batch_tokens = choose_vllm(
        size,
        weight_bytes=weight_bytes(size, kind, packs_experts=True) if size is not None else 0,
        device_bytes=current_platform.get_device_total_memory() if is_gpu else 0,
        share=config.gpu_memory_utilization,
        num_gpus=config.tensor_parallel_size * config.pipeline_parallel_size,
        context_tokens=config.context_tokens,
    )
    if config.batch_tokens is not None:
        # vLLM wants a place in the step for each sequence.
        return config.slots or min(slots, config.batch_tokens), config.batch_tokens
    return config.slots or slots, max(batch_tokens, config.slots or 0) if batch_tokens else None


def _check_names(given: Mapping[str, Any]) -> None:
    known = {
        field.name
        for field in dataclasses.fields(AsyncEngineArgs)
        if field.init and not field.name.startswith("_")
    }
    for name in given:
        if name in DROPPED_BY_VLLM:
            raise EngineMisconfigured(
                f"engine_args.{name} is no argument of vLLM any more: {DROPPED_BY_VLLM[name]}."
            )
        if name in _REFUSED:
            raise EngineMisconfigured(f"engine_args.{name} is refused: {_REFUSED[name]}.")
        if name in _SPELLED:
            raise EngineMisconfigured(f"engine_args.{name} is not set here; use {_SPELLED[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise EngineMisconfigured(f"vLLM has no engine argument {name}.{hint}")


def _structured_outputs(config: VllmConfig) -> dict[str, Any]:
    if config.asking.backend == "outlines_core":
        return {"backend": "outlines"}
    # Whitespace is governed with each schema; this covers what is sent without options.
    return {"backend": "guidance", "disable_any_whitespace": True}


def _quantization(asked: str, described: Mapping[str, Any]) -> str | None:
    """Return vLLM's name for a quantization of a checkpoint; None leaves it to the checkpoint."""
    if asked == "none":
        return None
    load_general_plugins()
    checkpoint = str((described.get("quantization_config") or {}).get("quant_method") or "")
    if asked == "nf4":
        if "bitsandbytes" not in QUANTIZATION_METHODS:
            raise EngineMisconfigured(
                "vLLM has no bitsandbytes of its own since 0.28: install vllm-bnb-plugin beside "
                "it, or use the hf engine for nf4."
            )
        if current_platform.is_cpu():
            raise EngineMisconfigured(
                "vllm-bnb-plugin loads nothing on a CPU; use the hf engine for nf4 there."
            )
        return "bitsandbytes"
    if asked == "marlin":
        # Today a kernel, not a format: the checkpoint's format decides.
        asked = {"gptq": "gptq_marlin", "awq": "awq_marlin"}.get(checkpoint, "")
        if not asked:
            raise EngineMisconfigured(
                "marlin is a kernel for gptq and awq checkpoints, and this one is "
                f"{checkpoint or 'not quantized'}; vLLM uses it by itself where it fits."
            )
    if asked in ("fp8", "nvfp4") and checkpoint:
        _check_float_checkpoint(asked, checkpoint)
        return None
    name = {"nvfp4": "nvfp4_per_token"}.get(asked, asked)
    if name not in QUANTIZATION_METHODS:
        raise EngineMisconfigured(
            f"This version of vLLM has no quantization {asked}; it has "
            f"{', '.join(sorted(QUANTIZATION_METHODS))}."
        )
    needs_files = asked.startswith(("awq", "gptq"))
    if needs_files and not checkpoint:
        raise EngineMisconfigured(
            f"The model is not quantized, and {asked} cannot be made while loading; use a "
            f"checkpoint that is, or quantization fp8 or none."
        )
    return name


def _check_float_checkpoint(asked: str, checkpoint: str) -> None:
    if checkpoint not in ("fp8", "modelopt", "modelopt_fp4", "compressed-tensors", "quark"):
        raise EngineMisconfigured(
            f"The model is quantized as {checkpoint} already, so it cannot be {asked}; leave the "
            "quantization out."
        )


def _adapter_arguments(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        rank = int(json.loads(path.read_text(encoding="utf-8"))["r"])
    except OSError:
        raise EngineMisconfigured(
            f"{folder} holds no adapter_config.json, so it is not the folder of a LoRA adapter."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise EngineMisconfigured(f"{path} does not say the adapter's rank `r`.") from None
    fitting = [size for size in _LORA_RANKS if size >= rank]
    if not fitting:
        raise EngineMisconfigured(
            f"The adapter {folder} has rank {rank}; vLLM takes up to {_LORA_RANKS[-1]}."
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}


def check_weights(config: VllmConfig, arguments: AsyncEngineArgs) -> None:
    """Refuse weights that cannot be loaded; vLLM itself would say it in a child's traceback.

    Reads the headers of safetensors files only. A hub model that is not here yet passes.

    Raises:
        EngineMisconfigured: a file is damaged, or there is none.
        EngineOutOfMemory: the GPUs together have less memory than the weights take.
    """
    folder = expand(config.model)
    if not folder.is_dir():
        return
    tensors = checkpoint.read_tensors(folder)
    if config.adapter:
        for file in sorted(expand(config.adapter).glob("*.safetensors")):
            checkpoint.read_header(file)
    others = [*folder.glob("*.bin"), *folder.glob("*.pt")]
    if arguments.load_format == "auto" and not tensors and not others:
        raise EngineMisconfigured(f"{folder} holds no weights (*.safetensors).")
    _check_room(folder, sum(tensor.num_bytes for tensor in tensors), arguments)


def _check_room(folder: Path, needed: float, arguments: AsyncEngineArgs) -> None:
    if not current_platform.is_cuda() or arguments.quantization or arguments.cpu_offload_gb:
        return
    num_gpus = arguments.tensor_parallel_size * arguments.pipeline_parallel_size
    share = arguments.gpu_memory_utilization * current_platform.get_device_total_memory()
    if needed > num_gpus * share:
        raise EngineOutOfMemory(
            f"The weights of {folder} take {needed / 2**30:.1f} GiB, and {num_gpus} GPU with "
            f"{share / 2**30:.1f} GiB each are given; raise tensor_parallel_size, or use a "
            "quantized model."
        )


def _cpu_arguments(config: VllmConfig) -> dict[str, Any]:
    """Return what is different on a CPU."""
    import psutil  # noqa: PLC0415 -- comes with vLLM

    found: dict[str, Any] = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(min(_CPU_CACHE_BYTES, psutil.virtual_memory().available // 4)),
    }
    if config.dtype == "auto":
        found["dtype"] = "float32"
    num_workers = config.tensor_parallel_size * config.pipeline_parallel_size
    if num_workers == 1 and envs.VLLM_CPU_OMP_THREADS_BIND == "nobind":
        found["distributed_executor_backend"] = _IN_CORE
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is no file.

    Raises:
        EngineMisconfigured: it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise EngineMisconfigured(f"{path} does not hold a JSON object.")
    return value


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line; of a validation error, its first reason."""
    reasons = getattr(error, "errors", None)
    if callable(reasons):
        try:
            first = reasons()[0]
            said = str(first["msg"]).removeprefix("Value error, ").splitlines()[0]
            where = ".".join(map(str, first["loc"]))
        except (IndexError, KeyError, TypeError):
            pass
        else:
            return f"{where}: {said}"[:400] if where else said[:400]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]
