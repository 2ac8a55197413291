"""The mixed batch that every engine is held to, on the hf engine; see tests/vllm, tests/remote."""

from pathlib import Path

import pytest

from tests.integration.runs import REPOSITORY, Folder
from tests.mixed import TOTALS, check_mixed, write_mixed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_mixed_batch_has_only_valid_answers(tmp_path: Path, quantization: str) -> None:
    folder = Folder(tmp_path)
    write_mixed(folder / "in.jsonl")
    ended = folder.run(
        *("in.jsonl", "--engine", "hf", "--quantization", quantization),
        *("-m", "demo", "-o", "out.jsonl", "--errors", "err.jsonl"),
        seconds=280,
    )
    assert ended.code == 0, ended.stderr
    assert check_mixed(folder / "out.jsonl", folder / "err.jsonl") == TOTALS


def test_examples_are_answered_in_four_bits(tmp_path: Path) -> None:
    people = REPOSITORY / "examples" / "people.jsonl"
    folder = Folder(tmp_path)
    ended = folder.run(
        *(str(people), "--engine", "hf", "--quantization", "nf4", "-m", "demo"),
        *("-o", "out.jsonl", "--errors", "err.jsonl"),
        seconds=120,
    )
    assert ended.code == 0, ended.stderr
    num_lines = len(people.read_text("utf-8").splitlines())
    assert len((folder / "out.jsonl").read_text("utf-8").splitlines()) == num_lines
