"""Tokens that a constraint leaves no choice about: no step for each, and the same answers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import override

from engine.config import AskingConfig, HfConfig
from engine.constraints import grammar_of, validate
from engine.hf import tokens
from engine.hf.engine import HfEngine
from engine.matching import Masks, TokenizerConstraints, _LlguidanceMatcher
from engine.spelling import decode
from jobs.domain.request import Constraint, Request, SamplingParams
from jobs.domain.result import Result
from tests.sources import ListSource

Ask = Callable[..., dict[int, Result]]
LONG = "The quick brown fox jumps over the lazy dog while nobody is looking. " * 4


def schema_of(number: int, *, constant: str = "fixed words") -> Constraint:
    fields = {
        f"first_name_{number}": {"type": "string", "pattern": "^[a-f]{2,6}$"},
        "said": {"const": constant},
        f"how_many_{number}": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": [f"alpha{number}", f"beta{number}"]},
    }
    schema = {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
    return Constraint("json_schema", json.dumps(schema))


def prompt_of(number: int) -> tuple[int, ...]:
    return tuple(10 + (7 * i + 13 * number) % 600 for i in range(9 + 5 * number))


def ask_for(number: int, *, constant: str = "fixed words", **sampling: Any) -> Request:  # noqa: ANN401 -- as SamplingParams
    return Request(
        id=number,
        prompt=prompt_of(number),
        constraint=schema_of(number, constant=constant),
        sampling=SamplingParams(**{"temperature": number % 2, "seed": number, **sampling}),
    )


class Counted:
    """An engine and the number of tokens in each step of its model."""

    def __init__(self, folder: Path, *, forced_tokens: bool, **changes: object) -> None:
        settings = {
            "model": str(folder),
            "device": "cpu",
            "compute_dtype": "float32",
            "slots": 4,
            "batch_tokens": 64,
            "page_tokens": 16,
            "num_blocks": 96,
            "forced_tokens": forced_tokens,
            # An answer that is ended early is another where the steps are.
            "asking": {"close_early": False},
            **changes,
        }
        self.engine = HfEngine(HfConfig.model_validate(settings))
        self.steps: list[int] = []
        model: Any = self.engine._loaded.model  # noqa: SLF001 -- the one place all steps go through
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _model: object, _args: object, given: dict[str, Any]) -> None:
        self.steps.append(given["input_ids"].shape[1])


def open_both(folder: Path, **changes: object) -> tuple[Counted, Counted]:
    return (
        Counted(folder, forced_tokens=False, **changes),
        Counted(folder, forced_tokens=True, **changes),
    )


@pytest.fixture(scope="module")
def both(tiny_model: Path) -> Iterator[tuple[Counted, Counted]]:
    opened = open_both(tiny_model)
    yield opened
    for one in opened:
        one.engine.close()


def is_same(slow: Result, quick: Result) -> bool:
    return (
        slow.text == quick.text
        and slow.finish_reason == quick.finish_reason
        and slow.usage.completion_tokens == quick.usage.completion_tokens
        and slow.usage.prompt_tokens == quick.usage.prompt_tokens
    )


def test_runs_of_forced_tokens_are_those_that_masks_allow_alone(tiny_model: Path) -> None:
    loaded = HfEngine(HfConfig(model=str(tiny_model), device="cpu"))._loaded  # noqa: SLF001
    made = TokenizerConstraints(
        tokens.constraint_tokenizer(
            loaded.tokenizer, vocab_size=loaded.vocab_size, eos_tokens=loaded.eos_tokens
        )
    )
    matcher, _ = made.matcher(schema_of(3))
    by_masks, _ = made.matcher(schema_of(3))
    row = torch.zeros(made.num_words, dtype=torch.int32)
    brace, space = loaded.tokenizer.encode("{"), loaded.tokenizer.encode(" ")
    for token in brace:
        assert matcher.advance(token)
        assert by_masks.advance(token)
    assert not matcher.forced(), "a space may come, or a quotation mark"
    for token in space:
        assert matcher.advance(token)
        assert by_masks.advance(token)
    forced = matcher.forced()
    assert '"first_name_3"'.startswith(decode(loaded.tokenizer, forced)[:10])
    assert len(forced) > 1
    for token in forced:
        by_masks.fill(row.numpy(), row.data_ptr())
        allowed = [i for i in range(loaded.vocab_size) if row[i >> 5] >> (i & 31) & 1]
        assert allowed == [token]
        assert by_masks.advance(token)


class Watched:
    """Hands on what is asked of llguidance's matcher, and notes it."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- whatever it is
        self.asked.append(name)
        return getattr(self._matcher, name)


