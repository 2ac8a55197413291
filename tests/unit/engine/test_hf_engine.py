import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from engine.base import Source
from engine.config import AskingConfig, GenerationDefaults, HfConfig
from engine.constraints import validate
from engine.hf.engine import HfEngine
from jobs.domain.errors import EngineDied, EngineMisconfigured
from jobs.domain.request import Constraint, Message, Request, SamplingParams
from jobs.domain.result import Result

Ask = Callable[..., dict[int, Result]]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def config_of(folder: Path, **changes: object) -> HfConfig:
    settings = {
        "model": str(folder),
        "device": "cpu",
        "compute_dtype": "float32",
        "slots": 4,
        "batch_tokens": 64,
        "page_tokens": 16,
        "num_blocks": 96,
        **changes,
    }
    return HfConfig.model_validate(settings)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[HfEngine]:
    opened = HfEngine(config_of(tiny_model), model="tiny")
    yield opened
    opened.close()


def test_a_loaded_engine_tells_how_many_tokens_its_cache_holds(engine: HfEngine) -> None:
    assert engine.capabilities.cache_tokens == 96 * 16


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    return [tuple(10 + (7 * i + 13 * n) % 600 for i in range(n)) for n in lengths]


def generate_alone(folder: Path, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # what is None in the call is taken from here
    given = torch.tensor([prompt])
    with torch.inference_mode():
        said = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            generation_config=GenerationConfig(
                max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            ),
        )
    tokens: list[int] = said[0, len(prompt) :].tolist()
    return tokens


def test_greedy_answers_are_those_of_generate_token_for_token(
    engine: HfEngine, tiny_model: Path, ask: Ask
) -> None:
    # Shorter than a page, a page, several chunks of prefill: 64 tokens are a step's budget.
    asked = prompts(3, 16, 17, 40, 100, 200, 31)
    results = ask(engine, [Request(id=i, prompt=p, sampling=GREEDY) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        expected = generate_alone(tiny_model, prompt, 24)
        decode = engine._loaded.tokenizer.decode  # noqa: SLF001 -- the same decoder
        assert results[i].text == decode(expected, skip_special_tokens=True), len(prompt)
        assert results[i].usage.prompt_tokens == len(prompt)
        assert results[i].usage.completion_tokens == 24
        assert results[i].finish_reason == "length"


@pytest.mark.parametrize(
    ("name", "changes", "own_attention"),
    [
        ("qwen3", {}, True),
        ("gpt_neox", {}, True),
        ("mistral", {"sliding_window": 16}, False),
        ("gemma2", {"sliding_window": 16, "attn_logit_softcapping": 20.0}, False),
        ("gpt_oss", {"sliding_window": 16, "num_local_experts": 4}, False),
    ],
)
def test_other_architectures_answer_as_generate_does(  # noqa: PLR0917 -- fixtures and a table
    tiny_model: Path,
    tmp_path: Path,
    ask: Ask,
    name: str,
    changes: dict[str, Any],
    own_attention: bool,  # noqa: FBT001 -- a value of the table
) -> None:
    shapes = {
        "vocab_size": 640,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    if name == "gpt_neox":
        del shapes["num_key_value_heads"]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shapes, **changes))
    model.float().save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / file, tmp_path)
    engine = HfEngine(config_of(tmp_path))
    implementation = engine._loaded.model.config._attn_implementation  # noqa: SLF001
    assert (implementation == "batchctl_paged") is own_attention
    asked = prompts(3, 17, 40, 100)
    results = ask(engine, [Request(id=i, prompt=p, sampling=GREEDY) for i, p in enumerate(asked)])
    decode = engine._loaded.tokenizer.decode  # noqa: SLF001 -- the same decoder
    for i, prompt in enumerate(asked):
        expected = generate_alone(tmp_path, prompt, 24)
        assert results[i].text == decode(expected, skip_special_tokens=True), len(prompt)


