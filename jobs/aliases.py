"""The names that other tools use for our settings, and what becomes of their values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.paths import expand
from jobs import fields
from jobs.catalogue import may_carry_keys
from jobs.domain.errors import InvalidInput

_URL_NAMES = {"vllm": "VLLM_REMOTE_URL", "openai": "REMOTE_OPENAI_URL"}


def _same(value: str) -> object:
    return value


def _backend(value: str) -> object:
    known = {
        "huggingface": "hf",
        "hf": "hf",
        "vllm_local": "vllm",
        "vllm_remote": "remote",
        "remote_openai": "remote",
    }
    try:
        return known[value.lower()]
    except KeyError:
        raise ValueError(
            "should be huggingface, vllm_local, vllm_remote or remote_openai"
        ) from None


def _words_of_vllm(backend: str) -> object:
    return "vllm" if backend.lower() == "vllm_remote" else None


def _four_bit(value: str) -> object:
    return "nf4" if _switch(value) else "none"


def _switch(value: str) -> bool:
    word = value.strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise ValueError("should be true or false")


def _hub_folder(value: str) -> object:
    return str(expand(value) / "hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A name that other tools use for one of our settings; `parse` returns None to say nothing.

    Names of a `family` belong to one server, and only those of the server in use are looked at:
    a key is never sent to the other one.
    """

    name: str
    path: tuple[str, ...]
    parse: Callable[[str], object] = _same
    note: str
    family: Literal["", "vllm", "openai"] = ""


ALIASES = (
    Alias(
        name="LLM_BACKEND",
        path=("engine",),
        parse=_backend,
        note="`huggingface`, `vllm_local`, `vllm_remote` or `remote_openai`",
    ),
    Alias(name="HF_DEVICE", path=("hf", "device"), note="auto, cpu, cuda, cuda:N or mps"),
    Alias(
        name="HF_LOAD_4BIT",
        path=("hf", "quantization"),
        parse=_four_bit,
        note="true is `nf4`, false `none`; `HF_QUANTIZATION` goes before it",
    ),
    Alias(name="HF_QUANTIZATION", path=("hf", "quantization"), note="`none`, `nf4` or `4bit`"),
    Alias(
        name="HF_FLASH_ATTENTION", path=("hf", "flash_attention"), parse=_switch, note="true, false"
    ),
    Alias(
        name="HF_HOME",
        path=("hf", "cache_folder"),
        parse=_hub_folder,
        note="models are kept in its folder `hub`",
    ),
    Alias(name="HF_TOKEN", path=("hf", "token"), note="hub token"),
    Alias(name="VLLM_TENSOR_PARALLEL_SIZE", path=("vllm", "tensor_parallel_size"), note="a number"),
    Alias(
        name="VLLM_GPU_MEMORY_UTILIZATION",
        path=("vllm", "gpu_memory_utilization"),
        note="a share, such as 0.9",
    ),
    Alias(name="VLLM_QUANTIZATION", path=("vllm", "quantization"), note="as the setting"),
    Alias(name="VLLM_MAX_MODEL_LEN", path=("vllm", "context_tokens"), note="tokens"),
    Alias(
        name="VLLM_PREFIX_CACHING",
        path=("vllm", "prefix_caching"),
        parse=_switch,
        note="true, false",
    ),
    Alias(
        name="OPENAI_API_KEY",
        path=("remote", "api_key"),
        note="key of the server of `remote.url`, if that has https or is on this machine; without "
        "`remote.url` of https://api.openai.com",
        family="openai",
    ),
    Alias(
        name="LLM_BACKEND",
        path=("remote", "native_constraints"),
        parse=_words_of_vllm,
        note="`vllm_remote` is `vllm`",
    ),
    Alias(
        name="VLLM_REMOTE_URL",
        path=("remote", "native_constraints"),
        parse=lambda _url: "vllm",
        note="any is `vllm`",
        family="vllm",
    ),
    Alias(name="VLLM_REMOTE_URL", path=("remote", "url"), note="a vLLM server", family="vllm"),
    Alias(name="VLLM_REMOTE_API_KEY", path=("remote", "api_key"), note="its key", family="vllm"),
    Alias(
        name="VLLM_REMOTE_TIMEOUT",
        path=("remote", "timeout_seconds"),
        note="seconds",
        family="vllm",
    ),
    Alias(
        name="REMOTE_OPENAI_URL",
        path=("remote", "url"),
        note="any OpenAI-compatible API; with both URLs set, `LLM_BACKEND` decides",
        family="openai",
    ),
    Alias(
        name="REMOTE_OPENAI_API_KEY", path=("remote", "api_key"), note="its key", family="openai"
    ),
    Alias(
        name="REMOTE_OPENAI_MODEL",
        path=("remote", "model"),
        note="its name for the model",
        family="openai",
    ),
)
"""In ascending order of precedence."""


def read_aliases(
    environment: Mapping[str, str], covered: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """Return the settings that the field's own names give, and the name that gave each path.

    Args:
        covered: what stronger layers say; those paths are left alone.

    Raises:
        InvalidInput: a value is none of those that its name may have.
    """
    values: dict[str, Any] = {}
    names: dict[tuple[str, ...], str] = {}
    family, url = _remote_family(environment, covered)
    for alias in ALIASES:
        text = environment.get(alias.name)
        # What a stronger layer says is not looked at: it cannot be wrong either.
        if not text or fields.get(covered, alias.path) is not fields.MISSING:
            continue
        if alias.family and family and alias.family != family:
            continue
        its_url = environment.get(_URL_NAMES.get(alias.family, ""))
        if its_url and its_url != url:
            continue  # what belongs to another server than the one in use
        if alias.name == "VLLM_REMOTE_API_KEY" and url is None:
            continue  # without that server's URL nobody can say to whom it may be sent
        if alias.name == "OPENAI_API_KEY" and url is not None and not may_carry_keys(url):
            continue  # set for whatever runs here; this server needs a key of its own name
        try:
            value = alias.parse(text)
        except ValueError as error:
            raise InvalidInput(f"{alias.name} {error}.", param="settings") from None
        if value is not None:
            fields.put(values, alias.path, value)
            names[alias.path] = alias.name
    return values, names


def _remote_family(
    environment: Mapping[str, str], covered: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """Return whose names describe the remote server (None: anybody's), and its URL if there is one.

    The one whose URL is set; with both or neither, the one that LLM_BACKEND names.
    """
    backend = environment.get("LLM_BACKEND", "").lower()
    named = {"vllm_remote": "vllm", "remote_openai": "openai"}.get(backend)
    url = fields.get(covered, ("remote", "url"))
    if url is not fields.MISSING:
        return named, str(url)
    urls = {one: text for one, name in _URL_NAMES.items() if (text := environment.get(name))}
    if len(urls) == 1:
        ((family, text),) = urls.items()
        return family, text
    family_of_both = named or "openai"
    return (family_of_both, urls[family_of_both]) if urls else (named, None)
