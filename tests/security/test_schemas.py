"""Schemas, patterns and grammars as weapons: rows 6, 13, 14 and 15 of the security table."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from engine.asking import Asking
from engine.complexity import MAX_LEVELS, TooDeep, is_endless, measure
from engine.config import AskingConfig
from engine.constraints import check, is_quick, validate
from engine.sandbox import Sandbox, Verdict
from jobs.checks import Problems, Schemas
from jobs.domain.batch import BatchStatus
from jobs.domain.errors import InvalidInput
from jobs.domain.request import Constraint, Request
from tests.builders import Bench, make_line
from tests.security.measuring import run_measured
from tests.sources import ListSource
from tests.unit.engine.test_asking import Parrot

NUM_LINKS = 40
ENDED = {"type": "array"}


def schema(value: object) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def chain(keyword: str, *, name: str = "$defs", links: int = NUM_LINKS) -> dict[str, Any]:
    """Return a schema of a few kilobytes that is followed 2 ** links times."""
    made: dict[str, Any] = {f"a{links}": ENDED}
    for number in range(links):
        next_one = {"$ref": f"#/{name}/a{number + 1}"}
        made[f"a{number}"] = {
            "allOf": {"allOf": [next_one, next_one]},
            "anyOf": {"anyOf": [{"allOf": [next_one, {"type": "string"}]}, next_one]},
            "oneOf": {"oneOf": [next_one, {"not": next_one}]},
            "if": {"if": next_one, "then": next_one, "else": False},
            "not": {"not": {"not": {"allOf": [next_one, {"not": {"not": next_one}}]}}},
            "dependentSchemas": {"dependentSchemas": {"x": next_one, "y": next_one}},
            "properties": {"properties": {"x": next_one, "y": next_one}},
            "items": {"prefixItems": [next_one, next_one]},
            "contains": {"contains": next_one, "propertyNames": next_one},
        }[keyword]
    return {name: made, "$ref": f"#/{name}/a0"}


def anchored_chain() -> dict[str, Any]:
    made: dict[str, Any] = {f"a{NUM_LINKS}": {"$anchor": f"a{NUM_LINKS}", **ENDED}}
    for number in range(NUM_LINKS):
        next_one = {"$ref": f"#a{number + 1}"}
        made[f"a{number}"] = {"$anchor": f"a{number}", "allOf": [next_one, next_one]}
    return {"$defs": made, "$ref": "#a0"}


def chain_in_a_resource() -> dict[str, Any]:
    return {"$ref": "#/$defs/r", "$defs": {"r": {"$id": "urn:x", **chain("allOf")}}}


def escaped_chain() -> dict[str, Any]:
    text = json.dumps(chain("allOf", name="a/b c"))
    return json.loads(text.replace("#/a/b c/", "#/a~1b%20c/"))  # type: ignore[no-any-return]


def tree(*, reference: str = "#/$defs/n", **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a schema that is followed twice for each level of the answer."""
    again = {"type": "object", "properties": {"c": {"$ref": reference}}}
    branches = [again | {"required": ["x"]}, again | {"required": ["c"]}, {"type": "string"}]
    return {"$defs": {"n": {"anyOf": branches, **more}}, "$ref": "#/$defs/n"}


def dynamic_tree() -> dict[str, Any]:
    again = {"type": "object", "properties": {"c": {"$dynamicRef": "#a"}}}
    branches = [again | {"required": ["x"]}, again, {"type": "string"}]
    return {"$dynamicAnchor": "a", "anyOf": branches}


def nested(levels: int) -> str:
    return '{"c":' * levels + "1" + "}" * levels


# --- row 13: schemas that are followed without end ---


