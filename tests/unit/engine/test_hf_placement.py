"""`device_map` and `max_memory`: answers do not depend on where a model lies."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest

from engine.choice import Machine, Plan, choose
from engine.config import HfConfig
from engine.demo import model_path
from engine.devices import Memory
from engine.hf import weights
from engine.hf.engine import HfEngine
from jobs.domain.errors import EngineMisconfigured
from jobs.domain.request import Request, SamplingParams
from tests.sources import ListSource

# Half of the demo model's layers, by name.
TABLE: dict[str, int | str] = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.layers.3": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def config(**changes: object) -> HfConfig:
    plain = {"model": str(model_path()), "device": "cpu", "compute_dtype": "float32", "slots": 4}
    return HfConfig.model_validate({**plain, **changes})


def answers(made: HfConfig) -> dict[int, str]:
    engine = HfEngine(made)
    asked = [
        Request(
            id=number,
            prompt=f"There was once a {animal}",
            sampling=SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        )
        for number, animal in enumerate(("fox", "crow", "very small mouse", "king", "cat", "hen"))
    ]
    found = {result.id: result.text for result in engine.generate(ListSource(asked))}
    engine.close()
    return found


def offloaded() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("batchctl-offload-*")}


@pytest.mark.parametrize(
    "changes",
    [
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"device_map": TABLE},
        {"max_memory": {"cpu": "6MB"}},
        {"device_map": "auto", "max_memory": {"cpu": 12_000_000}},
    ],
    ids=["auto", "all", "table", "limit", "auto and limit"],
)
def test_answers_do_not_depend_on_where_the_weights_lie(changes: dict[str, Any]) -> None:
    assert answers(config(**changes)) == answers(config())


def test_what_does_not_fit_the_limit_lies_on_disk_and_the_folder_goes_with_the_model() -> None:
    gc.collect()
    before = offloaded()
    loaded = weights.load(config(max_memory={"cpu": "6MB"}))
    model: Any = loaded.model
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert len(offloaded() - before) == 1
    del loaded, model
    gc.collect()
    assert offloaded() == before


def test_no_tensor_can_be_taken_for_a_tied_one_that_has_left_its_address() -> None:
    model: Any = weights.load(config(max_memory={"cpu": "6MB"})).model
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]  # noqa: SLF001
    known = {address for hook in hooks for address in getattr(hook, "tied_params_map", None) or {}}
    assert known == {model.get_input_embeddings().weight.data_ptr()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device_map": {"": "cuda:1"}}, "names 'cuda:1', and this model is computed on cpu"),
        ({"device_map": {"": 0}}, "tensor_parallel_size"),
        ({"device_map": {**TABLE, "model.layers.9": "cpu"}}, "do not match any submodules"),
        (
            # They share one tensor.
            {"device_map": {**TABLE, "model.embed_tokens": "disk", "lm_head": "disk"}},
            "embeddings of this model",
        ),
        ({"max_memory": {"cpu": "much"}}, "max_memory of cpu is 'much'; give bytes"),
        ({"max_memory": {"0": "1GiB"}}, "max_memory names '0'"),
        ({"max_memory": {"disk": "1GiB"}}, "the disk has the rest"),
        ({"device_map": TABLE, "max_memory": {"cpu": "1GiB"}}, "leave one of the two out"),
        ({"device_map": TABLE, "quantization": "nf4"}, "use quantization none"),
    ],
)
def test_what_cannot_lie_so_is_refused_with_what_to_do(changes: dict[str, Any], told: str) -> None:
    before = offloaded()
    with pytest.raises(EngineMisconfigured, match=told.replace("(", r"\(")):
        weights.load(config(**changes))
    gc.collect()
    assert offloaded() <= before, "nothing is left behind"


def test_a_model_larger_than_the_device_is_not_refused_where_its_parts_are_placed() -> None:
    machine = Machine(memory=Memory(total_bytes=1, available_bytes=1))
    placed = choose("m", None, machine, Plan(is_placed=True), engine="hf")
    assert placed.quantization == "none"
    assert "device_map and max_memory" in placed.reason
