"""What `make chaos` does to a fleet: kills, pauses, cut connections, and those that are aimed."""

import random
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import psutil
import psycopg
import redis

from scripts import fleet
from scripts.chaos_check import Books

LEASE_SECONDS = 3.0  # of the timing profile `fast`
TICK_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 3 * LEASE_SECONDS
_MAX_PAUSED = 3
_MAX_AIMED = 3  # at the finalizers of one batch
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
        while not self._ending.wait(TICK_SECONDS / 2):
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
