"""Which lines are suspected after a death, and when one is guilty beyond doubt.

An engine that dies leaves the requests it had started; they run again in halves, one half per
engine life. A worker that dies leaves nothing but the lease it held. When that happens again
before anything was done, every line left is suspected, runs in small groups, and each group is
noted before it begins: the next holder of the lease then knows which group to halve.

Source: transitions T6 and T7 of the reliability notes.
"""

from collections.abc import Sequence
from typing import TypeVar

from jobs.domain.shard import Fault, Shard, has_bit

SOLO_CRASHES = 3
"""How often a line kills alone before it gets an error, where there is one worker only."""
SOLO_CRASHES_APART = 2
"""The same, where they were engines of different machines or devices."""
CAREFUL_STALLS = 2
"""Leases in a row that ended with their worker and without a result, until lines are suspected."""
GROUP_LINES = 32

Group = tuple[int, ...]
_T = TypeVar("_T")


def is_guilty(fault: Fault) -> bool:
    """Return whether a line has killed alone often enough."""
    return (
        fault.solo_crashes >= SOLO_CRASHES
        or min(fault.solo_crashes, len(fault.places)) >= SOLO_CRASHES_APART
    )


def halve(group: Sequence[_T]) -> list[tuple[_T, ...]]:
    """Return the two halves of a group; of one alone, the group itself."""
    middle = (len(group) + 1) // 2
    return [tuple(half) for half in (group[:middle], group[middle:]) if half]


def list_suspects(shard: Shard) -> list[Group]:
    """Return the groups that are suspected, without the lines that are done since."""
    groups = (_undone(shard, group) for group in shard.suspects)
    return [group for group in groups if group]


def list_accused(shard: Shard) -> Group:
    """Return the lines that ran by themselves when the last worker died."""
    return _undone(shard, shard.trial.positions) if shard.trial is not None else ()


def suspect_all(shard: Shard) -> list[Group]:
    """Return groups of all lines that are not done: those already suspected as they are."""
    groups = list_suspects(shard)
    known = {position for group in groups for position in group}
    rest = [p for p in _undone(shard, range(shard.num_lines)) if p not in known]
    return groups + [
        tuple(rest[start : start + GROUP_LINES]) for start in range(0, len(rest), GROUP_LINES)
    ]


def narrow(shard: Shard) -> list[Group]:
    """Return the groups to run after a worker died: the accused in halves, then all others."""
    accused = list_accused(shard)
    others = [tuple(p for p in group if p not in accused) for group in suspect_all(shard)]
    return halve(accused) + [group for group in others if group]


def _undone(shard: Shard, positions: Sequence[int]) -> Group:
    return tuple(p for p in positions if not has_bit(shard.done, p))
