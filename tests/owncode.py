"""Python code of its own for a tiny model's folder, as people publish it with their models."""

import json
from pathlib import Path

_CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
_MODELING = """
from pathlib import Path

from transformers import LlamaForCausalLM, LlamaModel

from .configuration_own import OwnConfig

Path({canary!r}).touch()


class OwnModel(LlamaModel):
    config_class = OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def add_own_code(folder: Path, canary: Path) -> None:
    """Turn a Llama's folder into that of a model which only the code beside it knows.

    Args:
        canary: a file that is there once that code has run.
    """
    path = folder / "config.json"
    described = json.loads(path.read_text())
    described |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModel": "modeling_own.OwnModel",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    path.write_text(json.dumps(described))
    (folder / "configuration_own.py").write_text(_CONFIGURATION)
    (folder / "modeling_own.py").write_text(_MODELING.format(canary=str(canary)))
