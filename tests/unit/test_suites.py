"""What the last lines of `make test-all` say of each engine."""

from pathlib import Path

from scripts import test_all as suites

CORE, VLLM = "core, hf bf16 and nf4, fleet", "vllm (CPU)"


def write(folder: Path, suite: str, *cases: str) -> None:
    content = "".join(cases)
    path = suites.report_of(suite, folder)
    path.write_text(f"<testsuites><testsuite>{content}</testsuite></testsuites>")


def case(name: str, inside: str = "", of: str = "tests.conformance.engine.test_engine") -> str:
    return f'<testcase classname="{of}" name="{name}">{inside}</testcase>'


def said(folder: Path, *ran: str) -> dict[str, str]:
    return {
        one.name.removeprefix("conformance: "): one.words for one in suites.conformance(ran, folder)
    }


def test_each_engine_is_said_to_have_done_what_its_own_tests_did(tmp_path: Path) -> None:
    write(
        tmp_path,
        CORE,
        case("test_a[simulated]"),
        case("test_a[hf-float32]"),
        case("test_b[hf-float32-n]"),
        case("test_a[hf-nf4]"),
        case("test_b[hf-nf4-n]", "<failure/>"),
        case("test_a[hf-float32]", of="tests.unit.test_else"),
    )
    found = said(tmp_path, CORE)
    assert found["hf float32"] == "2 passed"
    assert found["hf nf4"] == "FAILED: 1 passed, 1 failed"
    assert found["simulated"].startswith("1 passed;")


def test_an_engine_without_a_test_that_passed_has_not_run(tmp_path: Path) -> None:
    write(tmp_path, CORE, case("test_a[hf-bfloat16]", "<skipped/>"))
    found = said(tmp_path, CORE, VLLM)
    assert found["hf bfloat16"] == "not run"
    assert found["vllm (CPU)"] == "not run", "there is no report"
    assert found["hf on CUDA"].startswith("not run")


def test_a_report_of_an_earlier_run_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, VLLM, case("test_a[n]", of="tests.vllm.test_conformance"))
    assert "vllm (CPU)" not in said(tmp_path, CORE)
    assert said(tmp_path, VLLM)["vllm (CPU)"] == "1 passed"
