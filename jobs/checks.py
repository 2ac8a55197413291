"""What planning holds every line of a file against, beyond its own form.

Each check collects what it finds in one `Problems`; none keeps a line.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

import numpy as np
import xxhash
from xxhash import xxh3_128_digest

from engine.sandbox import Sandbox, Verdict
from jobs.domain.batch import LineProblem
from jobs.domain.errors import EngineMisconfigured, InvalidInput, InvalidLine, NotFound
from jobs.domain.request import Capabilities, Constraint
from jobs.domain.slow import quoted
from storage.spill import on_disk

if TYPE_CHECKING:
    from engine.config import ConstraintBackend

_SPILL_BUCKETS = 16
_MAX_VERDICTS = 100_000
_MAX_WAITING_CHARS = 4 << 20
_MAX_WAITING_LINES = 10_000


@dataclass(slots=True)
class Problems:
    """Collects faults; keeps the first ones by line, counts them all."""

    limit: int
    kept: list[LineProblem] = field(default_factory=list)
    count: int = 0

    def add(self, problem: LineProblem) -> None:
        """Count a fault, and keep it if it is among the first."""
        self.count += 1
        self.kept.append(problem)
        if len(self.kept) > 2 * self.limit + 100:
            self.kept = self.first()

    def count_more(self, number: int) -> None:
        """Count further faults of lines that nobody kept."""
        self.count += number

    def add_error(self, error: InvalidLine, line: int | None) -> None:
        """Add what is wrong with a line; None stands for the whole file."""
        self.add(
            LineProblem(code=error.error_code, message=error.message, param=error.param, line=line)
        )

    def first(self) -> list[LineProblem]:
        """Return the first faults, in the order of their lines."""
        return sorted(self.kept, key=lambda problem: problem.line or 0)[: self.limit]


class Schemas:
    """Has every distinct constraint tried once, in chunks."""

    def __init__(self, checker: Sandbox, problems: Problems, *, chunk: int, refuse: bool) -> None:
        self._checker = checker
        self._problems = problems
        self._chunk = chunk
        self.refuse = refuse
        self.backend: ConstraintBackend | None = None
        self._verdicts: dict[bytes, InvalidLine | None] = {}
        self._waiting: dict[bytes, tuple[Constraint, str, list[int]]] = {}
        self._num_waiting_chars = 0
        self._num_waiting_lines = 0

    def add(self, constraint: Constraint, line: int, *, where: str) -> None:
        """Note that a line has this constraint; what is wrong with it is reported later.

        Args:
            where: the field of the body that holds it; what "tools" hold is only validated.
        """
        key = xxhash.xxh3_128_digest(f"{constraint.kind}\0{where}\0{constraint.spec}".encode())
        if key in self._verdicts:
            error = self._verdicts[key]
            if error is not None:
                self._problems.add_error(error, line)
            return
        self._num_waiting_lines += 1
        if key in self._waiting:
            self._waiting[key][2].append(line)
            if self._num_waiting_lines >= _MAX_WAITING_LINES:
                self.check()
            return
        self._waiting[key] = (constraint, where, [line])
        self._num_waiting_chars += len(constraint.spec)
        if len(self._waiting) >= self._chunk or self._num_waiting_chars > _MAX_WAITING_CHARS:
            self.check()

    def check(self) -> None:
        """Try the constraints that wait, and report what is wrong with them."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        self._num_waiting_chars = self._num_waiting_lines = 0
        constraints = [constraint for constraint, _, _ in waiting.values()]
        verdicts = self._checker.check_many(constraints, backend=self.backend)
        for (key, (_, where, lines)), verdict in zip(waiting.items(), verdicts, strict=True):
            error = self._judge(where, verdict)
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()  # the checker remembers the recent ones itself
            self._verdicts[key] = error
            if error is not None:
                for line in lines:
                    self._problems.add_error(error, line)

    def _judge(self, where: str, verdict: Verdict) -> InvalidLine | None:
        if verdict.error_code is not None:
            return InvalidLine(
                verdict.message, param=f"body.{where}", error_code=verdict.error_code
            )
        if self.refuse and verdict.outcome == "validated" and where != "tools":
            return InvalidLine(
                "The schema uses a keyword that cannot be enforced while generating; leave it out, "
                "or allow answers to be validated and asked for again "
                "(on_unsupported_schema = validate).",
                param=f"body.{where}",
                error_code="schema_unsupported",
            )
        return None


class CustomIds:
    """Finds repeated custom_ids by their 128-bit hashes, on disk when there are many."""

    def __init__(self, *, spill_bytes: int) -> None:
        """Go to disk when the hashes in memory have `spill_bytes`."""
        self._digests = bytearray()
        self._spill_bytes = spill_bytes
        self._stack = ExitStack()
        self._buckets: list[IO[bytes]] = []

    def add(self, custom_id: str) -> None:
        """Note a custom_id.

        Raises:
            BlobStoreUnavailable: the temporary folder is full, or gone.
        """
        self._digests += xxh3_128_digest(custom_id.encode())
        if len(self._digests) >= self._spill_bytes:
            self._spill()

    def repeated(self) -> set[bytes]:
        """Return the digests that were added more than once.

        Raises:
            BlobStoreUnavailable: the temporary folder is full, or gone.
        """
        if not self._buckets:
            return self._repeated_in(self._digests)
        self._spill()
        found: set[bytes] = set()
        with on_disk("Planning a batch"):
            for bucket in self._buckets:
                bucket.seek(0)
                found |= self._repeated_in(bucket.read())
        return found

    def close(self) -> None:
        """Give the disk back."""
        self._stack.close()

    @staticmethod
    def _repeated_in(digests: bytes | bytearray) -> set[bytes]:
        rows = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        halves = np.sort(rows[:, 0])
        if not (halves[1:] == halves[:-1]).any():  # as nearly always, and much cheaper to see
            return set()
        order = np.lexsort((rows[:, 1], rows[:, 0]))
        ordered = rows[order]
        same = (ordered[1:] == ordered[:-1]).all(axis=1)
        return {row.tobytes() for row in ordered[1:][same]}

    def _spill(self) -> None:
        rows = np.frombuffer(bytes(self._digests), dtype="<u8").reshape(-1, 2)
        which = rows[:, 0] % _SPILL_BUCKETS
        with on_disk("Planning a batch"):
            if not self._buckets:
                self._buckets = [
                    self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  by the stack
                    for _ in range(_SPILL_BUCKETS)
                ]
            for number, bucket in enumerate(self._buckets):
                bucket.write(rows[which == number].tobytes())
        self._digests = bytearray()


@dataclass(slots=True)
class _Naming:
    """The lines that name one model, or one of several: the first ones, and how many."""

    first: list[int] = field(default_factory=list)
    count: int = 0


class Models:
    """Decides which model each line of a file runs on, and which lines name none that there is.

    Attributes:
        found: what each model can do, in the order in which lines name them first.
        number: in `found`, of the last line's model.
    """

    def __init__(
        self,
        describe: Callable[[str], Capabilities],
        problems: Problems,
        *,
        override: str | None,
        max_models: int,
    ) -> None:
        """Run every line on `override` if given, else each on the model that it names.

        Raises:
            NotFound, InvalidInput, EngineMisconfigured: `override` is not to be had.
        """
        self._describe = describe
        self._problems = problems
        self._override = override
        self._max_models = max_models
        self._foreign: str | None = None
        # Lines that name the override, the first other model, or (None) any further one.
        self._naming: dict[str | None, _Naming] = {}
        self._known: dict[str, int] = {}
        self._unknown: dict[str, InvalidLine] = {}
        self.found: list[Capabilities] = []
        self.number = 0
        if override is not None:
            self.found = [describe(override)]

    def add(self, name: str | None, line: int) -> Capabilities | None:
        """Note that `line` names `name`; return what its model can do, where that is known."""
        if self._override is not None:
            if name is not None:
                if self._foreign is None and name != self._override:
                    self._foreign = name
                group = name if name in {self._override, self._foreign} else None
                naming = self._naming.setdefault(group, _Naming())
                naming.count += 1
                if len(naming.first) < self._problems.limit:
                    naming.first.append(line)
            return self.found[0]
        if name is None:
            self._problems.add(
                LineProblem(
                    code="missing_required_parameter",
                    message="Missing required parameter: 'model'.",
                    param="body.model",
                    line=line,
                )
            )
            return None
        if name not in self._known:
            error = self._unknown.get(name) or self._look_up(name)
            if error is not None:
                self._problems.add_error(error, line)
                return None
        self.number = self._known[name]
        return self.found[self.number]

    def is_settled(self, name: str | None) -> bool:
        """Return whether another line that names `name` would change and report nothing."""
        return self._override is None and name in self._known

    def _look_up(self, name: str) -> InvalidLine | None:
        """Return what is wrong with naming this model; a good one gets its number."""
        if not name.isprintable():  # a database would choke on some of it
            return InvalidLine(
                f"There is no model {quoted(name)!r}.",
                param="body.model",
                error_code="model_not_found",
            )
        try:
            found = self._describe(name)
        except (NotFound, InvalidInput, EngineMisconfigured) as reason:
            error = InvalidLine(reason.message, param="body.model", error_code="model_not_found")
        else:
            if len(self.found) < self._max_models:
                self._known[name] = len(self.found)
                self.found.append(found)
                return None
            error = InvalidLine(
                f"The lines before this one name {self._max_models} models already; split the "
                "file, or raise limits.max_models.",
                param="body.model",
                error_code="too_many_models",
            )
        if len(self._unknown) < self._problems.limit:
            self._unknown[name] = error
        return error

    def finish(self) -> None:
        """Report lines that name a model which a chosen model cannot stand in for."""
        if self._override is None or len(self._naming) <= 1:
            return
        # One foreign name throughout the file is a file written for another system; two names
        # mean that the caller wants two models.
        kept = self._override if self._override in self._naming else self._foreign
        for name, naming in self._naming.items():
            if name == kept:
                continue
            for line in naming.first:
                self._problems.add(
                    LineProblem(
                        code="mismatched_model",
                        message=f"This line names another model than the others ({kept}), and "
                        f"{self._override} was chosen to stand in for one; choose none to run "
                        "each line on the model that it names.",
                        param="body.model",
                        line=line,
                    )
                )
            self._problems.count_more(naming.count - len(naming.first))
