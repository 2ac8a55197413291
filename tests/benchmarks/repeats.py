"""C11: a batch of which half repeats the other, against that other half alone; processor time.

Slots are set: an engine that still looks for the best number would do so in some runs only.
"""

from engine.config import HfConfig
from engine.demo import model_path
from tests.benchmarks import workloads
from tests.benchmarks.local import open_local
from tests.benchmarks.measuring import Row, main, num_pairs_at, pairs_of, scaled


def measure(size: float) -> list[Row]:
    num_unique = scaled(300, size, least=16)
    alone = list(workloads.chat(num_unique, shrink=0.3))
    doubled = list(workloads.duplicates(2 * num_unique, shrink=0.3, share=0.5))
    config = HfConfig(model=str(model_path()), device="cpu", threads=1, slots=64)
    with open_local(config, model="demo") as local:
        local.run(alone)  # warm
        pairs = pairs_of(
            lambda _: local.run(doubled),
            lambda _: local.run(alone),
            num_pairs=num_pairs_at(11, size),
        )
    for half, whole in pairs:
        assert half.usage.completion_tokens == whole.usage.completion_tokens
    return [
        Row(
            id="C11",
            what="half duplicates ÷ the unique half alone",
            values=[both.cpu / unique.cpu for both, unique in pairs],
            must=1.05,
            goal=1.01,
            less=True,
            note=f"W9, {2 * num_unique} and {num_unique} requests, hf engine, demo model; the "
            "engine made as many tokens for both; processor time",
        )
    ]


if __name__ == "__main__":
    main(measure)
