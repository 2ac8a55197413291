"""Encoders in vLLM: the same vectors and scores as the hf engine makes, and the same refusals."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine.base import Engine
from engine.config import HfConfig
from engine.registry import open_engine
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.pooling import Pooling
from jobs.domain.request import Request
from jobs.domain.result import Result
from tests.sources import ListSource
from tests.unit.engine.test_pooling import make_encoder, make_scorer
from tests.vllm.conftest import open_vllm

Ask = Callable[..., dict[int, Result]]
TEXTS = ("alpha", "beta gamma delta", "json decoder wrap text alpha beta", "wrap")
# vLLM's attention for CPUs has nothing narrower than heads of 32.
WIDTH = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    make_encoder(path, hidden_size=WIDTH)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with closing(open_vllm(folder, name="encoder")) as opened:
        yield opened


def by_hf(folder: Path, requests: Sequence[Request]) -> dict[int, Result]:
    config = HfConfig(model=str(folder), compute_dtype="float32")
    with closing(open_engine(config)) as opened:
        return {result.id: result for result in opened.generate(ListSource(requests))}


def test_vectors_are_those_of_the_hf_engine(engine: Engine, folder: Path, ask: Ask) -> None:
    requests = [
        Request(id=1, pooling=Pooling("embed", TEXTS)),
        Request(id=2, pooling=Pooling("embed", TEXTS[:2], (), 16)),
        Request(id=3, pooling=Pooling("embed", ((5, 6, 7),))),
        Request(id=4, pooling=Pooling("score", TEXTS[1:], TEXTS[:1])),
    ]
    found, expected = ask(engine, requests), by_hf(folder, requests)
    assert sorted(found) == [1, 2, 3, 4]
    for number in (1, 2, 3):
        pairs = zip(found[number].vectors, expected[number].vectors, strict=True)
        for ours, theirs in pairs:
            assert np.allclose(np.frombuffer(ours, "<f4"), np.frombuffer(theirs, "<f4"), atol=1e-4)
        assert found[number].usage == expected[number].usage
    assert found[4].scores == pytest.approx(expected[4].scores, abs=1e-4)


def test_pairs_are_scored_as_the_hf_engine_scores_them(tmp_path: Path, ask: Ask) -> None:
    make_scorer(tmp_path, hidden_size=WIDTH)
    requests = [
        Request(id=1, pooling=Pooling("score", TEXTS, ("alpha beta",))),
        Request(id=2, pooling=Pooling("embed", ("alpha",))),
    ]
    with closing(open_vllm(tmp_path, name="scorer")) as opened:
        found = ask(opened, requests)
    expected = by_hf(tmp_path, requests)
    assert found[1].scores == pytest.approx(expected[1].scores, abs=1e-4)
    assert len(set(found[1].scores)) == len(TEXTS)
    assert found[2].error is not None
    assert found[2].error.code == "unsupported_endpoint"


def test_what_cannot_be_embedded_costs_its_own_line(engine: Engine, ask: Ask) -> None:
    found = ask(
        engine,
        [
            Request(id=1, pooling=Pooling("embed", ("alpha " * 200,))),
            Request(id=2, pooling=Pooling("embed", ((5, 1_000_000),))),
            Request(id=3, prompt="Write something."),
            Request(id=4, pooling=Pooling("embed", ("alpha",))),
        ],
    )
    codes = {number: result.error and result.error.code for number, result in found.items()}
    assert codes == {
        1: "context_length_exceeded",
        2: "invalid_value",
        3: "unsupported_endpoint",
        4: None,
    }


def test_what_nobody_waits_for_is_dropped_and_the_rest_goes_on(engine: Engine) -> None:
    source = ListSource([Request(id=n, pooling=Pooling("embed", TEXTS)) for n in range(60)])
    answered: list[int] = []
    for result in engine.generate(source):
        answered.append(result.id)
        source.aborted |= set(range(1, 60, 2))
    assert set(range(0, 60, 2)) <= set(answered)
    assert len(answered) < 45, "a few are answered before they are dropped"
    assert len(answered) == len(set(answered))


def test_a_way_of_pooling_that_vllm_has_not_is_refused_before_it_starts(tmp_path: Path) -> None:
    make_encoder(tmp_path, hidden_size=WIDTH, mode="max_tokens")
    with pytest.raises(EngineMisconfigured, match="use the hf engine"):
        open_vllm(tmp_path)
