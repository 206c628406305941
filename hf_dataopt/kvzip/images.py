"""Contexts that hold images: the token sequences that a processor makes of them, and what the model reads beside ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..text import plain_text
from ..text.chat import template_owner, text_of, tokenizer_of
from .config import FIRST_REPEAT_PROMPT, NEXT_REPEAT_PROMPT, KVzipConfig
from .prompt import KVzipPrompt, build_prompt

_BEGIN, _END = "<<KVZIP CONTEXT STARTS HERE>>", "<<KVZIP CONTEXT ENDS HERE>>"
# how an image part names its image; as in transformers' chat templates
_IMAGE = ("image", "url", "path", "base64")


@dataclass(frozen=True)
class ContextImages:
    """What a model is given beside the ids of a context with images: used to read it, and never saved.

    Args:
        inputs: `pixel_values`, `token_type_ids` and the like, as the processor names them; those that go by token cover prefix
            and context.
    """

    inputs: dict[str, Any]

    def on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The inputs where the model is, floats in its dtype."""
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.inputs.items()
        }


def build_context(processor: Any, context: Any, config: KVzipConfig) -> tuple[KVzipPrompt, ContextImages | None]:
    """`build_prompt` for every kind of context.

    Args:
        processor: of the model; for a context of text its tokenizer will do.
        context: text as for `build_prompt`, or content parts with `{"type": "image", "image": ...}` among them (`url`, `path`
            or `base64` instead of `image`, as in transformers), or a user's message with such parts.
        config: gives task line, system message and arguments of the template.

    Returns:
        The sequences, image placeholders among the context's ids, and what is read beside them (None for text). The context
        starts where its first part or its first image stands, whatever the template writes first.

    Raises:
        TypeError, ValueError: see `build_prompt`; images without a processor or a chat template that takes them, or special
            tokens written in the text beside images.
    """
    parts = context.get("content") if isinstance(context, dict) and context.get("role") == "user" else context
    if not isinstance(parts, list | tuple) or not any(map(_is_image, parts)):
        return build_prompt(processor, context, config), None
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"images need the model's processor, got {type(processor).__name__}; pass AutoProcessor.from_pretrained(...)"
        )
    if not getattr(template_owner(processor), "chat_template", None):
        raise ValueError("images need a chat template that places them, and this processor has none; set one")
    images = [_image(part) for part in parts if _is_image(part)]
    prefix, text, suffix = _written(processor, parts, config)
    token = getattr(processor, "image_token", None)
    if token is not None and text.count(token) != len(images):
        raise ValueError(
            f"the chat template writes {text.count(token)} image tokens {token!r} into the context for {len(images)} images"
        )
    given = dict(processor(text=text, images=images, add_special_tokens=False, return_tensors="pt"))
    ids = given.pop("input_ids").reshape(1, -1)
    given.pop("attention_mask", None)  # of one row: nothing is padded

    def encode(part: str) -> torch.Tensor:
        return torch.tensor(config.chat.ids(processor, part), dtype=torch.int64)

    begin = encode(prefix)
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:  # by token: what stands before is text, 0
            given[name] = torch.cat([value.new_zeros(1, begin.numel()), value], dim=1)
    repeats = encode(FIRST_REPEAT_PROMPT), encode(NEXT_REPEAT_PROMPT)
    return KVzipPrompt(begin, ids[0], encode(suffix), *repeats), ContextImages(given)


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _image(part: dict[str, Any]) -> Any:
    found = [part[name] for name in _IMAGE if part.get(name) is not None]
    if len(found) != 1:
        raise ValueError(
            f"an image part needs one of {', '.join(_IMAGE)}, got {sorted(map(str, part))}; pass "
            '{"type": "image", "image": ...}'
        )
    return found[0]


def _written(processor: Any, parts: Any, config: KVzipConfig) -> tuple[str, str, str]:
    """What the chat template writes before the context, as the context, and behind it."""
    chat = config.chat
    content: list[dict[str, Any]] = [{"type": "text", "text": config.task_line + _BEGIN}]
    for part in [*parts, {"type": "text", "text": _END}]:
        if _is_image(part):
            content.append({"type": "image"})
        elif content[-1]["type"] == "text":  # templates trim texts: the context's ends stand inside of one
            content[-1]["text"] += text_of([part])
        else:
            content.append({"type": "text", "text": text_of([part])})
    messages = [{"role": "user", "content": content}]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": config.system}]})
    messages = chat.hide(tokenizer_of(processor), messages)
    rendered = chat.render(processor, messages, add_generation_prompt=True)
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    left_out = [text for text in texts if text.strip() not in rendered]
    if left_out or rendered.count(_BEGIN) != 1 or rendered.count(_END) != 1:
        raise ValueError(
            "the chat template does not repeat the user's message once, or leaves a text or the system message out"
            f"{f' ({left_out[0]!r:.60})' if left_out else ''}; put it into other words"
        )
    before, _, behind = rendered.partition(_BEGIN)
    text, _, suffix = behind.partition(_END)
    token = getattr(processor, "image_token", None)
    first = before.find(token) if token else -1
    if first >= 0:  # this template writes images before all text
        before, text = before[:first], before[first:] + text
    if plain_text.hides(text):
        raise ValueError(
            "a text beside the images names a special token, which a processor reads as the token; take it out of the text, "
            "or let it count with special_tokens_in_text=True"
        )
    return before, text, suffix
