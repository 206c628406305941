"""The cache that one generation continues: memory first, then the tokens of the call."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class MemoryCache(DynamicCache):
    """A cache that starts with memory slots.

    Built without a config on purpose: sliding-window layers would throw memory away.

    Args:
        layers: per layer keys and values (B, KV heads, M, d), after RoPE; empty for an empty memory.
        full: every user holds every slot, so that a call without a mask is right.
        starts: (B,) int64, position of each user's first token behind the memory: whatever `generate` makes of the mask,
            tokens stand where they stood in training. None: the caller's positions hold.
    """

    def __init__(
        self, layers: list[tuple[torch.Tensor, torch.Tensor]], full: bool = True, starts: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.full, self.starts = full, starts
        self.memory_length = layers[0][0].shape[2] if layers else 0
        for keys, values in layers:  # referred to, not copied: they are the memory's own until this cache grows
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            self.layers.append(layer)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`DynamicCache.update`; a fork grows to the batch that `generate` makes for beams and several answers."""
        layers: list[Any] = self.layers
        held = layers[0].keys if layers else None
        if layer_idx == 0 and held is not None and held.shape[0] != key_states.shape[0]:
            self.batch_repeat_interleave(_copies(held.shape[0], key_states.shape[0]))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Forget everything. transformers may zero the tensors in place, but these are the memory's own."""
        self.layers.clear()
        self.memory_length = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As transformers, positions included."""
        super().batch_repeat_interleave(repeats)
        self.starts = None if self.starts is None else self.starts.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As transformers, positions included."""
        super().batch_select_indices(indices)
        self.starts = None if self.starts is None else self.starts[indices.to(self.starts.device)]

    def positions(self, mask: torch.Tensor, tokens: int) -> torch.Tensor | None:
        """Positions (B, tokens) of the last tokens under a mask (B, memory + all tokens), or None."""
        if self.starts is None:
            return None
        starts = self.starts.repeat_interleave(_copies(len(self.starts), mask.shape[0]))  # beams: the cache grows later
        behind = mask[:, self.memory_length :].long().cumsum(1)[:, -tokens:]
        return starts[:, None] + (behind - 1).clamp(min=0)

    def tail(self, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the last `tokens` slots, per layer."""
        layers: list[Any] = self.layers
        return [(layer.keys[:, :, -tokens:], layer.values[:, :, -tokens:]) for layer in layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        layers: list[Any] = self.layers
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None)


class CompressingCache(MemoryCache):
    """The memory during one compression: a layer attends to memory and new tokens, and keeps what will stay of them.

    So the keys and values of the context exist in one layer at a time, never in all.

    Args:
        layers: as `MemoryCache`.
        tokens: last tokens of the call to keep, the compression tokens.
        first: (B,) int64, new token of each user that is kept aside as sink; None keeps none.
        starts: as `MemoryCache`.
    """

    def __init__(
        self,
        layers: list[tuple[torch.Tensor, torch.Tensor]],
        tokens: int,
        first: torch.Tensor | None,
        starts: torch.Tensor | None,
    ) -> None:
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.sink: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.attended_bytes = self.attended_slots = 0  # of the layer that attended to most
        super().__init__(layers, starts=starts)
        self._tokens, self._first = tokens, first

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory with the new states behind it, for this layer's attention only."""
        keys, values = key_states, value_states
        self.kept.append((keys[:, :, -self._tokens :].clone(), values[:, :, -self._tokens :].clone()))
        if self._first is not None:
            first = self._first.to(keys.device)
            rows = torch.arange(len(first), device=keys.device)
            self.sink.append((keys[rows, :, first][:, :, None], values[rows, :, first][:, :, None]))
        if self.memory_length:
            held: Any = self.layers[layer_idx]
            keys, values = torch.cat([held.keys, keys], dim=2), torch.cat([held.values, values], dim=2)
        self.attended_slots = max(self.attended_slots, keys.shape[2])
        self.attended_bytes = max(self.attended_bytes, keys.nbytes + values.nbytes)
        return keys, values


def read_behind(
    model: Any, cache: MemoryCache, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, **options: Any
) -> Any:
    """One forward of ids (B, T) behind a cache, without dropout; the model's mode stays as it was.

    Args:
        model: with the adapter that the cache belongs to.
        cache: takes the new keys and values.
        ids, positions: (B, T) int64. mask: (B, slots + T) int64.
        options: of the model's forward.

    Returns:
        The model's output.
    """
    was_training = model.training
    model.eval()
    try:
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
    finally:
        model.train(was_training)


def _copies(users: int, rows: int) -> int:
    copies, rest = divmod(rows, users)
    if rest or not copies:
        raise ValueError(f"the memory holds {users} users, the call {rows} rows; take memory.inputs(...)")
    return copies
