import dataclasses
import enum
import json
import sys
from pathlib import Path
from typing import Any, Literal, TypedDict

import pydantic
import pytest
from outlines import types

from engine.constraints import check, validate
from engine.output_types import load_output_type, load_schema_file, to_constraint
from jobs.domain.errors import InvalidInput


class Person(pydantic.BaseModel):
    name: str
    age: int


@dataclasses.dataclass
class Point:
    x: int


class Place(TypedDict):
    city: str


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


def move(x: int, *, fast: bool = False) -> None:
    """Stand for a tool."""


@pytest.mark.parametrize(
    ("shape", "kind", "good", "bad"),
    [
        (Person, "json_schema", '{"name": "a", "age": 1}', '{"name": "a"}'),
        (Point, "json_schema", '{"x": 1}', "{}"),
        (Place, "json_schema", '{"city": "a"}', "{}"),
        (list[Person], "json_schema", "[]", "{}"),
        (Person | None, "json_schema", "null", "1"),
        (move, "json_schema", '{"x": 1}', '{"fast": true}'),
        (Mood, "choice", "good", "ugly"),
        (Literal["a", "b"], "choice", "a", "c"),
        (Literal[1, "b"], "json_schema", "1", "2"),
        (types.JsonSchema({"type": "integer"}), "json_schema", "1", '"a"'),
        (types.Regex(r"\d{3}"), "regex", "123", "12"),
        (types.Choice(["a", "b"]), "choice", "a", "c"),
        (types.CFG('start: "a" | "b"'), "grammar", "a", "c"),
        (types.integer, "regex", "12", "x"),
        (types.either("a", "b") + types.digit, "regex", "a1", "a"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # no addresses: xdist compares
)
def test_shape_becomes_a_constraint(shape: object, kind: str, good: str, bad: str) -> None:
    constraint = to_constraint(shape)
    assert constraint.kind == kind
    assert check(constraint) in ("enforced", "validated")
    assert validate(constraint, good) is None
    assert validate(constraint, bad) is not None


@pytest.mark.parametrize("shape", [5, "x", object(), json, lambda x: x])
def test_what_describes_no_answer_is_refused(shape: Any) -> None:  # noqa: ANN401
    with pytest.raises(InvalidInput):
        to_constraint(shape)


def test_type_is_found_beside_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes_of_mine.py").write_text("from typing import Literal\nYes = Literal['y']\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load_output_type("shapes_of_mine:Yes").spec == '["y"]'
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nonsense", "module:name"),
        ("no_such_module_here:X", "no module"),
        ("json:nope", "has no"),
        ("json:decoder", "describes no answer"),
    ],
)
def test_name_that_leads_nowhere_says_why(name: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        load_output_type(name)


def test_schema_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "integer"}')
    assert load_schema_file(file).spec == '{"type": "integer"}'
    for content in ("{", "[]"):
        file.write_text(content)
        with pytest.raises(InvalidInput):
            load_schema_file(file)
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_schema_file(tmp_path / "absent.json")
