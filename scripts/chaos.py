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
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Self

import psutil
import psycopg
import redis
import stamina.instrumentation

from jobs.client import Client, Upload
from jobs.domain.batch import TERMINAL_STATUSES
from jobs.domain.errors import BatchctlError
from scripts import fleet
from scripts.chaos_check import Books, Fate, Findings, Job, check, first, watch

LEASE_SECONDS = 3.0  # of the timing profile `fast`
_LONGEST_PAUSE_SECONDS = 3 * LEASE_SECONDS
_SPREAD = 0.9  # of the lines, over which the faults are spread
_NUM_BATCHES = 10
_NUM_UNFINISHED = 4  # so many batches are in work at once
_MAX_PAUSED = 3
_LONGEST_GAP_SECONDS = 1.0  # between two faults that are due
_TICK_SECONDS = 0.05
_LOOK_SECONDS = 0.5
_TELL_SECONDS = 5.0
_STUCK_SECONDS = 300.0
_AWAY_SECONDS = 120.0
_CUT_SHARE = 0.15
_MAX_AIMED = 3  # at the finalizers of one batch
_FATES: Mapping[int, Fate] = {1: "cancelled", 2: "expired"}
_REUSING = {0, 7, 9}  # the first gives its answers, and has ended by the time the others come
SIMULATED = {"slots": 32, "reply_tokens": 16, "step_seconds": 0.005}
# How often each kind is chosen, in a deck that is shuffled: none is left out.
KILLS = {
    "engine": 6,
    "engine worker": 4,
    "engine machine": 2,
    "control worker": 2,
    "control machine": 1,
    "celery main": 1,
    "launcher": 1,
    "sandbox": 1,
    "api": 2,
}
PAUSES = {
    "engine": 3,
    "engine worker": 3,
    "engine machine": 2,
    "control worker": 1,
    "control machine": 1,
    "api": 1,
}
CUTS = {"connections": 10, "flushall": 4, "valkey": 2, "s3": 2, "postgres": 1}
# What a process is, by a word of its command line.
_PARTS = {
    "engine.host": "engine",
    "engine.sandbox": "sandbox",
    "billiard.spawn": "child",
    "jobs.worker.process": "process",
    "celery": "celery main",
    "serve": "api",
    "worker": "launcher",
}


def tell(text: str) -> None:
    """Tell how it goes."""
    print(f"chaos: {text}", flush=True)


class Failed(Exception):
    """The run cannot go on."""


@dataclass(kw_only=True)
class Tally:
    """What was done, by kind; several threads do it."""

    kills: Counter[str] = field(default_factory=Counter)
    pauses: Counter[str] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, which: Counter[str], kind: str, count: int = 1) -> None:
        """Count something."""
        with self.lock:
            which[kind] += count


@dataclass(frozen=True, kw_only=True)
class Found:
    """A process of the fleet, and those that it started."""

    component: str
    part: str
    process: psutil.Process
    below: tuple[psutil.Process, ...]

    def is_a(self, role: str, parts: Collection[str]) -> bool:
        """Return whether it is one of these parts of a component of this role."""
        return self.component.startswith(role) and self.part in parts


class Monkey:
    """Does harm to the processes of a fleet, and has what it stopped go on."""

    def __init__(self, components: Mapping[str, fleet.Component], tally: Tally) -> None:
        """Harm `components`, by name; what was done is counted in `tally`."""
        self._components = components
        self._tally = tally
        self._paused: list[tuple[float, list[psutil.Process]]] = []
        self._lock = threading.Lock()

    # --- who there is ---

    def survey(self) -> list[Found]:
        """Return the processes of workers and API that can be told apart."""
        children: dict[int, list[psutil.Process]] = {}
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                children.setdefault(one.ppid(), []).append(one)
        found = []
        for name, component in self._components.items():
            if component.process is None or name in CUTS:
                continue
            with suppress(psutil.Error):
                root = psutil.Process(component.process.pid)
                for one in (root, *_below(root.pid, children)):
                    with suppress(psutil.Error):
                        part = _part_of(one.cmdline())
                        below = tuple(_below(one.pid, children))
                        found.append(Found(component=name, part=part, process=one, below=below))
        return found

    def _targets(self, kind: str) -> list[list[psutil.Process]]:
        """Return what one fault of a kind may hit, each a group of processes that are hit at once.

        A machine is a worker with all below it, which goes down at one moment.
        """
        role, _, what = kind.partition(" ")
        found = self.survey()
        if what == "machine":
            tops = {"celery main", "process"}
            return [[one.process, *one.below] for one in found if one.is_a(role, tops)]
        if what == "worker":
            return [[one.process] for one in found if one.is_a(role, {"child", "process"})]
        return [[one.process] for one in found if one.part == kind]

    # --- what is done to them ---

    def kill(self, kind: str, rng: random.Random) -> bool:
        """Kill something of this kind; return whether there was something."""
        targets = self._targets(kind)
        if not targets:
            return False
        num_killed = 0
        for one in rng.choice(targets):
            with suppress(psutil.NoSuchProcess):
                one.kill()
                num_killed += 1
        if num_killed:
            self._tally.note(self._tally.kills, kind)
        return num_killed > 0

    def pause(self, kind: str, rng: random.Random) -> bool:
        """Stop something of this kind for a while; return whether there was something."""
        with self._lock:
            stopped = {one.pid for _, group in self._paused for one in group}
            if len(self._paused) >= _MAX_PAUSED:
                return False
        targets = [
            group for group in self._targets(kind) if not any(one.pid in stopped for one in group)
        ]
        if not targets:
            return False
        seconds = rng.uniform(0.2, _LONGEST_PAUSE_SECONDS)
        return self.stop(rng.choice(targets), seconds=seconds, kind=kind)

    def stop(self, group: Sequence[psutil.Process], *, seconds: float, kind: str) -> bool:
        """Stop processes, which go on after so many seconds; return whether there was one."""
        stopped = []
        for one in group:
            with suppress(psutil.NoSuchProcess):
                one.suspend()
                stopped.append(one)
        if not stopped:
            return False
        with self._lock:
            self._paused.append((time.monotonic() + seconds, stopped))
        self._tally.note(self._tally.pauses, kind)
        return True

    def let_go(self, *, everybody: bool = False) -> None:
        """Let those go on whose time has come."""
        now = time.monotonic()
        with self._lock:
            due = [group for at, group in self._paused if everybody or at <= now]
            self._paused = [(at, group) for at, group in self._paused if group not in due]
        for group in due:
            for one in group:
                with suppress(psutil.NoSuchProcess):
                    one.resume()


