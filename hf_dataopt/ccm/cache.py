"""The cache that one generation continues: memory first, then the tokens of the call."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .._compat import active_adapters, cache_keyword, causal_model_of, decoder_of
from ..errors import DroppedTokensError
from ..routing.cache import RoutedCache
from ..routing.verdicts import evaluating

_ADVICE = "call `model.generate(**memory.inputs(question))`, which passes the full-length mask"


class MemoryCache(RoutedCache):
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
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.full, self.starts = full, starts
        self._adapters: tuple[str, ...] | None = None  # active when the memory was handed out
        self.asked: int | None = None  # tokens of the question that this fork was made for
        self.memory_length = layers[0][0].shape[2] if layers else 0
        for keys, values in layers:  # referred to, not copied: they are the memory's own until this cache grows
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            self.layers.append(layer)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As every growing cache; a fork grows to the batch that `generate` makes for beams and several answers."""
        layers: list[Any] = self.layers
        held = layers[0].keys if layers else None
        if layer_idx == 0 and held is not None and held.shape[0] != key_states.shape[0]:
            self.batch_repeat_interleave(_copies(held.shape[0], key_states.shape[0]))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def belongs_to(self, model: Any) -> MemoryCache:
        """This cache, for that model (with the adapter that wrote the memory) and no other."""
        self.made_for(causal_model_of(model), decoder_of(model))
        self._adapters = active_adapters(decoder_of(model))
        return self

    def check_model(self, module: torch.nn.Module) -> None:
        """Refuse another model than the one the memory was written by, and other adapters at work in it.

        Raises:
            ValueError: that.
        """
        if not self.knows(module):
            raise ValueError(
                f"this memory was written by another model than this {type(module).__name__}; use the model of the "
                "CompressedContextMemory, or append the contexts to a memory of this model"
            )
        now = self._adapters if self._adapters is None else active_adapters(module)
        if now != self._adapters:
            raise ValueError(
                f"these inputs were made with adapters {list(self._adapters or ())} active, now {list(now or ())} are; call "
                "model.set_adapter(...) with those, or make the inputs again"
            )

    def check_call(self, n_new: int, attention_mask: Any) -> None:
        """Refuse a forward whose mask (B, memory + tokens) does not cover memory and tokens.

        Raises:
            DroppedTokensError: prompt tokens would be dropped, or slots read that a user does not hold.
        """
        need = self.get_seq_length() + n_new
        if attention_mask is None and self.full and n_new:  # generate drops masks of ones
            return
        flat = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if not flat or attention_mask.shape[1] != need or n_new == 0:
            got = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else attention_mask
            raise DroppedTokensError(
                f"memory and tokens need a 2-D attention_mask of width {need}, got {got}; {_ADVICE}"
            )

    def prepare(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Refuse to cut a prompt, since new ids are no continuation of the memory's tokens, and to read a question twice.

        Raises:
            DroppedTokensError: `generate` is about to.
        """
        kept = kwargs.get("next_sequence_length")
        again = self.asked == input_ids.shape[1] and self.get_seq_length() > self.memory_length
        if kwargs.get("is_first_iteration") and again:
            raise DroppedTokensError(
                "this fork has read its question already; `memory.inputs(question)` makes a new one"
            )
        if kwargs.get("is_first_iteration") and kept is not None and kept != input_ids.shape[1]:
            raise DroppedTokensError(f"generate would keep {kept} of {input_ids.shape[1]} prompt tokens; {_ADVICE}")
        mask = kwargs.get("attention_mask")
        if self.full and mask is not None and bool(mask.all()):
            kwargs["attention_mask"] = None  # says nothing, and older assisted decoding cuts it to the new ids

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

    def text_positions(self, mask: torch.Tensor, tokens: int) -> torch.Tensor | None:
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

    atomic = False  # thrown away if the forward fails

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
        self.check_open()
        self._handed = layer_idx
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
    held = {cache_keyword(causal_model_of(model).forward): cache.belongs_to(model)}
    with evaluating(model):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **held, **options)


def _copies(users: int, rows: int) -> int:
    copies, rest = divmod(rows, users)
    if rest or not copies:
        raise ValueError(f"the memory holds {users} users, the call {rows} rows; take memory.inputs(...)")
    return copies
