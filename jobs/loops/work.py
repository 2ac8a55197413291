"""Runs shards on one engine process at a time: of one model, then of the next one that waits."""

import time
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec

from engine.deaths import DeathBudget
from engine.process import ProcessEngine
from engine.supervisor import EngineSupervisor
from engine.tuning import Tuning
from jobs import metrics, runner
from jobs.domain.errors import (
    BatchctlError,
    EngineDied,
    EngineError,
    EngineMisconfigured,
    EngineQuarantined,
    InvalidInput,
    NotFound,
    StorageError,
)
from jobs.domain.request import Capabilities
from jobs.domain.result import Result
from jobs.domain.retry import Settlement
from jobs.domain.shard import UnitKind, UnitState
from jobs.feed import FeedSettings
from jobs.loops.turns import Crew
from jobs.telemetry import log
from storage import units

WorkState = Literal["idle", "loading", "working", "quarantined", "draining"]

_STAY_LOOK_SECONDS = 5.0
_MAX_AVOID_SECONDS = 60.0


class WorkLoop:
    """Owns the engine of a worker and keeps it in work."""

    def __init__(
        self,
        crew: Crew,
        *,
        models: Collection[str] | None = None,
        engine_log: Path | None = None,
        others_serve: Callable[[str], bool] = lambda _model: False,
        on_loaded: Callable[[Capabilities], bool] = lambda _found: True,
        budget: DeathBudget | None = None,
    ) -> None:
        """Work with the leases of `crew`.

        Args:
            models: the only models to serve; None: any that has work.
            engine_log: where the engine's own output goes; by default `engine.log` in the folder.
            others_serve: whether another worker may be able to run a model that this one cannot
                start; then its shards are left to that one instead of ending with errors.
            on_loaded: called with what a loaded engine says of itself; False: it may not serve.
            budget: how often the engine may die before the loop rests and leaves the work to
                others; None: there are none, so it goes on as long as results come.
        """
        self._crew = crew
        self._app = crew.app
        self._models = None if models is None else frozenset(models)
        self._engine_log = engine_log or crew.app.folder / "engine.log"
        self._others_serve = others_serve
        self._on_loaded = on_loaded
        self._budget = budget
        self._was_quarantined = False
        self._stay_seconds = crew.app.settings.worker.model_stay_seconds
        self._supervisor: EngineSupervisor | None = None
        self._model: str | None = None
        self._model_since = 0.0
        self._may_stay = (0.0, True)
        # Models whose engine could not be had: left alone until when, after how many tries.
        self._avoided: dict[str, tuple[float, int]] = {}
        self._busy = False
        self._num_results = 0
        self._num_tokens = 0
        self._tuning: Tuning | None = None
        self._past_starts = 0

    # --- what others see ---

    @property
    def engine_pid(self) -> int | None:
        """The process id of the engine, or None while there is none."""
        supervisor = self._supervisor
        return supervisor.pid if supervisor is not None else None

    @property
    def num_engine_starts(self) -> int:
        """How many engine lives this loop has begun, of all its models together."""
        supervisor = self._supervisor
        return self._past_starts + (supervisor.num_starts if supervisor is not None else 0)

    @property
    def model(self) -> str | None:
        """The model that the engine has, or is loading."""
        return self._model

    @property
    def tuning(self) -> Tuning | None:
        """What the engine worked with last, where it chose that."""
        return self._tuning

    @property
    def state(self) -> WorkState:
        """What the loop is doing."""
        if self._crew.stopping.is_set():
            return "draining"
        if not self._busy:
            return "idle" if self.quarantine is None else "quarantined"
        return "loading" if self.engine_pid is None else "working"

    @property
    def quarantine(self) -> str | None:
        """Why the loop takes no work although its engine may start, or None where it does."""
        return self._budget.problem if self._budget is not None else None

    @property
    def num_unexplained_deaths(self) -> int:
        """How often the engine died lately without a request being to blame."""
        return self._budget.num_deaths if self._budget is not None else 0

    @property
    def num_shards(self) -> int:
        """How many shards are leased now."""
        return self._crew.keeper.num_held(UnitKind.SHARD)

    @property
    def num_tokens(self) -> int:
        """How many tokens were generated since the start."""
        return self._num_tokens

    @property
    def unavailable_models(self) -> frozenset[str]:
        """The models whose engine could not be had at the last try."""
        return frozenset(self._avoided)

    @property
    def has_no_engine_to_offer(self) -> bool:
        """Whether the engine of each model that it serves could not be had at the last try."""
        return bool(self._models) and self._avoided.keys() >= (self._models or frozenset())

    def progress(self) -> object:
        """Return something that changes while the engine works or loads."""
        supervisor = self._supervisor
        return supervisor.progress() if supervisor is not None else None

    def serve(self, models: Collection[str]) -> None:
        """Serve these models from now on; the shards that are held are run to their end."""
        self._models = frozenset(models)
        self._app.doorbell.ring_here()

    # --- one turn ---

    def turn(self) -> bool:
        """Run shards of one model until there are none, or another's turn; return if there were."""
        self._note_quarantine()
        model = None if self._was_quarantined else self._next_model()
        if model is None:
            return False
        self._busy = True
        try:
            return self._work(model)
        finally:
            self._busy = False

    def close(self) -> None:
        """End the engine process."""
        if self._supervisor is not None:
            self._past_starts += self._supervisor.num_starts
            self._supervisor.close()
        self._supervisor = None
        self._model = None

    def _work(self, model: str) -> bool:
        crew, num_results = self._crew, self._num_results
        try:
            supervisor = self._engine_for(model)
            runner.work(
                runner.WorkerContext(
                    db=self._app.db,
                    blobs=self._app.blobs,
                    keeper=crew.keeper,
                    doorbell=self._app.doorbell,
                    worker_id=crew.worker_id,
                    boot_id=crew.boot_id,
                    settings=self._feed_settings(),
                    may_claim=self._may_claim,
                    on_result=self._note_result,
                ),
                supervisor,
                model_keys=[model],
                stop=crew.stopping,
            )
            self._avoided.pop(model, None)
        except (EngineError, NotFound, InvalidInput) as error:
            self.close()
            if self._num_results > num_results:
                self._avoided.pop(model, None)  # it was there, so this is its first failure
            if crew.stopping.is_set():
                return False
            if isinstance(error, EngineQuarantined):
                return True  # the next turn says so, and rests
            if not crew.fail_without_engine:
                crew.fail(error)
                return False
            self._go_without_engine(model, error)
        except StorageError as error:
            if crew.fail_without_engine:
                raise
            crew.fail(error)  # the feed has been patient already
            return False
        return True

    def _note_quarantine(self) -> None:
        """Look whether the engine is to rest, and say so when that changes."""
        reason = self.quarantine
        is_on = reason is not None
        if is_on == self._was_quarantined:
            return
        self._was_quarantined = is_on
        if self._budget is not None and is_on:
            seconds = round(self._budget.spent_seconds, 1)
            log.error("worker_quarantined", reason=reason, again_in_seconds=seconds)
        else:
            log.info("worker_quarantine_over")

    def _note_tuning(self, model: str, tuning: Tuning) -> None:
        self._tuning = tuning
        metrics.note_tuning(model, slots=tuning.slots, batch_tokens=tuning.batch_tokens)
        log.info("engine_tuned", model=model, **msgspec.structs.asdict(tuning))

    def _note_result(self, result: Result) -> None:
        self._num_results += 1
        self._num_tokens += result.usage.completion_tokens

    # --- which model ---

    def _waiting_models(self) -> dict[str, datetime]:
        """Return which models of ours have shards that may run now, and since when."""
        now, clock = self._app.db.now(), time.monotonic()
        return {
            model: oldest_at
            for model, oldest_at in units.list_waiting_models(self._app.db).items()
            if (self._models is None or model in self._models)
            and oldest_at <= now
            and self._avoided.get(model, (0.0, 0))[0] <= clock
        }

    def _next_model(self) -> str | None:
        """Return a model that has work now: the present one if it may stay, else the next."""
        waiting = self._waiting_models()
        if self._model in waiting and not self._is_stay_over(waiting):
            return self._model
        others = {model: since for model, since in waiting.items() if model != self._model}
        return min(others or waiting, key=lambda model: waiting[model], default=None)

    def _is_stay_over(self, waiting: dict[str, datetime]) -> bool:
        """Return whether another model has waited long enough behind the present one."""
        if time.monotonic() - self._model_since < self._stay_seconds:
            return False
        patience = self._app.db.now() - timedelta(seconds=self._stay_seconds)
        return any(model != self._model and since < patience for model, since in waiting.items())

    def _may_claim(self) -> bool:
        """Return whether the present model may begin another shard; looks every few seconds."""
        looked_at, may_stay = self._may_stay
        if time.monotonic() - looked_at > min(_STAY_LOOK_SECONDS, self._stay_seconds):
            may_stay = not self._is_stay_over(self._waiting_models())
            self._may_stay = (time.monotonic(), may_stay)
        return may_stay

    # --- the engine ---

    def _engine_for(self, model: str) -> EngineSupervisor:
        if self._supervisor is None or self._model != model:
            self.close()
            config = self._app.engine_config(model)
            leases = self._app.settings.leases

            def start() -> ProcessEngine:
                try:
                    with metrics.engine_start(model):
                        return ProcessEngine(
                            config,
                            model=model,
                            log_path=self._engine_log,
                            start_seconds=leases.load_seconds,
                            stall_seconds=leases.stall_seconds,
                            request_seconds=leases.request_seconds,
                            on_tuned=lambda tuning: self._note_tuning(model, tuning),
                            stop=self._crew.stopping.is_set,
                        )
                except EngineDied as death:
                    # Another start follows, and if that is well nobody would know of this one.
                    log.warning("engine_died_loading", model=model, error=death.message)
                    raise

            self._model, self._tuning = model, None
            self._supervisor = EngineSupervisor(
                start,
                budget=self._budget,
                wait=self._crew.stopping.wait,
            )
            found = self._supervisor.open().capabilities
            if not self._on_loaded(found):
                raise EngineMisconfigured(
                    f"The model {model} is not the one that other workers serve under this name."
                )
            # Its turn begins when it is loaded; else one that loads for longer than it may stay
            # would leave without having done anything.
            self._model_since = time.monotonic()
            self._may_stay = (self._model_since, True)
        return self._supervisor

    def _go_without_engine(self, model: str, error: BatchctlError) -> None:
        """Leave a model whose engine cannot be had alone for a while, or end a shard of it.

        What may pass, such as a server that is away, never ends a shard: until its batch's deadline
        it waits, for this worker or another. Other models go on meanwhile.
        """
        metrics.count_engine_failure(model, error.code)
        num_tries = self._avoided.get(model, (0.0, 0))[1] + 1
        is_left = error.retryable or self._others_serve(model)
        seconds = self._pause_seconds(num_tries) if is_left else 0.0
        self._avoided[model] = (time.monotonic() + seconds, num_tries)
        log.error(
            "engine_unavailable",
            model=model,
            code=error.code,
            error=error.message,
            num_tries=num_tries,
            again_in_seconds=round(seconds, 1),
        )
        if not is_left:
            self._end_one_shard(model, error)

    def _pause_seconds(self, num_tries: int) -> float:
        """Return how long to leave a model alone; never nothing, unlike the pause of a shard."""
        ceiling = min(_MAX_AVOID_SECONDS, 2.0 ** min(num_tries, 10))
        return self._crew.rng.uniform(ceiling / 2, ceiling)

    def _end_one_shard(self, model: str, error: BatchctlError) -> None:
        """End a shard whose engine cannot be had, here or elsewhere, however long it waits."""
        crew = self._crew
        lease = units.claim(
            self._app.db,
            worker_id=crew.worker_id,
            boot_id=crew.boot_id,
            kinds=(UnitKind.SHARD,),
            model_keys=[model],
            lease_seconds=crew.times.lease_seconds,
        )
        if lease is None:
            return
        log.error("shard_failed", unit_id=lease.unit_id, code=error.code)
        reason = f"{error.code}: {error.message}"
        units.settle(self._app.db, lease, Settlement(state=UnitState.FAILED, exit=reason))
        self._app.doorbell.announce()

    def _feed_settings(self) -> FeedSettings:
        segments = self._app.settings.segments
        leases = self._app.settings.leases
        return FeedSettings(
            flush_results=segments.max_results,
            flush_bytes=segments.max_bytes,
            flush_seconds=segments.max_age_seconds,
            poll_seconds=min(0.5, leases.idle_poll_seconds),
            lease_seconds=leases.lease_seconds,
        )
