"""The remote engine against real servers on loopback: what is sent, and what comes back."""

# ruff: noqa: ANN401 - what a test changes is whatever field there is

import asyncio
import json
import time
from typing import Any

import pytest

from engine.config import AskingConfig, GenerationDefaults, RemoteConfig
from engine.registry import describe_model, open_engine
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.request import Constraint, Message, Request, SamplingParams
from jobs.domain.result import Usage
from tests.builders import await_true
from tests.sources import ListSource
from tests.unit.engine.loopback import (
    PROMPT,
    SECRET,
    Call,
    OpenRemote,
    Server,
    ask,
    collect,
    error,
)

# --- what is sent ---


def test_only_what_was_set_is_sent(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await call.answer()

    with Server(behave) as server:
        engine = open_remote(server, defaults=GenerationDefaults(top_p=0.5))
        full = SamplingParams(
            max_tokens=9, temperature=0, top_p=0.25, top_k=4, seed=7, stop=("a", "b"),
            ignore_eos=True,
        )  # fmt: skip
        collect(
            engine,
            Request(id=1, messages=(Message("system", "s", "n"), Message("user", "u"))),
            Request(id=2, prompt=(5, 6), sampling=full),
        )
    bodies = {call.path: call.body for call in server.calls}
    assert bodies["/v1/chat/completions"] == {
        "model": "a-model",
        "messages": [
            {"role": "system", "content": "s", "name": "n"},
            {"role": "user", "content": "u"},
        ],
        "top_p": 0.5,
        "stream": True,  # it may become long
        "stream_options": {"include_usage": True},
    }
    assert bodies["/v1/completions"] == {
        "model": "a-model",
        "prompt": [5, 6],
        "max_tokens": 9,
        "temperature": 0,
        "top_p": 0.25,
        "top_k": 4,
        "seed": 7,
        "stop": ["a", "b"],
        "ignore_eos": True,
    }
    assert {call.headers["authorization"] for call in server.calls} == {f"Bearer {SECRET}"}


def test_served_model_is_what_the_server_hears(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await call.answer()

    with Server(behave) as server:
        engine = open_remote(f"{server.url}/v1/", served_model="org/their-name", api_key=None)
        assert engine.capabilities.model == "a-model"
        collect(engine, ask())
    (call,) = server.calls
    assert call.body["model"] == "org/their-name"
    assert call.path == "/v1/chat/completions"
    assert "authorization" not in call.headers


def test_answer_and_usage_come_back(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if call.text == "plain":
            await call.answer("the text")
        elif call.text == "cut":
            choices = [{"message": {"content": "cut o"}, "finish_reason": "length"}]
            await call.answer(choices=choices, usage=None)
        else:
            choices = [{"message": {"content": None, "refusal": "I will not."}}]
            await call.answer(choices=choices)

    with Server(behave) as server:
        results = collect(
            open_remote(server), ask(1, "plain"), ask(2, "cut"), ask(3, "something refused")
        )
    assert results[1].text == "the text"
    assert results[1].finish_reason == "stop"
    assert results[1].usage == Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=2)
    assert (results[2].text, results[2].finish_reason) == ("cut o", "length")
    assert results[2].usage == Usage()
    refused = results[3].error
    assert refused is not None
    assert refused.code == "refusal"
    assert results[3].text == "I will not."


# --- constraints ---

SCHEMA = Constraint(
    "json_schema",
    '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],'
    ' "additionalProperties": false}',
)
LOOSE = Constraint("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}')


def test_constraints_are_sent_in_the_words_of_the_server(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await call.answer("{}")

    constraints = [
        SCHEMA,
        LOOSE,
        Constraint("json_object"),
        Constraint("regex", "a+"),
        Constraint("choice", '["x"]'),
        Constraint("grammar", 'start: "a"'),
    ]
    requests = [ask(i, str(i), constraint=one) for i, one in enumerate(constraints)]
    found = {}
    for native in ("openai", "vllm", "none"):
        with Server(behave) as server:
            results = collect(open_remote(server, native_constraints=native), *requests)
        kept = {i: results[i].constraint for i in results}
        assert set(kept.values()) == {"enforced" if native == "vllm" else "validated"}
        found[native] = {
            int(call.text): call.body.get("response_format") or call.body.get("structured_outputs")
            for call in server.calls
        }
    schema, loose = json.loads(SCHEMA.spec), json.loads(LOOSE.spec)
    assert found["openai"] == {
        0: {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
        1: {"type": "json_schema", "json_schema": {"name": "answer", "schema": loose}},
        2: {"type": "json_object"},
        3: None,
        4: None,
        5: None,
    }
    assert found["vllm"] == {
        0: {"json": schema},
        1: {"json": loose},
        2: {"json_object": True},
        3: {"regex": "a+"},
        4: {"choice": ["x"]},
        5: {"grammar": 'start: "a"'},
    }
    assert set(found["none"].values()) == {None}


def test_server_without_response_format_is_asked_without_it() -> None:
    async def behave(call: Call) -> None:
        if "response_format" in call.body:
            await call.respond(400, error("response_format is not supported here"))
        else:
            await call.answer('{"a": 1}' if call.number % 2 else '{"a": "no"}')

    with Server(behave) as server:
        config = RemoteConfig(url=server.url, asking=AskingConfig(max_asks=20))
        engine = open_engine(config, model="m")
        results = collect(engine, *[ask(i, constraint=SCHEMA) for i in range(30)])
        later = len(server.calls)
        assert collect(engine, ask(99, constraint=SCHEMA))[99].error is None
        engine.close()
    assert {result.error for result in results.values()} == {None}
    assert {result.constraint for result in results.values()} == {"validated"}
    assert {result.text for result in results.values()} == {'{"a": 1}'}
    assert max(result.attempts for result in results.values()) > 1
    # What was learnt is not asked for again.
    assert not any("response_format" in call.body for call in server.calls[later:])


def test_refusal_that_stays_without_the_constraint_is_the_lines(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await call.respond(400, error(f"bad schema? {call.text}", param="messages", code="bad"))

    with Server(behave) as server:
        results = collect(open_remote(server), ask(1, PROMPT, constraint=SCHEMA))
    assert len(server.calls) == 3  # strict, plain, without
    problem = results[1].error
    assert problem is not None
    assert (problem.code, problem.status_code, problem.param) == ("bad", 400, "messages")
    assert PROMPT not in problem.message


def test_newer_name_of_max_tokens_is_learnt(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if "max_tokens" in call.body:
            words = "Use 'max_completion_tokens' instead."
            await call.respond(400, error(words, param="max_tokens", code="unsupported_parameter"))
        else:
            await call.answer()

    with Server(behave) as server:
        engine = open_remote(server)
        assert collect(engine, ask())[1].error is None
        assert collect(engine, ask())[1].error is None
    assert [call.body.get("max_completion_tokens") for call in server.calls] == [None, 20, 20]


# --- streams ---


def test_slow_answer_is_not_cut_off_while_it_grows(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await call.begin_stream()
        for word in ("an", "answer", "that", "takes", "its", "time", "to", "come"):
            await asyncio.sleep(0.3)
            await call.event(content=f"{word} ")
        usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 8}}
        end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
        await call.send(f"data: {json.dumps(end)}\r\n\r\n: ping\n\n".encode())
        await call.send(f"data: {json.dumps(usage)}\n\ndata: [DO".encode())
        await call.send(b"NE]\n\n")

    with Server(behave) as server:
        engine = open_remote(server, timeout_seconds=1.5, streaming="always")
        before, began = engine.progress(), time.monotonic()
        result = collect(engine, ask())[1]
        assert time.monotonic() - began > 2  # more than its time-out
        assert engine.progress() >= before + 8
    assert result.text == "an answer that takes its time to come "
    assert result.usage == Usage(prompt_tokens=4, completion_tokens=8)
    assert len(server.calls) == 1


def test_server_that_does_not_stream_is_asked_plainly(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if "stream_options" in call.body:
            await call.respond(400, error("unknown field", param="stream_options"))
        else:
            await call.answer()

    with Server(behave) as server:
        engine = open_remote(server, streaming="always")
        assert collect(engine, ask(1))[1].text == "fine"
        assert collect(engine, ask(2))[2].text == "fine"
    assert ["stream" in call.body for call in server.calls] == [True, False, False]


def test_server_that_ignores_stream_is_understood(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await call.answer()

    with Server(behave) as server:
        assert collect(open_remote(server, streaming="always"), ask())[1].text == "fine"


# --- the run ---


def test_aborted_requests_close_their_connections(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if call.text == "long":
            await call.hang()
        else:
            await call.answer()

    with Server(behave) as server:
        engine = open_remote(server)
        source = ListSource([*[ask(i, "long") for i in range(4)], ask(9)])
        running = engine.generate(source)
        assert next(running).id == 9
        await_true(lambda: server.num_open == 4)
        source.aborted.update(range(4))
        assert list(running) == []
        await_true(lambda: server.num_open == 0)


def test_closed_run_leaves_nothing_at_the_server(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if call.text == "long":
            await call.hang()
        else:
            await call.answer()

    with Server(behave) as server:
        engine = open_remote(server)
        running = engine.generate(ListSource([ask(9), *[ask(i, "long") for i in range(4)]]))
        assert next(running).id == 9
        running.close()
        await_true(lambda: server.num_open == 0)
        assert set(collect(engine, ask(1))) == {1}


def test_idle_engine_waits_for_more_without_a_call(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        await call.answer()

    class Waiting:
        looks = 0

        def take(self, n: int) -> list[Request] | None:
            self.looks += 1
            if self.looks < 5:
                return []
            return [ask(1)][:n] if self.looks == 5 else None

        def is_aborted(self, _request_id: int) -> bool:
            return False

    with Server(behave) as server:
        assert [result.id for result in open_remote(server).generate(Waiting())] == [1]
    assert len(server.calls) == 1


def test_closed_engine_says_so(open_remote: OpenRemote) -> None:
    engine = open_remote("http://127.0.0.1:9")
    engine.close()
    with pytest.raises(EngineMisconfigured, match="closed"):
        next(engine.generate(ListSource([ask()])))


def test_model_is_described_without_a_call() -> None:
    def fingerprint(**changes: Any) -> str:
        config = RemoteConfig.model_validate({"url": "http://127.0.0.1:9", **changes})
        described = describe_model(config, "m")
        assert described.serves_everything
        assert described.context_tokens >= (changes.get("context_tokens") or 10**9)
        return described.fingerprint

    same = fingerprint()
    assert fingerprint(url="http://127.0.0.1:9/v1/") == same
    assert fingerprint(api_key="k", slots=3, timeout_seconds=5) == same
    others = [
        fingerprint(url="http://127.0.0.1:10"),
        fingerprint(served_model="other"),
        fingerprint(defaults={"temperature": 0.5}),
        fingerprint(asking={"max_asks": 1}),
        fingerprint(native_constraints="vllm"),
        fingerprint(context_tokens=100),
    ]
    assert len({same, *others}) == len(others) + 1


def test_prompt_tokens_are_counted_by_servers_that_can(open_remote: OpenRemote) -> None:
    async def behave(call: Call) -> None:
        if call.path == "/tokenize":
            await call.respond(200, {"count": 41, "max_model_len": 100})
        else:
            await call.respond(404, error())

    async def cannot(call: Call) -> None:
        await call.respond(404, error())

    with Server(behave) as server:
        assert open_remote(server).count_tokens(ask(1, "hello there")) == 41
    with Server(cannot) as server:
        engine = open_remote(server)
        assert engine.count_tokens(ask(1, "hello there")) == 6
        assert engine.count_tokens(Request(id=1, prompt=(1, 2, 3))) == 3
        assert len(server.calls) == 1  # it is asked once
