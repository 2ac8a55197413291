"""Removes what nobody needs any more: blobs without a row, what expired, segments of old batches.

What a writer is at is never touched: a blob has to be older than `orphan_seconds` before anybody
asks whether a row needs it, and then rows decide, by batch, unit and epoch, that none ever will.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from jobs import metrics
from jobs.domain.errors import Conflict, NotFound
from storage import answers, files, references
from storage.blobs.base import ROOTS, BlobStat, BlobStore, segments_prefix
from storage.database import Database

_PAGE = 1000
_NOTED = 100
_BATCHES_IN_A_TURN = 100
_FILES_IN_A_TURN = 1000
_ENGINE_LOG = re.compile(r"engine-(?P<worker>worker_[0-9a-f]+)\.log")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What may go, and how much of it is looked at in one turn.

    Attributes:
        orphan_seconds: how old a blob is before it may be one that no row needs.
        segment_seconds: how long the segments of a batch stay after its end.
        max_blobs: blobs that one turn looks at; the next one goes on behind them.
    """

    orphan_seconds: float = 86_400
    segment_seconds: float = 86_400
    max_blobs: int = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one turn removed, or would have.

    Attributes:
        num_seen: blobs that were looked at.
        place: the last key that was looked at, where there are more.
    """

    expired_files: int = 0
    old_segments: int = 0
    expired_answers: int = 0
    orphans: int = 0
    uploads: int = 0
    num_bytes: int = 0
    num_seen: int = 0
    place: str | None = None

    def __add__(self, other: "Collected") -> "Collected":
        """Return the sum of two turns, the later one on the right."""
        return Collected(
            expired_files=self.expired_files + other.expired_files,
            old_segments=self.old_segments + other.old_segments,
            expired_answers=self.expired_answers + other.expired_answers,
            orphans=self.orphans + other.orphans,
            uploads=self.uploads + other.uploads,
            num_bytes=self.num_bytes + other.num_bytes,
            num_seen=self.num_seen + other.num_seen,
            place=other.place,
        )

    @property
    def found(self) -> bool:
        """Whether there was anything to remove."""
        return bool(
            self.expired_files
            or self.old_segments
            or self.expired_answers
            or self.orphans
            or self.uploads
        )


def collect(
    db: Database,
    blobs: BlobStore,
    rules: Rules,
    *,
    place: str | None = None,
    dry_run: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int], None] | None = None,
) -> Collected:
    """Return what was removed in one turn; any number of processes may do this at the same time.

    Args:
        place: where the last turn stopped looking for orphans.
        dry_run: remove nothing and count what would go.
        stop: asked between two blobs; True ends the turn.
        on_progress: called with the number of blobs that were looked at, now and then.
    """
    turn = _Turn(db, blobs, rules, dry_run=dry_run, stop=stop, on_progress=on_progress)
    turn.remove_expired_files()
    turn.remove_old_segments()
    turn.remove_expired_answers()
    turn.remove_orphans(place)
    turn.remove_uploads()
    if not dry_run:
        metrics.count_collected("expired_file", turn.found.expired_files)
        metrics.count_collected("old_segment", turn.found.old_segments)
        metrics.count_collected("expired_answers", turn.found.expired_answers)
        metrics.count_collected("orphan", turn.found.orphans)
        metrics.count_collected("upload", turn.found.uploads)
        metrics.count_collected_bytes(turn.found.num_bytes)
    return turn.found


class _Turn:
    """One turn; `found` says what it has removed so far."""

    def __init__(
        self,
        db: Database,
        blobs: BlobStore,
        rules: Rules,
        *,
        dry_run: bool,
        stop: Callable[[], bool],
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._db = db
        self._blobs = blobs
        self._rules = rules
        self._dry_run = dry_run
        self._stop = stop
        self._on_progress = on_progress
        self._now = db.now()
        self.found = Collected()

    def remove_expired_files(self) -> None:
        """Delete files past their expiry, as their owners would; batches that run keep theirs."""
        for file in files.list_expired(self._db, now=self._now, limit=_FILES_IN_A_TURN):
            if self._stop():
                return
            if not self._dry_run:
                try:
                    files.mark_deleted(self._db, file.id, now=self._now)
                except (Conflict, NotFound):
                    continue  # a batch was begun over it, or its owner was first
                self._blobs.delete(file.blob_key)
            self._add(expired_files=1, num_bytes=file.num_bytes)

    def remove_old_segments(self) -> None:
        """Forget the segments of batches that ended long ago, then remove their blobs."""
        before = self._now - timedelta(seconds=self._rules.segment_seconds)
        found = references.list_collectable(self._db, ended_before=before, limit=_BATCHES_IN_A_TURN)
        for batch_id in found:
            if not self._dry_run:
                references.forget_segments(self._db, batch_id)
            # Blobs that a kill leaves behind from here on are orphans.
            for blob in self._blobs.list_blobs(segments_prefix(batch_id)):
                if self._stop():
                    return
                self._see()
                if not self._dry_run:
                    self._blobs.delete(blob.key)
                self._add(old_segments=1, num_bytes=blob.num_bytes)

    def remove_expired_answers(self) -> None:
        """Remove what earlier batches gave to later ones, and nobody may take any more."""
        for found in answers.list_expired(self._db, now=self._now, limit=_FILES_IN_A_TURN):
            if self._stop():
                return
            if not self._dry_run:
                answers.forget(self._db, found)
                self._blobs.delete(found.blob_key)
            self._add(expired_answers=1, num_bytes=found.num_bytes)

    def remove_uploads(self) -> None:
        """Remove what killed writers left that is no blob yet."""
        before = self._now - timedelta(seconds=self._rules.orphan_seconds)
        self._add(uploads=self._blobs.abort_uploads(before=before, dry_run=self._dry_run))

    def remove_orphans(self, place: str | None) -> None:
        """Remove blobs that are old and that no row needs, as many as one turn looks at."""
        before = self._now - timedelta(seconds=self._rules.orphan_seconds)
        listed = self._list_blobs(place or "")
        while page := list(islice(listed, _PAGE)):
            old = [blob for blob in page if blob.modified_at < before]
            needed = references.find_needed(self._db, [blob.key for blob in old])
            orphans = {blob.key for blob in old} - needed
            for blob in page:
                if blob.key in orphans:
                    if not self._dry_run:
                        self._blobs.delete(blob.key)
                    self._add(orphans=1, num_bytes=blob.num_bytes)
                self._see()
                if self._stop() or self.found.num_seen >= self._rules.max_blobs:
                    self.found = replace(self.found, place=blob.key)
                    return

    def _list_blobs(self, after: str) -> Iterator[BlobStat]:
        for root in ROOTS:
            # Keys behind one of a root begin with this root, or with a later one.
            if root > after or after.startswith(root):
                yield from self._blobs.list_blobs(root, after=after)

    def _see(self) -> None:
        self._add(num_seen=1)
        if self._on_progress is not None and self.found.num_seen % _NOTED == 0:
            self._on_progress(self.found.num_seen)

    def _add(self, **numbers: Any) -> None:  # noqa: ANN401  counts, as `Collected` has them
        self.found = replace(self.found + Collected(**numbers), place=self.found.place)


def remove_engine_logs(
    folder: Path, *, alive: Collection[str], before: datetime, dry_run: bool = False
) -> int:
    """Return how many logs of engines were removed from a folder: of workers that are no more.

    Args:
        alive: ids of workers whose logs stay.
        before: logs that were written to since then stay too.
    """
    removed = 0
    for path in sorted(folder.glob("engine-*.log")):
        named = _ENGINE_LOG.fullmatch(path.name)
        if named is None or named["worker"] in alive:
            continue
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < before.timestamp():
                if not dry_run:
                    path.unlink()
                removed += 1
    return removed