def test_full_cache_puts_sequences_back_and_changes_no_answer(tiny_model: Path, ask: Ask) -> None:
    asked = prompts(60, 61, 62, 63, 64, 65)
    requests = [Request(id=i, prompt=p, sampling=GREEDY) for i, p in enumerate(asked)]
    roomy = ask(HfEngine(config_of(tiny_model)), requests)
    # 14 blocks of 16 tokens hold two sequences of 89 and a little; four are tried at once.
    tight = ask(HfEngine(config_of(tiny_model, num_blocks=14)), requests)
    assert {i: r.text for i, r in tight.items()} == {i: r.text for i, r in roomy.items()}
    assert all(result.usage.completion_tokens == 24 for result in tight.values())


def test_seed_gives_the_same_answer_in_any_company(engine: HfEngine, ask: Ask) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=16, ignore_eos=True)
    asked = Request(id=1, prompt=prompts(20)[0], sampling=sampling)
    alone = ask(engine, [asked])[1].text
    company = [
        Request(id=10 + i, prompt=p, sampling=SamplingParams(temperature=1.3, max_tokens=9 + i))
        for i, p in enumerate(prompts(5, 30, 70))
    ]
    assert ask(engine, [*company, asked])[1].text == alone
    other = Request(id=1, prompt=asked.prompt, sampling=SamplingParams(seed=12, max_tokens=16))
    assert ask(engine, [other])[1].text != alone


def test_each_row_keeps_its_own_constraint(engine: HfEngine, ask: Ask) -> None:
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 10, "maximum": 99}},
            "required": ["n"],
            "additionalProperties": False,
        }
    )
    kinds = [
        Constraint("json_schema", schema),
        Constraint("regex", r"[a-f]{3}-\d{2}"),
        Constraint("choice", '["yes", "no"]'),
        Constraint("grammar", 'start: "a" | "b" "a"'),
        None,
    ]
    requests = [
        Request(
            id=i,
            prompt=prompts(10 + i)[0],
            constraint=kinds[i % 5],
            sampling=SamplingParams(temperature=i % 2, seed=i, max_tokens=40),
        )
        for i in range(20)
    ]
    results = ask(engine, requests)
    for request in requests:
        result = results[request.id]
        assert result.error is None
        if request.constraint is not None:
            assert result.constraint == "enforced"
            assert result.finish_reason == "stop"
            assert validate(request.constraint, result.text) is None
        else:
            assert result.constraint is None


def test_outlines_core_keeps_constraints_too(tiny_model: Path, ask: Ask) -> None:
    engine = HfEngine(config_of(tiny_model, asking=AskingConfig(backend="outlines_core")))
    constraint = Constraint("regex", r"[a-f]{3}-\d{2}")
    results = ask(
        engine,
        [Request(id=i, prompt=p, constraint=constraint) for i, p in enumerate(prompts(5, 6, 7))],
    )
    for result in results.values():
        assert validate(constraint, result.text) is None
        assert result.constraint == "enforced"


def test_schema_that_cannot_be_enforced_is_validated_or_refused(
    tiny_model: Path, engine: HfEngine, ask: Ask
) -> None:
    request = Request(
        id=1,
        prompt=(20, 30),
        constraint=Constraint("json_schema", '{"enum": ["a", "b"], "not": {"const": "a"}}'),
    )
    assert ask(engine, [request])[1].constraint == "validated"
    strict = HfEngine(config_of(tiny_model, asking=AskingConfig(on_unsupported_schema="refuse")))
    error = ask(strict, [request])[1].error
    assert error is not None
    assert error.code == "schema_unsupported"


