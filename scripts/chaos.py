"""Kill, pause and cut off a fleet at random while it works, then account for every line.

    submit ──► API ──► Postgres, Valkey, S3 ◄── control x 2, engines x 4 (Celery and without)
       SIGKILL  SIGSTOP  cut connections, FLUSHALL, restarts of servers  ──► all of them

`make chaos`. Faults are spread over the lines and not over time, so that a slow machine has as many
as a fast one. Finalizers and planners are aimed at while they hold a batch. The last line says how
many lines were lost or doubled; the exit code is 0 only if that is none, the faults that were asked
for happened, and every other check held. The seed decides what is done, not when it meets the work.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Self

import psutil
import psycopg
import stamina.instrumentation

from jobs.client import Client, Upload
from jobs.domain.batch import TERMINAL_STATUSES
from jobs.domain.errors import BatchctlError
from scripts import fleet
from scripts.chaos_check import Books, Fate, Findings, Job, check, first, watch
from scripts.chaos_faults import CUTS, KILLS, PAUSES, TICK_SECONDS, Aim, Cutter, Monkey, Tally

_SPREAD = 0.75  # of the lines, over which the faults are spread; the rest is time for what is due
_NUM_BATCHES = 10
_NUM_UNFINISHED = 4  # so many batches are in work at once
_LONGEST_GAP_SECONDS = 1.0  # between two faults that are due
_LOOK_SECONDS = 0.5
_TELL_SECONDS = 5.0
_STUCK_SECONDS = 300.0
_AWAY_SECONDS = 120.0
_CUT_SHARE = 0.15
_FATES: Mapping[int, Fate] = {1: "cancelled", 2: "expired"}
_REUSING = {0, 7, 9}  # the first gives its answers, and has ended by the time the others come
SIMULATED = {"slots": 32, "reply_tokens": 16, "step_seconds": 0.005}


def tell(text: str) -> None:
    """Tell how it goes."""
    print(f"chaos: {text}", flush=True)


class Failed(Exception):
    """The run cannot go on."""


class Customer:
    """Submits the batches one after the other, and cancels one, through whatever the API suffers.

    It runs in a thread of its own; `failure` holds what ended it early.
    """

    def __init__(self, url: str, jobs: Sequence[Job]) -> None:
        """Submit `jobs` to the API at `url`."""
        self._url = url
        self._jobs = jobs
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="customer", daemon=True)
        self.failure: Exception | None = None
        self.has_submitted = False

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._ending.set()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            with Client(self._url, patience_seconds=_AWAY_SECONDS) as client:
                self._buy(client)
        except Exception as error:  # noqa: BLE001  told by the main thread
            self.failure = error

    def _buy(self, client: Client) -> None:
        waiting = list(self._jobs)
        unfinished: list[Job] = []
        to_be_stopped = [job for job in self._jobs if job.fate != "completed"]
        while (waiting or to_be_stopped) and not self._ending.wait(_LOOK_SECONDS):
            if waiting and len(unfinished) < _NUM_UNFINISHED:
                job = waiting.pop(0)
                self._submit(client, job)
                unfinished.append(job)
            for job in unfinished[:]:
                batch = client.get_batch(job.batch_id)
                if job.fate == "expired" and batch.is_terminal and not batch.request_counts.total:
                    # Its window ended before its lines were known: nothing was accepted.
                    job.unplanned.append(job.batch_id)
                    job.window_seconds *= 2
                    self._submit(client, job)
                elif batch.is_terminal:
                    unfinished.remove(job)
                    if job in to_be_stopped:
                        to_be_stopped.remove(job)
                elif (
                    job.fate == "cancelled"
                    and job in to_be_stopped
                    and batch.request_counts.completed > job.num_lines / 10
                ):
                    client.cancel_batch(job.batch_id)
                    to_be_stopped.remove(job)
        self.has_submitted = not self._ending.is_set()

    def _submit(self, client: Client, job: Job) -> None:
        job.write()
        # The same key at each try, so that a try whose answer was lost makes no second batch.
        key = f"chaos-{job.number}-{len(job.unplanned)}"
        file = client.upload(Upload.from_path(job.path), idempotency_key=f"{key}-file")
        job.batch_id = client.create_batch(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window=f"{job.window_seconds}s",
            idempotency_key=key,
            priority=job.priority,
            reuse=job.reuse,
        ).id


class Run:
    """A fleet, the batches that it gets, and what happens to it meanwhile."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        """Prepare a run in `folder`."""
        self.seed: int = arguments.seed
        self.num_kills: int = arguments.kills
        self.num_pauses: int = arguments.pauses
        self.num_lines: int = arguments.lines
        self._until = time.monotonic() + 60 * arguments.minutes
        self.folder = folder
        self._rng = random.Random(self.seed)  # noqa: S311  to be repeated, not to be secret
        self._fleet = fleet.Fleet()
        self._components: dict[str, fleet.Component] = {}
        self._began = time.monotonic()
        self._told_at = self._looked_at = self._moved_at = 0.0
        self._last: tuple[object, ...] = ()
        self._num_done = 0
        self.tally = Tally()
        self.jobs = list(make_jobs(self.num_lines, folder / "input"))
        self.num_in_the_middle = 0
        self.own_deaths: list[str] = []

    @property
    def seconds(self) -> float:
        """Return how long it has run."""
        return time.monotonic() - self._began

    def run(self) -> Findings:
        """Start the fleet, harm it until the batches have ended, and look at what came out.

        Raises:
            Failed: it does not get on.
            KeyboardInterrupt: somebody wants it to end.
        """
        with self._fleet.signals():
            try:
                findings = self._work()
            finally:
                for one in left_of(self.folder):
                    with suppress(psutil.Error):
                        one.resume()
                self._fleet.stop()
                left = self._clean_up()
        findings.expect(found=left, wanted=[], what="processes that outlived their fleet")
        return findings

    def _work(self) -> Findings:
        url = f"http://{fleet.HOST}:{fleet.free_port()}"
        keys = fleet.read_secrets(self.folder / "data")
        servers, environment = fleet.make_servers(self.folder, keys)
        self._add(*servers)
        environment |= settings(self.folder)
        fleet.upgrade({**environment, "BATCHCTL_DATA": str(self.folder / "data" / "api")})
        database_url = environment["BATCHCTL_DATABASE__URL"]
        books = Books(database_url)
        watch(books)
        self._add(fleet.make_api(self.folder, environment, url))
        self._add(*make_workers(self.folder, environment, url))
        tell(f"the fleet is ready after {self.seconds:.0f} s")
        monkey = Monkey(self._components, self.tally)
        cutter = Cutter(
            self._components,
            books=books,
            broker_url=environment["BATCHCTL_BROKER__URL"],
            tally=self.tally,
        )
        aim = Aim(Books(database_url), monkey, self.tally, random.Random(self.seed + 1))  # noqa: S311
        with Customer(url, self.jobs) as customer, aim:
            self._harm(books, customer, monkey, cutter)
        self.num_in_the_middle = aim.num_in_the_middle
        monkey.let_go(everybody=True)
        self._settle(books, url)
        tell("all batches have ended; reading their files")
        with Client(url, patience_seconds=_AWAY_SECONDS) as client, closing(books):
            return check(books, client, self.jobs, self.folder / "results")

    def _add(self, *components: fleet.Component) -> None:
        self._components |= {one.name: one for one in components}
        self._fleet.add(*components)

    # --- while it runs ---

    def _harm(self, books: Books, customer: Customer, monkey: Monkey, cutter: Cutter) -> None:
        deck = [("kill", kind) for kind in islice(cycle(_spread(KILLS)), self.num_kills)]
        deck += [("pause", kind) for kind in islice(cycle(_spread(PAUSES)), self.num_pauses)]
        self._rng.shuffle(deck)
        num_cards, cuts = len(deck), list(_spread(CUTS))
        self._rng.shuffle(cuts)
        next_cut, next_at = cycle(cuts), 0.0
        while True:
            time.sleep(TICK_SECONDS)
            self._tend(customer)
            monkey.let_go()
            if self._look(books, customer):
                return
            if not (deck and self._num_done and time.monotonic() > next_at):
                continue
            share = (num_cards - len(deck)) / num_cards
            if self._num_done < _SPREAD * self.num_lines * share:
                continue
            next_at = time.monotonic() + self._rng.uniform(0.0, _LONGEST_GAP_SECONDS)
            self._play(deck, monkey)
            if self._rng.random() < _CUT_SHARE:
                cutter.cut(next(next_cut), self._rng)

    def _play(self, deck: list[tuple[str, str]], monkey: Monkey) -> None:
        """Do what the next card says; one that finds nobody at present comes later."""
        for number, (what, kind) in enumerate(deck):
            act = monkey.kill if what == "kill" else monkey.pause
            if act(kind, self._rng):
                del deck[number]
                return

    def _tend(self, customer: Customer | None) -> None:
        """Start again what has ended; raise what ends the run."""
        if self._fleet.is_stopping:
            raise KeyboardInterrupt
        if customer is not None and customer.failure is not None:
            raise Failed(f"a client was let down: {customer.failure}") from customer.failure
        for one in self._components.values():
            if one.is_running or one.process is None:
                continue
            if one.process.returncode != -signal.SIGKILL:
                self.own_deaths.append(f"{one.name} {one.how_it_ended()}")
                tell(f"{one.name} {one.how_it_ended()} by itself; its log ends with{one.tail()}")
            one.clean_up()
            one.start()

    def _look(self, books: Books, customer: Customer) -> bool:
        """Look how far the batches are; return whether all have ended."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return False
        self._looked_at = now
        try:
            rows = books.rows(_PROGRESS)
        except psycopg.Error:
            return False
        self._num_done = sum(int(done) for _, _, done in rows)
        state = (self._num_done, *rows)
        if state != self._last:
            self._last, self._moved_at = state, now
        num_ended = sum(status in TERMINAL_STATUSES for _, status, _ in rows)
        if now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            tell(
                f"{self._num_done:,} of {self.num_lines:,} lines, "
                f"{num_ended} of {max(len(rows), len(self.jobs))} batches, "
                f"{self.tally.kills.total()} kills, "
                f"{self.tally.pauses.total()} pauses, {self.seconds:.0f} s"
            )
        if now - self._moved_at > _STUCK_SECONDS:
            raise Failed(f"nothing has moved for {_STUCK_SECONDS:.0f} s: {rows}")
        if now > self._until:
            raise Failed(f"it has not ended in {self.seconds / 60:.0f} minutes: {rows}")
        return customer.has_submitted and num_ended == len(rows)

    def _settle(self, books: Books, url: str) -> None:
        """Wait until the API and the database answer again, now that nobody harms them."""
        deadline = time.monotonic() + _AWAY_SECONDS
        while not fleet.answers(f"{url}/ready"):
            self._tend(None)
            if time.monotonic() > deadline:
                raise Failed("the API does not come back")
            time.sleep(_LOOK_SECONDS)
        books.rows("SELECT 1")

    def _clean_up(self) -> list[str]:
        """Kill what is left of the fleet's processes, and return what that was."""
        deadline = time.monotonic() + _AWAY_SECONDS / 4
        while (left := left_of(self.folder)) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        names = []
        for one in left:
            with suppress(psutil.Error):
                names.append(" ".join(one.cmdline())[:200])
                one.kill()
        return names


