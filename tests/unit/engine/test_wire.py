import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.tuning import Tuning
from jobs.domain.request import Capabilities, Constraint, Message, Request, SamplingParams
from jobs.domain.result import LineError, Result, Usage

REQUEST = Request(
    id=2**60,
    messages=(Message("user", "café \U0001f600 \x00", "name"), Message("assistant", "")),
    sampling=SamplingParams(max_tokens=1, temperature=0.0, seed=-(2**63), stop=("a",)),
    constraint=Constraint("regex", "a+"),
)
RESULT = Result(
    id=2**60,
    text="x\n",
    finish_reason="length",
    usage=Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=3),
    error=LineError(code="c", message="m", status_code=500, param="p"),
    attempts=2,
    constraint="validated",
)
TO_ENGINE: list[wire.ToEngine] = [
    wire.Open('{"kind":"simulated"}', "m"),
    wire.Submit([]),
    wire.Submit([REQUEST, Request(id=1, prompt=(1, 2)), Request(id=2, prompt="x")]),
    wire.Abort([1, 2]),
    wire.Count(REQUEST),
    wire.End(),
]
FROM_ENGINE: list[wire.FromEngine] = [
    wire.Ready(Capabilities(model="m", engine="e", parameters=("n",)), 4),
    wire.Credit(7),
    wire.Started([1]),
    wire.Results([RESULT, Result(id=1)]),
    wire.Progress(2**40),
    wire.Progress(1, Tuning(slots=3, max_slots=4, slots_by="steps", num_evictions=1)),
    wire.Count(num_tokens=9),
    wire.Fatal("engine_error", "It broke."),
    wire.End(),
]


def test_engine_reads_what_the_worker_sends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(wire.encode_frame(TO_ENGINE) + wire.encode_frame([wire.End()]))
        assert wire.read_frame(theirs) == TO_ENGINE
        assert wire.read_frame(theirs) == [wire.End()]


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 9])
def test_frame_that_is_cut_off_is_the_end(kept: int) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(wire.encode_frame(TO_ENGINE)[:kept])
        ours.close()
        assert wire.read_frame(theirs) == []


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 4))
def test_worker_reads_frames_however_they_are_cut(sizes: list[int], num_frames: int) -> None:
    stream = wire.encode_frame(FROM_ENGINE) * num_frames
    buffer = wire.FrameBuffer()
    found: list[wire.FromEngine] = []
    start = 0
    for size in sizes:
        found += buffer.feed(stream[start : start + size])
        start += size
    found += buffer.feed(stream[start:])
    assert found == FROM_ENGINE * num_frames


def test_long_prompt_passes_the_socket() -> None:
    prompt = "x" * 20_000_000
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frame = wire.encode_frame([wire.Submit([Request(id=1, prompt=prompt)])])
        sender = threading.Thread(daemon=True, target=ours.sendall, args=(frame,))
        sender.start()
        (message,) = wire.read_frame(theirs)
        sender.join()
    assert isinstance(message, wire.Submit)
    assert message.requests[0].prompt == prompt