def test_answer_ends_inside_its_schema_before_its_tokens_run_out(
    tiny_model: Path, engine: HfEngine, ask: Ask
) -> None:
    fields = {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}}
    schema = {
        "type": "object",
        "properties": fields,
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    requests = [
        Request(
            id=i,
            prompt=prompts(5 + i)[0],
            constraint=Constraint("json_schema", json.dumps(schema)),
            sampling=SamplingParams(temperature=i % 2, seed=i, max_tokens=50),
        )
        for i in range(8)
    ]
    plain = HfEngine(config_of(tiny_model, asking=AskingConfig(close_early=False)))
    cut_off = ask(plain, requests)
    cut = {i for i, result in cut_off.items() if result.finish_reason == "length"}
    assert len(cut) >= 4
    for i, result in ask(engine, requests).items():
        assert validate(Constraint("json_schema", json.dumps(schema)), result.text) is None
        assert result.constraint == "enforced"
        assert result.usage.completion_tokens <= 50
        assert result.finish_reason == ("length" if i in cut else "stop")
        if i in cut:
            assert validate(Constraint("json_schema", json.dumps(schema)), cut_off[i].text)
        else:
            assert result.text == cut_off[i].text


def test_stop_string_ends_the_answer_across_token_borders(engine: HfEngine, ask: Ask) -> None:
    free = ask(engine, [Request(id=1, prompt=prompts(20)[0], sampling=GREEDY)])[1].text
    for start, stop in ((3, 5), (1, 9), (7, 8)):
        wanted = free[start:stop]
        sampling = SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, stop=("never appears", wanted)
        )
        result = ask(engine, [Request(id=1, prompt=prompts(20)[0], sampling=sampling)])[1]
        assert result.text == free[: free.index(wanted)]
        assert result.finish_reason == "stop"
        assert result.usage.completion_tokens <= 24


def test_end_of_sequence_token_stops_and_is_not_text(tiny_model: Path, ask: Ask) -> None:
    engine = HfEngine(config_of(tiny_model))
    first = generate_alone(tiny_model, prompts(20)[0], 3)
    engine._eos = frozenset({first[2]})  # noqa: SLF001 -- a random model never says its own
    request = Request(id=1, prompt=prompts(20)[0], sampling=SamplingParams(temperature=0))
    result = ask(engine, [request])[1]
    assert result.finish_reason == "stop"
    assert result.usage.completion_tokens == 3
    assert result.text == engine._loaded.tokenizer.decode(first[:2])  # noqa: SLF001


def test_prompt_without_room_for_an_answer_is_one_error_with_counts(
    engine: HfEngine, ask: Ask
) -> None:
    results = ask(
        engine,
        [
            Request(id=1, prompt=prompts(600)[0]),
            Request(id=2, prompt=prompts(8)[0], sampling=GREEDY),
            Request(id=3, messages=(Message("user", "x " * 600),)),
        ],
    )
    error = results[1].error
    assert error is not None
    assert error.code == "context_length_exceeded"
    assert error.status_code == 400
    assert "600" in error.message
    assert "512" in error.message
    assert error.param == "prompt"
    assert results[2].error is None
    assert results[3].error is not None
    assert results[3].error.param == "messages"


def test_cache_smaller_than_the_context_bounds_the_prompt(tiny_model: Path, ask: Ask) -> None:
    engine = HfEngine(config_of(tiny_model, num_blocks=8))
    results = ask(
        engine,
        [
            Request(id=1, prompt=prompts(128)[0]),
            Request(id=2, prompt=prompts(120)[0], sampling=SamplingParams(ignore_eos=True)),
        ],
    )
    assert results[1].error is not None
    assert results[1].error.code == "context_length_exceeded"
    assert results[2].usage.completion_tokens == 8
    assert results[2].finish_reason == "length"


def test_max_tokens_is_capped_by_the_context(engine: HfEngine, ask: Ask) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True)
    result = ask(engine, [Request(id=1, prompt=prompts(500)[0], sampling=sampling)])[1]
    assert result.usage.completion_tokens == 12
    assert result.finish_reason == "length"


