"""What a GGUF model can do, from the file's own description; needs no llama.cpp."""

import xxhash

from engine.config import LlamacppConfig
from engine.gguf import Gguf
from engine.revision import revision_of_file
from engine.tools import takes_tools
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.request import (
    COMPLETIONS,
    CONSTRAINT_KINDS,
    PARAMETERS,
    TEXT_ENDPOINTS,
    TOOL_PARAMETERS,
    Capabilities,
    SamplingParams,
)

_DEFAULT_CONTEXT_TOKENS = 2048


def describe_gguf(config: LlamacppConfig, file: Gguf, model: str) -> Capabilities:
    """Return what the model in a GGUF file can do.

    Args:
        model: the name clients use.

    Raises:
        EngineMisconfigured: there is no text model in it.
    """
    if not file.architecture:
        raise EngineMisconfigured(
            f"{file.path} does not say which architecture it is of, so it holds no model."
        )
    if not file.lengths.get("tokenizer.ggml.tokens"):
        raise EngineMisconfigured(
            f"{file.path} holds no vocabulary; convert the model again, with its tokenizer."
        )
    digest = xxhash.xxh3_128(f"{file.digest}\0{file.num_bytes}\0".encode())
    digest.update(
        config.model_dump_json(
            include={"cache_dtype", "repack", "context_tokens", "defaults", "asking"}
        ).encode()
    )
    template = file.text("tokenizer.chat_template")
    shows_tools = takes_tools(template)
    return Capabilities(
        model=model,
        engine=config.kind,
        endpoints=TEXT_ENDPOINTS if template else (COMPLETIONS,),
        context_tokens=config.context_tokens or file.context_tokens or _DEFAULT_CONTEXT_TOKENS,
        constraints=CONSTRAINT_KINDS,
        parameters=PARAMETERS
        if shows_tools
        else tuple(name for name in PARAMETERS if name not in TOOL_PARAMETERS),
        constraint_backend=config.asking.backend,
        refuses_unenforceable=config.asking.on_unsupported_schema == "refuse",
        fingerprint=f"{config.kind}-{digest.hexdigest()}",
        num_slots=config.slots,
        quantization=file.quantization,
        tokenizer_hash=file.tokenizer_digest,
        is_greedy=config.defaults.temperature == 0,
        revision=revision_of_file(file.path, "llama-cpp-python"),
    )


def read_defaults(file: Gguf) -> SamplingParams:
    """Return what a file itself asks for where a line says nothing.

    Source: the keys `general.sampling.*` of llama.cpp.
    """
    values = file.values
    temperature, top_p = values.get("general.sampling.temp"), values.get("general.sampling.top_p")
    top_k = values.get("general.sampling.top_k")
    return SamplingParams(
        temperature=float(temperature) if isinstance(temperature, int | float) else None,
        top_p=float(top_p) if isinstance(top_p, int | float) else None,
        top_k=int(top_k) if isinstance(top_k, int | float) else None,
    )
