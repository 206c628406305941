"""Keys at other positions than those that they were made for: a rotary embedding turned further."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .._compat import causal_model_of, decoder_of, layer_kinds, text_config
from ..errors import UnsupportedModelError


class Rotation:
    """Moves keys to other positions: R(new) = R(new - old) R(old).

    Args:
        model: a language model, or its decoder.

    Raises:
        ValueError: no rotary embedding, or one that changes with the length.
        UnsupportedModelError: sliding-window layers.
    """

    def __init__(self, model: Any) -> None:
        self.module: Any = getattr(decoder_of(model), "rotary_emb", None)
        config = text_config(causal_model_of(model))
        if "sliding" in layer_kinds(config):
            raise UnsupportedModelError(
                f"{type(causal_model_of(model)).__name__} has sliding-window layers; streaming re-assigns positions in one "
                "cache and needs global attention in every layer"
            )
        if self.module is None:
            raise ValueError("this model has no rotary embedding to re-assign positions with")
        self.layer_types = getattr(config, "layer_types", None)
        self.by_type = "layer_type" in inspect.signature(self.module.forward).parameters
        if getattr(self.module, "rope_type", "default") in ("dynamic", "longrope"):
            raise ValueError("rotary frequencies that change with the length cannot be re-assigned")

    def __call__(self, layer: int, keys: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Keys (B, KV heads, n, d) moved by `shift` positions, (n,) for all rows or (B, n)."""
        extra = {"layer_type": self.layer_types[layer]} if self.by_type and self.layer_types else {}
        cos, sin = self.module(keys.float(), shift if shift.ndim == 2 else shift[None], **extra)
        norm = torch.sqrt(cos[..., :1] ** 2 + sin[..., :1] ** 2)  # attention scaling, already in the keys
        cos, sin = (cos / norm)[:, None], (sin / norm)[:, None]
        width = cos.shape[-1]
        turned, rest = keys[..., :width].float(), keys[..., width:]
        half = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
        return torch.cat([(turned * cos + half * sin).to(keys.dtype), rest], dim=-1)