_PROGRESS = """
SELECT batches.id, batches.status, CASE
    WHEN batches.status IN ('validating', 'in_progress') AND batches.ending IS NULL
    THEN (
      SELECT coalesce(sum(num_completed + num_failed), 0) FROM shards WHERE batch_id = batches.id
    )
    ELSE coalesce(batches.total, 0) END
FROM batches ORDER BY batches.id
"""


def _spread(shares: Mapping[str, int]) -> list[str]:
    """Return each kind as often as its share says, those of one kind apart from each other."""
    rounds = range(max(shares.values()))
    return [kind for turn in rounds for kind, share in shares.items() if turn < share]


def left_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that were told of this folder, apart from this one."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if one.pid != os.getpid() and str(folder) in " ".join(one.environ().values()):
                found.append(one)
    return found


# --- what runs ---


def settings(folder: Path) -> dict[str, str]:
    """Return the settings of the API and of all workers, besides where the servers are."""
    options = {**SIMULATED, "ledger": str(folder / "ledger")}
    return {
        "BATCHCTL_LEASES__TIMING_PROFILE": "fast",
        "BATCHCTL_SHARDS__MAX_LINES": "500",
        "BATCHCTL_REUSE__EXPIRE_DAYS": "1",
        "BATCHCTL_SEGMENTS__MAX_RESULTS": "100",
        "BATCHCTL_WORKER__HEARTBEAT_SECONDS": "1",
        "BATCHCTL_MODELS": json.dumps({"simulated": {"engine": "simulated", "options": options}}),
        "BATCHCTL_LOG__FORMAT": "json",
        "OMP_NUM_THREADS": "1",
    }


