"""Request lines as weapons: rows 6, 11, 12, 16, 17, 20, 32 and 40 of the security table."""

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.domain.errors import InvalidLine
from jobs.domain.nesting import MAX_NESTING, is_nested_deeper, nesting_of
from jobs.domain.request import CHAT, COMPLETIONS, parse_line
from tests.builders import make_line
from tests.security.measuring import run_measured

DEEP = 5_000


def parse_or_explain(line: bytes, *, endpoint: str = CHAT) -> None:
    """Parse a line, which may be refused for a reason that can be read, and for nothing else."""
    try:
        parse_line(line, endpoint=endpoint)
    except InvalidLine as error:
        if not error.error_code or not 0 < len(error.message) < 500:
            raise


def refusal(line: bytes, endpoint: str = CHAT) -> InvalidLine:
    with pytest.raises(InvalidLine) as caught:
        parse_line(line, endpoint=endpoint)
    return caught.value


def with_body(fields: str) -> bytes:
    """Return a good chat line whose body has more fields, written as they are."""
    return make_line().replace(b'"messages"', fields.encode() + b', "messages"', 1)


# --- row 11: bombs of depth, numbers, keys and encodings ---


@pytest.mark.parametrize(
    "line",
    [
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        with_body('"x": ' + "[" * DEEP + "]" * DEEP),
        with_body('"x": ' + '{"a":' * 100 + "1" + "}" * 100),
        with_body('"messages": ' + "[" * 100 + "]" * 100),
        with_body('"logit_bias": ' + '{"a":' * MAX_NESTING + "1" + "}" * MAX_NESTING),
        make_line(metadata={}).replace(b'"hello"', b'["x", ' * 70 + b"1" + b"]" * 70),
    ],
    ids=lambda line: f"{line[:24]!r}",
)
def test_row_11_depth_is_refused_with_its_own_code_before_it_is_parsed(line: bytes) -> None:
    assert refusal(line).error_code == "nesting_too_deep"


def test_row_11_brackets_in_text_are_no_depth() -> None:
    text = '{[("\\' * 5_000
    parsed = parse_line(make_line(content=text, metadata={}), endpoint=CHAT)
    assert parsed.messages is not None
    assert parsed.messages[0].content == text


