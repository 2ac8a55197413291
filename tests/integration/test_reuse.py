"""`batchctl run --reuse` beside what earlier runs have kept."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from engine.demo import model_path
from tests.builders import make_line
from tests.integration.runs import Folder

KEEP = {"BATCHCTL_REUSE__EXPIRE_DAYS": "1"}


def lines_of(numbers: range, **body: object) -> bytes:
    return b"".join(
        make_line(f"r{n}", f"hello {n}", **{"temperature": 0, **body}) + b"\n" for n in numbers
    )


class Runs(Folder):
    """A folder whose simulated model writes down how many tokens it makes."""

    def reuse(self, content: bytes) -> tuple[int, str]:
        """Run a file; return how many tokens were computed, and what was said."""
        before = self.num_tokens()
        ended = self.run_file(content, "--reuse")
        assert ended.code == 0, ended.stderr
        return self.num_tokens() - before, ended.stderr

    def num_tokens(self) -> int:
        ledger = self / "ledger"
        return int(np.fromfile(ledger, dtype="<u4").sum()) if ledger.exists() else 0


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path, options={"ledger": str(tmp_path / "ledger")}, settings=dict(KEEP))


def test_chats_and_responses_of_one_meaning_share_their_answers(runs: Runs) -> None:
    def responses(numbers: range) -> bytes:
        return b"".join(
            json.dumps(
                {
                    "custom_id": f"r{n}",
                    "method": "POST",
                    "url": "/v1/responses",
                    "body": {"model": "simulated", "input": f"hello {n}", "temperature": 0},
                }
            ).encode()
            + b"\n"
            for n in numbers
        )

    def outputs() -> list[str]:
        bodies = [line["response"]["body"] for line in runs.lines("out.jsonl")]
        return [body["output"][0]["content"][0]["text"] for body in bodies]

    assert runs.reuse(responses(range(6)))[0] == 6 * 4
    first = outputs()
    tokens, said = runs.reuse(responses(range(6)))
    assert (tokens, outputs()) == (0, first)
    assert "reused     6 of 6 answers" in said
    tokens, _ = runs.reuse(lines_of(range(6), model="simulated"))
    assert (tokens, answers_of(runs)) == (0, first)


def answers_of(folder: Folder) -> list[str]:
    lines = folder.lines("out.jsonl")
    return [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]


def test_a_second_run_of_a_file_computes_nothing_and_a_changed_model_everything(runs: Runs) -> None:
    content = lines_of(range(20))
    tokens, said = runs.reuse(content)
    assert tokens == 20 * 4
    assert "reused     0 of 20 answers" in said
    first = answers_of(runs)
    tokens, said = runs.reuse(content)
    assert tokens == 0
    assert "reused     20 of 20 answers" in said
    assert answers_of(runs) == first
    tokens, said = runs.reuse(lines_of(range(10, 30)))
    assert tokens == 10 * 4
    assert "reused     10 of 20 answers" in said
    ended = runs.run_file(content, "--reuse", "--json")
    assert json.loads(ended.stdout)["reused"] == 20
    runs.options |= {"reply_tokens": 5}
    assert runs.reuse(content)[0] == 20 * 5
    assert runs.reuse(lines_of(range(20), max_tokens=3))[0] == 20 * 3


@pytest.mark.slow
def test_what_has_expired_is_computed_and_goes(runs: Runs) -> None:
    runs.settings = {"BATCHCTL_REUSE__EXPIRE_DAYS": str(0.5 / 86_400)}
    runs.reuse(lines_of(range(5)))
    time.sleep(0.6)
    assert runs.reuse(lines_of(range(5)))[0] == 5 * 4
    kept = [path for path in (runs / "data/reuse/blobs/reuse").rglob("*") if path.is_file()]
    assert len(kept) == 1, "the older one is removed"


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_what_it_took(runs: Runs) -> None:
    runs.reuse(lines_of(range(5)))
    assert runs.run_file(lines_of(range(9)), "--reuse").code == 0
    before = runs.num_tokens()
    ended = runs.run_file(lines_of(range(9)), "--reuse", "--resume")
    assert (ended.code, runs.num_tokens()) == (0, before)
    ended = runs.run_file(lines_of(range(9)), "--resume")
    ended.assert_refused(3, "reuse (then yes, now unset)")


def test_reuse_has_to_be_allowed_by_the_settings(runs: Runs) -> None:
    runs.settings = {}
    ended = runs.run_file(lines_of(range(2)), "--reuse")
    ended.assert_refused(3, "reuse.expire_days")
    assert not (runs / "data").exists()


@pytest.mark.slow
def test_other_weights_under_the_same_name_never_give_old_answers(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in model_path().iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    folder = Folder(tmp_path, settings=dict(KEEP))
    folder.write(
        "in.jsonl",
        b"".join(
            make_line(f"r{n}", f"hello {n}", temperature=0, max_tokens=8, model=None) + b"\n"
            for n in range(3)
        ),
    )

    def run() -> tuple[int, list[str]]:
        ended = folder.run(
            "in.jsonl",
            "-m",
            str(model),
            "--engine",
            "hf",
            "-o",
            "out.jsonl",
            "--reuse",
            "--json",
            seconds=240,
        )
        assert ended.code == 0, ended.stderr
        return json.loads(ended.stdout)["reused"], answers_of(folder)

    num_reused, first = run()
    assert num_reused == 0
    assert run() == (3, first)
    (weights,) = model.glob("*.safetensors")
    before = weights.stat()
    start = 8 + int.from_bytes(weights.read_bytes()[:8], "little")  # behind the header
    np.memmap(weights, dtype="<u2", offset=start)[::3] ^= 0x8000  # other signs, all else the same
    assert weights.stat().st_size == before.st_size
    num_reused, other = run()
    assert num_reused == 0
    assert other != first