def make_workers(
    folder: Path, environment: Mapping[str, str], url: str
) -> Iterator[fleet.Component]:
    """Yield control and engine workers: with Celery, and without, as where no broker is."""
    roles = {"control-1": "control", "control-2": "control", "engine-1": "engine"}
    roles |= {"engine-2": "engine", "engine-3": "engine"}
    for one in fleet.workers(roles, folder, environment, url):
        number = int(one.name.rpartition("-")[2])
        more = {"BATCHCTL_WORKER__ROLE": roles[one.name]}
        if number > 1:
            alone = (sys.executable, "-m", "jobs.worker.process")
            yield replace(one, command=alone, environment={**one.environment, **more})
        else:
            more |= {"BATCHCTL_WORKER__ENGINES": "2"}
            yield replace(one, environment={**one.environment, **more})


def make_jobs(num_lines: int, folder: Path) -> Iterator[Job]:
    """Yield batches of so many lines together: two that will not complete, and two priorities."""
    folder.mkdir(exist_ok=True)
    slow = num_lines // 25  # with long answers, so that there is time to stop them
    each = (num_lines - 2 * slow) // (_NUM_BATCHES - 2)
    for number in range(_NUM_BATCHES):
        job = Job(
            number=number,
            num_lines=each,
            fate=_FATES.get(number, "completed"),
            path=folder / f"{number:02}.jsonl",
            priority=(0, 5, 0, -5)[number % 4],
            reuse=number in _REUSING,
        )
        if job.fate == "cancelled":
            job.num_lines, job.content = slow, "[[tokens=100]]"
        elif job.fate == "expired":
            job.num_lines, job.window_seconds, job.content = slow, 20, "[[tokens=800]]"
        elif number == _NUM_BATCHES - 1:
            job.num_lines = num_lines - 2 * slow - each * (_NUM_BATCHES - 3)
        yield job


