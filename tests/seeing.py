"""A tiny random vision model of the LLaVA kind, and images for it; all made here, offline."""

import base64
import struct
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

DEMO = Path(__file__).parents[1] / "engine" / "demo" / "model"
SIZE = 32
PATCH = 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TEMPLATE = (
    "{%- for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{%- if m['content'] is string %}{{ m['content'] }}{%- else %}"
    "{%- for part in m['content'] %}"
    "{%- if part['type'] == 'image' %}{{ '<image>' }}{%- else %}{{ part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{ '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)
PARTS_ONLY = (
    "{%- for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{%- for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}"
    "{%- endfor %}"
    "{%- for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}"
    "{%- endfor %}{{ '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)
"""As that of LLaVA 1.5: what is no part of a message is not shown."""


def make_llava(folder: Path, *, template: str = TEMPLATE) -> Path:
    """Save a random model, a vision tower and a Llama of two layers each, and its processor."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = int(tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=32,
            initializer_range=0.3,
        ),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # so that what is seen weighs as much as what is read
        for weights in model.model.multi_modal_projector.parameters():
            weights.mul_(20)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    _name_as_published(folder / "model.safetensors")
    seen = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=seen, crop_size=seen),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return folder


def _name_as_published(file: Path) -> None:
    """Give the vision tower's tensors the names they have on the hub, which vLLM looks for."""
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def make_image(shade: int = 0, *, kind: str = "png", size: tuple[int, int] = (40, 30)) -> bytes:
    """Return an image; those of different shades look different all over."""
    width, height = size
    image = Pillow.new("RGB", size)
    image.putdata(
        [
            ((x * 7 + 60 * shade) % 256, (y * 11 + 90 * shade) % 256, (x * y + 30 * shade) % 256)
            for y in range(height)
            for x in range(width)
        ]
    )
    file = BytesIO()
    image.save(file, format=kind, **({"lossless": True} if kind == "webp" else {}))
    return file.getvalue()


@cache
def make_bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """Return a sound PNG of that many pixels, all of them black, in few bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = bytes((1 + (width + 7) // 8) * height)
    piece = bytes(1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    # One piece is packed, and its packed form repeated.
    packed = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(content[: len(content) % len(piece)]) + packer.flush()
    checked = struct.pack(">I", zlib.adler32(content))
    rows = b"\x78\xda" + packed * (len(content) // len(piece)) + rest + checked
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image_part(content: bytes, kind: str = "png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content, kind)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
