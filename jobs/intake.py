"""Takes batches in: records them, and plans them in one streaming pass over their file.

Planning looks at every line and reports everything that is wrong, with line numbers; only a file
without a fault is cut into shards.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import xxhash

from engine.sandbox import Sandbox, Verdict
from jobs.domain.batch import Batch, LineProblem
from jobs.domain.errors import BlobMissing, EngineMisconfigured, InvalidLine, NotFound
from jobs.domain.request import ENDPOINTS, Capabilities, Constraint, Line, parse_line
from jobs.domain.shard import Cut, Cutter, Lease
from jobs.wakeups import Doorbell
from storage import batches, files
from storage.blobs.base import BlobStore
from storage.database import Database
from storage.jsonl import scan

_SPILL_BUCKETS = 16
_PROGRESS_LINES = 1000
_MAX_VERDICTS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """How large an input may be, how shards are cut, and how many faults are listed."""

    max_lines: int = 10_000_000
    max_line_bytes: int = 8 << 20
    max_reported_errors: int = 100
    shard_lines: int = 1000
    shard_bytes: int = 16 << 20
    check_chunk: int = 256
    spill_bytes: int = 64 << 20


def submit(db: Database, doorbell: Doorbell, batch: Batch) -> Batch:
    """Record a batch, to be planned; return it as recorded.

    Repeating an idempotency key returns the first batch.
    """
    recorded = batches.insert(db, batch)
    doorbell.announce()
    return recorded


@dataclass(slots=True)
class _Problems:
    """Collects faults; keeps the first ones by line, counts them all."""

    limit: int
    kept: list[LineProblem] = field(default_factory=list)
    count: int = 0

    def add(self, problem: LineProblem) -> None:
        self.count += 1
        self.kept.append(problem)
        if len(self.kept) > 2 * self.limit + 100:
            self.kept = self.first()

    def add_error(self, error: InvalidLine, line: int | None) -> None:
        self.add(
            LineProblem(
                code=error.error_code, message=error.message, param=error.param, line=line
            )
        )

    def first(self) -> list[LineProblem]:
        return sorted(self.kept, key=lambda problem: problem.line or 0)[: self.limit]


class _Schemas:
    """Has every distinct constraint tried once, in chunks."""

    def __init__(
        self, checker: Sandbox, problems: _Problems, *, chunk: int, refuse: bool
    ) -> None:
        self._checker = checker
        self._problems = problems
        self._chunk = chunk
        self._refuse = refuse
        self._verdicts: dict[bytes, InvalidLine | None] = {}
        self._waiting: dict[bytes, tuple[Constraint, list[int]]] = {}

    def add(self, constraint: Constraint, line: int) -> None:
        key = xxhash.xxh3_128_digest(f"{constraint.kind}\0{constraint.spec}".encode())
        if key in self._verdicts:
            error = self._verdicts[key]
            if error is not None:
                self._problems.add_error(error, line)
            return
        if key in self._waiting:
            self._waiting[key][1].append(line)
            return
        self._waiting[key] = (constraint, [line])
        if len(self._waiting) >= self._chunk:
            self.check()

    def check(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        verdicts = self._checker.check_many([constraint for constraint, _ in waiting.values()])
        for (key, (constraint, lines)), verdict in zip(waiting.items(), verdicts, strict=True):
            error = self._judge(constraint, verdict)
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()  # the checker remembers the recent ones itself
            self._verdicts[key] = error
            if error is not None:
                for line in lines:
                    self._problems.add_error(error, line)

    def _judge(self, constraint: Constraint, verdict: Verdict) -> InvalidLine | None:
        where = "response_format" if constraint.kind.startswith("json") else "structured_outputs"
        if verdict.error_code is not None:
            return InvalidLine(
                verdict.message, param=f"body.{where}", error_code=verdict.error_code
            )
        if self._refuse and verdict.outcome == "validated":
            return InvalidLine(
                "The schema uses a keyword that cannot be enforced while generating; leave it out, "
                "or allow answers to be validated and asked for again "
                "(on_unsupported_schema = validate).",
                param=f"body.{where}",
                error_code="schema_unsupported",
            )
        return None


class _CustomIds:
    """Finds repeated custom_ids by their 128-bit hashes, on disk when there are many."""

    def __init__(self, *, spill_bytes: int) -> None:
        self._digests = bytearray()
        self._spill_bytes = spill_bytes
        self._stack = ExitStack()
        self._buckets: list[IO[bytes]] = []

    def add(self, custom_id: str) -> None:
        self._digests += xxhash.xxh3_128_digest(custom_id.encode())
        if len(self._digests) >= self._spill_bytes:
            self._spill()

    def repeated(self) -> set[bytes]:
        """Return the digests that were added more than once."""
        if not self._buckets:
            return self._repeated_in(self._digests)
        self._spill()
        found: set[bytes] = set()
        for bucket in self._buckets:
            bucket.seek(0)
            found |= self._repeated_in(bucket.read())
        return found

    def close(self) -> None:
        self._stack.close()

    @staticmethod
    def _repeated_in(digests: bytes | bytearray) -> set[bytes]:
        rows = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        order = np.lexsort((rows[:, 1], rows[:, 0]))
        ordered = rows[order]
        same = (ordered[1:] == ordered[:-1]).all(axis=1)
        return {row.tobytes() for row in ordered[1:][same]}

    def _spill(self) -> None:
        if not self._buckets:
            self._buckets = [
                self._stack.enter_context(tempfile.TemporaryFile()) for _ in range(_SPILL_BUCKETS)
            ]
        rows = np.frombuffer(bytes(self._digests), dtype="<u8").reshape(-1, 2)
        which = rows[:, 0] % _SPILL_BUCKETS
        for number, bucket in enumerate(self._buckets):
            bucket.write(rows[which == number].tobytes())
        self._digests = bytearray()


class _Models:
    """Decides which model a file runs on, and which lines name another."""

    def __init__(
        self,
        describe: Callable[[str], Capabilities],
        problems: _Problems,
        *,
        override: str | None,
    ) -> None:
        self._describe = describe
        self._problems = problems
        self._override = override
        self._lines: dict[str, list[int]] = {}
        self.capabilities: Capabilities | None = None
        self._unknown: dict[str, InvalidLine] = {}
        if override is not None:
            self.capabilities = describe(override)

    def add(self, name: str | None, line: int) -> Capabilities | None:
        """Note that `line` names `name`; return what its model can do, where that is known."""
        if self._override is not None:
            if name is not None and name != self._override:
                lines = self._lines.setdefault(name, [])
                if len(lines) < self._problems.limit:
                    lines.append(line)
            elif name is not None:
                self._lines.setdefault(name, [])
            return self.capabilities
        if name is None:
            self._problems.add(
                LineProblem(
                    code="missing_required_parameter",
                    message="Missing required parameter: 'model'.",
                    param="body.model",
                    line=line,
                )
            )
            return self.capabilities
        if self.capabilities is not None and name == self.capabilities.model:
            return self.capabilities
        error = self._unknown.get(name)
        if error is None:
            try:
                found = self._describe(name)
            except (NotFound, EngineMisconfigured) as reason:
                error = InvalidLine(
                    reason.message, param="body.model", error_code="model_not_found"
                )
            else:
                if self.capabilities is None:
                    self.capabilities = found
                    return found
                error = InvalidLine(
                    f"This line names another model than the first ({self.capabilities.model}); "
                    "a batch runs on one model.",
                    param="body.model",
                    error_code="mismatched_model",
                )
            if len(self._unknown) < self._problems.limit:
                self._unknown[name] = error
        self._problems.add_error(error, line)
        return None

    def finish(self) -> None:
        """Report lines that name a model which a chosen model cannot stand in for."""
        if self._override is None or len(self._lines) <= 1:
            return
        # One foreign name throughout the file is a file written for another system; two names
        # mean that the caller wants two models.
        names = list(self._lines)
        kept = self._override if self._override in self._lines else names[0]
        for name in names:
            for line in self._lines[name] if name != kept else ():
                self._problems.add(
                    LineProblem(
                        code="mismatched_model",
                        message=f"This line names another model than the others ({kept}); "
                        "a batch runs on one model.",
                        param="body.model",
                        line=line,
                    )
                )


def plan(
    db: Database,
    blobs: BlobStore,
    lease: Lease,
    *,
    describe: Callable[[str], Capabilities],
    checker: Sandbox,
    limits: PlanLimits,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Validate the file of the batch that `lease` is about, and cut it into shards.

    What is wrong with the input becomes the batch's errors, not an exception.

    Args:
        describe: what the model of this name can do; raises NotFound or EngineMisconfigured.
        on_progress: called with the number of lines read, now and then.

    Raises:
        LeaseLost: another worker plans this batch.
        StorageError: the input could not be read.
    """
    batch = batches.get(db, lease.batch_id, tenant_id=None)
    problems = _Problems(limits.max_reported_errors)
    try:
        file = files.get(db, batch.input_file_id, tenant_id=batch.tenant_id)
        if batch.endpoint not in ENDPOINTS:
            raise InvalidLine(
                f"Endpoint {batch.endpoint} is not supported; use one of {', '.join(ENDPOINTS)}.",
                param="endpoint",
                error_code="invalid_value",
            )
        planned = _read_file(
            blobs,
            file.blob_key,
            batch,
            describe=describe,
            checker=checker,
            limits=limits,
            problems=problems,
            on_progress=on_progress,
        )
    except NotFound as error:
        problems.add(LineProblem(code="invalid_request", message=error.message, param="file_id"))
    except BlobMissing:
        message = f"The content of file {batch.input_file_id} is gone; upload it again."
        problems.add(LineProblem(code="invalid_request", message=message, param="file_id"))
    except InvalidLine as error:
        problems.add_error(error, None)
    if problems.count:
        batches.refuse(db, lease, errors=problems.first(), num_errors=problems.count)
        return
    cuts, total, model = planned
    batches.record_plan(
        db, lease, cuts=cuts, source_blob_key=file.blob_key, model_key=model, total=total
    )


