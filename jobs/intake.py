"""Takes batches in: records them, and plans them in one streaming pass over their file.

Planning looks at every line and reports everything that is wrong, with line numbers; only a file
without a fault is cut into shards. Where another order than the file's is worth it, or lines repeat
each other, a second pass writes the lines in the order they will run, and that is cut instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from engine.sandbox import Sandbox
from jobs import metrics
from jobs.arrange import Arranging
from jobs.checks import CustomIds, Models, Problems, Schemas
from jobs.domain.batch import Batch, LineProblem
from jobs.domain.errors import (
    BlobMissing,
    EngineMisconfigured,
    InvalidInput,
    InvalidLine,
    NotFound,
)
from jobs.domain.images import Image, ImageLimits
from jobs.domain.mixed import BATCH_ENDPOINTS, MIXED, MixedSketcher, open_sketcher
from jobs.domain.models import ModelColumn, group_by_model, model_at
from jobs.domain.plan import Columns, Fold, RunOrder, order
from jobs.domain.request import Capabilities, Constraint, check_takes_images
from jobs.domain.shard import Cut, Cutter, Lease
from jobs.domain.sketch import Sketch, Sketcher, Terms
from jobs.pictures import Pictures
from jobs.reuse import Cache, Keys, finding
from jobs.telemetry import log
from jobs.wakeups import Doorbell
from storage import batches, files, lengths
from storage.blobs.base import BlobStore, keys_key, plan_key
from storage.database import Database
from storage.jsonl import (
    ScannedLine,
    scan,
)
from storage.spill import Spill

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from storage.batches import Reused

_PROGRESS_LINES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """How large an input may be, how shards are cut, and how many faults are listed."""

    max_lines: int = 10_000_000
    max_models: int = 16
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
    images: ImageLimits = field(default_factory=ImageLimits)


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
                pictures=Pictures(db, blobs, batch.tenant_id),
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
        names = [one.model for one in reading.found]
        model = names[0] if len(names) == 1 else ""
        if not model:
            keys = None  # they are of one model's answers
        found = stack.enter_context(finding(cache, keys, on_progress=on_progress))
        is_known = limits.by_template and bool(model)
        run_order, starts = reading.choose_order(
            learned=lengths.read(db, batch.tenant_id, model) if is_known else {},
            reused=found.is_reused if found is not None else None,
        )
        source_blob_key, cuts = file.blob_key, reading.cuts
        reused: Sequence[Reused] = ()
        if not run_order.is_arrival:
            writing = Arranging(
                blobs, batch, lease, cutter=reading.open_cutter(), model=model, starts=starts
            )
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
        model_key=model or None,
        model_keys=() if model else [names[model_at(cut.first_index, starts)] for cut in cuts],
        total=reading.total,
        is_run_order=not run_order.is_arrival,
        reused=reused,
        reuse_identity=identity or None,
        reuse_blob_key=keys_key(batch.id, lease.epoch) if identity else None,
    )
    if is_planned and reused:
        log.info("answers_reused", num_lines=reading.total, num_reused=run_order.num_reused)
        metrics.count_reused(model, run_order.num_reused)


def _longest(terms: Terms) -> int:
    """Return how many tokens an answer may have; 0: unknown."""
    if terms.max_tokens is None and terms.constraint is not None:
        return len(terms.constraint.spec) // 4  # an answer is about as long as its schema
    return terms.max_tokens or 0


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
        model: its number.
        salt: what tells its requests from those of other models and kinds of the file.
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
        sketcher: Sketcher | MixedSketcher,
        pictures: Pictures,
    ) -> None:
        self._models = models
        self._checker = checker
        self._pictures = pictures
        self._limits = limits
        self._problems = problems
        self._sketcher = sketcher
        self._is_mixed = batch.endpoint == MIXED
        self._refuse = batch.on_unsupported_schema == "refuse"
        self._all_schemas: dict[tuple[bool, str | None], Schemas] = {}
        self._schemas = self._schemas_for(None)
        self._terms: Terms | None = None
        self._capabilities: Capabilities | None = None
        self._fault: InvalidLine | None = None
        self._constraints: list[tuple[Constraint, str]] = []
        self.wants_each = True
        self.is_determined = self.is_shared = False
        self.identity = ""
        self.model = 0
        self.salt = b""
        self.longest = 0

    def look(self, terms: Terms, number: int, *, images: Sequence[Image] = ()) -> None:
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
            self.model = self._models.number
            self.salt = bytes((self.model,)) if self.model else b""
            if self._is_mixed:
                # A chat and a response may ask for the same, and are not answered alike.
                self.salt += self._sketcher.endpoint.encode()
            self._constraints = terms.list_schemas()
            if capabilities is not None:
                self._schemas = self._schemas_for(capabilities)
        if self._fault is not None:
            self._problems.add_error(self._fault, number)
        for constraint, where in self._constraints:
            self._schemas.add(constraint, number, where=where)
        if images:
            self._look_at_images(images, number)
        self.wants_each = (
            self._fault is not None
            or bool(self._constraints)
            or not self._models.is_settled(terms.model)
        )

    def _look_at_images(self, images: Sequence[Image], number: int) -> None:
        try:
            if self._capabilities is not None:
                check_takes_images(self._capabilities)
            self._pictures.check(images, self._limits.images)
        except InvalidLine as error:
            self._problems.add_error(error, number)

    def finish(self) -> None:
        """Report what could not be said before the last line."""
        for schemas in self._all_schemas.values():
            schemas.check()
        self._models.finish()

    def _schemas_for(self, capabilities: Capabilities | None) -> Schemas:
        """Return what tries schemas as a model of these capabilities needs it; None: any."""
        refuse, backend = self._refuse, None
        if capabilities is not None:
            refuse = refuse or capabilities.refuses_unenforceable
            backend = capabilities.constraint_backend
        key = (refuse, backend)
        if key not in self._all_schemas:
            found = Schemas(
                self._checker, self._problems, chunk=self._limits.check_chunk, refuse=refuse
            )
            found.backend = backend
            self._all_schemas[key] = found
        return self._all_schemas[key]

    def _find_fault(self, terms: Terms, capabilities: Capabilities | None) -> InvalidLine | None:
        """Return why a model cannot serve lines on these terms, which are good in themselves."""
        if capabilities is None:
            return None
        endpoint = self._sketcher.endpoint
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
        pictures: Pictures,
    ) -> None:
        self._blobs = blobs
        self._batch = batch
        self._key = key
        self._limits = limits
        self._problems = problems
        self.cuts: list[Cut] = []
        self.total = 0
        self.found: list[Capabilities] = []
        self._models = ModelColumn()
        self._columns = Columns(batch.endpoint, spill, self._contents)
        self._keys = keys
        self._pictures = pictures

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
        sketcher = open_sketcher(self._batch.endpoint)
        sketch, note, keys = sketcher.sketch, self._columns.add, self._keys
        judge = _Judge(
            self._batch,
            models,
            checker,
            limits=limits,
            problems=self._problems,
            sketcher=sketcher,
            pictures=self._pictures,
        )
        cutter = self.open_cutter()
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
                if line.terms is not terms or judge.wants_each or line.images:
                    terms = line.terms
                    self._begin_terms(judge, line, number, total, cutter)
                ids.add(line.custom_id)
                cut = cutter.add(total, number, start, num_bytes)
                if cut is not None:
                    self.cuts.append(cut)
                if keys is not None:
                    keys.add(line.request() if judge.is_determined else None, judge.identity)
                key = line.digest(judge.salt) if judge.is_shared else None
                note(content, line.num_first_chars, key, judge.longest)
                total += 1
                if on_progress is not None and total % _PROGRESS_LINES == 0:
                    on_progress(total)
            judge.finish()
            repeated = ids.repeated()
        self.total = total
        self._finish(repeated, cutter.finish(), models.found)

    def _finish(self, repeated: set[bytes], last: Cut | None, found: list[Capabilities]) -> None:
        """Report what the file as a whole has wrong, and keep what ended with its last line."""
        if repeated:
            self._report_repeated(repeated)
        if last is not None:
            self.cuts.append(last)
        self._check_size()
        self.found = found

    def open_cutter(self) -> Cutter:
        """Return what cuts lines into shards."""
        return Cutter(max_lines=self._limits.shard_lines, max_bytes=self._limits.shard_bytes)

    def _begin_terms(
        self, judge: "_Judge", line: Sketch, number: int, index: int, cutter: Cutter
    ) -> None:
        """Look at a line that asks for other things than the one before it, or has to be."""
        judge.look(line.terms, number, images=line.images)
        if self._models.note(index, judge.model):
            cut = cutter.finish()
            if cut is not None:
                self.cuts.append(cut)

    def _report_long(self, number: int, num_bytes: int) -> None:
        message = (
            f"This line has {num_bytes} bytes; at most {self._limits.max_line_bytes} are allowed."
        )
        self._problems.add(LineProblem(code="line_too_long", message=message, line=number))

    def choose_order(
        self, *, learned: Mapping[int, int], reused: "NDArray[np.bool_] | None"
    ) -> tuple[RunOrder, list[int]]:
        """Return in which order the lines are to run, and where in it each model begins.

        See `order` for what was learned.

        Args:
            reused: for each line, whether it need not; None: all have to.
        """
        chosen = order(
            self._columns,
            cache_tokens=min(one.cache_tokens for one in self.found),
            by_prefix=self._limits.by_prefix,
            by_length=self._limits.by_length,
            learned=learned,
            reused=reused,
        )
        if len(self.found) == 1:
            return chosen, [0]
        return group_by_model(chosen, self._models, self.total)

    def scan(self) -> Iterator[ScannedLine]:
        """Yield the lines of the file."""
        return scan(self._blobs, self._key, max_line_bytes=self._limits.max_line_bytes)

    def _contents(self) -> Iterator[bytes]:
        return (content for *_, content in self.scan() if content is not None)

    def _open_models(self, describe: Callable[[str], Capabilities]) -> Models:
        if self._batch.endpoint not in BATCH_ENDPOINTS:
            raise InvalidLine(
                f"Endpoint {self._batch.endpoint} is not supported; use one of "
                f"{', '.join(BATCH_ENDPOINTS)}.",
                param="endpoint",
                error_code="invalid_value",
            )
        try:
            return Models(
                describe,
                self._problems,
                override=self._batch.model_override,
                max_models=self._limits.max_models,
            )
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
        sketcher = open_sketcher(self._batch.endpoint)
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