def tokens_of(ledger: Path) -> int:
    """Return how many tokens the engines have generated, those of dead ones included."""
    content = ledger.read_bytes() if ledger.exists() else b""
    return sum(int.from_bytes(content[at : at + 4], "little") for at in range(0, len(content), 4))


def groups_of(folder: Path) -> dict[str, int]:
    """Return how many groups the planners found in each batch, as their logs say."""
    found = {}
    for log in folder.glob("*.log"):
        with log.open("rb") as lines:
            for line in lines:
                if b'"run_order_written"' in line:
                    with suppress(ValueError):  # its writer may have been killed
                        told = json.loads(line)
                        found[told["batch_id"]] = int(told["num_groups"])
    return found


# --- the command ---


def parse_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="Nothing lost, nothing twice, whatever dies.")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="of what to do")
    parser.add_argument("--lines", type=int, default=250_000, help="in all batches together")
    parser.add_argument("--kills", type=int, default=100, help="at least so many")
    parser.add_argument("--pauses", type=int, default=100, help="at least so many")
    parser.add_argument("--minutes", type=float, default=45.0, help="after which it has failed")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a good run too")
    parser.add_argument("--json", type=Path, help="file for what was found")
    parser.add_argument("--folder", type=Path, default=fleet.ROOT / "build" / "chaos")
    return parser.parse_args()


