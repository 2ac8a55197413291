"""Which blobs are still needed, as the rows say, and the files and segments that are no more."""

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from jobs.domain.batch import BatchStatus
from jobs.domain.errors import Conflict, NotFound
from jobs.domain.ids import BatchId
from storage.database import Transaction, reads, writes
from storage.tables import UNENDED, UNFINISHED, answers, batches, files, segments, shards, units
from storage.transitions import lock_batch

_IN_ONE_QUERY = 500
_ENDED_AT = sa.func.coalesce(batches.c.completed_at, batches.c.cancelled_at, batches.c.expired_at)


class _SegmentPlace(NamedTuple):
    unit_id: str
    epoch: int
    sequence: int


@reads
def find_needed(tx: Transaction, keys: Collection[str]) -> set[str]:
    """Return those of `keys` that some row needs, or may come to need.

    A key that none of our writers makes is needed: it is somebody else's.

    Needed are the bytes of files that were not deleted, and of deleted ones that an unfinished
    batch reads; whatever finalizers of an unfinished batch wrote; what planners wrote of a batch
    that is unfinished or has segments; answers for batches to come that have their row; and
    segments that have theirs, or whose unit is still under the epoch that wrote them, or has not
    come to it.
    """
    found: set[str] = set()
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    plans: dict[str, str] = {}
    given: dict[str, str] = {}
    places: dict[str, _SegmentPlace] = {}
    for key in keys:
        match key.split("/"):
            case ["files", file_id] if file_id.startswith("file-"):
                inputs[key] = file_id
            case ["outputs", batch_id, name] if batch_id.startswith("batch_") and name:
                outputs[key] = batch_id
            case ["plans", batch_id, name] if batch_id.startswith("batch_") and name:
                plans[key] = batch_id
            case ["segments", batch_id, "reused", name] if batch_id.startswith("batch_") and name:
                plans[key] = batch_id  # written before its shard has a row
            case ["reuse", batch_id, name] if batch_id.startswith("batch_") and name:
                given[key] = batch_id
            case ["segments", _, unit_id, name] if place := _parse_segment(unit_id, name):
                places[key] = place
            case _:
                found.add(key)
    found |= _needed_inputs(tx, inputs)
    found |= _needed_outputs(tx, outputs)
    found |= _needed_plans(tx, plans)
    found |= _needed_answers(tx, given)
    found |= _needed_segments(tx, places)
    return found


def _parse_segment(unit_id: str, name: str) -> _SegmentPlace | None:
    parts = name.split("-")
    if not unit_id.startswith("unit_") or len(parts) != len(_SegmentPlace._fields):
        return None
    if not (parts[0].isdecimal() and parts[1].isdecimal()):
        return None
    return _SegmentPlace(unit_id, int(parts[0]), int(parts[1]))


def _needed_inputs(tx: Transaction, inputs: dict[str, str]) -> set[str]:
    reads_it = sa.exists().where(batches.c.input_file_id == files.c.id, UNFINISHED)
    query = sa.select(files.c.id).where(files.c.deleted_at.is_(None) | reads_it)
    there = _select(tx, query, files.c.id, inputs.values())
    return {key for key, file_id in inputs.items() if file_id in there}


def _needed_outputs(tx: Transaction, outputs: dict[str, str]) -> set[str]:
    unfinished = _select(
        tx, sa.select(batches.c.id).where(UNFINISHED), batches.c.id, outputs.values()
    )
    published = _select(
        tx,
        sa.select(files.c.blob_key)
        .join(
            batches,
            (batches.c.output_file_id == files.c.id) | (batches.c.error_file_id == files.c.id),
        )
        .where(files.c.deleted_at.is_(None)),
        batches.c.id,
        outputs.values(),
    )
    return {key for key, batch_id in outputs.items() if batch_id in unfinished or key in published}


def _needed_plans(tx: Transaction, plans: dict[str, str]) -> set[str]:
    has_segments = sa.exists().where(
        shards.c.batch_id == batches.c.id, segments.c.unit_id == shards.c.unit_id
    )
    query = sa.select(batches.c.id).where(UNFINISHED | has_segments)
    there = _select(tx, query, batches.c.id, plans.values())
    return {key for key, batch_id in plans.items() if batch_id in there}


def _needed_answers(tx: Transaction, given: dict[str, str]) -> set[str]:
    unfinished = _select(
        tx, sa.select(batches.c.id).where(UNFINISHED), batches.c.id, given.values()
    )
    kept = _select(tx, sa.select(answers.c.blob_key), answers.c.batch_id, given.values())
    return {key for key, batch_id in given.items() if batch_id in unfinished or key in kept}


def _needed_segments(tx: Transaction, places: dict[str, _SegmentPlace]) -> set[str]:
    unit_ids = [place.unit_id for place in places.values()]
    # The epochs first: a segment that is recorded in between may be the one that ends its unit.
    epochs: dict[str, int] = {}
    for some in _chunks(unit_ids):
        query = sa.select(units.c.id, units.c.epoch).where(units.c.id.in_(some), UNENDED)
        epochs |= {row.id: row.epoch for row in tx.execute(query)}
    recorded = _select(tx, sa.select(segments.c.blob_key), segments.c.unit_id, unit_ids)
    return {
        key
        for key, place in places.items()
        # An epoch that is over can commit nothing any more, however late its writer wakes up.
        if key in recorded or (place.unit_id in epochs and place.epoch >= epochs[place.unit_id])
    }


def _select(
    tx: Transaction, query: "sa.Select[tuple[str]]", column: sa.Column[str], ids: Iterable[str]
) -> set[str]:
    found: set[str] = set()
    for some in _chunks(ids):
        found |= set(tx.execute(query.where(column.in_(some))).scalars())
    return found


def _chunks(ids: Iterable[str]) -> Iterable[list[str]]:
    every = sorted(set(ids))
    return [every[at : at + _IN_ONE_QUERY] for at in range(0, len(every), _IN_ONE_QUERY)]


@reads
def list_collectable(tx: Transaction, *, ended_before: datetime, limit: int = 100) -> list[BatchId]:
    """Return batches with segments that ended before then with files that have all of them."""
    # From the segments, of which there are few: those of batches that run or ended lately. A batch
    # that failed has none of the three instants.
    query = (
        sa.select(shards.c.batch_id)
        .join(segments, segments.c.unit_id == shards.c.unit_id)
        .join(batches, batches.c.id == shards.c.batch_id)
        .where(~UNFINISHED, ended_before > _ENDED_AT)
        .distinct()
        .limit(limit)
    )
    return sorted(tx.execute(query).scalars())


@writes
def forget_segments(tx: Transaction, batch_id: BatchId) -> int:
    """Return how many segments of a batch were forgotten; its files have their results.

    Their blobs are removed afterwards: a segment that has its row always has its bytes.

    Raises:
        NotFound: there is no such batch.
        Conflict: it has not ended, or failed and has nothing else.
    """
    batch = lock_batch(tx, batch_id)
    if batch is None:
        raise NotFound(f"No such Batch object: {batch_id}", param="batch_id")
    if not batch.status.is_terminal or batch.status is BatchStatus.FAILED:
        raise Conflict(f"Batch {batch_id} is {batch.status}; its segments are all it has.")
    of_batch = sa.select(shards.c.unit_id).where(shards.c.batch_id == batch_id)
    return tx.execute(sa.delete(segments).where(segments.c.unit_id.in_(of_batch))).rowcount
