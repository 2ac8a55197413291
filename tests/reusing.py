"""Batches that take answers of earlier ones and give theirs to later ones."""

from collections.abc import Callable
from typing import Any

from jobs.domain.batch import Batch
from jobs.domain.ids import TenantId
from jobs.domain.request import Capabilities
from jobs.feed import FeedSettings
from jobs.reuse import Cache
from storage import answers
from storage.answers import AnswerBlob
from tests.builders import Bench, ScriptedEngine, Worker, describe, make_line

GREEDY: dict[str, Any] = {"temperature": 0}
DAY = 86_400.0
FLUSH_EACH = FeedSettings(flush_results=1, flush_bytes=1, flush_seconds=0, poll_seconds=0.02)


def lines_of(numbers: range, **body: object) -> list[bytes]:
    return [make_line(f"r{n}", f"hello {n}", **{**GREEDY, **body}) for n in numbers]


def join(lines: list[bytes]) -> bytes:
    return b"\n".join(lines) + b"\n"


class Reusing:
    """Batches that take answers of earlier ones and give theirs to later ones."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.cache = Cache(db=bench.db, blobs=bench.blobs, expire_seconds=DAY, max_bytes=1 << 30)
        self.engine = ScriptedEngine(slots=4)

    def submit(self, lines: list[bytes], *, reuse: bool = True, **changes: Any) -> Batch:  # noqa: ANN401
        return self.bench.submit(join(lines), reuse=reuse, **changes)

    def plan(self, **limits: Any) -> Batch:  # noqa: ANN401
        return self.bench.plan(cache=self.cache, **limits)

    def run(
        self,
        lines: list[bytes],
        *,
        reuse: bool = True,
        model: Callable[[str], Capabilities] = describe,
        tenant_id: str = "default",
        limits: dict[str, Any] | None = None,
    ) -> Batch:
        """Bring a batch to its end; `engine.asked` then says what was computed."""
        self.submit(lines, reuse=reuse, tenant_id=TenantId(tenant_id))
        self.plan(describe=model, **limits or {})
        self.engine = ScriptedEngine(slots=4)
        self.engine.capabilities = model("simulated")
        with Worker(self.bench, self.engine, settings=FLUSH_EACH) as worker:
            worker.result()
        return self.bench.finalize(self.cache)

    @property
    def num_run(self) -> int:
        return len(self.engine.asked)

    def blob(self, batch: Batch) -> AnswerBlob:
        (found,) = answers.list_newest(
            self.bench.db,
            tenant_id=batch.tenant_id,
            identity=describe("simulated").identity,
            limit=9,
        )
        assert found.batch_id == batch.id
        return found
