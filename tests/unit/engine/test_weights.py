import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import HfConfig
from engine.devices import read_memory
from engine.hf import weights
from jobs.domain.errors import EngineError, EngineMisconfigured, EngineOutOfMemory


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    return folder


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_tensor(folder: Path) -> None:
    """Change one letter of a tensor's name, as a flipped bit of the header would."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.uq_proj", 1))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def enlarge(folder: Path) -> None:
    """Make the weights two thousand GB, of which the disk holds nothing."""
    change_config(
        folder, hidden_size=65536, num_attention_heads=512, num_key_value_heads=8, head_dim=128
    )
    shape = [65536, 1024 * 1024 * 16]
    num_bytes = shape[0] * shape[1] * 2
    header = json.dumps(
        {
            "model.layers.0.mlp.up_proj.weight": {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [0, num_bytes],
            }
        }
    ).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + num_bytes)


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )


@pytest.mark.parametrize(
    ("damage", "kind", "told"),
    [
        (cut, EngineMisconfigured, r"model\.safetensors is damaged: it is cut off"),
        (lose_shard, EngineMisconfigured, "incomplete: model-00001-of-00001"),
        (rename_tensor, EngineMisconfigured, "incomplete: model.layers.1.mlp.up_proj.weight"),
        (enlarge, EngineOutOfMemory, "do not fit on cpu: they take 2199.0 GB, and it has"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            EngineMisconfigured,
            r"config\.json is no JSON",
        ),
        (
            lambda folder: change_config(folder, model_type="nobody"),
            EngineMisconfigured,
            "architecture 'nobody', which transformers .* does not know",
        ),
        (
            lambda folder: change_config(folder, model_type=None),
            EngineMisconfigured,
            "names no model_type",
        ),
        (
            lambda folder: change_config(folder, model_type="vit"),
            EngineMisconfigured,
            "'vit', which does not generate text",
        ),
        (
            lambda folder: change_config(folder, hidden_size=96),
            EngineMisconfigured,
            "other shapes than its config",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            EngineMisconfigured,
            r"JSON files, such as tokenizer\.json, is damaged",
        ),
    ],
    ids=[
        *("cut off", "missing shard", "renamed tensor", "too large", "config that is no JSON"),
        *("unknown architecture", "no architecture", "pictures", "other shapes", "tokenizer"),
    ],
)
def test_bad_model_is_one_line(
    copy: Path, damage: Callable[[Path], object], kind: type[EngineError], told: str
) -> None:
    damage(copy)
    with pytest.raises(kind) as refused:
        weights.load(HfConfig(model=str(copy), device="cpu"))
    assert re.search(told, refused.value.message)
    assert str(copy) in refused.value.message or told.startswith("incomplete")
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 500


def test_nf4_is_proposed_where_it_would_fit(copy: Path) -> None:
    """With weights between what 4 bits and 16 bits take on the memory of this machine."""
    rows = int(read_memory().total_bytes * 1.5) // (65536 * 2)
    header = json.dumps(
        {"up.weight": {"dtype": "BF16", "shape": [rows, 65536], "data_offsets": [0, rows * 131072]}}
    ).encode()
    with (copy / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + rows * 131072)
    with pytest.raises(EngineOutOfMemory, match="quantization nf4 needs"):
        weights.load(HfConfig(model=str(copy), device="cpu"))