json_values = st.recursive(
    st.none() | st.booleans() | st.text(alphabet='{}[]"\\a\n', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet='{}[]"\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)


def depth_of(value: Any) -> int:  # noqa: ANN401 - any JSON
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@given(json_values)
def test_row_11_nesting_is_what_a_parser_finds(value: Any) -> None:  # noqa: ANN401 - any JSON
    text = json.dumps(value).encode()
    assert nesting_of(text) == depth_of(value)
    for levels in range(4):
        assert is_nested_deeper(text, levels) is (depth_of(value) > levels)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ('"seed": ' + "9" * 5_000, "invalid_json_line"),
        ('"seed": ' + "9" * 4_000, "invalid_type"),
        ('"seed": 1' + "0" * 30, "invalid_value"),
        ('"max_tokens": 1e400', "invalid_json_line"),
        ('"temperature": NaN', "invalid_json_line"),
        ('"temperature": -Infinity', "invalid_json_line"),
        ('"temperature": 1e-400000', None),
        ('"stop": "\\ud800"', "invalid_json_line"),
        ('"stop": "\\udfff\\ud800"', "invalid_json_line"),
        ('"' + "k" * 100_000 + '": 1', "unsupported_parameter"),
        ('"' + "\\u0000" * 1_000 + '": 1', "unsupported_parameter"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_row_11_numbers_keys_and_surrogates_that_no_parser_should_meet(
    fields: str, code: str | None
) -> None:
    if code is None:
        assert parse_line(with_body(fields), endpoint=CHAT).sampling.temperature == 0
    else:
        error = refusal(with_body(fields))
        assert error.error_code in {code, "invalid_type", "invalid_value"}
        assert len(error.message) < 500


def test_row_11_a_key_that_repeats_means_the_same_to_every_reader() -> None:
    from jobs.domain.request import custom_id_of  # noqa: PLC0415 - next to what it is held against

    line = make_line("first").replace(b'{"custom_id"', b'{"custom_id": "other", "custom_id"', 1)
    assert parse_line(line, endpoint=CHAT).custom_id == custom_id_of(line) == "first"


@given(st.binary(max_size=200))
def test_row_11_any_bytes_are_a_line_or_an_invalid_line(line: bytes) -> None:
    for endpoint in (CHAT, COMPLETIONS):
        parse_or_explain(line, endpoint=endpoint)


@given(st.data())
def test_row_11_hostile_pieces_inside_a_good_line_are_never_another_exception(
    data: st.DataObject,
) -> None:
    pieces = [
        *(b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"\x00", b"\xff", b"\xf0\x9f"),
        *(b"[" * 80, b'{"a":' * 80, b"9" * 4_400, b"1e999", b"NaN", b"\\ud800", b"\\u0000"),
        *(b'"metadata": {}', b'"x": 1,', b'"custom_id": [],', b'"role": "root",', b"null"),
    ]
    line = make_line(metadata={}, guided_json={"a": 1})
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(line)))
        line = line[:at] + data.draw(st.sampled_from(pieces)) + line[at:]
    parse_or_explain(line)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: b"[" * n,
        lambda n: b'{"a":' * (n // 5),
        lambda n: b'"\\' * (n // 2),
        lambda n: b'{"' + b"\\" * n,
        lambda n: make_line(content="{[" * (n // 2), metadata={}),
        lambda n: with_body('"x": "' + "'" * n + '"'),
        lambda n: with_body(f'"{"`" * n}": 1'),
        lambda n: with_body('"role": "' + "' - at `$" * (n // 8) + '"'),
    ],
    ids=["arrays", "objects", "quotes", "backslashes", "text", "apostrophes", "ticks", "places"],
)
def test_row_11_time_grows_with_the_length_of_a_bad_line_and_no_faster(make: Any) -> None:  # noqa: ANN401
    def cost(num_bytes: int) -> float:
        line = make(num_bytes)
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            with suppress(InvalidLine):
                parse_line(line, endpoint=CHAT)
            best = min(best, time.process_time() - began)
        return best

    # Sixteen times the length; what grows with its square takes 256 times as long.
    assert cost(1_600_000) < 80 * max(cost(100_000), 0.001)


# --- row 12: a line without an end ---


def test_row_12_a_line_of_gigabytes_costs_no_memory_and_the_next_one_is_read() -> None:
    cost = run_measured(
        """
        from jobs.domain.request import CHAT, parse_line
        from storage.jsonl import scan
        from tests.builders import make_line

        class Endless:
            '''A blob with a line of a gigabyte between two good ones.'''
            def __init__(self):
                self.pieces = iter([make_line("a") + b"\\n", *[b"x" * (1 << 20)] * 1024,
                                    b"\\n" + make_line("b") + b"\\n"])
            def __enter__(self): return self
            def __exit__(self, *_): pass
            def read(self, size=-1): return next(self.pieces, b"")

        class Blobs:
            def open_reader(self, key, *, start=0, length=None): return Endless()

        told = [
            (number, line and parse_line(line, endpoint=CHAT).custom_id)
            for number, _, _, line in scan(Blobs(), "key")
        ]
        """
    )
    assert cost.told == [[1, "a"], [2, None], [3, "b"]]
    assert cost.peak_bytes < 250 << 20


# --- row 40: ids and names of any length ---


@pytest.mark.parametrize("custom_id", ["", "x" * 513, "é" * 257, "日" * 171, "\U0001f600" * 129])
def test_row_40_a_custom_id_has_at_most_512_bytes(custom_id: str) -> None:
    error = refusal(make_line(custom_id))
    assert (error.param, error.error_code) == ("custom_id", "invalid_value")


@pytest.mark.parametrize("custom_id", ["x" * 512, "é" * 256, "日" * 170, "\x1b[2J", "\0"])
def test_row_40_a_custom_id_of_512_bytes_is_good(custom_id: str) -> None:
    assert parse_line(make_line(custom_id), endpoint=CHAT).custom_id == custom_id


def test_row_40_a_model_has_a_name_and_no_novel() -> None:
    assert parse_line(make_line(model="m" * 512), endpoint=CHAT).model == "m" * 512
    assert refusal(make_line(model="m" * 513)).param == "body.model"


@pytest.mark.parametrize(
    "fields",
    [
        f'"{"canary" * 1_000}": 1',
        f'"response_format": {{"type": "{"canary" * 1_000}"}}',
        f'"response_format": {{"type": "text", "{"canary" * 1_000}": 1}}',
        f'"structured_outputs": {{"{"canary" * 1_000}": 1}}',
    ],
)
def test_row_40_a_message_shows_little_of_what_it_complains_about(fields: str) -> None:
    error = refusal(with_body(fields))
    assert len(error.message) < 300
    assert len(error.param or "") < 300
    assert "canary" * 20 not in f"{error.message}{error.param}"


@pytest.mark.parametrize(
    "line",
    [with_body('"\\u0000\\u001b[2J": 1'), make_line().replace(b'"user"', b'"\\u0000\\u202e"')],
)
def test_row_40_a_message_holds_no_character_that_a_database_or_terminal_obeys(line: bytes) -> None:
    assert refusal(line).message.isprintable()


# --- what a line may not ask for ---


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "http://2852039166/"}},
        {"type": "image_url", "image_url": {"url": "http://[::ffff:169.254.169.254]/"}},
        {"type": "image_url", "image_url": {"url": "http://good.example@10.0.0.1/"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1/"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "text", "text": "x", "image_url": "http://127.0.0.1/"},
    ],
    ids=lambda part: json.dumps(part)[:60],
)
def test_row_6_no_part_of_a_message_names_something_to_fetch(part: dict[str, Any]) -> None:
    line = make_line(messages=[{"role": "user", "content": [part]}])
    assert (refusal(line).param or "").startswith("body.messages")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template", "{% for x in range(10**9) %}{% endfor %}"),
        ("chat_template_kwargs", {"tokenize": True}),
        ("chat_template_kwargs", {"chat_template": "{{ 'x' * 10**9 }}"}),
        ("mm_processor_kwargs", {"num_crops": 10**9}),
        ("documents", [{"text": "x"}]),
        ("prompt_embeds", "gASVAAAA"),
        ("prompt_logprobs", 20),
        ("cache_salt", "another-tenant"),
        ("vllm_xargs", {"x": 1}),
        ("logits_processors", ["os.system"]),
        ("kv_transfer_params", {"remote_host": "10.0.0.1"}),
        ("trust_remote_code", True),
        ("tools", [{"type": "web_search"}]),
        ("n", 16_384),
        ("best_of", 16_384),
        ("top_logprobs", 10_000),
        ("logit_bias", {"1": 1000}),
        ("max_tokens", 2**31),
        ("stop", ["x"] * 17),
        ("use_beam_search", True),
    ],
)
def test_row_16_row_20_row_29_row_32_no_line_changes_template_cache_or_number_of_answers(
    name: str,
    value: Any,  # noqa: ANN401
) -> None:
    error = refusal(make_line(**{name: value}))
    assert (error.param or "").startswith(f"body.{name}")
    assert error.error_code in {"unsupported_parameter", "invalid_value", "invalid_type"}


@pytest.mark.parametrize("role", ["root", "function", "System", "system\n", "", "developer "])
def test_row_17_unknown_roles_are_refused(role: str) -> None:
    error = refusal(make_line(messages=[{"role": role, "content": "x"}]))
    assert error.param == "body.messages[0].role"
