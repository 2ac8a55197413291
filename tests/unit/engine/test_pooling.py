"""Encoders: vectors and scores, as the model alone would make them, whatever they run with."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from engine.base import Engine
from engine.config import HfConfig
from engine.encoders import read_pooling_settings
from engine.registry import describe_model, open_engine
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.pooling import EMBEDDINGS, POOLING_ENDPOINTS, RERANK, SCORE, Pooling
from jobs.domain.request import Request
from jobs.domain.result import Result
from tests.unit.engine.conftest import make_tokenizer

Ask = Callable[..., dict[int, Result]]
WORDS = ("alpha", "beta", "gamma", "delta", "json", "decoder", "wrap", "text")


def tiny_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 32) -> BertConfig:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1
    return config


def make_encoder(folder: Path, *, hidden_size: int = 32, mode: str = "mean_tokens") -> None:
    """Save a random encoder that says how it pools, as sentence-transformers save it."""
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    BertModel(tiny_config(tokenizer, hidden_size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds = ("Transformer", "Pooling", "Normalize")
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"type": f"sentence_transformers.models.{kind}", "path": f"{n}_{kind}" if n else ""}
                for n, kind in enumerate(kinds)
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))


def make_scorer(folder: Path, *, hidden_size: int = 32) -> None:
    """Save a random cross-encoder."""
    tokenizer = make_tokenizer()
    torch.manual_seed(2)
    model = BertForSequenceClassification(tiny_config(tokenizer, hidden_size))
    with torch.no_grad():
        # What is query and what is text shall matter to the score.
        model.bert.embeddings.token_type_embeddings.weight *= 50
        model.classifier.weight *= 50
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer")
    make_scorer(folder)
    return folder


@pytest.fixture(scope="module")
def engine(encoder: Path) -> Iterator[Engine]:
    opened = open_engine(HfConfig(model=str(encoder), compute_dtype="float32", slots=4))
    yield opened
    opened.close()


def floats(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


def alone(folder: Path, text: str) -> torch.Tensor:
    """Return a text's vector, made by the model without us."""
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    ids = torch.tensor([make_tokenizer().backend_tokenizer.encode(text).ids])
    with torch.inference_mode():
        hidden = model(input_ids=ids).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)


def sentence(source: random.Random, num_words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(num_words))


def test_every_text_has_the_vector_that_it_has_alone(
    engine: Engine, encoder: Path, ask: Ask
) -> None:
    source = random.Random(3)
    requests = [
        Request(
            id=number,
            pooling=Pooling(
                "embed", tuple(sentence(source, source.randint(1, 9)) for _ in range(5))
            ),
        )
        for number in range(12)
    ]
    results = ask(engine, requests)
    assert sorted(results) == list(range(12))
    for request in requests:
        assert request.pooling is not None
        for text, vector in zip(request.pooling.texts, results[request.id].vectors, strict=True):
            assert isinstance(text, str)
            assert torch.allclose(torch.tensor(floats(vector)), alone(encoder, text), atol=1e-5)


def test_shorter_vectors_have_length_one_again(engine: Engine, ask: Ask) -> None:
    long = ask(engine, [Request(id=1, pooling=Pooling("embed", ("alpha",)))])[1]
    short = ask(engine, [Request(id=1, pooling=Pooling("embed", ("alpha",), (), 8))])[1]
    cut = torch.tensor(floats(long.vectors[0])[:8])
    expected = torch.nn.functional.normalize(cut, dim=0)
    assert torch.allclose(torch.tensor(floats(short.vectors[0])), expected, atol=1e-6)


def test_token_ids_are_embedded_as_they_are(engine: Engine, ask: Ask) -> None:
    ids = tuple(make_tokenizer().backend_tokenizer.encode("alpha beta").ids)
    results = ask(
        engine,
        [
            Request(id=1, pooling=Pooling("embed", ("alpha beta",))),
            Request(id=2, pooling=Pooling("embed", (ids,))),
        ],
    )
    assert results[1].usage.prompt_tokens == results[2].usage.prompt_tokens == len(ids)
    assert torch.allclose(
        torch.tensor(floats(results[1].vectors[0])), torch.tensor(floats(results[2].vectors[0]))
    )


def test_an_encoder_scores_by_the_cosine_of_vectors(
    engine: Engine, encoder: Path, ask: Ask
) -> None:
    request = Request(id=1, pooling=Pooling("score", ("alpha", "beta gamma"), ("alpha",)))
    scores = ask(engine, [request])[1].scores
    expected = alone(encoder, "alpha") @ alone(encoder, "beta gamma")
    assert scores == pytest.approx((1.0, float(expected)), abs=1e-5)


def test_a_head_for_scores_sees_both_texts_at_once(scorer: Path, ask: Ask) -> None:
    opened = open_engine(HfConfig(model=str(scorer), compute_dtype="float32"))
    try:
        request = Request(
            id=1, pooling=Pooling("score", ("beta", "gamma delta"), ("alpha", "alpha beta"))
        )
        refused = Request(id=2, pooling=Pooling("embed", ("alpha",)))
        results = ask(opened, [request, refused])
    finally:
        opened.close()
    model = BertForSequenceClassification.from_pretrained(scorer).eval()
    backend = make_tokenizer().backend_tokenizer
    expected = []
    for query, text in (("alpha", "beta"), ("alpha beta", "gamma delta")):
        encoded = backend.encode(query, text)
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor([encoded.ids]),
                token_type_ids=torch.tensor([encoded.type_ids]),
            ).logits
        expected.append(float(torch.sigmoid(logits[0, 0])))
    assert results[1].scores == pytest.approx(expected, abs=1e-5)
    assert results[2].error is not None
    assert results[2].error.code == "unsupported_endpoint"


def test_what_cannot_be_embedded_costs_its_own_line(engine: Engine, ask: Ask) -> None:
    results = ask(
        engine,
        [
            Request(id=1, pooling=Pooling("embed", ("alpha " * 200,))),
            Request(id=2, pooling=Pooling("embed", ((5, 1_000_000),))),
            Request(id=3, prompt="Write something."),
            Request(id=4, pooling=Pooling("embed", ("alpha",))),
        ],
    )
    codes = {number: result.error and result.error.code for number, result in results.items()}
    assert codes == {
        1: "context_length_exceeded",
        2: "invalid_value",
        3: "unsupported_endpoint",
        4: None,
    }


def test_requests_that_nobody_waits_for_are_left_out(engine: Engine, ask: Ask) -> None:
    requests = [Request(id=n, pooling=Pooling("embed", ("alpha",))) for n in range(4)]
    assert sorted(ask(engine, requests, aborted=[1, 2])) == [0, 3]


def test_a_folder_says_what_its_model_does(encoder: Path, scorer: Path, tiny_model: Path) -> None:
    def endpoints(folder: Path) -> tuple[str, ...]:
        return describe_model(HfConfig(model=str(folder)), "m").endpoints

    assert endpoints(encoder) == POOLING_ENDPOINTS
    assert endpoints(scorer) == (RERANK, SCORE)
    assert EMBEDDINGS not in endpoints(tiny_model)


@pytest.mark.parametrize(
    ("described", "complaint"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "max_tokens"),
        ({}, "nothing"),
    ],
)
def test_a_way_of_pooling_that_is_not_built_in_is_named(
    tmp_path: Path, described: dict[str, bool], complaint: str
) -> None:
    (tmp_path / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]'
    )
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(described))
    with pytest.raises(EngineMisconfigured, match=complaint):
        read_pooling_settings(tmp_path)