@pytest.mark.parametrize(
    "bomb",
    [
        *(
            pytest.param(chain(keyword), id=keyword)
            for keyword in (
                *("allOf", "anyOf", "oneOf", "if", "not", "dependentSchemas"),
                *("properties", "items", "contains"),
            )
        ),
        pytest.param(chain("allOf", name="definitions"), id="definitions"),
        pytest.param(chain("allOf", name="elsewhere"), id="elsewhere"),
        pytest.param(anchored_chain(), id="anchors"),
        pytest.param(chain_in_a_resource(), id="resource"),
        pytest.param(escaped_chain(), id="escaped"),
        pytest.param({"properties": {"$defs": chain("allOf")}} | chain("allOf"), id="hidden"),
    ],
)
def test_row_13_a_schema_that_is_followed_exponentially_is_refused_before_it_is_compiled(
    bomb: dict[str, Any],
) -> None:
    began = time.process_time()
    with pytest.raises(InvalidInput, match="references are followed") as caught:
        check(schema(bomb))
    assert caught.value.error_code == "invalid_schema"
    assert time.process_time() - began < 5


def test_row_13_a_schema_that_shares_its_definitions_is_no_bomb() -> None:
    address = {"type": "object", "properties": {f"line{n}": {"type": "string"} for n in range(9)}}
    fields = {f"address{n}": {"$ref": "#/$defs/address"} for n in range(200)}
    fine = schema({"$defs": {"address": address}, "type": "object", "properties": fields})
    assert check(fine) == "enforced"
    assert is_quick(fine, "{}" * 100)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"properties": {"x": {"enum": list(range(5_001))}}}, "enum of more than"),
        ({"pattern": "a" * 2_049}, "pattern of more than"),
        ({"patternProperties": {"a" * 2_049: True}}, "pattern of more than"),
        ({"description": "x" * (256 << 10)}, "larger than"),
        ({"$ref": "http://127.0.0.1/x"}, "points outside"),
        (chain("contains", links=1_500), "references are followed"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_row_13_what_no_schema_needs_is_refused(value: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        check(schema(value))


@pytest.mark.parametrize(
    ("value", "is_refused"),
    [
        ({"$ref": "#"}, True),
        ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, True),
        ({"type": "object", "properties": {"n": {"$ref": "#"}}}, False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, True),
        ({"type": "array", "items": {"$ref": "#"}}, False),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": {"$ref": "#"}}, False),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, False),
        (
            {
                "$defs": {
                    "a": {
                        "type": "object",
                        "properties": {"b": {"anyOf": [{"$ref": "#/$defs/b"}]}},
                        "required": ["b"],
                    },
                    "b": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 2},
                },
                "$ref": "#/$defs/a",
            },
            True,
        ),
    ],
)
def test_row_13_a_schema_whose_every_value_is_endless_is_refused_before_it_is_asked_for(
    value: dict[str, Any],
    is_refused: bool,  # noqa: FBT001 -- a column
) -> None:
    if is_refused:
        with pytest.raises(InvalidInput, match="cannot be satisfied"):
            check(schema(value))
    else:
        check(schema(value))


def test_row_13_looking_for_the_end_of_tangled_definitions_has_an_end() -> None:
    every = [{"$ref": f"#/$defs/d{n}"} for n in range(14)]
    tangled = {"$defs": {f"d{n}": {"anyOf": every} for n in range(14)}, "$ref": "#/$defs/d0"}
    began = time.process_time()
    is_endless(tangled)
    assert time.process_time() - began < 5


def test_row_13_a_long_way_of_references_is_refused_and_overflows_no_stack() -> None:
    links = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}]} for n in range(1_500)}
    with pytest.raises(TooDeep):
        measure({"$defs": links | {"a1500": {}}, "$ref": "#/$defs/a0"})
    backwards = dict(reversed([*links.items(), ("a1500", {})]))
    with pytest.raises(TooDeep):
        measure({"allOf": list(backwards.values()), "$defs": backwards})
    assert MAX_LEVELS < 500


