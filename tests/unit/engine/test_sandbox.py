import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from engine.sandbox import Sandbox
from jobs.domain.request import Constraint

FINE = Constraint("regex", "a+b")
ENDLESS = Constraint("regex", "(a{1000}){1000}")


def test_each_constraint_gets_its_own_verdict_in_order() -> None:
    with Sandbox() as sandbox:
        verdicts = sandbox.check_many(
            [
                FINE,
                Constraint("json_schema", '{"type": "strin"}'),
                Constraint("json_schema", '{"uniqueItems": true}'),
                FINE,
            ]
        )
    assert [verdict.outcome for verdict in verdicts] == [
        "enforced",
        "invalid",
        "validated",
        "enforced",
    ]
    assert verdicts[0].enforceable
    assert verdicts[1].error_code == "invalid_schema"
    assert "`uniqueItems`" in verdicts[2].message


def test_thousands_of_distinct_schemas_pass_through_the_pipe() -> None:
    schemas = [
        Constraint("json_schema", json.dumps({"type": "string", "enum": [f"{i}" * (i % 90)]}))
        for i in range(1, 1500)
    ]
    with Sandbox() as sandbox:
        assert all(verdict.enforceable for verdict in sandbox.check_many(schemas))


def test_constraint_that_takes_too_long_is_too_complex_and_the_rest_is_checked() -> None:
    with Sandbox(wall_seconds=0.3) as sandbox:
        verdicts = sandbox.check_many([FINE, ENDLESS, Constraint("regex", "c")])
    assert [verdict.outcome for verdict in verdicts] == ["enforced", "invalid", "enforced"]
    assert verdicts[1].error_code == "schema_too_complex"


def test_constraint_that_takes_too_much_memory_is_too_complex() -> None:
    large = Constraint("json_schema", json.dumps({"enum": [f"value {i}" for i in range(4000)]}))
    with Sandbox() as sandbox:
        assert sandbox.check(large).enforceable
    # The libraries alone take more, so nothing new can be allocated.
    with Sandbox(memory_bytes=64 << 20) as sandbox:
        assert sandbox.check(large).error_code == "schema_too_complex"


def test_helper_that_was_killed_is_replaced_and_no_item_is_blamed() -> None:
    with Sandbox() as sandbox:
        assert sandbox.check(FINE).enforceable
        helper = sandbox._helper  # noqa: SLF001 -- the test plays the out-of-memory killer
        assert helper is not None
        helper.kill()
        assert sandbox.check(Constraint("regex", "other")).enforceable


def test_known_verdicts_need_no_helper() -> None:
    with Sandbox() as sandbox:
        assert sandbox.check(FINE).enforceable
        sandbox.close()
        assert sandbox.check(FINE).enforceable
        assert sandbox._helper is None  # noqa: SLF001 -- none was started


@pytest.mark.skipif(sys.platform != "linux", reason="uses the parent-death signal")
def test_helper_ends_with_its_parent() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import time
                from engine.sandbox import Sandbox
                from jobs.domain.request import Constraint
                sandbox = Sandbox()
                sandbox.check(Constraint("regex", "a"))
                print(sandbox._helper.pid, flush=True)
                time.sleep(60)
                """
            ),
        ],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    helper = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    ends_at = time.monotonic() + 10
    while _is_running(helper) and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert not _is_running(helper)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 -- not a file of ours
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