@contextmanager
def in_folder(parent: Path, seed: int) -> Iterator[Path]:
    """A new folder for one run, which nobody else uses."""
    folder: Path = parent.resolve() / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with fleet.lock(folder):
        for old in folder.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != "lock":
                old.unlink()
        (folder / "data").mkdir()
        yield folder


def report(run: Run, findings: Findings, generated: int) -> dict[str, object]:
    """Say what was done and found; return it."""
    tally = run.tally
    repeated = generated - findings.completion_tokens
    for name, counter in (("kills", tally.kills), ("pauses", tally.pauses), ("cuts", tally.cuts)):
        tell(f"{name}: " + ", ".join(f"{kind} {n}" for kind, n in sorted(counter.items())))
    num_groups = sum(groups_of(run.folder).values())
    tell(
        f"{findings.num_folded:,} lines folded into others, {findings.num_followers:,} of them "
        f"answered; {num_groups} groups of lines that begin alike"
    )
    if not num_groups:
        findings.problems.append("no lines were grouped by how they begin")
    tell(
        f"{findings.num_segments:,} segments, {findings.num_reaped:,} leases reaped, "
        f"{run.num_in_the_middle} finalizers hit in the middle; of {generated:,} tokens "
        f"{repeated:,} were not kept; {findings.num_reused:,} answers were reused"
    )
    if tally.kills.total() < run.num_kills or tally.pauses.total() < run.num_pauses:
        findings.problems.append("fewer faults than were asked for")
    for problem in findings.problems:
        tell(f"wrong: {problem}")
    for what, ids in (("lost", findings.lost), ("doubled", findings.doubled)):
        if ids:
            tell(f"{what}: {first(ids)}")
    return {
        "seed": run.seed,
        "lines": findings.num_lines,
        "kills": dict(tally.kills),
        "pauses": dict(tally.pauses),
        "cuts": dict(tally.cuts),
        "batches": dict(findings.statuses),
        "folded": findings.num_folded,
        "groups": num_groups,
        "leases_reaped": findings.num_reaped,
        "finalizers_hit": run.num_in_the_middle,
        "tokens_generated": generated,
        "tokens_not_kept": repeated,
        "answers_reused": findings.num_reused,
        "ended_by_themselves": run.own_deaths,
        "lost": len(findings.lost),
        "doubled": len(findings.doubled),
        "problems": findings.problems,
        "seconds": round(run.seconds, 1),
        "cores": os.cpu_count(),
    }


def main() -> int:
    """Run, and return 0 only where everything held."""
    arguments = parse_arguments()
    stamina.instrumentation.set_on_retry_hooks([])  # a client that tries again is no news here
    for name in [name for name in os.environ if name.startswith(("BATCHCTL_", "HF_", "VLLM_"))]:
        del os.environ[name]
    with in_folder(arguments.folder, arguments.seed) as folder:
        tell(f"seed {arguments.seed}, in {folder}")
        run = Run(arguments, folder)
        try:
            findings = run.run()
        except KeyboardInterrupt:
            tell("ended by a signal")
            return 130
        except (Failed, BatchctlError, psycopg.Error) as error:
            tell(f"failed with seed {arguments.seed}: {error}. Logs and data are in {folder}")
            return 1
        found = report(run, findings, tokens_of(folder / "ledger"))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")
        if not findings.is_good:
            tell(f"failed with seed {arguments.seed}. Logs and data are in {folder}")
        elif not arguments.keep:
            shutil.rmtree(folder)
    print(
        f"{findings.num_lines} lines, {run.tally.kills.total()} kills, "
        f"{run.tally.pauses.total()} pauses: {len(findings.lost)} lost, "
        f"{len(findings.doubled)} doubled"
    )
    return 0 if findings.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
