"""Each metric of this process, named once; never a prompt, an answer or a name a caller made up.

Everything here is counted where work comes in bulk (a segment, a shard, an engine life), never for
a single request. Models are those of the catalogue, outcomes our own error codes, so the number of
series is bounded. Counts are of this process since it started: what the whole system holds (queues,
batches, workers) is read from the database by whoever serves the API (`jobs.api.metrics`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.registry import Collector

from jobs.domain.result import Usage

# When a counter began is in no dashboard of ours, and would double the series.
disable_created_metrics()  # type: ignore[no-untyped-call]  # theirs has no types
CONTENT_TYPE = CONTENT_TYPE_LATEST
COMPLETED = "completed"
MAX_OUTCOMES = 64
"""Further codes told apart; a remote server may make codes up, and the later ones are `other`."""

_CODE = re.compile("[a-zA-Z0-9_.-]{1,64}")
_FLUSH_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_UNIT_SECONDS = (0.1, 0.5, 1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200)
_LOADING_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900)

_requests = Counter(
    "batchctl_requests",
    "Requests whose result became durable, by model and outcome: completed or an error code.",
    ("model", "outcome"),
)
_reused = Counter(
    "batchctl_reused_requests",
    "Requests among them whose answer was an earlier batch's, by model.",
    ("model",),
)
_tokens = Counter(
    "batchctl_tokens",
    "Tokens of durable results: prompt (cached ones included), completion, cached; by outcome.",
    ("model", "kind", "outcome"),
)
_segment_bytes = Counter("batchctl_segment_bytes", "Bytes of the segments written.", ("model",))
_segment_flush = Histogram(
    "batchctl_segment_flush_seconds",
    "Time from the first byte of a segment to its commit.",
    buckets=_FLUSH_SECONDS,
)
_units = Histogram(
    "batchctl_unit_seconds",
    "Time from the claim of a unit to its end here, by kind (plan, shard, finalize) and model.",
    ("kind", "model", "outcome"),
    buckets=_UNIT_SECONDS,
)
_engine_starts = Counter("batchctl_engine_starts", "Engines started, restarts too.", ("model",))
_engine_deaths = Counter(
    "batchctl_engine_deaths", "Engines that died while they had requests.", ("model",)
)
_engine_failures = Counter(
    "batchctl_engine_failures", "Engines that could not be had, by error code.", ("model", "code")
)
_engine_loading = Histogram(
    "batchctl_engine_loading_seconds",
    "Time to start an engine and load its model.",
    ("model",),
    buckets=_LOADING_SECONDS,
)
_engine_slots = Gauge(
    "batchctl_engine_slots", "Sequences that an engine generates at once now.", ("model",)
)
_engine_batch_tokens = Gauge(
    "batchctl_engine_batch_tokens", "Most tokens of a step of an engine now.", ("model",)
)
_leases_lost = Counter("batchctl_leases_lost", "Leases that this process could not keep.")
_leases_reaped = Counter("batchctl_leases_reaped", "Leases of others that this process gave up.")
_damaged_segments = Counter(
    "batchctl_damaged_segments",
    "Segments that a finalizer found damaged or gone, by outcome: run_again or given_up.",
    ("outcome",),
)
_audits = Counter(
    "batchctl_audits", "Batches that were audited, by outcome: ok or violated.", ("outcome",)
)
_audit_problems = Counter(
    "batchctl_audit_problems",
    "Checks of an audit that a batch did not pass, by the check's name.",
    ("check",),
)
_collected = Counter(
    "batchctl_collected",
    "What was removed because nothing needs it: expired_file, old_segment, expired_answers, "
    "orphan, upload, log.",
    ("kind",),
)
_collected_bytes = Counter("batchctl_collected_bytes", "Bytes of the blobs among them.")
_storage_failures = Counter(
    "batchctl_storage_failures", "Reads and writes of work that failed, by error code.", ("code",)
)
_loop_failures = Counter(
    "batchctl_loop_failures",
    "Turns of the control, sweep, work and chore loops that failed.",
    ("loop",),
)
_KNOWN = frozenset(
    (
        *(COMPLETED, "done", "released", "lost", "retried", "cancelled", "expired", "failed"),
        "repaired",
        *("truncated", "schema_mismatch", "schema_unsupported", "context_length_exceeded"),
        *("engine_crash", "attempts_exhausted"),
    )
)
_further: set[str] = set()


def count_segment(
    model: str | None,
    *,
    outcomes: Mapping[str, int],
    usage: Usage,
    failed_usage: Usage,
    num_bytes: int,
    seconds: float,
) -> None:
    """Count a segment that was committed.

    Args:
        outcomes: how many of its results are completed, and how many have which error code.
        usage: tokens of all of its results.
        failed_usage: those of the failed ones among them.
    """
    model = model or ""
    for outcome, number in outcomes.items():
        if number:
            _requests.labels(model, _bounded(outcome)).inc(number)
    for outcome, tokens in ((COMPLETED, _less(usage, failed_usage)), ("failed", failed_usage)):
        for kind, number in (
            ("prompt", tokens.prompt_tokens),
            ("completion", tokens.completion_tokens),
            ("cached", tokens.cached_tokens),
        ):
            if number:
                _tokens.labels(model, kind, outcome).inc(number)
    _segment_bytes.labels(model).inc(num_bytes)
    _segment_flush.observe(seconds)


def count_reused(model: str | None, number: int) -> None:
    """Count requests that need not run: their results became durable with the plan."""
    _requests.labels(model or "", COMPLETED).inc(number)
    _reused.labels(model or "").inc(number)


def count_unit(kind: str, model: str | None, *, outcome: str, seconds: float) -> None:
    """Count a unit that ended here: done, released, lost, or a state it was stopped in."""
    _units.labels(str(kind), model or "", _bounded(outcome)).observe(seconds)


@contextmanager
def engine_start(model: str) -> Iterator[None]:
    """Count the start of an engine within the block, and how long it took when it succeeded."""
    began = monotonic()
    _engine_starts.labels(model).inc()
    yield
    _engine_loading.labels(model).observe(monotonic() - began)


def note_tuning(model: str, *, slots: int, batch_tokens: int) -> None:
    """Note what an engine works with from now on."""
    _engine_slots.labels(model).set(slots)
    _engine_batch_tokens.labels(model).set(batch_tokens)


def count_engine_death(model: str) -> None:
    """Count an engine that died at work."""
    _engine_deaths.labels(model).inc()


def count_engine_failure(model: str, code: str) -> None:
    """Count an engine that could not be had."""
    _engine_failures.labels(model, _bounded(code)).inc()


def count_lost_lease() -> None:
    """Count a lease that could not be kept."""
    _leases_lost.inc()


def count_reaped(number: int) -> None:
    """Count leases of others that were given up."""
    if number:
        _leases_reaped.inc(number)


def count_damage(outcome: str, num_segments: int) -> None:
    """Count segments that were found damaged or gone: run_again or given_up."""
    _damaged_segments.labels(outcome).inc(num_segments)


def count_audit(violated: Sequence[str]) -> None:
    """Count a batch that was audited.

    Args:
        violated: names of the checks that it did not pass.
    """
    _audits.labels("violated" if violated else "ok").inc()
    for check in violated:
        _audit_problems.labels(check).inc()


def count_collected(kind: str, number: int) -> None:
    """Count what was removed, by its kind."""
    if number:
        _collected.labels(kind).inc(number)


def count_collected_bytes(number: int) -> None:
    """Count the bytes of blobs that were removed."""
    _collected_bytes.inc(number)


def count_loop_failure(loop: str) -> None:
    """Count a turn of a loop that failed."""
    _loop_failures.labels(loop).inc()


def count_storage_failure(code: str) -> None:
    """Count a failed read or write of work."""
    _storage_failures.labels(_bounded(code)).inc()


def render(*further: Collector) -> bytes:
    """Return the metrics of this process, and what `further` collects, in Prometheus's format."""
    own = generate_latest(REGISTRY)
    return own + b"".join(generate_latest(_Only(one)) for one in further)


class _Only:
    """A registry of one collector: several APIs of one process do not share theirs."""

    def __init__(self, collector: Collector) -> None:
        self.collect = collector.collect


def _bounded(code: str) -> str:
    if code in _KNOWN or code in _further:
        return code
    if len(_further) >= MAX_OUTCOMES or not _CODE.fullmatch(code):
        return "other"
    _further.add(code)
    return code


def _less(usage: Usage, other: Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens - other.prompt_tokens,
        completion_tokens=usage.completion_tokens - other.completion_tokens,
        cached_tokens=usage.cached_tokens - other.cached_tokens,
    )
