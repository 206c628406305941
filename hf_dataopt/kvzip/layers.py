"""The layers of a compressed cache: a shared ragged context, and what came after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .._compat import chunked_attention, copied_layer, expand_states, has_states, layer_device, text_config
from ..errors import DroppedTokensError
from ..routing.dispatch import tag
from ..settings import check_device
from .attention import attend, merge, merged_output
from .decode_cpu import attend_token as attend_token_on_cpu
from .kernels import takes_token
from .quantised import Storage
from .ragged import Ragged, RaggedContext
from .ragged_attention import attend_ragged
from .reading import PrefilledContext, check_supported
from .rules import AttentionRules, no_autocast, same_dtype, tail_mask, wants_gradients
from .tail import Tail


class KVzipLayer(DynamicLayer):
    """One global-attention layer: a shared ragged context and a dense tail of the tokens that came after it.

    Args:
        context: what was kept.
        latent: the model expands what is cached to keys and values of all heads (MLA), so it is handed all of it.
        scores: of the kept pairs, by head, inf for the prefix; what another compression needs. They stay in main memory.
    """

    def __init__(self, context: Ragged, latent: bool = False, scores: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.context, self.latent, self.scores = context, latent, scores
        self.tail: Tail | None = None
        self.tail_scores: Any = None  # (KV heads, n), of what came after the context, for budgets that stand

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the tail and hand the tail to the model, marked so that attention comes back to `attend`.

        Raises:
            ValueError: the context is on another device.
        """
        _expect_device(self.context.device, key_states)
        keys, values = self._append(key_states, value_states)
        if self.latent:
            batch = keys.shape[0]
            kept = (part[None, None].expand(batch, -1, -1, -1) for part in self.context.opened())
            keys, values = (torch.cat([old, new], 2) for old, new in zip(kept, (keys, values), strict=True))
        return tag(keys, self), values

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.n_tail
        if n == 0 or wants_gradients(keys, values):
            # a question alone needs no room behind it, and what gradients go back through is not written into
            self.tail = None
            return super().update(keys, values)
        old: Any = (self.keys, self.values)
        if self.tail is None or not self.tail.claim(n, keys):
            self.tail = Tail.of(old[0], old[1], keys.shape[2])
            self.tail.claim(n, keys)
        self.keys, self.values = self.tail.write(n, keys, values)
        return self.keys, self.values

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
        asked, rows, length = query.dtype, query.shape[2], key.shape[2] - kept
        # before anything else: what comes next costs a token on a CPU as much as its kernels
        if mask is None and not expanded and rules.usual:
            found = attend_token_on_cpu(query, self.context, key, value, scale)
            if found is not None:
                return found
        mask, causal = tail_mask(mask, rows, length, self.context.n_tokens, query.device)
        with no_autocast(query.device):
            query, key, value = same_dtype(query, key, value)
            if mask is None and not expanded and takes_token(query, key, value, self.context):
                from .decode_kernel import attend_token  # Triton is not everywhere

                result = attend_token(query, self.context, key, value, **rules.options)
                return rules.with_sinks(result)[0].to(asked)
            if expanded:
                context = attend(query, key[:, :, :kept], value[:, :, :kept], **rules.options)
                key, value = key[:, :, kept:], value[:, :, kept:]
            else:
                context = self.attend_context(query, rules)
            tail = attend(query, key, value, mask=mask, causal=causal, **rules.options)
            if rules.sinks is None:
                return merged_output(context, tail).to(asked)
            return rules.with_sinks(merge(context, tail))[0].to(asked)

    def attend_context(self, query: torch.Tensor, rules: AttentionRules) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (B, H, q, v) and log-sum-exp (B, H, q) over the kept context."""
        return attend_ragged(query, self.context, **rules.options)

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
        if self.tail_scores is not None:
            self.tail_scores = self.tail_scores[:, : self.n_tail]

    def reset(self) -> None:
        """Forget the tail; the compressed context stays."""
        self.keys = self.values = self.tail = self.tail_scores = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the tail's rows; the context is the same in all of them."""
        if self.n_tail:
            super().reorder_cache(beam_idx)
            self.tail = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the tail's rows; the context is shared by all of them."""
        if self.n_tail:
            super().batch_repeat_interleave(repeats)
            self.tail = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select the tail's rows."""
        if self.n_tail:
            super().batch_select_indices(indices)
            self.tail = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the tail's tokens, not its room."""
        if not self.n_tail or self.tail is None:
            return self.__dict__
        keys: Any = self.keys
        values: Any = self.values
        return {**self.__dict__, "tail": None, "keys": keys.clone(), "values": values.clone()}