def _below(pid: int, children: Mapping[int, Sequence[psutil.Process]]) -> Iterator[psutil.Process]:
    for child in children.get(pid, ()):
        yield child
        yield from _below(child.pid, children)


def _part_of(words: Sequence[str]) -> str:
    text = " ".join(words)
    return next((part for word, part in _PARTS.items() if word in text), "")


class Aim:
    """Lies in wait for planners and finalizers, and hits them while they hold a batch."""

    def __init__(self, books: Books, monkey: Monkey, tally: Tally, rng: random.Random) -> None:
        """Find the holders in `books`."""
        self._books = books
        self._monkey = monkey
        self._tally = tally
        self._rng = rng
        self._seen: set[tuple[str, int]] = set()
        self._hits: Counter[str] = Counter()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aim", daemon=True)
        self.num_in_the_middle = 0

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._ending.set()
        self._thread.join(30)
        self._books.close()

    def _run(self) -> None:
        while not self._ending.wait(_TICK_SECONDS / 2):
            with suppress(psycopg.Error, psutil.Error):
                self._look()

    def _look(self) -> None:
        held = self._books.rows(
            "SELECT units.id, units.epoch, units.batch_id, units.kind, workers.pid FROM units "
            "JOIN workers ON workers.id = units.owner "
            "WHERE units.state = 'leased' AND units.kind IN ('plan', 'finalize')"
        )
        for unit_id, epoch, batch_id, kind, pid in held:
            if (unit_id, epoch) in self._seen:
                continue
            self._seen.add((unit_id, epoch))
            name = f"{kind} {batch_id}"
            most = _MAX_AIMED if kind == "finalize" else 1
            if self._hits[name] < most and self._rng.random() < (0.8 if most > 1 else 0.4):
                self._hits[name] += 1
                self._hit(unit_id, epoch, kind, pid)

    def _hit(self, unit_id: str, epoch: int, kind: str, pid: int) -> None:
        known = {one.process.pid: one.process for one in self._monkey.survey()}
        if pid not in known:
            return
        self._ending.wait(self._rng.uniform(0.0, 0.4))
        who = f"{'planner' if kind == 'plan' else 'finalizer'} at work"
        if self._rng.random() < 0.3:  # noqa: PLR2004  it wakes when another one has ended its work
            seconds = self._rng.uniform(LEASE_SECONDS, _LONGEST_PAUSE_SECONDS)
            self._monkey.stop([known[pid]], seconds=seconds, kind=who)
        else:
            known[pid].kill()
            self._tally.note(self._tally.kills, who)
        left = self._books.rows(
            "SELECT 1 FROM units WHERE id = %s AND epoch = %s AND state = 'leased'", unit_id, epoch
        )
        self.num_in_the_middle += bool(left) and kind == "finalize"


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


class Cutter:
    """Cuts connections, and restarts the servers that everything stands on."""

    def __init__(
        self,
        servers: Mapping[str, fleet.Component],
        *,
        books: Books,
        broker_url: str,
        tally: Tally,
    ) -> None:
        """Cut off `servers`, by name."""
        self._servers = servers
        self._books = books
        self._broker_url = broker_url
        self._tally = tally

    def cut(self, kind: str, rng: random.Random) -> bool:
        """Do one thing of this kind; return whether it could be done."""
        try:
            count = self._do(kind, rng)
        except (psycopg.Error, redis.RedisError, psutil.Error):
            return False
        self._tally.note(self._tally.cuts, kind, count)
        return count > 0

    def _do(self, kind: str, rng: random.Random) -> int:
        if kind == "connections":
            pids = self._books.rows(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' "
                "AND application_name <> 'chaos' ORDER BY pid"
            )
            chosen = rng.sample(pids, rng.randint(min(1, len(pids)), len(pids)))
            for (pid,) in chosen:
                self._books.rows("SELECT pg_terminate_backend(%s)", pid)
            return len(chosen)
        if kind == "flushall":
            with redis.Redis.from_url(self._broker_url, socket_timeout=2) as client:
                client.flushall()
            return 1
        server = self._servers[kind]
        if server.process is None or not server.is_running:
            return 0
        victim = psutil.Process(server.process.pid)
        # Of Postgres one backend: the server then ends all of them and recovers by itself, where
        # it would refuse to start again while one of an earlier start lives.
        (rng.choice(victim.children()) if kind == "postgres" else victim).kill()
        return 1


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
            time.sleep(_TICK_SECONDS)
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
