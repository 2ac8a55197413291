"""Images in prompts of LLaVA-like models: seen by the vision tower, read by the language model.

The model is taken apart: its language model generates as any other does, and the rows of a step
that stand for an image get what the vision tower made of it in place of a token's embedding.

In the engine's prompts the tokens of an image are numbers of their own, made from its bytes. No
vocabulary has them, so that prompts which begin alike share their cache exactly where they show
the same image.
"""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.bounded import BoundedCache
from engine.pictures import decode
from jobs.domain.errors import EngineMisconfigured, InvalidLine
from jobs.domain.images import Image
from jobs.domain.request import Request

_FIRST_TOKEN = 1 << 30
"""Of those that stand for images; a cache knows blocks by tokens of 31 bits."""
_MAX_REMEMBERED_BYTES = 256 << 20


class Vision(msgspec.Struct, frozen=True):
    """What of a model sees: all of it but the language model's own part.

    Attributes:
        whole: the model as it was loaded.
        processor: makes pixels of an image, as its folder says.
        image_token: stands for one image in what the chat template writes.
    """

    whole: Any
    processor: Any
    image_token: int


class Shown(msgspec.Struct, frozen=True):
    """The images of one prompt: where their tokens are, and a row for each of them."""

    places: "np.ndarray[Any, np.dtype[np.int64]]"
    features: torch.Tensor


def take_apart(whole: PreTrainedModel) -> PreTrainedModel:
    """Return the language model inside a LLaVA-like one; both have the same weights.

    Raises:
        EngineMisconfigured: it is put together in another way.
    """
    inside: Any = whole
    try:
        # Nothing is made but the shell around what is there already.
        with torch.device("meta"):
            text: Any = AutoModelForCausalLM.from_config(whole.config.get_text_config())
        setattr(text, text.base_model_prefix, inside.model.language_model)
        text.lm_head = inside.lm_head
    except (AttributeError, ValueError) as error:
        raise EngineMisconfigured(
            "The language model of this vision model cannot be run by itself; serve it with vLLM."
        ) from error
    text.eval()
    language_model: PreTrainedModel = text
    return language_model


class Seer:
    """Puts what images show into prompts; for the thread that prepares requests."""

    def __init__(self, vision: Vision, *, device: torch.device) -> None:
        """Take the part of the model that sees."""
        self._vision = vision
        self._device = device
        self._key = secrets.token_bytes(32)
        """So that nobody can look for two images with the same tokens."""
        self._seen: BoundedCache[torch.Tensor] = BoundedCache(
            max_entries=4096, max_bytes=_MAX_REMEMBERED_BYTES
        )

    def show(self, request: Request, prompt: Sequence[int]) -> tuple[list[int], list[int], Shown]:
        """Return a prompt with room for its images, twice, and what belongs there.

        Args:
            prompt: with one token for each image.

        Returns:
            the prompt with the model's own image tokens, as it counts for penalties; the prompt
            that tells images apart; and the images.

        Raises:
            InvalidLine: an image is damaged, or the chat template shows other images than these.
        """
        images = [image for message in request.messages or () for image in message.images]
        image_token = self._vision.image_token
        if prompt.count(image_token) != len(images):
            raise InvalidLine(
                "The model's chat template does not show the images of these messages.",
                param="messages",
                error_code="invalid_messages",
            )
        following = iter(images)
        plain: list[int] = []
        told: list[int] = []
        places: list[int] = []
        features: list[torch.Tensor] = []
        for token in prompt:
            if token != image_token:
                plain.append(token)
                told.append(token)
                continue
            digest = hashlib.blake2b(
                (image := next(following)).content, key=self._key, digest_size=32
            ).digest()
            seen = self._see(image, digest)
            places += range(len(plain), len(plain) + len(seen))
            plain += [image_token] * len(seen)
            told += _spell(digest, len(seen))
            features.append(seen)
        return plain, told, Shown(np.asarray(places, dtype=np.int64), torch.cat(features))

    def _see(self, image: Image, digest: bytes) -> torch.Tensor:
        """Return what the vision tower makes of an image: a row for each of its tokens."""
        seen = self._seen.find(digest)
        if seen is not None:
            return seen
        pixels = decode(image)
        whole = self._vision.whole
        try:
            given = self._vision.processor(images=[pixels], return_tensors="pt")
        except Exception as error:  # noqa: BLE001 -- each model's processor refuses in its own way
            raise InvalidLine(
                f"The model's processor refuses an image ({type(error).__name__}).",
                param="messages",
                error_code="invalid_image",
            ) from None
        with torch.inference_mode():
            values = given["pixel_values"].to(self._device, whole.dtype)
            (seen,) = whole.get_image_features(pixel_values=values, return_dict=True).pooler_output
        rows: torch.Tensor = seen
        return self._seen.keep(digest, rows, weight=rows.numel() * rows.element_size())


def _spell(digest: bytes, num_tokens: int) -> list[int]:
    """Return the tokens of an image."""
    stream = hashlib.shake_256(digest).digest(4 * num_tokens)
    numbers = np.frombuffer(stream, dtype="<u4") & (_FIRST_TOKEN - 1)
    tokens: list[int] = (numbers + _FIRST_TOKEN).tolist()
    return tokens


def embed(
    embedding: torch.nn.Module,
    tokens: torch.Tensor,
    batch: Sequence[Any],
    shown: dict[str, Shown],
) -> torch.Tensor | None:
    """Return the embeddings of a step, images among them; None where it holds no image.

    Args:
        tokens: of the step, [1, num_tokens].
        batch: transformers' requests of the step, in order, counted on to its end already.
        shown: the images of prompts, by request.
    """
    found: list[tuple[int, Shown, int, int]] = []
    row = 0
    for future in batch:
        length, state = future.query_length, future.state
        one = shown.get(state.request_id)
        if one is not None:
            first = state.position_offset - length
            start, stop = np.searchsorted(one.places, (first, first + length)).tolist()
            if start < stop:
                found.append((row - first, one, start, stop))
        row += length
    if not found:
        return None
    is_image = tokens >= _FIRST_TOKEN
    embedded: torch.Tensor = embedding(tokens.masked_fill(is_image, 0))
    for offset, one, start, stop in found:
        places = torch.from_numpy(one.places[start:stop] + offset).to(tokens.device)
        embedded[0, places] = one.features[start:stop].to(embedded.dtype)
    return embedded
