"""The engine's own process, for real, with the engine that needs no model."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from engine.config import HfConfig, SimulatedConfig
from engine.demo import model_path
from engine.process import ProcessEngine
from jobs.domain.errors import (
    EngineDied,
    EngineMisconfigured,
    EngineTimedOut,
    EngineUnavailable,
)
from jobs.domain.request import Request
from jobs.domain.result import Result
from tests.builders import await_true, descriptors, make_request

if TYPE_CHECKING:
    from engine.tuning import Tuning

CONFIG = SimulatedConfig(step_seconds=0.001, slots=4, reply_tokens=4, context_tokens=10**8)
LONG = "[[tokens=1000000]]"


class Requests:
    """A source of a fixed list of requests, which a test may abort, or hold open."""

    def __init__(self, *requests: Request, held_open: bool = False) -> None:
        self._waiting = list(requests)
        self.held_open = held_open
        self.aborted: set[int] = set()

    def take(self, n: int) -> Sequence[Request] | None:
        if not self._waiting:
            return () if self.held_open else None
        taken, self._waiting = self._waiting[:n], self._waiting[n:]
        return taken

    def is_aborted(self, request_id: int) -> bool:
        return request_id in self.aborted


@contextmanager
def opened(
    folder: Path,
    config: SimulatedConfig = CONFIG,
    *,
    start_seconds: float = 60.0,
    stall_seconds: float = 60.0,
    request_seconds: float = 3600.0,
) -> Iterator[ProcessEngine]:
    with closing(
        ProcessEngine(
            config,
            model="m",
            log_path=folder / "engine.log",
            start_seconds=start_seconds,
            stall_seconds=stall_seconds,
            request_seconds=request_seconds,
        )
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessEngine]:
    with opened(tmp_path_factory.mktemp("engine")) as made:
        yield made


def collect(engine: ProcessEngine, *requests: Request) -> dict[int, Result]:
    found: dict[int, Result] = {}
    for result in engine.generate(Requests(*requests)):
        assert result.id not in found, "two results for one request"
        found[result.id] = result
    return found


def requests(first: int, last: int, content: str = "hello") -> list[Request]:
    return [make_request(n, content) for n in range(first, last + 1)]


# --- sessions ---


def test_process_says_what_its_engine_can_do(engine: ProcessEngine) -> None:
    assert (engine.capabilities.model, engine.capabilities.engine) == ("m", "simulated")
    assert engine.num_slots == 4
    assert engine.count_tokens(make_request(1, "x" * 40)) == 14


def test_engine_that_chooses_its_slots_tells_which_and_what_came_of_them(tmp_path: Path) -> None:
    told: list[Tuning] = []
    with closing(
        ProcessEngine(
            HfConfig(model=str(model_path()), device="cpu", threads=1),
            model="demo",
            log_path=tmp_path / "engine.log",
            on_tuned=told.append,
        )
    ) as engine:
        (first,) = told
        assert (first.slots, first.max_slots, first.slots_by) == (128, 128, "device")
        assert engine.num_slots == 128
        assert first.cache_tokens == engine.capabilities.cache_tokens > 0
        asked = [make_request(n, ignore_eos=True, max_tokens=40) for n in range(128)]
        assert len(collect(engine, *asked)) == 128
        # What it came to in the end is there with the end.
        assert engine.tuning is not None
        assert engine.tuning.num_comparisons > 0
        choices = [one.choice for one in told]
        assert len(set(choices)) == len(choices), "said once"
        assert choices[-1] == engine.tuning.choice


def test_every_request_of_every_session_is_answered_once(engine: ProcessEngine) -> None:
    for session in range(5):
        asked = requests(100 * session, 100 * session + 30)
        assert set(collect(engine, *asked)) == {request.id for request in asked}
    assert collect(engine) == {}, "a session without a request"
    assert set(collect(engine, make_request(1))) == {1}


def test_long_prompt_and_long_answer_pass(engine: ProcessEngine) -> None:
    text = "x" * 20_000_000
    (result,) = collect(engine, make_request(1, f"[[reply={text}]]")).values()
    assert result.text == text


def test_leaving_a_session_early_aborts_it_and_the_next_one_is_clean(
    engine: ProcessEngine,
) -> None:
    asked = [make_request(1), *requests(2, 20, LONG)]
    with closing(engine.generate(Requests(*asked))) as results:
        assert next(results).id == 1
    assert set(collect(engine, *requests(21, 30))) == set(range(21, 31))


def test_aborted_request_frees_its_slot_and_has_no_result(engine: ProcessEngine) -> None:
    source = Requests(*requests(1, 4, LONG), *requests(5, 12))
    source.aborted.update({1, 2, 3, 4})  # all slots would be taken for a quarter of an hour
    assert {result.id for result in engine.generate(source)} == set(range(5, 13))


def test_idle_session_takes_requests_that_come_later(engine: ProcessEngine) -> None:
    source = Requests(held_open=True)

    def feed() -> None:
        source._waiting += requests(1, 3)  # noqa: SLF001 - our own
        source.held_open = False

    timer = threading.Timer(0.05, feed)
    timer.start()
    assert {result.id for result in engine.generate(source)} == {1, 2, 3}
    timer.join()


def test_sessions_leak_no_descriptor(engine: ProcessEngine, tmp_path: Path) -> None:
    collect(engine, make_request(1))
    before = sorted(descriptors())
    there = sorted(psutil.Process(engine.pid).open_files())
    for session in range(20):
        collect(engine, *requests(10 * session, 10 * session + 5))
    assert sorted(descriptors()) == before
    assert sorted(psutil.Process(engine.pid).open_files()) == there
    for _ in range(3):
        with opened(tmp_path) as another:
            collect(another, make_request(1))
    assert sorted(descriptors()) == before


def test_closing_ends_the_process_and_may_be_repeated(tmp_path: Path) -> None:
    with opened(tmp_path) as engine:
        process = psutil.Process(engine.pid)
        engine.close()
        assert not process.is_running()
    with pytest.raises(EngineDied):
        collect(engine, make_request(1))


def test_settings_named_as_vllms_own_variables_are_not_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ("VLLM_TENSOR_PARALLEL_SIZE", "VLLM_MAX_MODEL_LEN", "VLLM_REMOTE_API_KEY")
    for name in (*ours, "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "1")
    with opened(tmp_path) as engine:
        there = psutil.Process(engine.pid).environ()
    assert not there.keys() & set(ours)
    assert there["VLLM_CPU_KVCACHE_SPACE"] == "1", "vLLM's own are"


# --- deaths ---


def test_suspects_of_a_crash_are_exactly_the_requests_that_had_started(tmp_path: Path) -> None:
    asked = [
        make_request(1, "[[tokens=1]]"),
        *requests(2, 4, LONG),
        make_request(5, "[[fault=crash]]"),  # starts when the first has ended
        *requests(6, 8),  # in the engine's hands, and not started
    ]
    with opened(tmp_path) as engine:
        results = engine.generate(Requests(*asked))
        assert next(results).id == 1
        with pytest.raises(EngineDied, match="SIGKILL with 4 requests") as caught:
            next(results)
        assert caught.value.suspects == {2, 3, 4, 5}
        assert type(caught.value) is EngineDied


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_engine_is_reported_with_what_it_was_at(tmp_path: Path, number: int) -> None:
    asked = [make_request(1, "[[tokens=1]]"), *requests(2, 4, LONG)]
    with opened(tmp_path) as engine:
        results = engine.generate(Requests(*asked, held_open=True))
        assert next(results).id == 1
        os.kill(engine.pid, number)
        with pytest.raises(EngineDied, match=signal.Signals(number).name) as caught:
            next(results)
        assert caught.value.suspects == {2, 3, 4}
        assert not psutil.pid_exists(engine.pid)


def test_results_that_were_sent_before_the_end_are_kept(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"slots": 1})
    # The first runs long enough for the last to be handed over, before nobody reads.
    asked = [
        make_request(1, "[[tokens=1000]]"),
        make_request(2),
        make_request(3, "[[fault=oom]]"),
    ]
    with opened(tmp_path, config) as engine:
        results = engine.generate(Requests(*asked))
        assert next(results).id == 1
        # The engine goes on while nobody reads; then it gives up.
        await_true(lambda: has_ended(engine))
        assert next(results).id == 2
        with pytest.raises(EngineDied) as caught:
            next(results)
        assert caught.value.suspects == {3}


def test_request_whose_result_was_sent_is_no_suspect(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    config = CONFIG.model_copy(update={"ledger": str(ledger)})
    asked = [make_request(1, "[[tokens=1]]"), make_request(2, "[[tokens=5]]")]
    with opened(tmp_path, config) as engine:
        results = engine.generate(Requests(*asked, *requests(3, 30, LONG)))
        assert next(results).id == 1
        steps = ledger.stat().st_size // 4
        await_true(lambda: ledger.stat().st_size // 4 > steps + 20)  # the second is long over
        os.kill(engine.pid, signal.SIGKILL)
        await_true(lambda: has_ended(engine))
        assert next(results).id == 2
        with pytest.raises(EngineDied) as caught:
            next(results)
        assert caught.value.suspects == {3, 4, 5, 6}


def has_ended(engine: ProcessEngine) -> bool:
    return psutil.Process(engine.pid).status() == psutil.STATUS_ZOMBIE


def test_killed_engine_that_was_idle_suspects_nobody(tmp_path: Path) -> None:
    with opened(tmp_path) as engine:
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied) as caught:
            collect(engine, make_request(1))
        assert caught.value.suspects == frozenset()


@pytest.mark.parametrize("how", ["hang", "stopped"])
def test_engine_without_progress_is_ended(tmp_path: Path, how: str) -> None:
    with opened(tmp_path, stall_seconds=0.5) as engine:
        if how == "hang":
            asked = [make_request(1, "[[tokens=1]]"), make_request(2, "[[fault=hang]]")]
            results = engine.generate(Requests(*asked, held_open=True))
        else:
            asked = [make_request(1, "[[tokens=1]]"), make_request(2, LONG)]
            results = engine.generate(Requests(*asked, held_open=True))
            assert next(results).id == 1
            os.kill(engine.pid, signal.SIGSTOP)
        with pytest.raises(EngineTimedOut) as caught:
            list(results)
        assert 2 in caught.value.suspects
        assert not psutil.pid_exists(engine.pid)


def test_slow_engine_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    slow = CONFIG.model_copy(update={"step_seconds": 0.05})
    # Half a second for an answer that takes two: steps are progress.
    with opened(tmp_path, slow, stall_seconds=1.2) as engine:
        assert set(collect(engine, make_request(1, "[[tokens=40]]"))) == {1}


def test_request_that_never_ends_costs_only_itself_and_frees_its_slot(tmp_path: Path) -> None:
    asked = [*requests(1, 4, "[[fault=endless]]"), *requests(5, 12)]
    with opened(tmp_path, request_seconds=3.0) as engine:
        found = collect(engine, *asked)
        assert set(found) == set(range(1, 13))
        codes = {n: result.error.code for n, result in found.items() if result.error is not None}
        assert codes == dict.fromkeys(range(1, 5), "request_timed_out")
        assert set(collect(engine, *requests(13, 20))) == set(range(13, 21)), "it works on"


def test_probe_is_answered_and_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    with opened(tmp_path) as engine:
        engine.probe()
        assert set(collect(engine, *requests(1, 8))) == set(range(1, 9))
        engine.probe()


def test_probe_of_an_engine_that_died_says_so(tmp_path: Path) -> None:
    with opened(tmp_path) as engine:
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            engine.probe()


def test_engine_out_of_memory_while_it_works_suspects_what_it_held(tmp_path: Path) -> None:
    with opened(tmp_path) as engine, pytest.raises(EngineDied, match="out of memory") as caught:
        collect(engine, make_request(1, "[[fault=oom]]"))
    assert caught.value.suspects == {1}
    assert caught.value.cause == "engine_out_of_memory"


def test_engine_that_hangs_is_ended_even_when_nobody_waits_any_more(tmp_path: Path) -> None:
    with opened(tmp_path, stall_seconds=2.0) as engine:
        source = Requests(make_request(1, "[[fault=hang]]"), held_open=True)

        def leave() -> None:
            source.aborted.add(1)
            source.held_open = False

        # Later than it is taken: what nobody waited for from the start never reaches the model.
        timer = threading.Timer(0.5, leave)
        timer.start()
        with pytest.raises(EngineTimedOut):
            list(engine.generate(source))
        timer.join()
        assert not psutil.pid_exists(engine.pid)


def test_loading_is_given_up_when_told_to_stop(tmp_path: Path) -> None:
    slow = CONFIG.model_copy(update={"load_seconds": 60.0})
    told = threading.Event()
    threading.Timer(0.3, told.set).start()
    log_path = tmp_path / "engine.log"
    before = psutil.Process().children()
    with pytest.raises(EngineUnavailable):
        ProcessEngine(slow, model="m", log_path=log_path, stop=told.is_set)
    assert psutil.Process().children() == before


# --- starting ---


def test_engine_that_is_configured_badly_says_how(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"ledger": str(tmp_path / "no" / "ledger")})
    before = sorted(descriptors())
    with pytest.raises(EngineMisconfigured, match="ledger"), opened(tmp_path, config):
        pass
    assert sorted(descriptors()) == before


def test_engine_that_dies_while_it_loads_points_to_its_log(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"load_seconds": 600})

    def load() -> None:
        with opened(tmp_path, config):
            pass

    others = {child.pid for child in psutil.Process().children()}
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        (child,) = await_engines(os.getpid(), others)
        child.kill()
        with pytest.raises(EngineDied, match=r"SIGKILL.*engine\.log") as caught:
            loading.result(30)
    assert caught.value.suspects == frozenset()


def test_engine_that_takes_too_long_to_load_is_ended(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"load_seconds": 600})
    before = {child.pid for child in psutil.Process().children()}
    with (
        pytest.raises(EngineTimedOut, match=r"model m .* leases\.load_seconds .*engine\.log"),
        opened(tmp_path, config, start_seconds=1.0),
    ):
        pass
    assert {child.pid for child in psutil.Process().children()} == before


# --- nothing outlives the worker ---

WORKER = """
import sys
from pathlib import Path
from engine.config import SimulatedConfig
from engine.process import ProcessEngine
from tests.unit.engine.test_process import Requests, LONG
from tests.builders import make_request

