import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from engine.choice import Choice, Machine, check_group, look_around
from engine.config import HfConfig, LlamacppConfig, VllmConfig
from engine.devices import Device, Memory
from engine.registry import describe_model
from jobs.app import open_app
from jobs.catalogue import Completed, resolve
from jobs.cli import exits
from jobs.cli.main import app as cli
from jobs.domain.errors import (
    EngineMisconfigured,
    EngineOutOfMemory,
    InvalidInput,
    NotFound,
)
from jobs.model_settings import EngineChoice, ModelSettings
from jobs.settings import Settings, load, resolve_model
from tests.builders import make_lines

GB = 10**9
SHAPES = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824},
    "70b": {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672},
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in os.environ:
        if name.startswith(("BATCHCTL_", "HF_", "VLLM_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    """Return a function that makes a folder with the configuration of a model, and no more."""

    def make(name: str, **more: Any) -> str:  # noqa: ANN401
        folder = tmp_path / name
        folder.mkdir()
        described = {
            "model_type": "llama",
            "num_attention_heads": SHAPES[name]["hidden_size"] // 128,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            **SHAPES[name],
            **more,
        }
        (folder / "config.json").write_text(json.dumps(described))
        return str(folder)

    return make


def machine(*gpu_gb: int, memory_gb: int = 64, **more: Any) -> Machine:  # noqa: ANN401
    gpus = tuple(
        Device(index=n, uuid=f"GPU-{n}", name="NVIDIA L4", total_bytes=gb * GB, free_bytes=GB)
        for n, gb in enumerate(gpu_gb)
    )
    memory = Memory(total_bytes=memory_gb * GB, available_bytes=GB)
    told = {"has_cuda": bool(gpus), "has_bitsandbytes": True, **more}
    return Machine(gpus=gpus, memory=memory, **told)


def complete(
    source: str,
    there: Machine,
    *,
    settings: Settings | None = None,
    engine: EngineChoice = "auto",
    flag: str | None = None,
    **entry: Any,  # noqa: ANN401
) -> Completed:
    settings = settings or Settings()
    return resolve(
        {"m": ModelSettings.model_validate({"source": source, **entry})},
        "m",
        groups=settings.engine_groups,
        engine=engine,
        quantization=flag,
        machine=there,
    )


def chosen(found: Completed) -> tuple[str, str | None, bool]:
    assert found.choice is not None
    assert (found.choice.engine, found.choice.quantization) == (
        found.settings.engine,
        found.settings.quantization,
    )
    assert "\n" not in found.choice.reason
    return found.settings.engine, found.settings.quantization, found.choice.is_notable


def test_model_that_fits_runs_at_16_bit_and_nobody_is_told(model: Callable[..., str]) -> None:
    found = complete(model("7b"), machine(memory_gb=32))
    assert chosen(found) == ("hf", "none", False)
    assert found.choice is not None
    assert found.choice.device == "cpu"


def test_model_that_fits_in_4_bits_only_gets_nf4_and_says_why(model: Callable[..., str]) -> None:
    found = complete(model("13b"), machine(24))
    assert chosen(found) == ("hf", "nf4", True)
    assert found.choice is not None
    assert found.choice.device == "cuda:0"
    for part in ("nf4", "GPU 0 (NVIDIA L4)", "24.0 GB", "16 bit"):
        assert part in found.choice.reason


def test_main_memory_is_judged_where_there_is_no_gpu(model: Callable[..., str]) -> None:
    assert chosen(complete(model("13b"), machine(memory_gb=24))) == ("hf", "nf4", True)


def test_model_that_does_not_fit_says_what_is_needed_and_what_there_is(
    model: Callable[..., str],
) -> None:
    with pytest.raises(EngineOutOfMemory) as refused:
        complete(model("70b"), machine(24, memory_gb=32))
    for part in ("16 bit", "4 bits (nf4)", "21.6 GB of 24.0 GB", "smaller model"):
        assert part in refused.value.message
    assert "\n" not in refused.value.message


def test_room_in_main_memory_is_pointed_out_where_the_gpu_is_too_small(
    model: Callable[..., str],
) -> None:
    folder = model("70b")
    with pytest.raises(EngineOutOfMemory, match=r"`hf\.device` to cpu"):
        complete(folder, machine(24, memory_gb=200))
    found = complete(folder, machine(24, memory_gb=200), options={"device": "cpu"})
    assert chosen(found) == ("hf", "none", False)


def test_vllm_is_chosen_where_it_is_installed_and_there_is_cuda(
    model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    folder = model("7b")
    assert chosen(complete(folder, machine(24, has_vllm=True))) == ("vllm", "none", False)
    assert chosen(complete(folder, machine(24)))[0] == "hf"
    assert chosen(complete(folder, machine(has_vllm=True)))[0] == "hf"
    assert chosen(complete(folder, machine(24, has_vllm=True, has_cuda=False)))[0] == "hf"


def test_gpus_of_a_group_share_weights_and_cache(
    model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    folder = model("70b")
    four = Settings.model_validate({"vllm": {"tensor_parallel_size": 4}})
    assert chosen(complete(folder, machine(*[48] * 4, has_vllm=True), settings=four)) == (
        *("vllm", "none"),
        False,
    )
    assert chosen(complete(folder, machine(*[24] * 4, has_vllm=True), settings=four)) == (
        *("vllm", "nf4"),
        True,
    )
    # Whether they are there is not judged here: a launcher sees all GPUs, a worker its group.
    assert complete(folder, machine(48, 48, has_vllm=True), settings=four)
    with pytest.raises(EngineMisconfigured, match=r"4 GPUs .* sees 2"):
        check_group("m", machine(48, 48), num_gpus=4)
    check_group("m", machine(48, 48), num_gpus=2)
    check_group("m", machine(), num_gpus=4)


def test_gpu_that_torch_cannot_use_is_named(model: Callable[..., str]) -> None:
    found = complete(model("7b"), machine(24, has_cuda=False))
    assert chosen(found) == ("hf", "none", True)
    assert found.choice is not None
    assert found.choice.device == "cpu"
    assert "NVIDIA L4" in found.choice.reason
    assert "no CUDA" in found.choice.reason


@pytest.mark.parametrize("where", ["flag", "entry", "group"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_explicit_quantization_wins(
    model: Callable[..., str], where: str, quantization: str
) -> None:
    small = machine(memory_gb=8)
    folder = model("70b")
    flag = quantization if where == "flag" else None
    entry: dict[str, Any] = {"quantization": quantization} if where == "entry" else {}
    group = {"hf": {"quantization": quantization}} if where == "group" else {}
    found = complete(folder, small, settings=Settings.model_validate(group), flag=flag, **entry)
    assert found.settings.quantization == quantization


def test_explicit_engine_wins_and_bits_are_still_chosen(model: Callable[..., str]) -> None:
    there = machine(24, has_vllm=True)
    found = complete(model("13b"), there, engine="hf")
    assert chosen(found) == ("hf", "nf4", True)


def test_nothing_is_chosen_where_everything_is_said(model: Callable[..., str]) -> None:
    found = complete(model("13b"), machine(24), engine="hf", flag="nf4")
    assert found.choice is None


def test_auto_said_in_words_is_the_same_as_unset(model: Callable[..., str]) -> None:
    found = complete(model("13b"), machine(24), flag="auto", quantization="auto", engine="auto")
    assert chosen(found) == ("hf", "nf4", True)
    config = ModelSettings(source="a/b", engine="hf", quantization="auto").to_engine_config()
    assert isinstance(config, HfConfig)
    assert config.quantization == "none"


def test_context_that_was_asked_for_has_to_fit(model: Callable[..., str]) -> None:
    folder = model("7b", max_position_embeddings=131_072)
    there = machine(24)
    assert chosen(complete(folder, there))[1] == "none"
    # 100,000 tokens of 128 KiB each are 13 GB of cache.
    assert chosen(complete(folder, there, context_tokens=100_000))[1] == "nf4"


def test_nf4_without_its_library_says_what_to_install(model: Callable[..., str]) -> None:
    with pytest.raises(EngineMisconfigured, match="bitsandbytes"):
        complete(model("13b"), machine(24, has_bitsandbytes=False))


def test_quantized_checkpoint_stays_as_it_is(model: Callable[..., str]) -> None:
    folder = model("13b", quantization_config={"quant_method": "awq", "bits": 4})
    assert chosen(complete(folder, machine(24))) == ("hf", "none", False)
    with pytest.raises(EngineOutOfMemory, match="stored in"):
        complete(folder, machine(6))


def test_free_memory_of_the_moment_changes_nothing(model: Callable[..., str]) -> None:
    """Another process may hold the GPU; tomorrow's answers have to be today's."""
    folder = model("7b")
    busy = machine(24)
    assert all(gpu.free_bytes < 2 * GB for gpu in busy.gpus)
    assert chosen(complete(folder, busy))[1] == "none"


def test_hub_model_that_is_not_here_is_taken_to_fit(tmp_path: Path) -> None:
    settings = Settings.model_validate({"hf": {"cache_folder": str(tmp_path)}})
    found = complete("owner/name", machine(memory_gb=1), settings=settings)
    assert chosen(found) == ("hf", "none", False)


def test_hub_model_in_the_cache_is_judged(model: Callable[..., str], tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((Path(model("13b")) / "config.json").read_bytes())
    settings = Settings.model_validate({"hf": {"cache_folder": str(tmp_path / "hub")}})
    assert chosen(complete("owner/name", machine(24), settings=settings))[1] == "nf4"


def test_damaged_weights_are_said_before_anything_is_loaded(model: Callable[..., str]) -> None:
    folder = model("7b")
    (Path(folder) / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(EngineMisconfigured, match=r"model\.safetensors is damaged"):
        complete(folder, machine(24))


def test_url_means_the_server(model: Callable[..., str]) -> None:
    there = machine(24, has_vllm=True)
    found = complete(model("70b"), there, url="http://127.0.0.1:9/v1")
    assert found.settings.engine == "remote"


def test_planning_looks_at_nothing(tmp_path: Path) -> None:
    """Neither at the machine nor at files: both are other ones where the work is done."""
    settings = Settings(models={"m": {"source": str(tmp_path / "elsewhere")}})
    found = resolve(
        settings.models,
        "m",
        groups=settings.engine_groups,
        engine="auto",
        check_installed=False,
    )
    assert (found.settings.engine, found.settings.quantization) == ("hf", "none")
    assert found.choice is None


def test_options_that_are_wrong_are_still_refused(model: Callable[..., str]) -> None:
    with pytest.raises(NotFound):
        resolve({}, "nobody", groups=Settings().engine_groups, engine="auto", machine=machine())
    with pytest.raises(InvalidInput, match="slots"):
        complete(model("7b"), machine(24), options={"slots": "many"})


@pytest.mark.parametrize("name", ["~nobodyatall/model", "~nobodyatall/model.gguf"])
def test_a_home_that_nobody_has_is_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(NotFound):
        resolve({}, name, groups=Settings().engine_groups, engine="auto", machine=machine())
    with pytest.raises(EngineMisconfigured, match=r"There is no (folder|file)"):
        describe_model(
            LlamacppConfig(model=name) if name.endswith(".gguf") else HfConfig(model=name), name
        )


def test_a_source_that_is_neither_a_folder_nor_a_hub_id_is_told_as_such() -> None:
    with pytest.raises(EngineMisconfigured, match="no hub id such as owner/name"):
        describe_model(HfConfig(model="my models/the best one"), "m")


def test_completed_settings_open_the_engine_that_was_chosen(
    model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    config = complete(model("13b"), machine(24, has_vllm=True)).settings.to_engine_config()
    assert isinstance(config, VllmConfig)
    assert config.quantization == "nf4"


def test_looking_around_is_quick_and_imports_no_torch() -> None:
    program = (
        "import sys, time; from engine.choice import look_around; "
        "begun = time.process_time(); look_around(); spent = time.process_time() - begun; "
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), 'imported'; "
        "print(spent)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert float(ran.stdout) < 0.05


def test_demo_model_on_this_machine_runs_at_16_bit() -> None:
    begun = time.process_time()
    found = resolve(
        Settings().models, "demo", groups=Settings().engine_groups, engine="hf", machine=None
    )
    assert time.process_time() - begun < 0.05
    assert found.settings.quantization == "none"
    assert isinstance(found.choice, Choice)
    assert look_around().memory.total_bytes > 0


def write_model_for_nf4_only(folder: Path) -> str:
    """Make a configuration whose 16-bit weights are 1.5 times the memory of this machine."""
    folder.mkdir()
    layers = round(1.5 * look_around().memory.total_bytes / 405_000_000)  # bytes of one layer
    described = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 1,
        "intermediate_size": 11008 + 2048,
        "vocab_size": 1000,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


@pytest.mark.skipif(bool(look_around().gpus), reason="judges by the main memory")
def test_worker_logs_what_nobody_would_expect_and_no_more(tmp_path: Path) -> None:
    source = write_model_for_nf4_only(tmp_path / "large")
    settings = Settings.model_validate({"models": {"large": {"source": source}}})
    with open_app(settings, folder=tmp_path / "data") as app, capture_logs() as logs:
        config = app.engine_config("large")
        app.engine_config("demo")
    assert isinstance(config, HfConfig)
    assert config.quantization == "nf4"
    assert [(one["event"], one["model"], one["log_level"]) for one in logs] == [
        ("engine_chosen", "large", "warning")
    ]


@pytest.mark.skipif(bool(look_around().gpus), reason="judges by the main memory")
def test_run_says_in_one_line_that_it_took_4_bits(tmp_path: Path) -> None:
    source = write_model_for_nf4_only(tmp_path / "large")
    (tmp_path / "in.jsonl").write_bytes(make_lines(1))
    arguments = ["run", str(tmp_path / "in.jsonl"), "--data", str(tmp_path / "data")]
    ended = CliRunner().invoke(cli, [*arguments, "--model", source], prog_name="batchctl")
    assert ended.exit_code == exits.REFUSED  # there is a configuration and no tokenizer
    first = ended.stderr.splitlines()[0]
    assert first.startswith(f"{source} runs on hf at 4 bits (nf4): it needs ")
    quiet = CliRunner().invoke(
        cli, [*arguments, "--model", source, "--quantization", "nf4"], prog_name="batchctl"
    )
    assert "4 bits" not in quiet.stderr


def test_settings_of_the_guide_are_settings(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "choosing.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        (tmp_path / "batchctl.toml").write_text(block)
        settings = load(tmp_path / "batchctl.toml")
        name = next(name for name in settings.models if f"models.{name}]" in block)
        _, model = resolve_model(settings, name, check_installed=False)
        assert model.to_engine_config().kind == model.engine


@pytest.mark.parametrize(
    ("billions", "gpus", "chosen_bits"),
    [("7b", (24,), "none"), ("13b", (16,), "nf4"), ("13b", (80,), "none"), ("70b", (80,), "nf4")],
)
def test_hardware_of_the_guide_holds_what_it_says(
    model: Callable[..., str], billions: str, gpus: tuple[int, ...], chosen_bits: str
) -> None:
    heads = SHAPES[billions]["hidden_size"] // 128
    folder = model(billions, num_key_value_heads=8 if billions == "70b" else heads)
    assert chosen(complete(folder, machine(*gpus)))[1] == chosen_bits


@pytest.mark.parametrize("word", ["awq", "gptq", "fp8", "marlin", "nvfp4", "gptq_marlin"])
@pytest.mark.parametrize("where", ["entry", "flag"])
def test_quantization_that_only_vllm_has_chooses_vllm(where: str, word: str) -> None:
    entry = {"source": "owner/name", **({"quantization": word} if where == "entry" else {})}
    flag = word.upper() if where == "flag" else None
    models = {"m": ModelSettings.model_validate(entry)}
    groups = Settings().engine_groups
    planned = resolve(
        models, "m", groups=groups, engine="auto", quantization=flag, check_installed=False
    )
    assert (planned.settings.engine, planned.settings.quantization) == ("vllm", word)
    config = planned.settings.to_engine_config()
    assert isinstance(config, VllmConfig)
    assert config.quantization == word


def test_quantization_that_only_vllm_has_runs_on_vllm_here_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    for there in (machine(24, has_vllm=True), machine(memory_gb=16, has_vllm=True)):
        found = complete("owner/name", there, quantization="awq")
        assert (found.settings.engine, found.settings.quantization) == ("vllm", "awq")


def test_quantization_that_only_vllm_has_is_not_run_on_hf_where_hf_is_named() -> None:
    with pytest.raises(InvalidInput, match="m cannot run so: only the vllm engine has awq"):
        complete("owner/name", machine(24), engine="hf", quantization="awq")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"vllm": {"quantization": "squeezellm"}}, "vLLM has no squeezellm since 0.7"),
        ({"vllm": {"quantization": "nonsense"}}, "no quantization 'nonsense'"),
        ({"hf": {"quantization": "awq"}}, "only the vllm engine has awq"),
        ({"hf": {"quantization": "nonsense"}}, "Known are: auto, none, nf4, fp4, int8"),
        (
            {"models": {"m": {"source": "a/b", "quantization": "squeezellm"}}},
            "vLLM has no squeezellm since 0.7",
        ),
        ({"models": {"m": {"engine": "hf", "quantization": "fp8"}}}, "only the vllm engine has"),
        ({"models": {"m": {"quantization": "gtpq"}}}, "Did you mean 'gptq'?"),
    ],
)
def test_wrong_quantization_is_refused_with_the_settings(
    given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        load(**given)
    assert reason in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("word", ["int8", "fp4", "8bit"])
@pytest.mark.parametrize("where", ["flag", "entry"])
def test_kinds_that_only_hf_has_choose_hf_and_are_refused_on_vllm(word: str, where: str) -> None:
    flag = word if where == "flag" else None
    entry: dict[str, Any] = {"quantization": word} if where == "entry" else {}
    there = machine(24, has_vllm=True)
    found = complete("owner/name", there, flag=flag, **entry)
    assert found.settings.engine == "hf"
    assert found.settings.quantization == word.replace("8bit", "int8")
    with pytest.raises((InvalidInput, ValueError), match="only the hf engine has"):
        resolve(
            {"m": ModelSettings.model_validate({"source": "o/n", "engine": "vllm", **entry})},
            "m",
            groups=Settings().engine_groups,
            engine="auto",
            quantization=flag,
            check_installed=False,
        )


def test_wrong_quantization_of_a_flag_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^There is no quantization 'nonsense'"):
        complete("owner/name", machine(24), flag="nonsense")
