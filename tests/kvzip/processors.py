"""Processors of multimodal models, made offline around the byte tokenizer: one token a byte, four image tokens an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast

from ..models import byte_tokenizer

pytest.importorskip("torchvision")  # video processors, and the fast ones of images

_SIZE = {"height": 28, "width": 28}
# as Gemma 3's: texts are trimmed, contents may be text or parts
_IN_PLACE = (
    "<bos>{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# as LLaVA's: contents are parts, images come before all text
_FIRST = (
    "<bos>{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}IMAGE "
    "{% endfor %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def picture(seed: int) -> Image.Image:
    """A picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def gemma3_processor() -> Any:
    """For the family `gemma3`: placeholders where the images stand."""
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    images = transformers.Gemma3ImageProcessor(size=_SIZE)
    template = _IN_PLACE.replace("IMAGE", "<start_of_image>")
    return transformers.Gemma3Processor(images, _tokenizer(names), chat_template=template, image_seq_length=4)


def llava_processor() -> Any:
    """For the family `llava`: placeholders before all text."""
    images = transformers.CLIPImageProcessor(size=_SIZE, crop_size=_SIZE)
    return transformers.LlavaProcessor(
        images,
        _tokenizer({"image_token": "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_FIRST.replace("IMAGE", "<image>"),
    )


def qwen3_vl_processor() -> Any:
    """For the family `qwen3_vl`: positions in three parts."""
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    images = transformers.Qwen2VLImageProcessor(min_pixels=64 * 64, max_pixels=64 * 64, patch_size=16, merge_size=2)
    template = _IN_PLACE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    videos = transformers.Qwen3VLVideoProcessor()
    return transformers.Qwen3VLProcessor(images, _tokenizer(names), videos, chat_template=template)


def _tokenizer(names: dict[str, str]) -> PreTrainedTokenizerFast:
    """The byte tokenizer with more special tokens, from id 260 on, as attributes too."""
    plain = byte_tokenizer(chat=False)
    plain.add_special_tokens({"additional_special_tokens": list(names.values())})
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )
