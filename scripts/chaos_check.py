"""What has to hold of every batch after a chaos run, looked up in its files and in the database."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import psycopg

from jobs.client import Client
from jobs.client_types import Batch
from jobs.domain.plan import MAX_FOLLOWERS

Fate = Literal["completed", "cancelled", "expired"]
_CODES: dict[Fate, frozenset[str]] = {
    "completed": frozenset(),  # whoever is killed, no line may be blamed for it
    "cancelled": frozenset({"batch_cancelled"}),
    "expired": frozenset({"batch_expired"}),
}
_SHOWN = 10
_NUM_BEGINNINGS = 6
_BEGINNING = "Consider carefully what was agreed on before you answer. " * 12


@dataclass(kw_only=True)
class Job:
    """A batch of the run: what is asked for, and how it has to end.

    Three lines of ten are greedy and repeat others, one of them the same question for the whole
    batch, so that it has more followers than one line may lead. Three of ten begin alike. Nobody
    shares anything with the other four.
    """

    number: int
    num_lines: int
    fate: Fate
    path: Path
    priority: int = 0
    window_seconds: int = 86_400
    content: str = "tell"
    reuse: bool = False  # its lines are those of the other batches that do, and greedy
    batch_id: str = ""
    unplanned: list[str] = field(default_factory=list)  # whose window ended before they were read

    def custom_id(self, index: int) -> str:
        """Return the id of a line."""
        return f"b{self.number:02}-{index}"

    def repeats(self, index: int) -> str | None:
        """Return the question of a line that is asked more than once, or None."""
        turn, kind = divmod(index, 10)
        if kind == 0:
            return "always"
        if kind <= 2:  # noqa: PLR2004
            return f"again {turn % (self.num_lines // 50 + 1)}"
        return None

    def body(self, index: int) -> dict[str, Any]:
        """Return what a line asks for."""
        again = self.repeats(index)
        alone = str(index) if self.reuse else self.custom_id(index)
        asked = f"{self.content} {again or alone}"
        body: dict[str, Any] = {
            "model": "simulated",
            "messages": [{"role": "user", "content": asked}],
        }
        if self.reuse or again is not None:
            body["temperature"] = 0
        if again is None and index % 10 <= 5:  # noqa: PLR2004
            begins = {"role": "system", "content": f"{index // 10 % _NUM_BEGINNINGS} {_BEGINNING}"}
            body["messages"] = [begins, *body["messages"]]
        return body

    @property
    def num_folded(self) -> int:
        """How many lines nobody has to run, since an equal one does."""
        asked = Counter(filter(None, map(self.repeats, range(self.num_lines))))
        return sum(count - -(-count // (MAX_FOLLOWERS + 1)) for count in asked.values())

    def write(self) -> None:
        """Write its input."""
        with self.path.open("wb") as file:
            for index in range(self.num_lines):
                line = {
                    "custom_id": self.custom_id(index),
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": self.body(index),
                }
                file.write(msgspec.json.encode(line) + b"\n")


@dataclass(kw_only=True)
class Findings:
    """What was found; `problems` holds everything but lost and doubled lines."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_lines: int = 0
    num_folded: int = 0
    num_followers: int = 0
    completion_tokens: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    num_reaped: int = 0
    num_segments: int = 0
    num_reused: int = 0

    @property
    def is_good(self) -> bool:
        """Whether everything held."""
        return not (self.lost or self.doubled or self.problems)

    def expect(self, *, found: object, wanted: object, what: str) -> None:
        """Note a problem where something is not as it has to be."""
        if found != wanted:
            self.problems.append(f"{what}: {found!r} instead of {wanted!r}")


class Books:
    """The database, read past the product; a connection that was cut is opened again."""

    def __init__(self, url: str) -> None:
        """Read the database at `url`."""
        self._url = url
        self._connection: psycopg.Connection[Any] | None = None

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a query, or of a statement that returns some.

        Raises:
            psycopg.OperationalError: the database is away.
        """
        try:
            if self._connection is None:
                self._connection = psycopg.connect(
                    self._url, autocommit=True, application_name="chaos", connect_timeout=5
                )
            cursor = self._connection.execute(query.encode(), values or None)
            return cursor.fetchall() if cursor.description is not None else []
        except psycopg.OperationalError:
            self.close()
            raise

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


# A witness beside the product's own guards: what a trigger sees in the transaction that commits.
_WITNESS = """
CREATE TABLE chaos_stale (unit_id text, epoch bigint, unit_epoch bigint, unit_state text);
CREATE FUNCTION chaos_look() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO chaos_stale
    SELECT NEW.unit_id, NEW.epoch, units.epoch, units.state FROM units
    WHERE units.id = NEW.unit_id
      -- What a plan brings with it has epoch 0: nobody can have held a lease of that.
      AND (units.epoch <> NEW.epoch OR (units.state <> 'leased' AND NEW.epoch > 0));
  RETURN NULL;
END $$;
CREATE TRIGGER chaos_look AFTER INSERT ON segments FOR EACH ROW EXECUTE FUNCTION chaos_look();
CREATE TABLE chaos_ends (batch_id text, old_status text, new_status text);
CREATE FUNCTION chaos_end() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO chaos_ends VALUES (OLD.id, OLD.status, NEW.status);
  RETURN NULL;
END $$;
CREATE TRIGGER chaos_end AFTER UPDATE ON batches FOR EACH ROW
  WHEN (OLD.status IN ('completed', 'cancelled', 'expired', 'failed') AND (
    OLD.status <> NEW.status OR OLD.output_file_id IS DISTINCT FROM NEW.output_file_id
    OR OLD.error_file_id IS DISTINCT FROM NEW.error_file_id))
  EXECUTE FUNCTION chaos_end();
"""


def watch(books: Books) -> None:
    """Let the database note what may never happen: late results, and a batch that ends twice."""
    books.rows(_WITNESS)


def check(books: Books, client: Client, jobs: Sequence[Job], folder: Path) -> Findings:
    """Download the files of every batch into `folder` and compare all that is known of it."""
    findings = Findings()
    folder.mkdir(exist_ok=True)
    known = {one for job in jobs for one in (job.batch_id, *job.unplanned)}
    made = {str(row[0]) for row in books.rows("SELECT id FROM batches")}
    findings.expect(found=made - known, wanted=set(), what="batches that nobody asked for")
    for job in jobs:
        batch = client.get_batch(job.batch_id)
        files: dict[str, list[dict[str, Any]]] = {"output": [], "error": []}
        for kind, file_id in (("output", batch.output_file_id), ("error", batch.error_file_id)):
            if file_id is None:
                continue
            path = folder / f"{job.number:02}.{kind}.jsonl"
            sha256 = _download(client, file_id, path)
            stored = books.rows("SELECT sha256 FROM files WHERE id = %s", file_id)
            findings.expect(found=sha256, wanted=stored[0][0], what=f"hash of {file_id}")
            files[kind] = list(_read(path))
        check_files(findings, job, batch, files)
        _check_rows(findings, books, job, batch)
    for what, query in (
        (
            "units that did not end",
            "SELECT count(*) FROM units WHERE state IN ('pending', 'leased')",
        ),
        ("segments committed under a lease that was lost", "SELECT count(*) FROM chaos_stale"),
        ("batches that changed after their end", "SELECT count(*) FROM chaos_ends"),
        ("lines blamed for the death of an engine", _CONVICTED),
    ):
        findings.expect(found=books.rows(query)[0][0], wanted=0, what=what)
    totals = books.rows("SELECT coalesce(sum(crash_count), 0) FROM units")
    findings.num_reaped = int(totals[0][0])
    findings.num_segments = int(books.rows("SELECT count(*) FROM segments")[0][0])
    return findings


_CONVICTED = "SELECT coalesce(sum(num_failed), 0)::bigint FROM segments"


def check_files(
    findings: Findings, job: Job, batch: Batch, found: Mapping[str, Sequence[dict[str, Any]]]
) -> None:
    """Check the published files: every line once, in order, and sums that are the batch's own.

    Args:
        found: the lines of the `output` and of the `error` file.
    """
    name = f"batch {job.number} ({job.batch_id})"
    findings.expect(found=batch.status, wanted=job.fate, what=f"{name}: status")
    findings.statuses[batch.status] += 1
    seen: Counter[str] = Counter()
    for kind, lines in found.items():
        ids = [str(line["custom_id"]) for line in lines]
        seen.update(ids)
        if ids != sorted(ids, key=lambda one: int(one.partition("-")[2])):
            findings.problems.append(f"{name}: the {kind} file is not in the order of the input")
    wanted = [job.custom_id(index) for index in range(job.num_lines)]
    findings.lost += [one for one in wanted if one not in seen]
    findings.doubled += [one for one, count in seen.items() if count > 1]
    findings.num_lines += len(wanted)
    findings.num_reused += batch.num_reused
    strange = seen.keys() - set(wanted)
    findings.expect(found=strange, wanted=set(), what=f"{name}: ids that nobody asked for")
    check_followers(findings, job, found["output"])
    codes = Counter(line["error"]["code"] for line in found["error"] if line["error"])
    allowed = _CODES[job.fate]
    refused = {code: count for code, count in codes.items() if code not in allowed}
    findings.expect(found=refused, wanted={}, what=f"{name}: error lines")
    counts = batch.request_counts
    findings.expect(
        found=(counts.total, counts.completed, counts.failed),
        wanted=(job.num_lines, len(found["output"]), len(found["error"])),
        what=f"{name}: counts (total, completed, failed)",
    )
    spent = [line["response"]["body"]["usage"] for line in found["output"]]
    completion_tokens = sum(one["completion_tokens"] for one in spent)
    findings.completion_tokens += completion_tokens
    usage = batch.usage
    findings.expect(
        found=(usage.input_tokens, usage.output_tokens) if usage is not None else None,
        wanted=(sum(one["prompt_tokens"] for one in spent), completion_tokens),
        what=f"{name}: usage (input, output)",
    )


def check_followers(findings: Findings, job: Job, output: Sequence[dict[str, Any]]) -> None:
    """Check that a line another one ran for has the answer to the question that it asked."""
    bodies = {line["custom_id"]: line["response"]["body"] for line in output}
    for custom_id, body in bodies.items():
        leader = body.get("batchctl", {}).get("same_as")
        if leader is None:
            continue
        findings.num_followers += 1
        asked = [
            job.repeats(int(one.partition("-")[2])) if one in bodies else None
            for one in (custom_id, leader)
        ]
        if (
            asked[0] is None
            or asked[0] != asked[1]
            or body["choices"] != bodies[leader]["choices"]
            or "same_as" in bodies[leader].get("batchctl", {})
        ):
            findings.problems.append(f"{custom_id} has an answer of {leader}, which is another")


def _check_rows(findings: Findings, books: Books, job: Job, batch: Batch) -> None:
    """Check that the rows say the same as the files, and that it ended once."""
    name = f"batch {job.number} ({job.batch_id})"
    rows = books.rows(
        "SELECT coalesce(sum(segments.num_completed), 0)::bigint FROM segments "
        "JOIN shards USING (unit_id) WHERE batch_id = %s",
        job.batch_id,
    )
    completed = batch.request_counts.completed
    findings.expect(found=rows[0][0], wanted=completed, what=f"{name}: results in segments")
    (shards,) = books.rows(
        "SELECT coalesce(sum(num_lines), 0)::bigint, coalesce(bool_and(is_run_order), true) "
        "FROM shards WHERE batch_id = %s",
        job.batch_id,
    )
    folded = job.num_lines - shards[0]
    findings.expect(
        # What has its answer from another batch runs for nobody, and nobody for it.
        found=(max(folded, job.num_folded) if job.reuse else folded, shards[1]),
        wanted=(job.num_folded, True),
        what=f"{name}: lines that were folded, and whether it ran in an order of its own",
    )
    findings.num_folded += job.num_lines - shards[0]
    published = {one for one in (batch.output_file_id, batch.error_file_id) if one is not None}
    files = books.rows(
        "SELECT id FROM files WHERE purpose = 'batch_output' AND filename LIKE %s",
        f"{job.batch_id}%",
    )
    findings.expect(
        found={row[0] for row in files}, wanted=published, what=f"{name}: files of results"
    )
    events = books.rows("SELECT event FROM outbox WHERE batch_id = %s", job.batch_id)
    findings.expect(found=events, wanted=[(f"batch.{job.fate}",)], what=f"{name}: events")


def _download(client: Client, file_id: str, path: Path) -> str:
    """Write a file of the server to `path`, and return its hash."""
    hashed = hashlib.sha256()
    with path.open("wb") as file:
        for piece in client.download(file_id):
            hashed.update(piece)
            file.write(piece)
    return hashed.hexdigest()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            yield msgspec.json.decode(line)


def first(ids: Iterable[str]) -> str:
    """Return the first few ids of many."""
    listed = list(ids)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
