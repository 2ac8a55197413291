"""Images beside a prompt's tokens, in the form in which vLLM takes both."""

import asyncio
from typing import Any

from vllm.inputs import tokens_input
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.engine.async_llm import AsyncLLM

from engine.pictures import decode
from jobs.domain.errors import InvalidLine
from jobs.domain.request import Request


def render(
    llm: AsyncLLM, loop: asyncio.AbstractEventLoop, request: Request, prompt: list[int]
) -> tuple[list[int], Any]:
    """Return a prompt's tokens, those of images among them, and what vLLM is to be given.

    For any thread but that of `loop`.

    Args:
        prompt: with one token for each image.

    Raises:
        InvalidLine: an image is damaged, or vLLM refuses what is shown.
    """
    images = [image for message in request.messages or () for image in message.images]
    if not images:
        return prompt, tokens_input(prompt)
    given = {
        "prompt_token_ids": prompt,
        "multi_modal_data": {"image": [decode(image) for image in images]},
    }
    # What its processor remembers has to be sent in the order in which it was rendered; requests
    # that end before they are sent would break that.
    rendering = llm.renderer.render_cmpl_async(
        [parse_model_prompt(llm.model_config, given)], skip_mm_cache=True
    )
    try:
        (rendered,) = asyncio.run_coroutine_threadsafe(rendering, loop).result()
    except Exception as error:  # noqa: BLE001 -- each model's processor refuses in its own way
        raise InvalidLine(
            f"vLLM's processor refuses the images ({type(error).__name__}).",
            param="messages",
            error_code="invalid_image",
        ) from None
    return list(rendered["prompt_token_ids"]), rendered