@dataclass(frozen=True)
class Padding:
    """Which slots of a padded batch are tokens, and where these stand.

    Args:
        real: (B, n) bool, False for padding.
        positions: (B, n) int64, counted over tokens alone.
    """

    real: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor) -> Padding:
        """From a mask (B, n) of ones and zeros."""
        real = mask.bool()
        return cls(real, real.long().cumsum(-1) - 1)

    @classmethod
    def of_call(cls, mask: Any) -> Padding | None:
        """From what a model was given: None where nothing is padded, or masks are ready-made."""
        flat = isinstance(mask, torch.Tensor) and mask.ndim == 2
        return cls.of(mask) if flat and not bool(mask.all()) else None

    def check_context(self, n: int) -> None:
        """Refuse padding among the first n tokens.

        Raises:
            DroppedTokensError: there is some.
        """
        if not bool(self.real[:, :n].all()):
            raise DroppedTokensError(
                "the attention mask hides tokens of the compressed context, whose pairs are no longer apart; pad between "
                "context and question, as `cache.inputs([...])` does"
            )


class KVzipSlidingLayer(DynamicSlidingWindowLayer):
    """One sliding-window layer (Gemma 3): kept whole; one context serves a batch of requests here too.

    A batch is padded between context and question, where padding would take room in the window: then the layer keeps as
    many slots more, and answers by itself.

    Args:
        sliding_window: tokens that a token sees, itself included.
        chunked: tokens see their own fixed chunk instead (Llama 4).
    """

    def __init__(self, sliding_window: int, chunked: bool = False) -> None:
        super().__init__(sliding_window)
        self.chunked = chunked
        self.padding: Padding | None = None

    @classmethod
    def of(cls, layer: DynamicSlidingWindowLayer, chunked: bool = False) -> KVzipSlidingLayer:
        """A copy of the window as a layer of this class.

        The stock layer keeps its window as a view into the keys of the whole prefill, which would all stay in memory.
        """
        ours = cls(layer.sliding_window, chunked)
        ours.__dict__.update(layer.__dict__)
        if layer.keys is not None and layer.values is not None:
            ours.keys, ours.values = layer.keys.clone(), layer.values.clone()
        return ours

    def pad(self, padding: Padding | None) -> None:
        """Say how the next call is padded.

        Raises:
            ValueError: a padded batch on chunked attention, whose borders padding would move.
        """
        if padding is not None and self.chunked:
            raise ValueError(
                "padding would move the borders of this model's attention chunks; ask questions of one length together, or one "
                "by one"
            )
        self.padding = padding

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the stock layer; the context's window is expanded to the batch of the new tokens first.

        Raises:
            ValueError: the context is on another device.
        """
        if self.keys is not None:
            _expect_device(self.keys.device, key_states)
        batch, room = key_states.shape[0], self.sliding_window - 1
        if self.keys is not None and self.values is not None:
            held = self.keys.shape[0]
            if held == 1 < batch:
                self.keys, self.values = self.keys.expand(batch, -1, -1, -1), self.values.expand(batch, -1, -1, -1)
            elif held < batch and batch % held == 0:  # of several contexts, beams of each
                self.keys, self.values = (one.repeat_interleave(batch // held, 0) for one in (self.keys, self.values))
            if self.padding is None and not self.record_past and self.keys.shape[2] > room:
                self.keys, self.values = self.keys[:, :, -room:], self.values[:, :, -room:]
        if self.padding is None or self.keys is None or self.values is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            seen = room + key_states.shape[2]  # older releases hand out all that `record_past` keeps
            return keys[:, :, -seen:], values[:, :, -seen:]
        keys, values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        self.cumulative_length += key_states.shape[2]
        padded = int((~self.padding.real).sum(-1).max())
        self.keys, self.values = keys[:, :, -(room + padded) :], values[:, :, -(room + padded) :]
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
        """Attention (B, H, q, v) of a padded call: the window is counted in positions, not in slots."""
        if expanded or self.padding is None:
            raise ValueError("the model changes keys of sliding layers after they are cached; ask questions one by one")
        rules, total = AttentionRules.of(scale, options), self.cumulative_length
        rows, held, asked = query.shape[2], key.shape[2], query.dtype
        device = query.device
        real = self.padding.real[:, total - held : total].to(device)
        at = self.padding.positions[:, total - held : total].to(device)
        slots = torch.arange(held, device=device)
        visible = (
            real[:, None] & (slots <= slots[-rows:, None]) & (at[:, -rows:, None] - at[:, None] < self.sliding_window)
        )
        with no_autocast(device):
            query, key, value = same_dtype(query, key, value)
            return rules.with_sinks(attend(query, key, value, mask=visible[:, None], **rules.options))[0].to(asked)


def _expect_device(held: torch.device, new: torch.Tensor) -> None:
    if new.device != held:
        raise ValueError(
            f"the compressed context is on {held}, the model's layer on {new.device}; ask `cache.moved_to(model)`, which is a "
            "copy where the model needs it"
        )


def expect_batch(layers: list[Any], batch: int, padding: Padding | None) -> None:
    """Tell layers that are kept whole of a call's batch and of its padding.

    Raises:
        ValueError: padding on layers in which it would change what a token sees.
    """
    for layer in layers:
        if has_states(layer):
            expand_states(layer, batch)
            if padding is not None:
                raise ValueError(
                    "padding would change the states of this model's linear layers; ask questions of one length together, "
                    "or one by one"
                )
        elif isinstance(layer, KVzipSlidingLayer):
            layer.pad(padding)


def compressed_layers(
    prefilled: PrefilledContext,
    keep: torch.Tensor,
    *,
    scores: torch.Tensor | None = None,
    storage: Storage = "model",
    free: bool = False,
) -> list[Any]:
    """One cache layer per layer of the model, evicted where it attends globally.

    Args:
        prefilled: the full cache.
        keep: (scored layers, KV heads, prefix and context tokens) bool, True = stays.
        scores: as `keep`, float: what the layers are to remember of what stays.
        storage: see `KVzipConfig`.
        free: release each layer of the full cache as soon as it is compressed.

    Returns:
        Layers that share nothing with the full cache that is written to.
    """
    layers: list[Any] = []
    full: list[Any] = prefilled.cache.layers
    chunked = chunked_attention(text_config(prefilled.model))
    for index, layer in enumerate(full):
        if index not in prefilled.scored_layers:
            layers.append(kept_layer(layer, chunked))
            continue
        place = prefilled.scored_layers.index(index)
        kept, held = keep[place], None
        if scores is not None:
            held = [row[stays] for row, stays in zip(scores[place].cpu(), kept.cpu(), strict=True)]
        context = RaggedContext.evict(layer.keys, layer.values, kept).stored(storage)
        layers.append(KVzipLayer(context, prefilled.latent, held))
        if free:
            layer.keys = layer.values = None
    return layers


def mover(where: Any) -> Callable[[list[Any]], list[Any]]:
    """Copies layers of one cache to where they are wanted; contexts that some of them share are copied once.

    Args:
        where: a device, or the model, whose layers say where they compute.

    Returns:
        A function of all layers of a cache.

    Raises:
        TypeError, ValueError: neither a device nor a language model, or a device that is not there.
    """
    if isinstance(where, torch.nn.Module):
        check_supported(where)
    else:
        place = torch.device(check_device("where", where, here=True))
    contexts: dict[int, Ragged] = {}

    def move(layers: list[Any]) -> list[Any]:
        found = []
        for index, layer in enumerate(layers):
            device = layer_device(where, index) if isinstance(where, torch.nn.Module) else place
            found.append(_moved(layer, device, contexts))
        return found

    return move


def _moved(layer: Any, device: torch.device, contexts: dict[int, Ragged]) -> Any:
    other = copied_layer(layer)
    for name, held in list(other.__dict__.items()):
        if isinstance(held, Ragged):
            if id(held) not in contexts:
                contexts[id(held)] = held.to(device)
            setattr(other, name, contexts[id(held)])
        elif isinstance(held, torch.Tensor):
            setattr(other, name, held.to(device))
        elif isinstance(held, dict):
            setattr(other, name, {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in held.items()})
        elif isinstance(held, torch.device):
            setattr(other, name, device)
        elif isinstance(held, Tail):  # its tokens are `keys` and `values`, which have no room behind them now
            setattr(other, name, None)
    return other


def kept_layer(layer: Any, chunked: bool) -> Any:
    """A layer that is not evicted from, as a compressed cache has it: a window with its own memory, or a copy."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return KVzipSlidingLayer.of(layer, chunked)
    return copied_layer(layer)