def test_aborted_requests_give_no_result_and_free_their_slot(engine: HfEngine, ask: Ask) -> None:
    endless = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True)
    requests = [Request(id=i, prompt=prompts(20)[0], sampling=endless) for i in range(4)]
    requests.append(Request(id=9, prompt=prompts(20)[0], sampling=GREEDY))
    results = ask(engine, requests, aborted={0, 1, 2, 3})
    assert set(results) == {9}


def test_closed_generator_leaves_the_engine_ready(
    engine: HfEngine, make_source: Callable[..., Source], ask: Ask
) -> None:
    requests = [Request(id=i, prompt=p, sampling=GREEDY) for i, p in enumerate(prompts(9, 8, 7))]
    expected = ask(engine, requests)
    running = engine.generate(make_source(requests))
    next(running)
    running.close()
    assert ask(engine, requests) == expected


def test_shared_prefix_is_computed_once_and_counted(engine: HfEngine, ask: Ask) -> None:
    shared = prompts(64)[0]
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    leader = [Request(id=0, prompt=shared, sampling=sampling)]
    followers = [Request(id=i, prompt=(*shared, i), sampling=sampling) for i in range(1, 13)]
    results = ask(engine, leader + followers)
    assert results[0].usage.cached_tokens == 0
    assert results[12].usage.cached_tokens == 64


@pytest.mark.parametrize("batch_tokens", [512, 64], ids=["at once", "in pieces"])
def test_a_beginning_shared_by_requests_that_start_together_is_computed_once(
    tiny_model: Path, ask: Ask, batch_tokens: int
) -> None:
    shared = prompts(160)[0]  # ten blocks, and three more tokens of each one's own
    asked = [Request(id=i, prompt=(*shared, 7, 8, 10 + i), sampling=GREEDY) for i in range(8)]
    engine = HfEngine(config_of(tiny_model, slots=8, batch_tokens=batch_tokens, num_blocks=128))
    results = ask(engine, asked)
    found = sorted(result.usage.cached_tokens for result in results.values())
    assert found == [0, *[160] * 7]
    for request in asked:
        (alone,) = ask(HfEngine(config_of(tiny_model)), [request]).values()
        assert results[request.id].text == alone.text
    engine.close()


