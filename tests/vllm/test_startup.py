"""What a failure to start is taken for, by what vLLM's processes said."""

import pytest

from engine.vllm import startup
from jobs.domain.errors import EngineDied, EngineError, EngineMisconfigured, EngineOutOfMemory

FAILED = RuntimeError(
    "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (
            "RuntimeError: Did not receive response from front-end process within 5 minutes",
            EngineDied,
        ),
        ("ValueError: This model has no such layer", EngineMisconfigured),
        ("torch.OutOfMemoryError: CUDA out of memory.", EngineOutOfMemory),
    ],
)
def test_processes_that_did_not_find_each_other_are_no_fault_of_the_settings(
    reason: str, kind: type[EngineError]
) -> None:
    said = f"(EngineCore pid=7) Traceback (most recent call last):\n(EngineCore pid=7) {reason}\n"
    found = startup.explain(FAILED, said, model="tiny")
    assert type(found) is kind
    assert reason.partition(": ")[2] in found.message
    assert found.retryable is (kind is EngineDied)
