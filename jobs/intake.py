"""Takes batches in: records them, and plans them in one streaming pass over their file.

Planning looks at every line and reports everything that is wrong, with line numbers; only a file
without a fault is cut into shards. Where another order than the file's is worth it, or lines repeat
each other, a second pass writes the lines in the order they will run, and that is cut instead.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from engine.sandbox import Sandbox
from jobs import metrics
from jobs.checks import CustomIds, Models, Problems, Schemas
from jobs.domain.batch import Batch, LineProblem
from jobs.domain.errors import (
    BlobMissing,
    EngineMisconfigured,
    InvalidInput,
    InvalidLine,
    NotFound,
)
from jobs.domain.ids import BatchId
from jobs.domain.plan import Columns, Fold, RunOrder, order
from jobs.domain.request import (
    ENDPOINTS,
    Capabilities,
    Constraint,
    Sketcher,
    Terms,
    custom_id_of,
)
from jobs.domain.result import Result, render_result
from jobs.domain.shard import Cut, Cutter, Lease
from jobs.reuse import Cache, Found, Keys, finding
from jobs.telemetry import log
from jobs.wakeups import Doorbell
from storage import batches, files, lengths
from storage.batches import Reused
from storage.blobs.base import BlobStore, keys_key, plan_key, reused_key
from storage.database import Database
from storage.jsonl import (
    KIND_OUTPUT,
    Entry,
    Follower,
    ScannedLine,
    encode_run_head,
    encode_segment,
    scan,
)
from storage.reorder import Ranked, Reorder
from storage.spill import Spill

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PROGRESS_LINES = 1000
_WRITE_BYTES = 1 << 20
_LEADER, _FOLLOWER, _RESULT = 0, 1, 2
_KIND_BITS = 2
"""Of a tag, behind the index of the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """How large an input may be, how shards are cut, and how many faults are listed."""

    max_lines: int = 10_000_000
    max_line_bytes: int = 8 << 20
    max_reported_errors: int = 100
    shard_lines: int = 1000
    shard_bytes: int = 16 << 20
    check_chunk: int = 256
    spill_bytes: int = 1 << 20
    fold: Fold = "determined"
    by_prefix: bool = True
    by_length: bool = True
    by_template: bool = True


def submit(db: Database, doorbell: Doorbell, batch: Batch) -> Batch:
    """Record a batch, to be planned; return it as recorded.

    Repeating an idempotency key returns the first batch.
    """
    recorded = batches.insert(db, batch)
    doorbell.announce()
    return recorded


