import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from engine.demo import model_path
from engine.devices import read_memory
from jobs.cli import exits
from jobs.cli.main import app

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in os.environ:
        if name.startswith(("BATCHCTL_", "HF_", "VLLM_", "REMOTE_", "OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BATCHCTL_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *args], prog_name="batchctl")


def read(*args: str, code: int = exits.OK) -> dict[str, Any]:
    result = invoke(*args, "--json")
    assert result.exit_code == code, result.output
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def write_config(name: str, **more: Any) -> str:  # noqa: ANN401
    folder = Path(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_7B | more))
    return f"./{name}"


def test_machine_is_described_without_a_model() -> None:
    found = read()
    assert set(found["packages"]) == {"hf", "vllm", "llamacpp", "server"}
    memory = found["devices"][-1]
    assert (memory["device"], memory["total_bytes"]) == ("cpu", read_memory().total_bytes)
    assert {name: one["ok"] for name, one in found["services"].items()} == {
        "database": True,
        "blobs": True,
        "broker": True,
    }
    assert "model" not in found
    assert not Path("data").exists(), "looking makes nothing"


def test_extra_that_is_missing_says_how_to_install_it() -> None:
    found = read()["packages"]
    for extra, one in found.items():
        assert one["ok"] or f"batchctl[{extra}]" in one["told"]


def test_options_of_a_model_are_those_of_its_shapes() -> None:
    found = read("--model", write_config("seven", max_position_embeddings=2048))["model"]
    assert found["parameters"] == 6_738_415_616
    assert found["context_tokens"] == 2048
    by_kind = {o["weights_as"]: o for o in found["options"] if o["device"] == "cpu"}
    half, four = by_kind["16 bit"], by_kind["nf4"]
    assert half["weights_bytes"] == 2 * 6_738_415_616
    assert 3.6e9 < four["weights_bytes"] < 4.5e9
    assert half["cache_bytes"] == 2048 * 2 * 32 * 32 * 128 * 2
    for option in found["options"]:
        parts = ("weights_bytes", "cache_bytes", "step_bytes", "other_bytes")
        assert option["total_bytes"] == sum(option[part] for part in parts)
        assert option["fits"] == (option["total_bytes"] <= option["usable_bytes"])


def test_cache_is_that_of_the_sequences_that_were_asked_about() -> None:
    folder = write_config("seven")
    one = read("--model", folder, "--context", "1000")["model"]["options"][0]
    many = read("--model", folder, "--context", "1000", "--sequences", "8")["model"]["options"][0]
    assert many["cache_bytes"] == 8 * one["cache_bytes"] == 8 * 1000 * 524_288


def test_model_that_fits_says_what_auto_chooses() -> None:
    found = read("--model", str(model_path()))["model"]
    assert found["can_run"]
    assert "runs on hf at 16 bit" in found["choice"] or "vllm" in found["choice"]
    assert found["notes"] == []


def test_model_that_fits_nowhere_ends_with_the_code_of_engines() -> None:
    folder = write_config("huge", num_hidden_layers=32_000)
    found = read("--model", folder, code=exits.ENGINE)["model"]
    assert not found["can_run"]
    assert "does not fit" in found["choice"]
    assert not any(option["fits"] for option in found["options"])


def test_quantization_that_is_set_and_does_not_fit_is_said() -> None:
    folder = write_config("huge", num_hidden_layers=32_000)
    result = invoke("--model", folder, "--engine", "hf", "--quantization", "none")
    assert result.exit_code == exits.ENGINE
    assert "with quantization none, as is set, and does not fit" in result.stdout


def test_damaged_weights_are_the_problem() -> None:
    folder = write_config("broken")
    (Path(folder) / "model.safetensors").write_bytes(b"")
    result = invoke("--model", folder)
    assert result.exit_code == exits.ENGINE
    assert "model.safetensors is damaged" in result.stdout


def test_what_is_missing_beside_the_config_is_noted() -> None:
    notes = "\n".join(read("--model", write_config("seven"), code=_any_code())["model"]["notes"])
    assert "no tokenizer.json" in notes
    assert "no weights" in notes


def _any_code() -> int:
    """Return how a model of 7B ends here: four bits of it need 7 GB."""
    return exits.OK if read_memory().total_bytes * 0.8 > 8e9 else exits.ENGINE


def test_config_without_shapes_says_that_it_cannot_tell() -> None:
    Path("odd").mkdir()
    (Path("odd") / "config.json").write_text('{"model_type": "odd"}')
    found = read("--model", "./odd")["model"]
    assert found["can_run"]
    assert found["options"] == []
    assert any("not known" in note for note in found["notes"])


def test_remote_model_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "BATCHCTL_MODELS",
        json.dumps({"far": {"url": "http://127.0.0.1:9/v1", "api_key": "s3cret"}}),
    )
    found = read("--model", "far")["model"]
    assert found["can_run"]
    assert "http://127.0.0.1:9/v1" in found["choice"]


def test_unknown_model_is_one_line() -> None:
    result = invoke("--model", "nobody")
    assert result.exit_code == exits.NOT_FOUND
    assert result.stderr.count("\n") == 1


def test_services_that_are_away_are_named_without_their_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BATCHCTL_DATABASE__URL", "postgresql://u:s3cret@127.0.0.1:9/db")
    monkeypatch.setenv("BATCHCTL_BROKER__URL", "redis://:s3cret@127.0.0.1:9/0")
    monkeypatch.setenv(
        "BATCHCTL_BLOBS",
        json.dumps(
            {
                "kind": "s3",
                "bucket": "some-bucket",
                "endpoint_url": "http://127.0.0.1:9",
                "access_key": "key",
                "secret_key": "s3cret",
            }
        ),
    )
    result = invoke("--json")
    assert result.exit_code == exits.OK
    assert "s3cret" not in result.output
    services = json.loads(result.stdout)["services"]
    assert not any(one["ok"] for one in services.values()), services
    assert "127.0.0.1:9" in services["broker"]["told"]
    plain = invoke()
    assert plain.stdout.count("problem: ") == 3
    assert "s3cret" not in plain.output


def test_database_that_is_there_is_looked_into(postgres_url: str) -> None:
    result = CliRunner().invoke(
        app, ["doctor", "--json"], env={"BATCHCTL_DATABASE__URL": postgres_url}
    )
    told = json.loads(result.stdout)["services"]["database"]
    assert told["ok"]
    assert "tables up to date" in told["told"]


def test_table_is_aligned_text_without_a_terminal() -> None:
    result = invoke("--model", write_config("seven"))
    lines = result.stdout.splitlines()
    assert any(line.startswith("ENGINE\tWEIGHTS AS\tDEVICE") for line in lines)
    assert any(line.startswith("hf\tnf4\tmain memory\t") for line in lines)


def test_sizes_are_told_where_no_engine_is_installed() -> None:
    program = """
import sys
for name in ("torch", "transformers", "bitsandbytes", "psutil", "pynvml"):
    sys.modules[name] = None  # as if it were not installed
from typer.testing import CliRunner
from jobs.cli.main import app
ended = CliRunner().invoke(app, ["doctor", "--model", "./seven", "--json"])
print(ended.stdout)
sys.exit(ended.exit_code)
"""
    write_config("seven")
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == exits.ENGINE, ran.stderr
    found = json.loads(ran.stdout)["model"]
    assert found["parameters"] == 6_738_415_616
    assert "pip install 'batchctl[hf]'" in found["choice"]
