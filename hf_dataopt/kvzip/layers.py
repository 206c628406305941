"""The layers of a compressed cache: a shared ragged context, and what came after it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .._compat import copied_layer
from ..routing.dispatch import tag
from .attention import RaggedContext, attend, attend_ragged, merge
from .reading import PrefilledContext
from .rules import AttentionRules, no_autocast, same_dtype, tail_mask


class KVzipLayer(DynamicLayer):
    """One global-attention layer: a shared ragged context and a dense tail of the tokens that came after it.

    Args:
        context: what was kept.
        latent: the model expands what is cached to keys and values of all heads (MLA), so it is handed all of it.
    """

    def __init__(self, context: RaggedContext, latent: bool = False) -> None:
        super().__init__()
        self.context, self.latent = context, latent

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the tail and hand the tail to the model, marked so that attention comes back to `attend`."""
        keys, values = super().update(key_states, value_states)
        if self.latent:
            batch = keys.shape[0]
            kept = (part[None, None].expand(batch, -1, -1, -1) for part in (self.context.keys, self.context.values))
            keys, values = (torch.cat([old, new], 2) for old, new in zip(kept, (keys, values), strict=True))
        return tag(keys, self), values

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scale: float,
        expanded: bool,
        **options: Any,
    ) -> torch.Tensor:
        """Attention (B, H, q, v) over the kept context, all of it visible, and the tail under its causal mask."""
        if expanded != self.latent:
            raise ValueError(
                "the model changes keys after they are cached, which this cache was not made for; make it again"
            )
        rules, kept = AttentionRules.of(scale, options), self.context.lengths[0] if expanded else 0
        mask, causal = tail_mask(mask, query.shape[2], key.shape[2] - kept, self.context.n_tokens, query.device)
        with no_autocast(query.device):
            query, key, value = same_dtype(query, key, value)
            if expanded:
                context = attend(query, key[:, :, :kept], value[:, :, :kept], **rules.options)
                key, value = key[:, :, kept:], value[:, :, kept:]
            else:
                context = attend_ragged(query, self.context, **rules.options)
            tail = attend(query, key, value, mask=mask, causal=causal, **rules.options)
            return rules.with_sinks(merge(context, tail))[0]

    @property
    def n_tail(self) -> int:
        """Tokens after the context."""
        return self.keys.shape[-2] if self.keys is not None and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        """Logical length: all tokens ever seen, evicted or not."""
        return self.context.n_tokens + self.n_tail

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover the tail only; it starts where the context ended."""
        return self.n_tail + query_length, self.context.n_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of the tail (negative count, as transformers has it).

        Raises:
            ValueError: more tokens than the tail has; a compressed context cannot be cut.
        """
        if abs(tokens_to_remove) > self.n_tail:
            raise ValueError(
                f"cannot remove {abs(tokens_to_remove)} tokens: {self.n_tail} came after the compressed context, which cannot "
                "be cut; compress a shorter context instead"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget the tail; the compressed context stays."""
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the tail's rows; the context is the same in all of them."""
        if self.n_tail:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the tail's rows; the context is shared by all of them."""
        if self.n_tail:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select the tail's rows."""
        if self.n_tail:
            super().batch_select_indices(indices)


class KVzipSlidingLayer(DynamicSlidingWindowLayer):
    """One sliding-window layer (Gemma 3): kept whole; one context serves a batch of requests here too."""

    @classmethod
    def of(cls, layer: DynamicSlidingWindowLayer) -> KVzipSlidingLayer:
        """A copy of the window as a layer of this class.

        The stock layer keeps its window as a view into the keys of the whole prefill, which would all stay in memory.
        """
        ours = cls(layer.sliding_window)
        ours.__dict__.update(layer.__dict__)
        if layer.keys is not None and layer.values is not None:
            ours.keys, ours.values = layer.keys.clone(), layer.values.clone()
        return ours

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the stock layer; the context's window is expanded to the batch of the new tokens first."""
        batch = key_states.shape[0]
        if self.keys is not None and self.values is not None and self.keys.shape[0] == 1 < batch:
            self.keys, self.values = self.keys.expand(batch, -1, -1, -1), self.values.expand(batch, -1, -1, -1)
        return super().update(key_states, value_states, *args, **kwargs)


def compressed_layers(prefilled: PrefilledContext, keep: torch.Tensor, *, free: bool = False) -> list[Any]:
    """One cache layer per layer of the model, evicted where it attends globally.

    Args:
        prefilled: the full cache.
        keep: (scored layers, KV heads, prefix and context tokens) bool, True = stays.
        free: release each layer of the full cache as soon as it is compressed.

    Returns:
        Layers that share nothing with the full cache that is written to.
    """
    layers: list[Any] = []
    full: list[Any] = prefilled.cache.layers
    for index, layer in enumerate(full):
        if index not in prefilled.scored_layers:
            sliding = isinstance(layer, DynamicSlidingWindowLayer)
            layers.append(KVzipSlidingLayer.of(layer) if sliding else copied_layer(layer))
            continue
        kept = keep[prefilled.scored_layers.index(index)]
        layers.append(KVzipLayer(RaggedContext.evict(layer.keys, layer.values, kept), prefilled.latent))
        if free:
            layer.keys = layer.values = None
    return layers
