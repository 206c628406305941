"""The cache that one generation continues: memory first, then the tokens of the call."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache


class MemoryCache(DynamicCache):
    """A cache that starts with memory slots.

    Built without a config on purpose: sliding-window layers would throw memory away.

    Args:
        layers: per layer keys and values (B, KV heads, M, d), after RoPE; empty for an empty memory.
        full: every user holds every slot, so that a call without a mask is right.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], full: bool = True) -> None:
        super().__init__()
        self.full = full
        self.memory_length = layers[0][0].shape[2] if layers else 0
        for index, (keys, values) in enumerate(layers):
            self.update(keys, values, index)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`DynamicCache.update`; a fork grows to the batch that `generate` makes for beams and several answers."""
        layers: list[Any] = self.layers
        held = layers[0].keys if layers else None
        if layer_idx == 0 and held is not None and held.shape[0] != key_states.shape[0]:
            copies, rest = divmod(key_states.shape[0], held.shape[0])
            if rest or not copies:
                raise ValueError(
                    f"the memory holds {held.shape[0]} users, the call {key_states.shape[0]} rows; take memory.inputs(...)"
                )
            self.batch_repeat_interleave(copies)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def tail(self, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the last `tokens` slots, per layer."""
        layers: list[Any] = self.layers
        return [(layer.keys[:, :, -tokens:], layer.values[:, :, -tokens:]) for layer in layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        layers: list[Any] = self.layers
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None)