def test_a_run_of_forced_tokens_is_told_to_the_library_in_one_call_and_needs_no_mask() -> None:
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = grammar_of(Constraint("regex", "(ab|cd)EFGHIJ[0-9]"))
    watched = Watched(llguidance.LLMatcher(tokenizer, grammar, log_level=0))
    matcher = _LlguidanceMatcher(watched)  # type: ignore[arg-type]  # it is one in all but name
    plain = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    row = np.zeros((tokenizer.vocab_size + 31) // 32, dtype=np.int32)
    for place, token in enumerate(b"cdEFGHIJ7"):
        matcher.fill(row, row.ctypes.data)
        assert row.tobytes() == plain.compute_bitmask()[: row.nbytes], "as the library's own mask"
        assert matcher.advance(token)
        assert plain.consume_token(token)
        assert matcher.is_finished() == matcher.is_accepting() == (place == len("cdEFGHIJ"))
    # A choice at the first place and at the last; what lies between them follows.
    assert watched.asked.count("unsafe_compute_mask_ptr") == 2
    assert watched.asked.count("consume_token") + watched.asked.count("consume_tokens") == 3


def test_a_token_that_does_not_fit_into_a_forced_run_is_refused_at_once() -> None:
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = grammar_of(Constraint("regex", "ABCDEF"))
    matcher = _LlguidanceMatcher(llguidance.LLMatcher(tokenizer, grammar, log_level=0))
    assert bytes(matcher.forced()) == b"ABCDEF"
    assert matcher.advance(b"A"[0])
    assert bytes(matcher.forced()) == b"BCDEF"
    assert not matcher.advance(b"X"[0])


def test_forced_tokens_take_no_step_each_and_change_no_answer(
    both: tuple[Counted, Counted], ask: Ask
) -> None:
    for number in range(6):
        for one in both:
            one.steps.clear()
        slow, quick = (ask(one.engine, [ask_for(number)])[number] for one in both)
        assert is_same(slow, quick), number
        assert validate(schema_of(number), quick.text or "") is None
        assert quick.constraint == "enforced"
        # A step gives a token; what a run at the end says is not computed at all.
        slow_steps, quick_steps = (len(one.steps) for one in both)
        assert slow_steps - prefill_steps(number) == slow.usage.completion_tokens - 1
        assert quick_steps < 0.6 * slow_steps
        assert sum(both[1].steps) <= sum(both[0].steps)


def prefill_steps(number: int) -> int:
    return -(-len(prompt_of(number)) // 64)


def test_forced_tokens_of_many_sequences_change_no_answer(
    both: tuple[Counted, Counted], ask: Ask
) -> None:
    free = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    asked = [ask_for(number) for number in range(12)]
    asked += [Request(id=100 + i, prompt=prompt_of(i), sampling=free) for i in range(4)]
    slow, quick = (ask(one.engine, asked) for one in both)
    for request in asked:
        assert is_same(slow[request.id], quick[request.id]), request.id


@pytest.mark.parametrize("batch_tokens", [16, 64, 512])
def test_a_run_longer_than_a_step_goes_in_pieces(
    tiny_model: Path, ask: Ask, batch_tokens: int
) -> None:
    both = open_both(tiny_model, batch_tokens=batch_tokens)
    asked = [ask_for(number, constant=LONG) for number in range(4)]
    slow, quick = (ask(one.engine, asked) for one in both)
    for request in asked:
        assert json.loads(quick[request.id].text or "")["said"] == LONG
        assert is_same(slow[request.id], quick[request.id]), request.id
    assert max(both[1].steps) <= batch_tokens
    assert len(both[1].steps) < len(both[0].steps)


def test_a_full_cache_puts_back_sequences_with_forced_tokens(tiny_model: Path, ask: Ask) -> None:
    asked = [ask_for(number, constant=LONG[:120]) for number in range(6)]
    roomy = ask(Counted(tiny_model, forced_tokens=True).engine, asked)
    tight = Counted(tiny_model, forced_tokens=True, num_blocks=16)
    found = ask(tight.engine, asked)
    for request in asked:
        assert is_same(roomy[request.id], found[request.id]), request.id


def test_max_tokens_ends_an_answer_within_a_run(both: tuple[Counted, Counted], ask: Ask) -> None:
    whole = ask(both[1].engine, [ask_for(2)])[2]
    for limit in range(1, whole.usage.completion_tokens):
        slow, quick = (ask(one.engine, [ask_for(2, max_tokens=limit)])[2] for one in both)
        assert quick.usage.completion_tokens == limit
        assert quick.finish_reason == "length"
        assert is_same(slow, quick), limit


def test_a_stop_string_ends_an_answer_within_a_run(both: tuple[Counted, Counted], ask: Ask) -> None:
    whole = ask(both[1].engine, [ask_for(2)])[2].text or ""
    for stop in ("rst_na", "ed wo", "how_many", '"kind"'):
        slow, quick = (ask(one.engine, [ask_for(2, stop=(stop,))])[2] for one in both)
        assert quick.text == whole[: whole.index(stop)]
        assert quick.finish_reason == "stop"
        assert is_same(slow, quick), stop


def test_an_answer_that_ends_in_a_run_takes_no_step_for_it(
    both: tuple[Counted, Counted], ask: Ask
) -> None:
    only = Constraint("choice", json.dumps(["just this one answer and no other"]))
    request = Request(id=1, prompt=prompt_of(1), constraint=only)
    both[1].steps.clear()
    result = ask(both[1].engine, [request])[1]
    assert result.text == "just this one answer and no other"
    assert result.finish_reason == "stop"
    assert result.usage.completion_tokens > 3
    assert both[1].steps == [len(prompt_of(1))]
    assert is_same(ask(both[0].engine, [request])[1], result)


class DroppedWithinARun(ListSource):
    """Drops the request 0 as soon as it has computed a part of a long run of forced tokens."""

    def __init__(self, requests: list[Request], engine: HfEngine) -> None:
        super().__init__(requests)
        self._engine = engine
        self.was_dropped = False

    @override
    def is_aborted(self, request_id: int) -> bool:
        stepper = self._engine._stepper  # noqa: SLF001 -- nothing else tells how far a run is
        assert stepper is not None
        state = stepper._scheduler.active_requests.get("0")  # noqa: SLF001
        if request_id == 0 and state is not None and state.generated_tokens:
            self.was_dropped |= bool(state.remaining_prefill_tokens)
        return request_id == 0 and self.was_dropped


def test_an_answer_dropped_within_a_run_leaves_the_others_alone(
    tiny_model: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.hf.engine._ABORT_SECONDS", 0)
    one = Counted(tiny_model, forced_tokens=True, batch_tokens=4, slots=2)
    asked = [ask_for(number, constant=LONG) for number in range(3)]
    expected = ask(one.engine, asked)
    source = DroppedWithinARun(asked, one.engine)
    found = {result.id: result for result in one.engine.generate(source)}
    assert source.was_dropped
    assert found.keys() == {1, 2}
    assert all(is_same(expected[number], found[number]) for number in found)


def test_attention_of_transformers_takes_forced_tokens_too(
    tiny_model: Path, tmp_path: Path, ask: Ask
) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "mistral",
            vocab_size=640,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            initializer_range=0.3,
            sliding_window=16,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=3,
        )
    )
    model.float().save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / file).write_bytes((tiny_model / file).read_bytes())
    both = open_both(tmp_path)
    asked = [ask_for(number, constant=LONG) for number in range(6)]
    slow, quick = (ask(one.engine, asked) for one in both)
    for request in asked:
        assert is_same(slow[request.id], quick[request.id]), request.id
    assert len(both[1].steps) < 0.6 * len(both[0].steps)


def test_outlines_core_answers_alike_with_forced_tokens_switched_on(
    tiny_model: Path, ask: Ask
) -> None:
    both = open_both(tiny_model, asking=AskingConfig(backend="outlines_core"))
    asked = [
        Request(
            id=i,
            prompt=prompt_of(i),
            constraint=Constraint("regex", r"always [a-f]{3}-\d{2}"),
            sampling=SamplingParams(temperature=0),
        )
        for i in range(3)
    ]
    slow, quick = (ask(one.engine, asked) for one in both)
    for request in asked:
        assert is_same(slow[request.id], quick[request.id])


def test_masks_filled_while_the_model_runs_give_the_same_answers(
    tiny_model: Path, both: tuple[Counted, Counted], ask: Ask
) -> None:
    beside = Counted(tiny_model, forced_tokens=True)
    num_words = beside.engine._constraints.num_words  # noqa: SLF001 -- as on a GPU
    beside.engine._masks = Masks(4, num_words, is_beside=True)  # noqa: SLF001
    asked = [ask_for(number) for number in range(8)]
    expected, found = (ask(one.engine, asked) for one in (both[0], beside))
    for request in asked:
        assert is_same(expected[request.id], found[request.id]), request.id
