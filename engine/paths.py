"""Paths as people write them."""

from pathlib import Path


def expand(path: str | Path) -> Path:
    """Return a path with its `~` spelled out, or as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