def _read_file(
    blobs: BlobStore,
    key: str,
    batch: Batch,
    *,
    describe: Callable[[str], Capabilities],
    checker: Sandbox,
    limits: PlanLimits,
    problems: _Problems,
    on_progress: Callable[[int], None] | None,
) -> tuple[list[Cut], int, str]:
    try:
        models = _Models(describe, problems, override=batch.model_override)
    except (NotFound, EngineMisconfigured) as reason:
        raise InvalidLine(
            reason.message, param="model", error_code="model_not_found"
        ) from None
    schemas = _Schemas(
        checker,
        problems,
        chunk=limits.check_chunk,
        refuse=batch.on_unsupported_schema == "refuse",
    )
    ids = _CustomIds(spill_bytes=limits.spill_bytes)
    cutter = Cutter(max_lines=limits.shard_lines, max_bytes=limits.shard_bytes)
    cuts: list[Cut] = []
    index = 0
    endpoint = batch.endpoint
    try:
        for number, start, num_bytes, content in scan(
            blobs, key, max_line_bytes=limits.max_line_bytes
        ):
            if content is None:
                problems.add(
                    LineProblem(
                        code="line_too_long",
                        message=f"This line has {num_bytes} bytes; at most "
                        f"{limits.max_line_bytes} are allowed.",
                        line=number,
                    )
                )
                continue
            try:
                line = parse_line(content, endpoint=endpoint)
            except InvalidLine as error:
                problems.add_error(error, number)
                continue
            capabilities = models.add(line.model, number)
            _check(line, number, endpoint, capabilities, content, problems)
            if line.constraint is not None:
                schemas.add(line.constraint, number)
            ids.add(line.custom_id)
            cut = cutter.add(index=index, line=number, byte_start=start, num_bytes=num_bytes)
            if cut is not None:
                cuts.append(cut)
            index += 1
            if on_progress is not None and index % _PROGRESS_LINES == 0:
                on_progress(index)
        schemas.check()
        models.finish()
        repeated = ids.repeated() if index else set()
        if repeated:
            _report_repeated(blobs, key, endpoint, repeated, limits, problems)
    finally:
        ids.close()
    _check_size(index, limits, problems)
    last = cutter.finish()
    if last is not None:
        cuts.append(last)
    if models.capabilities is None:
        return cuts, index, ""
    return cuts, index, models.capabilities.model


