import json
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.domain.errors import InvalidLine
from jobs.domain.request import (
    CHAT,
    COMPLETIONS,
    PARAMETERS,
    Capabilities,
    Line,
    Message,
    SamplingParams,
    custom_id_of,
    parse_line,
)
from jobs.domain.responses import RESPONSES
from jobs.domain.sketch import Sketcher
from tests.builders import make_line
from tests.unit.jobs.domain.lines import (
    FORMAT,
    NEUTRAL,
    SCHEMA,
    USER,
    parse,
    with_body,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from(sorted({*PARAMETERS, *NEUTRAL, "messages", "prompt", "model"}))
plausible: st.SearchStrategy[Any] = st.sampled_from(
    [0, 1, 2, -1, 0.5, True, False, None, "", "a", [], ["a"], {}, {"type": "text"}, {"json": {}}]
)


def parse_or_explain(line: bytes, *, endpoint: str) -> Line | None:
    """Return the line, or None when it was refused for a reason that can be read."""
    try:
        return parse_line(line, endpoint=endpoint)
    except InvalidLine as error:
        if not (error.error_code and error.message):
            raise
        return None


@given(st.binary(max_size=60), st.sampled_from([CHAT, COMPLETIONS]))
def test_any_bytes_are_a_line_or_an_invalid_line(line: bytes, endpoint: str) -> None:
    parse_or_explain(line, endpoint=endpoint)


@given(st.data())
def test_any_damage_to_a_good_line_leaves_a_line_or_an_invalid_line(data: st.DataObject) -> None:
    good = with_body(
        '"temperature":1,"stop":["a"],'
        + FORMAT % SCHEMA
        + ',"guided_json":{"a":"b"},"metadata":null'
    )
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 4)))
    line = good[:start] + data.draw(st.binary(max_size=4)) + good[end:]
    parse_or_explain(line, endpoint=CHAT)


@given(
    st.dictionaries(fields, plausible | json_values, max_size=5),
    st.sampled_from([CHAT, COMPLETIONS]),
    st.booleans(),
)
def test_any_body_is_a_line_or_an_invalid_line(
    body: dict[str, Any],
    endpoint: str,
    complete: bool,  # noqa: FBT001
) -> None:
    if complete:
        body = {"messages": USER} | body if endpoint == CHAT else {"prompt": "x"} | body
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    parsed = parse_or_explain(json.dumps(line).encode(), endpoint=endpoint)
    if parsed is None:
        return
    assert (parsed.messages is None) is (endpoint == COMPLETIONS)
    msgspec.msgpack.encode(parsed.to_request(1))  # it can cross to the engine


sampling = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 2**31 - 1),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(-1, 2**31 - 1),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.lists(st.text(min_size=1, max_size=5), max_size=16),
        "ignore_eos": st.booleans(),
    },
)


@given(
    sampling,
    st.text(min_size=1, max_size=50).filter(lambda s: s.isprintable()),
    st.text(max_size=40),
    st.booleans(),
)
def test_what_is_accepted_arrives_as_it_was_written(
    asked: dict[str, Any],
    custom_id: str,
    content: str,
    slowly: bool,  # noqa: FBT001
) -> None:
    line = make_line(custom_id, content, **asked, **({"best_of": 1} if slowly else {}))
    parsed = parse(line)
    expected = SamplingParams(**asked | {"stop": tuple(asked.get("stop", ()))})
    assert parsed.sampling == expected
    assert parsed.custom_id == custom_id == custom_id_of(line)
    assert parsed.messages == (Message("user", content),)


# --- what planning sees of a line ---

contents = st.sampled_from(
    [
        "x",
        "",
        "é\u2028\U0001f600",
        [{"type": "text", "text": "x"}],
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        "a\nb",
        [{"type": "image"}],
        7,
    ]
)
conversations = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "nobody"]), "content": contents},
        optional={"name": st.sampled_from(["me", None, 1])},
    ),
    max_size=3,
)
prompts = st.sampled_from(["x", ["x"], [1, 2], [[1, 2]], [], ["x", "y"], [-1], None])
asked_for = st.one_of(
    sampling,
    st.dictionaries(fields, plausible | json_values, max_size=3),
    st.sampled_from(
        [
            {"max_completion_tokens": 5},
            {"max_tokens": 5},
            {"max_tokens": 5, "n": 1, "user": "me"},
            {"n": 2},
            {"logprobs": 0},
            {"response_format": {"type": "json_object"}},
            {"guided_json": {"type": "object"}},
            {"guided_json": '{"type": "object"}'},
            {"stop": "a"},
            {"stop": ["a"]},
            {"ignore_eos": False},
        ]
    ),
)