@pytest.mark.parametrize(
    "loop",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"type": "string"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$dynamicRef": "#"},
        {"not": {"$ref": "#"}},
        {"if": {"$ref": "#"}, "then": {"$ref": "#"}},
    ],
    ids=json.dumps,
)
def test_row_13_a_schema_that_names_itself_at_once_ends(loop: dict[str, Any]) -> None:
    with Sandbox() as sandbox:
        sandbox.check(schema(loop))
        sandbox.validate(schema(loop), "1")


@pytest.mark.parametrize("value", [tree(), dynamic_tree(), tree(minProperties=0)])
def test_row_13_an_answer_that_makes_a_recursive_schema_explode_holds_up_nobody(
    value: dict[str, Any],
) -> None:
    constraint = schema(value)
    assert is_quick(constraint, nested(4))
    assert validate(constraint, '{"c":{"c":"x"}}') is None
    assert not is_quick(constraint, nested(40))
    with Sandbox(wall_seconds=1) as sandbox:
        assert sandbox.validate(constraint, nested(40)) == "it takes too long to check"
        assert sandbox.validate(constraint, '{"c":{"c":"x"}}') is None, "others go on"
        reason = sandbox.validate(constraint, nested(9))
        assert reason == "it breaks `anyOf` of its schema", "checked in the helper"
        half = nested(40) + "\ud83d"
        assert sandbox.validate(constraint, half) == "it could not be checked"


def test_row_13_after_a_few_such_answers_the_constraint_is_not_tried_again() -> None:
    with Sandbox(cpu_seconds=1, wall_seconds=0.2) as sandbox:
        for _ in range(3):
            sandbox.validate(schema(tree()), nested(50))
        helper = sandbox._helper  # noqa: SLF001 - whether another one is started
        assert sandbox.validate(schema(tree()), nested(50)) == "it takes too long to check"
        assert sandbox._helper is helper  # noqa: SLF001


def test_row_13_a_list_is_followed_once_a_level_and_stays_quick() -> None:
    linked = schema({"type": "object", "properties": {"next": {"$ref": "#"}}})
    assert is_quick(linked, '{"next":' * 500 + "{}" + "}" * 500)


@pytest.mark.parametrize(
    "pattern",
    [
        "^(a|a)*$",
        "^(a+)+$",
        "^(a|aa)+$",
        "(.*a){40}$",
        "^[ab]*a[ab]{500}$",
        "^(([ab]*a[ab]{20}){20}){5}$",
        r"^(\w+\s?)*$",
    ],
)
def test_row_13_catastrophic_patterns_are_matched_in_linear_time(pattern: str) -> None:
    text = "ab" * 10_000 + "!"
    began = time.process_time()
    with Sandbox(cpu_seconds=2, wall_seconds=8) as sandbox:
        for constraint, answer in (
            (schema({"type": "string", "pattern": pattern}), json.dumps(text)),
            (schema({"patternProperties": {pattern: False}}), json.dumps({text: 1})),
            (schema({"propertyNames": {"pattern": pattern}}), json.dumps({text: 1})),
            (Constraint("regex", pattern), text),
        ):
            sandbox.check(constraint)
            sandbox.validate(constraint, answer)
    assert time.process_time() - began < 5


def test_row_13_repetitions_of_repetitions_cost_an_engine_little_time_and_memory() -> None:
    cost = run_measured(
        """
        import time
        import numpy as np
        from engine.constraints import byte_tokenizer, validate
        from engine.matching import TokenizerConstraints
        from jobs.domain.request import Constraint

        constraint = Constraint("regex", "((a{0,500}){0,500}){0,500}")
        constraints = TokenizerConstraints(byte_tokenizer())
        before = time.process_time()
        matcher, _ = constraints.matcher(constraint)
        row = np.full(constraints.num_words, -1, dtype=np.int32)
        num_steps = 0
        while num_steps < 2000:
            matcher.fill(row, int(row.ctypes.data))
            if not matcher.advance(ord("a")):
                break
            num_steps += 1
        validate(constraint, "a" * 20_000 + "!")
        told = [num_steps, time.process_time() - before]
        """
    )
    num_steps, cpu_seconds = cost.told
    assert num_steps > 0
    assert cpu_seconds < 5
    assert cost.peak_bytes < 300 << 20


