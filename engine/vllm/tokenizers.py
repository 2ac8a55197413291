"""The tokenizer of a model in vLLM, which is ours to use: prompts go to vLLM as token ids."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.config import VllmConfig
from engine.trust import trusts_code
from engine.vllm.arguments import first_line, read_object
from jobs.domain.errors import EngineMisconfigured


def load_tokenizer(config: VllmConfig, folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a folder.

    Raises:
        EngineMisconfigured: it cannot be loaded, is no fast one, or needs code that nobody trusts.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=trusts_code(config, folder, read_object(folder / "config.json")),
            local_files_only=True,
        )
    except EngineMisconfigured:
        raise
    except Exception as error:
        raise EngineMisconfigured(
            f"The tokenizer in {folder} cannot be loaded: {first_line(error)}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise EngineMisconfigured(f"{folder} has no tokenizer.json; save it with a fast tokenizer.")
    return tokenizer
