"""Whether Python code that a model brings may run: only what an operator has pinned.

Such code runs with all that the engine's process may do. So the operator says which: the code of a
folder by the digest of its files, that of the hub by the commit. Nothing that a client sends, and
nothing in the model's own files, has a say in it.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from engine.config import HfConfig, VllmConfig
from engine.paths import expand
from jobs.domain.errors import EngineMisconfigured

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Where libraries keep a module for each family of models that they know themselves.
_FAMILIES = (("transformers", "models"), ("vllm", "transformers_utils/configs"))


def trusts_code(config: HfConfig | VllmConfig, folder: Path, described: Mapping[str, Any]) -> bool:
    """Return whether the code of a model is to be run.

    Args:
        folder: with its describing files, and where it is local all the others.
        described: what its config.json says.

    Raises:
        EngineMisconfigured: it cannot run without its code, which nobody trusts; or its code is
            not what the operator trusted.
    """
    is_local = expand(config.model).is_dir()
    pin, found = config.trusted_code, digest_code(folder) if is_local else folder.name
    if pin is None:
        if needs_code(config, described):
            raise EngineMisconfigured(
                f"{config.model} brings Python code of its own, which runs only if an operator "
                "trusts it: read the code, then put the model into the settings with "
                f"`trusted_code` set to {found!r}; or use a model that needs none."
            )
        return False
    if pin != found or not (is_local or (_COMMIT.fullmatch(pin) and pin == config.revision)):
        raise EngineMisconfigured(
            f"The Python code of {config.model} is not the code that was trusted: "
            f"{'its digest' if is_local else 'the commit'} is {found!r}, and `trusted_code` is "
            f"{pin!r}. Read what changed before you trust it."
        )
    foreign = sorted({text for text in _references(described) if "--" in text})
    if foreign:
        raise EngineMisconfigured(
            f"{config.model} takes its Python code from another repository "
            f"({foreign[0].partition('--')[0][:80]!r}), which `trusted_code` says nothing of; save "
            "model and code in one folder."
        )
    return True


def digest_code(folder: Path) -> str:
    """Return the SHA-256 digest of the Python files below a folder, by their names and bytes.

    Raises:
        EngineMisconfigured: a file cannot be read.
    """
    digest = sha256()
    try:
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    except OSError as error:
        raise EngineMisconfigured(f"{folder} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def needs_code(config: HfConfig | VllmConfig, described: Mapping[str, Any]) -> bool:
    """Return whether the engine, as far as it is installed here, cannot do without the code."""
    if not described.get("auto_map"):
        return False
    family = str(described.get("model_type") or "").replace("-", "_")
    wanted = _FAMILIES if config.kind == "vllm" else _FAMILIES[:1]
    for library, places in wanted:
        spec = importlib.util.find_spec(library)
        if spec is None:
            return False  # where it is installed it is asked again
        for root in spec.submodule_search_locations or ():
            place = Path(root) / places / family
            if family.isidentifier() and (place.is_dir() or place.with_suffix(".py").is_file()):
                return False
    return True


def _references(described: Mapping[str, Any]) -> Iterator[str]:
    """Yield where the classes are that a model brings."""
    for value in dict(described.get("auto_map") or {}).values():
        yield from (str(one) for one in (value if isinstance(value, list) else [value]))