engine = ProcessEngine(
    SimulatedConfig(load_seconds=float(sys.argv[2])), model="m", log_path=Path(sys.argv[1])
)
print("ready", flush=True)
asked = [make_request(n, content) for n, content in enumerate(sys.argv[3:])]
for result in engine.generate(Requests(*asked)):
    print(result.id, flush=True)
"""


@pytest.mark.parametrize("load_seconds", [0, 600], ids=["working", "loading"])
def test_engine_ends_with_its_worker(tmp_path: Path, load_seconds: int) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path / "log"), str(load_seconds), LONG]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
        try:
            (engine,) = await_engines(worker.pid)
            if load_seconds:
                await_true(lambda: len(engine.cmdline()) > 2 and bool(engine.threads()[1:]))
            else:
                assert worker.stdout is not None
                assert worker.stdout.readline() == b"ready\n"
        finally:
            worker.kill()
        psutil.wait_procs([engine], timeout=10)
        assert not engine.is_running()


@contextmanager
def busy_worker(folder: Path) -> Iterator[tuple[psutil.Process, list[psutil.Process]]]:
    """Yield a worker, and its engine with the engine's child, which work on a long request."""
    command = [sys.executable, "-c", WORKER, str(folder / "log"), "0"]
    asked = ["[[fault=child]][[tokens=1]]", LONG]
    with subprocess.Popen([*command, *asked], stdout=subprocess.PIPE) as worker:
        tree: list[psutil.Process] = []
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
            (engine,) = await_engines(worker.pid)
            assert worker.stdout.readline() == b"0\n", "then the child is there"
            tree = psutil.Process(worker.pid).children(recursive=True)
            (child,) = engine.children()
            yield psutil.Process(worker.pid), [engine, child]
        finally:
            worker.kill()
            for one in tree:
                with suppress(psutil.NoSuchProcess):
                    one.kill()


