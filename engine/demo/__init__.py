"""The bundled toy model, the text it was trained on and the script that trained it."""

from pathlib import Path


def model_path() -> Path:
    """Return the folder that holds the packaged weights, tokenizer and chat template."""
    return Path(__file__).resolve().parent / "model"
