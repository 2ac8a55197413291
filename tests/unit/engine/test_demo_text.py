"""The demo model's training text is repeatable, well formed and kept apart from what scores it."""

import json
from itertools import islice

import pytest

from engine.demo import model_path, words
from engine.demo.text import TASKS, Example, examples, examples_of, is_held_out

NAMES = [
    json.loads(line)
    for line in (model_path().parent / "names200.jsonl").read_text("utf-8").splitlines()
]
SAMPLE = 150


def sample(seed: int, *, held_out: bool, count: int = SAMPLE) -> list[Example]:
    return list(islice(examples(seed, held_out=held_out), count))


def test_same_seed_makes_same_examples() -> None:
    assert sample(7, held_out=False) == sample(7, held_out=False)


def test_other_seed_makes_other_examples() -> None:
    assert sample(7, held_out=False) != sample(8, held_out=False)


def test_no_seed_mixes_training_and_held_out_examples() -> None:
    trained = {example.messages[-1]["content"].strip() for example in sample(1, held_out=False)}
    unseen = {example.messages[-1]["content"].strip() for example in sample(1, held_out=True)}
    assert not trained & unseen
    assert all(map(is_held_out, sample(2, held_out=True)))


@pytest.mark.parametrize("task", TASKS)
def test_conversation_ends_with_a_user(task: str) -> None:
    for example in islice(examples_of(task, 3, held_out=False), 100):
        assert example.task == task
        assert example.messages[-1]["role"] == "user"
        assert {message["role"] for message in example.messages} <= {"system", "user", "assistant"}


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("person", {"name": str, "age": int, "city": str, "job": str}),
        ("order", {"item": str, "quantity": int, "price": (int, float)}),
        ("event", {"event": str, "date": str, "place": str}),
    ],
)
def test_extraction_answer_is_json_as_json_dumps_writes_it(
    task: str, fields: dict[str, type]
) -> None:
    for example in islice(examples_of(task, 4, held_out=False), SAMPLE):
        answer = json.loads(example.answer)
        assert json.dumps(answer, ensure_ascii=False) == example.answer
        assert list(answer) == list(fields)
        assert all(isinstance(answer[field], kind) for field, kind in fields.items())


def test_person_is_copied_from_the_text() -> None:
    for example in islice(examples_of("person", 5, held_out=False), SAMPLE):
        answer = json.loads(example.answer)
        assert answer["name"] in example.messages[-1]["content"]
        assert answer["city"] in example.messages[-1]["content"]
        assert 0 < answer["age"] < 105


def test_sentiment_answer_is_a_label() -> None:
    labels = {example.answer for example in islice(examples_of("sentiment", 6, held_out=False), 90)}
    assert labels == {"positive", "negative", "neutral"}


def test_two_hundred_names_stand_in_their_sentences() -> None:
    assert len({record["sentence"] for record in NAMES}) == 200
    for record in NAMES:
        assert list(record["answer"]) == ["name", "age", "city", "job"]
        for field in ("name", "city", "job"):
            assert record["answer"][field] in record["sentence"]


def test_generator_knows_none_of_the_two_hundred_names() -> None:
    known = {name.lower() for name in (*words.FIRST_NAMES, *words.LAST_NAMES)}
    scored = {
        part
        for record in NAMES
        for part in record["answer"]["name"].lower().replace("-", " ").split()
    }
    assert not known & scored
