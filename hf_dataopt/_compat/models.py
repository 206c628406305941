"""Where things are in a model of transformers, under wrappers and whatever each modeling file calls them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def text_config(model: Any) -> Any:
    """Config of the language model inside `model` (multimodal models nest it)."""
    return model.config.get_text_config(decoder=True)


def causal_model_of(model: Any) -> PreTrainedModel:
    """The model that `generate` belongs to, under PEFT's and `torch.compile`'s wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def decoder_of(model: Any) -> PreTrainedModel:
    """The module that runs the transformer layers, under wrappers and language-model heads."""
    model = causal_model_of(model)
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not hasattr(decoder, "config"):  # some classes call their head a decoder
        decoder = getattr(model, "base_model", model)
    return decoder


def last_block(decoder: Any) -> Any | None:
    """The last transformer layer of a decoder: what it gives has not passed the final norm, unlike all that models return."""
    blocks = next((getattr(decoder, name) for name in ("layers", "h", "blocks") if hasattr(decoder, name)), None)
    return blocks[-1] if isinstance(blocks, torch.nn.ModuleList) and len(blocks) else None


def output_projection(module: Any, width: int) -> Any | None:
    """The part of an attention module that maps all heads' outputs, `width` values, back to hidden states; None if unseen."""
    for name in ("o_proj", "out_proj", "dense", "c_proj", "wo"):
        found = getattr(module, name, None)
        weight = getattr(getattr(found, "base_layer", found), "weight", None)
        if isinstance(weight, torch.Tensor) and (weight.ndim != 2 or width in weight.shape):
            return found
    return None


# (x (heads, n, d), positions (n,) int64, back) -> x turned to these positions, or back from them
Turn = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def rotary_of(decoder: Any, module: Any, index: int) -> Turn | None:
    """The rotary embedding of one layer as a function of any vectors; None where it cannot be seen.

    transformers hands attention ready cosines and sines, and has how they are applied in every modeling file.
    """
    embedding = getattr(decoder, "rotary_emb", None)
    files = (sys.modules.get(parent.__module__) for parent in type(module).__mro__)
    apply = next((found for file in files if (found := getattr(file, "apply_rotary_pos_emb", None))), None)
    if getattr(module, "use_rope", True) is False:
        return lambda x, positions, back: x
    if embedding is None or apply is None or hasattr(module, "qk_rope_head_dim"):
        return None
    named = "layer_type" in inspect.signature(embedding.forward).parameters
    kind = {"layer_type": decoder.config.layer_types[index]} if named else {}

    def turn(x: torch.Tensor, positions: torch.Tensor, back: bool) -> torch.Tensor:
        cos, sin = embedding(x, positions[None], **kind)
        if back:  # some embeddings scale too
            size = cos.square() + sin.square()
            cos, sin = cos / size, -sin / size
        front, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat([apply(front[None], front[None], cos, sin)[0][0], rest], dim=-1)

    return turn


def positions_of(config: Any) -> int | None:
    """Positions that a model was made for; None where its config does not say.

    Args:
        config: of the language model. A rotary embedding that was stretched (`factor` over
            `original_max_position_embeddings`) counts with its stretched length; llama3's limit is already that.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *rope.values()) if isinstance(rope, dict) else ():
        if isinstance(part, dict) and part.get("rope_type") != "llama3":
            first, factor = part.get("original_max_position_embeddings"), part.get("factor")
            if isinstance(first, int) and isinstance(factor, int | float):
                limit = max(limit, int(first * factor))
    return limit


def chunked_attention(config: Any) -> bool:
    """Whether what looks like sliding-window layers attends in fixed chunks: caches of both are alike, masks are not."""
    types = getattr(config, "layer_types", None) or []
    return bool(getattr(config, "attention_chunk_size", None)) and (not types or "chunked_attention" in types)


def takes_positions(module: Any) -> bool:
    """Whether a module's forward names `position_ids`."""
    return "position_ids" in _parameters(module)


def named_arguments(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward's arguments with all but the first under their names, as far as its signature names them."""
    names = _parameters(module)[1 : len(args) + 1]  # without self
    if len(args) < 2 or len(names) < len(args) or set(names) & set(kwargs):
        return args, kwargs  # the forward itself says what is wrong
    return args[:1], {**dict(zip(names[1:], args[1:], strict=True)), **kwargs}


_PARAMETERS: dict[type, tuple[str, ...]] = {}  # not functools.cache: torch.compile warns about it


def _parameters(module: Any) -> tuple[str, ...]:
    kind: Any = type(module)
    if kind not in _PARAMETERS:
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        found = inspect.signature(kind.forward).parameters.values()
        _PARAMETERS[kind] = tuple(parameter.name for parameter in found if parameter.kind not in variadic)
    return _PARAMETERS[kind]


def last_logits(model: Any) -> dict[str, int]:
    """Keyword for a forward whose logits nobody reads but for the last; layers that share keys would leave tokens out too."""
    model = causal_model_of(model)
    shares = getattr(text_config(model), "num_kv_shared_layers", 0)
    return {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) and not shares else {}
