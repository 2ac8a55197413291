"""Learns from a finished batch how long answers to its templates are, for batches to come.

A `max_tokens` of 4,096 on every line says nothing of which answers are long; what earlier answers
to the same system prompt took does. Looks at a sample, behind the batch's end, and what it finds
is advice: nothing waits for it, and where it is lost, lines run as they would have.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from jobs.domain.errors import InvalidLine
from jobs.domain.ids import BatchId
from jobs.domain.mixed import open_sketcher
from jobs.domain.plan import Columns
from jobs.domain.shard import Shard, UnitState
from storage import batches, lengths, segments, shards
from storage.blobs.base import BlobStore
from storage.database import Database
from storage.jsonl import KIND_OUTPUT, decode_segment, read_requests

MIN_LINES = 8
"""So many answers to a template say how long they are."""
_MAX_SHARDS = 32
_MAX_LINES = 4096
_MAX_TEMPLATES = 256
_MAX_BYTES = 64 << 20
_MOSTLY = 0.5
# Inside a text these quotes have a backslash before them.
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_CUT_OFF = b'"finish_reason":"length"'


def learn(db: Database, blobs: BlobStore, batch_id: BatchId) -> int:
    """Return of how many templates it is known now how long the answers of a batch were.

    Raises:
        StorageError: its results cannot be read.
    """
    batch = batches.get(db, batch_id, tenant_id=None)
    if batch.model is None:
        return 0
    done = [
        shard
        for shard, state in shards.list_for_batch(db, batch_id)
        # Of a shard that was stopped only the short answers may be there.
        if state is UnitState.DONE
    ]
    columns = Columns(batch.endpoint)
    sketcher = open_sketcher(batch.endpoint)
    counts: list[int] = []
    are_cut: list[bool] = []
    for line, result in _read_sample(db, blobs, done):
        found = _TOKENS.search(result)
        num_tokens = int(found[1]) if found is not None else 0
        if not num_tokens:  # it was an error, or an answer of earlier
            continue
        try:
            sketch = sketcher.sketch(line)
        except InvalidLine:  # planning let it through, so the code changed since
            continue
        columns.add(line, num_first_chars=sketch.num_first_chars, key=None, max_tokens=0)
        counts.append(num_tokens)
        are_cut.append(_CUT_OFF in result)
    known = _find_means(columns, counts, are_cut)
    lengths.record(db, batch.tenant_id, batch.model, known)
    return len(known)


def _read_sample(
    db: Database, blobs: BlobStore, done: Sequence[Shard]
) -> Iterator[tuple[bytes, bytes]]:
    """Yield lines from all over a batch, each with its result."""
    picked = done[:: max(1, -(-len(done) // _MAX_SHARDS))]
    stride = max(1, -(-sum(shard.num_lines for shard in picked) // _MAX_LINES))
    num_bytes = 0
    for shard in picked:
        results: dict[int, bytes] = {}
        for segment in segments.list_for_unit(db, shard.unit_id):
            num_bytes += segment.num_bytes
            entries = decode_segment(blobs.get(segment.blob_key))
            results |= {index: line for index, kind, line in entries if kind == KIND_OUTPUT}
        for _, index, _, line in islice(read_requests(blobs, shard), 0, None, stride):
            if index in results:
                yield line, results[index]
        if num_bytes > _MAX_BYTES:
            return


def _find_means(columns: Columns, counts: Sequence[int], are_cut: Sequence[bool]) -> dict[int, int]:
    """Return the mean answer of each template that enough answers are known of."""
    templates, member, num_lines = np.unique(
        columns.templates(), return_inverse=True, return_counts=True
    )
    means = np.bincount(member, weights=counts, minlength=len(templates)) / num_lines
    # Where most answers end at max_tokens, that is what says how long they are.
    shares = np.bincount(member, weights=are_cut, minlength=len(templates)) / num_lines
    is_known = (num_lines >= MIN_LINES) & (shares < _MOSTLY) & (templates != 0)
    commonest = np.flatnonzero(is_known)[np.argsort(-num_lines[is_known], kind="stable")]
    return {
        int(templates[at]): max(1, round(float(means[at]))) for at in commonest[:_MAX_TEMPLATES]
    }