def test_row_13_repetitions_of_repetitions_are_refused_as_the_pattern_of_a_schema() -> None:
    with pytest.raises(InvalidInput, match="`pattern`"):
        check(schema({"type": "string", "pattern": "((a{0,500}){0,500}){0,500}"}))


@pytest.mark.parametrize("pattern", [r"(a)\1", r"(?=a)b", r"(?<=a)b", r"(?>a)b"])
def test_row_13_no_pattern_reaches_an_engine_that_goes_back(pattern: str) -> None:
    with pytest.raises(InvalidInput):
        check(schema({"type": "string", "pattern": pattern}))


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "((a{0,500}){0,500}){0,500}"),
        Constraint("regex", "(?:" * 2_000 + ")" * 47),
        Constraint("grammar", "start: start start | "),
        Constraint("grammar", "start: " + "(" * 20_000 + ")" * 20_000),
        Constraint("grammar", "start: /" + "(a|" * 500 + ")" * 500 + "/"),
        Constraint("grammar", "root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000),
        Constraint("choice", json.dumps(["x" * 60_000] * 4)),
        Constraint("choice", json.dumps([str(n) for n in range(5_001)])),
        schema({"maxItems": 10**9, "minItems": 10**9, "items": {"type": "integer"}}),
        schema({"multipleOf": 1e-300}),
        schema({"minLength": 10**18}),
        schema({"type": "integer", "minimum": -(10**300), "maximum": 10**300}),
        schema({"type": "string", "pattern": "(" * 1_000 + ")" * 1_000}),
    ],
    ids=lambda constraint: f"{constraint.kind}-{constraint.spec[:30]}",
)
def test_row_13_what_takes_all_there_is_to_compile_costs_the_helper_at_most(
    constraint: Constraint,
) -> None:
    with Sandbox(cpu_seconds=1, wall_seconds=6) as sandbox:
        verdict = sandbox.check(constraint)
        assert verdict.outcome in {"enforced", "validated", "invalid"}
        assert sandbox.check(Constraint("regex", "a")).enforceable, "the next one is served"


def test_row_15_a_bad_constraint_among_good_ones_is_named_and_costs_the_others_nothing(
    bench: Bench,
) -> None:
    bombs = (chain("allOf"), tree(), {"pattern": "(a){5000}{5000}"}, {"type": "nothing"})
    lines = [make_line(f"r{n}", guided_json={"maxLength": n}) for n in range(200)]
    for number, bomb in enumerate(bombs):
        lines[50 * number] = make_line(f"r{50 * number}", guided_json=bomb)
    bench.submit(b"\n".join(lines))
    batch = bench.plan()
    assert batch.status is BatchStatus.FAILED
    named = {problem.line: problem.code for problem in batch.errors}
    assert set(named) <= {1, 51, 101, 151}
    assert named[1] == named[151] == "invalid_schema"


# --- row 6: nothing is fetched ---


@pytest.fixture
def listener() -> Iterator[tuple[str, list[object]]]:
    """A URL of this machine, and everybody who came there."""
    came: list[object] = []
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            came.append(address)
            connection.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/s.json", came
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(10)


