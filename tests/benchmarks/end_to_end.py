"""C1: a batch from JSONL to JSONL against the bare engine, same prompts, same engine process.

    raw          prompts from a list, results thrown away
    end to end   JSONL in, planned, run, written in segments, finalized; database on

Processor time of this process and of all it started.
"""

from engine.config import HfConfig
from engine.demo import model_path
from tests.benchmarks import workloads
from tests.benchmarks.local import open_local
from tests.benchmarks.measuring import Row, main, num_pairs_at, pairs_of, scaled


def measure(size: float) -> list[Row]:
    num_lines = scaled(400, size, least=16)
    # As much in and out as W1, with lengths that two cores get through.
    lines = list(workloads.chat(num_lines, shrink=0.3))
    config = HfConfig(model=str(model_path()), device="cpu", threads=1)
    with open_local(config, model="demo") as local:
        local.generate(lines[:32])  # warm
        pairs = pairs_of(
            lambda _: local.generate(lines),
            lambda _: local.run(lines),
            num_pairs=num_pairs_at(5, size),
        )
    tokens = {one.usage.completion_tokens for pair in pairs for one in pair}
    assert len(tokens) == 1, tokens
    return [
        Row(
            id="C1",
            what="end to end ÷ raw engine",
            values=[raw.cpu / whole.cpu for raw, whole in pairs],
            must=0.95,
            goal=0.99,
            note=f"W1 x 0.3, {num_lines} requests, {tokens.pop()} answer tokens, hf engine, demo "
            "model, one thread; processor time",
        )
    ]


if __name__ == "__main__":
    main(measure)