def _check(
    line: Line,
    number: int,
    endpoint: str,
    capabilities: Capabilities | None,
    content: bytes,
    problems: _Problems,
) -> None:
    """Hold a line against what its model can do."""
    if capabilities is None:
        return
    if endpoint not in capabilities.endpoints:
        problems.add(
            LineProblem(
                code="unsupported_endpoint",
                message=f"Model {capabilities.model} cannot serve {endpoint}"
                " (a chat needs a chat template).",
                param="url",
                line=number,
            )
        )
    elif not capabilities.serves_everything:
        try:
            parse_line(content, endpoint=endpoint, capabilities=capabilities)
        except InvalidLine as error:
            problems.add_error(error, number)


def _check_size(total: int, limits: PlanLimits, problems: _Problems) -> None:
    if not total and not problems.count:
        problems.add(
            LineProblem(
                code="empty_file", message="The file has no requests; write one JSON line for each."
            )
        )
    if total > limits.max_lines:
        problems.add(
            LineProblem(
                code="too_many_tasks",
                message=f"The file has {total} requests; at most {limits.max_lines} are allowed. "
                "Split it, or raise limits.max_lines.",
            )
        )


def _report_repeated(
    blobs: BlobStore,
    key: str,
    endpoint: str,
    repeated: set[bytes],
    limits: PlanLimits,
    problems: _Problems,
) -> None:
    """Read the file again and list every line that repeats an earlier custom_id."""
    first_lines: dict[bytes, int] = {}
    for number, custom_id in _custom_ids(blobs, key, endpoint, limits):
        digest = xxhash.xxh3_128_digest(custom_id.encode())
        if digest not in repeated:
            continue
        first = first_lines.setdefault(digest, number)
        if first != number:
            problems.add(
                LineProblem(
                    code="duplicate_custom_id",
                    message=f"The custom_id of this line is also that of line {first}; "
                    "it must be unique in the file.",
                    param="custom_id",
                    line=number,
                )
            )


def _custom_ids(
    blobs: BlobStore, key: str, endpoint: str, limits: PlanLimits
) -> Iterator[tuple[int, str]]:
    for number, _, _, content in scan(blobs, key, max_line_bytes=limits.max_line_bytes):
        if content is None:
            continue
        try:
            yield number, parse_line(content, endpoint=endpoint).custom_id
        except InvalidLine:
            continue