def test_row_6_no_schema_or_grammar_makes_anything_be_fetched(
    listener: tuple[str, list[object]],
) -> None:
    url, came = listener
    host = url.rpartition("/")[0]
    with Sandbox() as sandbox:
        for constraint in (
            schema({"$ref": url}),
            schema({"$schema": url, "type": "object"}),
            schema({"$id": url, "$ref": "other.json"}),
            schema({"$id": f"{host}/", "$ref": "#/$defs/x", "$defs": {"x": {"$id": url}}}),
            schema({"$id": f"{host}/", "allOf": [{"$ref": "#/s.json"}]}),
            schema({"$defs": {"a": {"$id": f"{host}/a", "$ref": "#b"}}, "$ref": "#/$defs/a"}),
            schema({"$dynamicRef": url}),
            schema({"$recursiveRef": url}),
            schema({"$ref": "file:///etc/passwd"}),
            schema({"x-guidance": {"$ref": url}, "contentMediaType": url}),
            Constraint("grammar", 'start: %json {"$ref": "' + url + '"}'),
            Constraint("grammar", f"%import {url}.X\nstart: X"),
        ):
            sandbox.check(constraint)
            sandbox.validate(constraint, "{}")
            try:
                check(constraint)
            except InvalidInput:
                continue
    assert came == []


# --- row 14: what is kept of them ---


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param('schema({"maxLength": number, "enum": ["x" * 500]})', id="schemas"),
        pytest.param(
            'schema({"allOf": [{"pattern": "\\\\w{%d}%d" % (n, number)} for n in range(20, 40)]})',
            id="patterns",
        ),
        pytest.param('Constraint("regex", "\\\\w{20}X%d" % number)', id="regexes"),
        pytest.param('Constraint("choice", \'["%d"]\' % number)', id="choices"),
    ],
)
def test_row_14_thousands_of_distinct_constraints_leave_memory_flat(kind: str) -> None:
    cost = run_measured(
        f"""
        import json, resource
        from engine.constraints import validate
        from jobs.domain.request import Constraint

        def schema(value):
            return Constraint("json_schema", json.dumps(value))

        def size():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

        before, sizes = size(), []
        for number in range(1200):
            validate({kind}, '"some text"')
            if number in (599, 1199):
                sizes.append(size() - before)
        told = sizes
        """
    )
    half, full = cost.told
    assert full < 150 << 20
    assert full < half + (40 << 20)


def test_row_14_planning_holds_few_large_constraints_at_a_time() -> None:
    cost = run_measured(
        """
        from engine.sandbox import Verdict
        from jobs.checks import Problems, Schemas
        from jobs.domain.request import Constraint

        class Checker:
            def check_many(self, constraints, *, backend=None):
                return [Verdict("invalid", "invalid_schema", "too large") for _ in constraints]

        problems = Problems(10)
        schemas = Schemas(Checker(), problems, chunk=256, refuse=False)
        for number in range(200):
            schemas.add(Constraint("grammar", f"{number}" + "x" * (4 << 20)), number + 1, where="x")
        schemas.check()
        told = problems.count
        """
    )
    assert cost.told == 200
    assert cost.peak_bytes < 300 << 20


@pytest.mark.slow
def test_row_13_an_engine_goes_on_after_an_answer_that_cannot_be_judged_in_time() -> None:
    fine = '{"c":{"c":"x"}}'
    asking = Asking(Parrot(nested(40), fine), AskingConfig(max_asks=2))
    asked = [Request(id=number, prompt="?", constraint=schema(tree())) for number in (1, 2)]
    try:
        results = list(asking.generate(ListSource(asked, ())))
    finally:
        asking.close()
    assert [(one.text, one.attempts, one.error) for one in results] == [(fine, 2, None)] * 2


def test_row_14_planning_keeps_no_line_that_has_the_schema_of_others() -> None:
    checked: list[int] = []

    class Checker:
        def check_many(self, constraints: list[Constraint], **_: object) -> list[Verdict]:
            checked.append(len(constraints))
            return [Verdict("invalid", "invalid_schema", "no") for _ in constraints]

    problems = Problems(10)
    schemas = Schemas(cast("Sandbox", Checker()), problems, chunk=256, refuse=False)
    for number in range(25_000):
        schemas.add(Constraint("json_object"), number + 1, where="x")
        if number == 12_000:
            assert checked == [1], "once there are many"
    schemas.check()
    assert checked == [1]
    assert problems.count == 25_000
    assert [problem.line for problem in problems.first()] == list(range(1, 11))
