"""Which models embed or score instead of writing text, read from their folder without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from jobs.domain.errors import EngineMisconfigured

PoolingMode = Literal["cls", "mean", "max", "last"]
_MODES: dict[str, PoolingMode] = {
    "cls_token": "cls",
    "mean_tokens": "mean",
    "max_tokens": "max",
    "lasttoken": "last",
}
_SCORING = "ForSequenceClassification"


class PoolingSettings(msgspec.Struct, frozen=True):
    """How a model's folder says that the vectors of tokens become one of the text.

    `max_tokens` is the longest text that it was made for; None: as long as its positions go.
    """

    mode: PoolingMode
    normalize: bool
    max_tokens: int | None


def is_encoder(folder: Path, described: Mapping[str, Any]) -> bool:
    """Return whether a model embeds or scores: by its class, or by sentence-transformers' files.

    Args:
        described: what its config.json says.
    """
    named = [str(name) for name in described.get("architectures") or ()]
    return (
        is_scoring(described)
        or (folder / "modules.json").exists()
        or any(name.endswith("Model") and "LMHead" not in name for name in named)
    )


def is_scoring(described: Mapping[str, Any]) -> bool:
    """Return whether a model has a head that gives a pair of texts one number."""
    named = [str(name) for name in described.get("architectures") or ()]
    return any(name.endswith(_SCORING) for name in named)


def read_pooling_settings(folder: Path) -> PoolingSettings:
    """Return what the files of sentence-transformers say, or what fits a model without them.

    Raises:
        EngineMisconfigured: the model pools in a way that is not known here.
    """
    modules = _read(folder / "modules.json") or []
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules}
    extra = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if extra:
        raise EngineMisconfigured(
            f"{folder} puts {', '.join(sorted(extra))} behind its encoder, which is not built in; "
            "serve it with vLLM."
        )
    mode: PoolingMode = "mean"
    if "Pooling" in kinds:
        described = _read(folder / str(kinds["Pooling"].get("path", "")) / "config.json") or {}
        asked = [
            name.removeprefix("pooling_mode_")
            for name, is_on in described.items()
            if name.startswith("pooling_mode_") and is_on is True
        ]
        if len(asked) != 1 or asked[0] not in _MODES:
            raise EngineMisconfigured(
                f"{folder} pools by {', '.join(sorted(asked)) or 'nothing'}, which is not built "
                "in; serve it with vLLM."
            )
        mode = _MODES[asked[0]]
    limits = _read(folder / "sentence_bert_config.json") or {}
    return PoolingSettings(mode, "Normalize" in kinds or not modules, limits.get("max_seq_length"))


def _read(path: Path) -> Any:  # noqa: ANN401 -- any JSON
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EngineMisconfigured(f"{path} cannot be read: {type(error).__name__}.") from error