def _asking(url: str, talk: list[Any], prompt: object) -> dict[str, Any]:
    names: dict[str, tuple[str, object]] = {CHAT: ("messages", talk), RESPONSES: ("input", talk)}
    name, asked = names.get(url, ("prompt", prompt))
    return {name: asked}


written_lines = st.builds(
    lambda custom_id, url, model, talk, prompt, asked, style, damage: _damaged(
        json.dumps(
            {
                "custom_id": custom_id,
                "method": "POST",
                "url": url,
                "body": model | _asking(url, talk, prompt) | asked,
            },
            **style,
        ).encode(),
        damage,
    ),
    st.sampled_from(["a", "b", "é", "", "x" * 513, 5]),
    st.sampled_from([CHAT, CHAT, CHAT, COMPLETIONS, RESPONSES]),
    st.sampled_from([{"model": "m"}, {"model": "other"}, {}]),
    conversations,
    prompts,
    asked_for,
    st.sampled_from([{}, {"ensure_ascii": False}, {"separators": (",", ":")}, {"sort_keys": True}]),
    st.none() | st.tuples(st.integers(0, 200), st.binary(max_size=2)),
)


def _damaged(line: bytes, damage: tuple[int, bytes] | None) -> bytes:
    if damage is None:
        return line
    at, written = damage
    return line[:at] + written + line[at + len(written) :]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(written_lines, st.integers(1, 2)), min_size=1, max_size=8),
    st.sampled_from([CHAT, CHAT, COMPLETIONS, RESPONSES]),
)
def test_planning_and_running_agree_on_every_line(
    lines: list[tuple[bytes, int]], endpoint: str
) -> None:
    sketcher = Sketcher(endpoint)
    some = Capabilities(
        model="m", engine="hf", parameters=("seed",), constraints=("regex",), endpoints=(CHAT,)
    )
    seen: dict[bytes, bytes] = {}
    for line in [line for line, times in lines for _ in range(times)]:
        reason = _reason(partial(parse_line, line, endpoint=endpoint))
        assert _reason(partial(sketcher.sketch, line)) == reason
        if reason is not None:
            continue
        parsed = parse_line(line, endpoint=endpoint)
        sketch = sketcher.sketch(line)
        terms, asked = sketch.terms, parsed.sampling
        assert (sketch.custom_id, terms.model) == (parsed.custom_id, parsed.model)
        assert (terms.max_tokens, terms.temperature, terms.seed, terms.constraint) == (
            asked.max_tokens,
            asked.temperature,
            asked.seed,
            parsed.constraint,
        )
        first = [len(message.content) for message in (parsed.messages or ())[:-1]]
        assert sketch.num_first_chars == sum(first)
        # Equal where and only where what the engine is asked is.
        request = msgspec.msgpack.encode(parsed.to_request(0))
        digest = sketch.digest()
        assert seen.setdefault(digest, request) == request
        assert len(set(seen.values())) == len(seen)
        assert _reason(partial(terms.check, some)) == _reason(
            partial(parse_line, line, endpoint=endpoint, capabilities=some)
        )


def _reason(check: Callable[[], object]) -> tuple[str, str | None, str] | None:
    try:
        check()
    except InvalidLine as error:
        return error.error_code, error.param, error.message
    return None


def test_lines_in_a_row_that_ask_for_the_same_share_their_terms() -> None:
    sketcher = Sketcher(CHAT)
    first = sketcher.sketch(make_line("a", "one", max_tokens=5, user="me"))
    second = sketcher.sketch(make_line("b", "two", max_tokens=5, user="you"))
    third = sketcher.sketch(make_line("c", "two", max_tokens=6))
    assert first.terms is second.terms
    assert third.terms is not second.terms
    assert len({first.digest(), second.digest(), third.digest()}) == 3