def test_groups_that_share_a_small_cache_compute_their_beginnings_once(
    tiny_model: Path, ask: Ask
) -> None:
    # Ten blocks each, which with their answers fill the cache: were the leaders of all groups let
    # in at once, they would be gone before the others of their groups find room.
    shared = [tuple(20 + (31 * group + n) % 600 for n in range(160)) for group in range(6)]
    asked = [Request(id=i, prompt=(*shared[i // 3], 10 + i), sampling=GREEDY) for i in range(6 * 3)]
    engine = HfEngine(config_of(tiny_model, slots=16, batch_tokens=512, num_blocks=40))
    results = ask(engine, asked)
    computed = [i for i, result in sorted(results.items()) if not result.usage.cached_tokens]
    assert computed == [0, 3, 6, 9, 12, 15]
    engine.close()


def test_who_waits_for_a_shared_beginning_goes_on_when_its_leader_is_dropped(
    tiny_model: Path, ask: Ask
) -> None:
    shared = prompts(400)[0]
    asked = [Request(id=i, prompt=(*shared, 10 + i), sampling=GREEDY) for i in range(4)]
    # A step takes 16 tokens, so the first is far from its end when it is dropped.
    engine = HfEngine(config_of(tiny_model, batch_tokens=16))
    assert set(ask(engine, asked, aborted=[0])) >= {1, 2, 3}
    engine.close()


def test_progress_counts_tokens(engine: HfEngine, ask: Ask) -> None:
    before = engine.progress()
    ask(engine, [Request(id=1, prompt=prompts(200)[0], sampling=GREEDY)])
    # 200 tokens take four steps of prefill, the last of which gives the first token.
    assert engine.progress() - before == 24 + 3


def test_logits_that_are_not_numbers_fail_their_own_request(tiny_model: Path, ask: Ask) -> None:
    engine = HfEngine(config_of(tiny_model))
    poisoned = 17
    with torch.no_grad():
        model: Any = engine._loaded.model  # noqa: SLF001 -- the fault is in the weights
        embedding = model.get_input_embeddings()
        embedding.weight = torch.nn.Parameter(embedding.weight.clone())  # untied from the head
        embedding.weight[poisoned] = torch.nan
    good = [Request(id=i, prompt=p, sampling=GREEDY) for i, p in enumerate(prompts(30, 40, 50))]
    good = [r for r in good if isinstance(r.prompt, tuple) and poisoned not in r.prompt]
    assert good
    expected = ask(engine, good)
    bad = Request(id=77, prompt=(20, poisoned, 21), sampling=GREEDY)
    results = ask(engine, [bad, *good])
    assert results[77].error is not None
    assert results[77].error.code == "numerical_error"
    assert {i: r.text for i, r in results.items() if i != 77} == {
        i: r.text for i, r in expected.items()
    }


def test_step_that_fails_names_the_sequences_in_flight_and_the_engine_goes_on(
    tiny_model: Path, ask: Ask
) -> None:
    engine = HfEngine(config_of(tiny_model))
    requests = [Request(id=i, prompt=p, sampling=GREEDY) for i, p in enumerate(prompts(9, 8, 7))]
    expected = ask(engine, requests)

    def break_down(*_inputs: object) -> None:
        raise RuntimeError("kernel failed on a prompt about canaries")

    model: Any = engine._loaded.model  # noqa: SLF001 -- the fault is in the device
    hook = model.register_forward_pre_hook(break_down)
    with pytest.raises(EngineDied) as caught:
        ask(engine, requests)
    hook.remove()
    assert caught.value.suspects == {0, 1, 2}
    assert "canaries" not in caught.value.message
    assert ask(engine, requests) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_weights_may_be_replaced_on_disk_while_the_engine_runs(
    tiny_model: Path, tmp_path: Path, compute_dtype: str, quantization: str
) -> None:
    copy = tmp_path / "replaceable"
    shutil.copytree(tiny_model, copy)
    engine = HfEngine(config_of(copy, compute_dtype=compute_dtype, quantization=quantization))
    assert str(copy) not in Path("/proc/self/maps").read_text()
    engine.close()


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantized_model_runs_and_keeps_constraints(
    tiny_model: Path, ask: Ask, quantization: str
) -> None:
    engine = HfEngine(config_of(tiny_model, quantization=quantization, compute_dtype="bfloat16"))
    assert engine.capabilities.quantization == quantization
    constraint = Constraint("choice", '["yes", "no"]')
    results = ask(
        engine,
        [
            Request(id=1, prompt=prompts(20)[0], sampling=GREEDY),
            Request(id=2, prompt=prompts(9)[0], constraint=constraint),
        ],
    )
    assert results[1].usage.completion_tokens == 24
    assert results[2].text in ("yes", "no")


def test_defaults_come_from_the_line_then_the_settings_then_the_model(tiny_model: Path) -> None:
    plain = HfEngine(config_of(tiny_model))
    line = Request(id=1, prompt="x", sampling=SamplingParams(temperature=0.2))
    assert plain.resolve_sampling(line).temperature == 0.2
    assert plain.resolve_sampling(line).top_p == 1.0
    configured = HfEngine(
        config_of(tiny_model, defaults=GenerationDefaults(top_p=0.5, temperature=0.9, seed=3))
    )
    resolved = configured.resolve_sampling(line)
    assert (resolved.temperature, resolved.top_p, resolved.seed) == (0.2, 0.5, 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "/nowhere/at/all"}, "no folder"),
        ({"device": "cuda:7"}, "cuda"),
        ({"device": "abacus"}, "no device"),
        ({"flash_attention": True}, "flash"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_say_what_to_do(
    tiny_model: Path, change: dict[str, object], told: str
) -> None:
    with pytest.raises(EngineMisconfigured, match=told):
        HfEngine(config_of(tiny_model, **change))
