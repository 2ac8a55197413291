"""Places that results are written to: what can be replaced, and what is one and the same."""

from pathlib import Path


def is_special(place: Path) -> bool:
    """Return whether it is a pipe, a device or a stream, which is written to and not replaced."""
    if not place.exists():
        return False
    return not place.is_file() or place.absolute().is_relative_to("/dev")


def is_same(one: Path, other: Path) -> bool:
    """Return whether what is written to one would overwrite the other."""
    if is_special(one):
        return False
    return one.resolve() == other.resolve() or (
        one.exists() and other.exists() and one.samefile(other)
    )