def assert_ended(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("which", ["process", "group"])
def test_engine_that_runs_no_code_any_more_ends_with_its_worker(tmp_path: Path, which: str) -> None:
    with busy_worker(tmp_path) as (worker, engine):
        others = [one for one in worker.children(recursive=True) if one not in engine]
        if which == "group":
            os.killpg(engine[0].pid, signal.SIGSTOP)
        else:
            engine[0].suspend()
        worker.kill()
        assert_ended([*engine, *others])


def test_children_of_an_engine_that_was_killed_end_although_its_worker_does_nothing(
    tmp_path: Path,
) -> None:
    with busy_worker(tmp_path) as (worker, engine):
        worker.suspend()
        engine[0].kill()
        assert_ended(engine)


def test_those_who_ask_a_whole_service_to_end_do_not_end_the_guardian(tmp_path: Path) -> None:
    with busy_worker(tmp_path) as (worker, engine):
        (guardian,) = [one for one in worker.children() if one not in engine]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            guardian.send_signal(number)
        engine[0].suspend()
        worker.kill()
        assert_ended([*engine, guardian])


def test_engine_that_ended_in_order_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True)), sorted(descriptors())
    with opened(tmp_path) as engine:
        assert set(collect(engine, make_request(1, "[[fault=child]]"))) == {1}
        started = set(psutil.Process().children(recursive=True)) - before[0]
        assert len(started) == 3, "the engine, its child, its guardian"
    assert_ended(list(started))
    assert (set(psutil.Process().children(recursive=True)), sorted(descriptors())) == before


def await_engines(parent: int, others: Collection[int] = ()) -> list[psutil.Process]:
    """Return the engine processes of `parent` but `others`, once there are any."""
    found: list[psutil.Process] = []

    def look() -> bool:
        children = psutil.Process(parent).children()
        found[:] = [child for child in children if child.pid not in others and is_engine(child)]
        return bool(found)

    await_true(look)
    return found


def is_engine(process: psutil.Process) -> bool:
    try:
        return "engine.host" in process.cmdline()
    except psutil.Error:
        return False