def plan(
    db: Database,
    blobs: BlobStore,
    lease: Lease,
    *,
    describe: Callable[[str], Capabilities],
    checker: Sandbox,
    limits: PlanLimits,
    cache: Cache | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Validate the file of the batch that `lease` is about, and cut it into shards.

    What is wrong with the input becomes the batch's errors, not an exception.

    Args:
        describe: what the model of this name can do; raises NotFound or EngineMisconfigured.
        cache: answers of earlier batches, for one that wants to take them; None: there are none.
        on_progress: called with the number of lines read, now and then.

    Raises:
        LeaseLost: another worker plans this batch.
        StorageError: the input could not be read.
    """
    batch = batches.get(db, lease.batch_id, tenant_id=None)
    problems = Problems(limits.max_reported_errors)
    keys = Keys(batch.tenant_id) if batch.reuse and cache is not None else None
    with Spill() as spill, ExitStack() as stack:
        try:
            file = files.get(db, batch.input_file_id, tenant_id=batch.tenant_id)
            reading = _Reading(
                blobs,
                batch,
                file.blob_key,
                limits=limits,
                problems=problems,
                spill=spill,
                keys=keys,
            )
            reading.read(describe, checker, on_progress)
        except NotFound as error:
            problems.add(
                LineProblem(code="invalid_request", message=error.message, param="file_id")
            )
        except BlobMissing:
            message = f"The content of file {batch.input_file_id} is gone; upload it again."
            problems.add(LineProblem(code="invalid_request", message=message, param="file_id"))
        except InvalidLine as error:
            problems.add_error(error, None)
        if problems.count:
            batches.refuse(db, lease, errors=problems.first(), num_errors=problems.count)
            return
        found = stack.enter_context(finding(cache, keys, on_progress=on_progress))
        run_order = reading.choose_order(
            learned=lengths.read(db, batch.tenant_id, reading.model) if limits.by_template else {},
            reused=found.is_reused if found is not None else None,
        )
        source_blob_key, cuts = file.blob_key, reading.cuts
        reused: Sequence[Reused] = ()
        if not run_order.is_arrival:
            writing = _Writing(blobs, batch, lease, limits=limits, model=reading.model)
            source_blob_key = plan_key(batch.id, lease.epoch)
            cuts, reused = writing.write(
                reading.scan(),
                run_order=run_order,
                num_bytes=file.num_bytes,
                found=found,
                on_progress=on_progress,
            )
    identity = keys.identity if keys is not None else ""
    if keys is not None and identity:
        with blobs.open_writer(keys_key(batch.id, lease.epoch)) as writer:
            writer.write(memoryview(keys.content))
            writer.commit()
    is_planned = batches.record_plan(
        db,
        lease,
        cuts=cuts,
        source_blob_key=source_blob_key,
        model_key=reading.model,
        total=reading.total,
        is_run_order=not run_order.is_arrival,
        reused=reused,
        reuse_identity=identity or None,
        reuse_blob_key=keys_key(batch.id, lease.epoch) if identity else None,
    )
    if is_planned and reused:
        log.info("answers_reused", num_lines=reading.total, num_reused=run_order.num_reused)
        metrics.count_reused(reading.model, run_order.num_reused)


class _Writing:
    """Writes the lines of a file as they will run, each with those it runs for.

    Behind them come the lines that need not run, and their results go where a worker's would.
    """

    def __init__(
        self, blobs: BlobStore, batch: Batch, lease: Lease, *, limits: PlanLimits, model: str
    ) -> None:
        self._blobs = blobs
        self._batch = batch
        self._lease = lease
        self._limits = limits
        self._model = model
        self._cuts: list[Cut] = []
        self._reused: list[Reused] = []
        self._results: list[Entry] = []

    def write(
        self,
        scanned: Iterator[ScannedLine],
        *,
        run_order: RunOrder,
        num_bytes: int,
        found: Found | None,
        on_progress: Callable[[int], None] | None,
    ) -> tuple[list[Cut], list[Reused]]:
        """Return the shards that run, and those whose results are there.

        Raises:
            StorageError: the input cannot be read, a blob not written, or there is no room to sort.
        """
        if found is not None:
            num_bytes += found.num_bytes
        with Reorder(num_ranks=run_order.num_leaders, num_bytes=num_bytes) as reorder:
            self._sort(scanned, reorder, run_order, found, on_progress)
            self._write_sorted(reorder, run_order, on_progress)
        log.info(
            "run_order_written",
            batch_id=self._batch.id,
            num_lines=len(run_order.rank) if run_order.rank is not None else 0,
            num_run=run_order.num_leaders - run_order.num_reused,
            num_groups=run_order.num_groups,
            shared_percent=round(100 * run_order.shared, 1),
        )
        return self._cuts, self._reused

    def _sort(
        self,
        scanned: Iterator[ScannedLine],
        reorder: Reorder,
        run_order: RunOrder,
        found: Found | None,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        ranks = run_order.rank.data if run_order.rank is not None else memoryview(b"")
        follows = None if run_order.is_follower is None else run_order.is_follower.data
        answers = found.read() if found is not None else iter(())
        answer = next(answers, None)
        for index, (_, _, _, line) in enumerate(scanned):
            content = line or b""
            rank, tag = ranks[index], index << _KIND_BITS
            if follows is not None and follows[index]:
                reorder.add(rank, tag | _FOLLOWER, custom_id_of(content).encode())
            else:
                reorder.add(rank, tag | _LEADER, content)
            if answer is not None and answer[0] == index:
                result = self._render(content, index, answer[1], answer[2])
                reorder.add(rank, tag | _RESULT, result)
                answer = next(answers, None)
            if on_progress is not None and index % _PROGRESS_LINES == 0:
                on_progress(index)

    def _render(self, content: bytes, index: int, batch_id: BatchId, result: Result) -> bytes:
        return render_result(
            result,
            custom_id=custom_id_of(content),
            request_id=f"{self._batch.id[6:]}{index:08x}",
            endpoint=self._batch.endpoint,
            model=self._model,
            created=int(time.time()),
            reused_from=batch_id,
        )

    def _write_sorted(
        self,
        reorder: Reorder,
        run_order: RunOrder,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        limits = self._limits
        first_reused = run_order.num_leaders - run_order.num_reused
        cutter = Cutter(max_lines=limits.shard_lines, max_bytes=limits.shard_bytes)
        with self._blobs.open_writer(plan_key(self._batch.id, self._lease.epoch)) as writer:
            at = num_held = 0
            held: list[bytes] = []
            for rank, line in enumerate(_run_lines(reorder.read())):
                head = encode_run_head(line.place, line.followers)
                num_bytes = len(head) + len(line.content) + 1
                held += (head, line.content, b"\n")
                num_held += num_bytes
                if num_held >= _WRITE_BYTES:
                    writer.write(b"".join(held))
                    held.clear()
                    num_held = 0
                if rank == first_reused:
                    self._end_shard(cutter.finish())
                self._end_shard(
                    cutter.add(index=rank, line=rank + 1, byte_start=at, num_bytes=num_bytes)
                )
                self._results += [(line.place, KIND_OUTPUT, one) for one in line.results]
                at += num_bytes
                if on_progress is not None and rank % _PROGRESS_LINES == 0:
                    on_progress(rank)
            writer.write(b"".join(held))
            writer.commit()
        self._end_shard(cutter.finish())

    def _end_shard(self, cut: Cut | None) -> None:
        """Note a shard that has all its lines, and write the results that these have."""
        if cut is None:
            return
        if not self._results:
            self._cuts.append(cut)
            return
        key = reused_key(self._batch.id, self._lease.epoch, len(self._reused))
        blob = self._blobs.put(key, encode_segment(self._results))
        self._reused.append(Reused(cut, blob))
        self._results = []


def _longest(terms: Terms) -> int:
    """Return how many tokens an answer may have; 0: unknown."""
    if terms.max_tokens is None and terms.constraint is not None:
        return len(terms.constraint.spec) // 4  # an answer is about as long as its schema
    return terms.max_tokens or 0


class _RunLine(NamedTuple):
    """A line that runs, with those it runs for, or with the result that it has already.

    `place` is its index in the file.
    """

    place: int
    content: bytes
    followers: list[Follower]
    results: list[bytes]


def _run_lines(entries: Iterator[Ranked]) -> Iterator[_RunLine]:
    """Yield the lines of a run order; the leader is the first of its rank, as in the file."""
    last: _RunLine | None = None
    for _, tag, content in entries:
        index, kind = tag >> _KIND_BITS, tag & ((1 << _KIND_BITS) - 1)
        if kind == _LEADER:
            if last is not None:
                yield last
            last = _RunLine(index, content, [], [])
        elif last is not None and kind == _FOLLOWER:
            last.followers.append((index, content.decode()))
        elif last is not None:
            last.results.append(content)
    if last is not None:
        yield last


def _is_determined(terms: Terms, capabilities: Capabilities | None) -> bool:
    """Return whether equal requests on these terms have equal answers: greedy or seeded."""
    if terms.seed is not None:
        return True
    if terms.temperature is None:
        return capabilities is not None and capabilities.is_greedy
    return terms.temperature == 0


class _Judge:
    """What follows from what a line asks for; lines in a row mostly ask for the same.

    Attributes:
        wants_each: whether it has to look at the next line even if that one does.
        is_determined: whether equal requests are sure to have equal answers.
        is_shared: whether equal requests may have one answer.
        identity: of the model; empty: unknown.
        longest: how many tokens an answer may have; 0: unknown.
    """

    def __init__(
        self,
        batch: Batch,
        models: Models,
        checker: Sandbox,
        *,
        limits: PlanLimits,
        problems: Problems,
    ) -> None:
        self._batch = batch
        self._models = models
        self._limits = limits
        self._problems = problems
        self._refuse = batch.on_unsupported_schema == "refuse"
        self._schemas = Schemas(checker, problems, chunk=limits.check_chunk, refuse=self._refuse)
        self._terms: Terms | None = None
        self._capabilities: Capabilities | None = None
        self._fault: InvalidLine | None = None
        self._constraints: list[tuple[Constraint, str]] = []
        self.wants_each = True
        self.is_determined = self.is_shared = False
        self.identity = ""
        self.longest = 0

    def look(self, terms: Terms, number: int) -> None:
        """Hold a line that is good in itself against what its model can do."""
        capabilities = self._models.add(terms.model, number)
        if terms is not self._terms or capabilities is not self._capabilities:
            self._terms, self._capabilities = terms, capabilities
            self._fault = self._find_fault(terms, capabilities)
            self.is_determined = _is_determined(terms, capabilities)
            fold = self._limits.fold
            self.is_shared = self.is_determined if fold == "determined" else fold == "all"
            self.identity = capabilities.identity if capabilities is not None else ""
            self.longest = _longest(terms)
            self._constraints = terms.list_schemas()
            if capabilities is not None:
                self._schemas.refuse = self._refuse or capabilities.refuses_unenforceable
                self._schemas.backend = capabilities.constraint_backend
        if self._fault is not None:
            self._problems.add_error(self._fault, number)
        for constraint, where in self._constraints:
            self._schemas.add(constraint, number, where=where)
        self.wants_each = (
            self._fault is not None
            or bool(self._constraints)
            or not self._models.is_settled(terms.model)
        )

    def finish(self) -> None:
        """Report what could not be said before the last line."""
        self._schemas.check()
        self._models.finish()

    def _find_fault(self, terms: Terms, capabilities: Capabilities | None) -> InvalidLine | None:
        """Return why a model cannot serve lines on these terms, which are good in themselves."""
        if capabilities is None:
            return None
        endpoint = self._batch.endpoint
        if endpoint not in capabilities.endpoints:
            return InvalidLine(
                f"Model {capabilities.model} cannot serve {endpoint}, only "
                f"{', '.join(capabilities.endpoints)} (a chat needs a chat template).",
                param="url",
                error_code="unsupported_endpoint",
            )
        try:
            terms.check(capabilities)
        except InvalidLine as error:
            return error
        return None


class _Reading:
    """One pass over a file: what is wrong with it, and where its shards begin and end."""

    def __init__(
        self,
        blobs: BlobStore,
        batch: Batch,
        key: str,
        *,
        limits: PlanLimits,
        problems: Problems,
        spill: Spill,
        keys: Keys | None,
    ) -> None:
        self._blobs = blobs
        self._batch = batch
        self._key = key
        self._limits = limits
        self._problems = problems
        self.cuts: list[Cut] = []
        self.total = 0
        self.model = ""
        self._capabilities: Capabilities | None = None
        self._columns = Columns(batch.endpoint, spill, self._contents)
        self._keys = keys

    def read(
        self,
        describe: Callable[[str], Capabilities],
        checker: Sandbox,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        """Look at every line; see `plan` for the arguments.

        Raises:
            InvalidLine: nothing in the file could be run, whatever its lines say.
        """
        limits = self._limits
        models = self._open_models(describe)
        judge = _Judge(self._batch, models, checker, limits=limits, problems=self._problems)
        cutter = Cutter(max_lines=limits.shard_lines, max_bytes=limits.shard_bytes)
        sketch, note, keys = Sketcher(self._batch.endpoint).sketch, self._columns.add, self._keys
        total = 0
        terms: Terms | None = None
        with closing(CustomIds(spill_bytes=limits.spill_bytes)) as ids:
            # Once for each of millions of lines, so calls that can be spared are.
            for number, start, num_bytes, content in self.scan():
                if content is None:
                    self._report_long(number, num_bytes)
                    continue
                try:
                    line = sketch(content)
                except InvalidLine as error:
                    self._problems.add_error(error, number)
                    continue
                if line.terms is not terms or judge.wants_each:
                    terms = line.terms
                    judge.look(terms, number)
                ids.add(line.custom_id)
                cut = cutter.add(total, number, start, num_bytes)
                if cut is not None:
                    self.cuts.append(cut)
                if keys is not None:
                    keys.add(line.request() if judge.is_determined else None, judge.identity)
                key = line.digest() if judge.is_shared else None
                note(content, line.num_first_chars, key, judge.longest)
                total += 1
                if on_progress is not None and total % _PROGRESS_LINES == 0:
                    on_progress(total)
            judge.finish()
            repeated = ids.repeated()
        self.total = total
        self._finish(repeated, cutter.finish(), models.capabilities)

    def _finish(
        self, repeated: set[bytes], last: Cut | None, capabilities: Capabilities | None
    ) -> None:
        """Report what the file as a whole has wrong, and keep what ended with its last line."""
        if repeated:
            self._report_repeated(repeated)
        if last is not None:
            self.cuts.append(last)
        self._check_size()
        self._capabilities = capabilities
        if capabilities is not None:
            self.model = capabilities.model

    def _report_long(self, number: int, num_bytes: int) -> None:
        message = (
            f"This line has {num_bytes} bytes; at most {self._limits.max_line_bytes} are allowed."
        )
        self._problems.add(LineProblem(code="line_too_long", message=message, line=number))

    def choose_order(
        self, *, learned: Mapping[int, int], reused: "NDArray[np.bool_] | None"
    ) -> RunOrder:
        """Return in which order the lines are to run; see `order` for what was learned.

        Args:
            reused: for each line, whether it need not; None: all have to.
        """
        found = self._capabilities
        return order(
            self._columns,
            cache_tokens=found.cache_tokens if found is not None else 0,
            by_prefix=self._limits.by_prefix,
            by_length=self._limits.by_length,
            learned=learned,
            reused=reused,
        )

    def scan(self) -> Iterator[ScannedLine]:
        """Yield the lines of the file."""
        return scan(self._blobs, self._key, max_line_bytes=self._limits.max_line_bytes)

    def _contents(self) -> Iterator[bytes]:
        return (content for *_, content in self.scan() if content is not None)

    def _open_models(self, describe: Callable[[str], Capabilities]) -> Models:
        if self._batch.endpoint not in ENDPOINTS:
            raise InvalidLine(
                f"Endpoint {self._batch.endpoint} is not supported; use one of "
                f"{', '.join(ENDPOINTS)}.",
                param="endpoint",
                error_code="invalid_value",
            )
        try:
            return Models(describe, self._problems, override=self._batch.model_override)
        except (NotFound, InvalidInput, EngineMisconfigured) as reason:
            raise InvalidLine(reason.message, param="model", error_code="model_not_found") from None

    def _check_size(self) -> None:
        limit = self._limits.max_lines
        if not self.total and not self._problems.count:
            message = "The file has no requests; write one JSON line for each."
            self._problems.add(LineProblem(code="empty_file", message=message))
        if self.total > limit:
            message = (
                f"The file has {self.total} requests; at most {limit} are allowed. Split it, or "
                "raise limits.max_lines."
            )
            self._problems.add(LineProblem(code="too_many_tasks", message=message))

    def _report_repeated(self, repeated: set[bytes]) -> None:
        """Read the file again and list every line that repeats an earlier custom_id."""
        first_lines: dict[bytes, int] = {}
        sketcher = Sketcher(self._batch.endpoint)
        for number, _, _, content in self.scan():
            if content is None:
                continue
            try:
                custom_id = sketcher.sketch(content).custom_id
            except InvalidLine:
                continue
            digest = xxhash.xxh3_128_digest(custom_id.encode())
            if digest not in repeated:
                continue
            first = first_lines.setdefault(digest, number)
            if first != number:
                self._problems.add(
                    LineProblem(
                        code="duplicate_custom_id",
                        message=f"The custom_id of this line is also that of line {first}; it "
                        "must be unique in the file.",
                        param="custom_id",
                        line=number,
                    )
                )
