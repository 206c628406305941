"""A context read into a full cache, piece by piece, without masks: what is scored and evicted afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .._compat import cache_keyword, decoder_of, input_device, layer_kinds, takes_positions, text_config
from ..errors import UnsupportedModelError
from ..evaluation_mode import evaluating
from ..progress import bar
from ..routing.attach import attach
from ..routing.cache import RoutedCache
from ..routing.dispatch import maskless, tag
from .attention import attend, merge
from .config import KVzipConfig
from .prompt import KVzipPrompt
from .rules import AttentionRules, no_autocast, same_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USER = "kvzip"  # of `routing.attach`
_KEPT_KINDS = {"full", "sliding", "linear", "shared"}


@dataclass
class PrefilledContext:
    """A context's full cache, before anything is evicted.

    Args:
        model: the language model that made it.
        prompt: its token sequences.
        cache: full keys and values of prefix and context, batch 1.
        scored_layers: indices of the layers that attend globally; other layers are neither scored nor evicted.
        latent: the model caches one latent a token and expands it to keys and values of all heads (MLA).
    """

    model: PreTrainedModel
    prompt: KVzipPrompt
    cache: DynamicCache
    scored_layers: list[int]
    latent: bool = False

    @property
    def n_prefix(self) -> int:
        """Tokens before the context."""
        return self.prompt.prefix_ids.numel()

    @property
    def n_context(self) -> int:
        """Tokens of the context."""
        return self.prompt.context_ids.numel()


def check_supported(model: Any) -> list[int]:
    """Refuse models with nothing to evict, before anything is computed; `proof.prove` tells whether the rest is exact.

    Args:
        model: a causal language model, PEFT-wrapped or not.

    Returns:
        Indices of the layers that are scored and evicted.

    Raises:
        UnsupportedModelError: no layer attends globally, or layers of a kind that KVzip does not know.
        TypeError: no language model of transformers.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise TypeError(f"KVzip needs a causal language model of transformers, got {type(model).__name__}")
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"KVzip compresses decoder-only models; {config.model_type} has an encoder")
    kinds = layer_kinds(config)
    scored = [index for index, kind in enumerate(kinds) if kind == "full"]
    if not scored or set(kinds) - _KEPT_KINDS:
        raise UnsupportedModelError(
            f"KVzip evicts from layers with global attention; this {config.model_type} model has {len(scored)} of them "
            f"among {len(kinds)} ({', '.join(sorted(set(kinds)))}). Load it without a sliding window, or use a plain cache"
        )
    return scored


@torch.no_grad()
def read_context(model: Any, prompt: KVzipPrompt, config: KVzipConfig, *, progress: bool = True) -> PrefilledContext:
    """`prefill` of a model that `check_supported` accepts, proven or not."""
    scored_layers = check_supported(model)
    decoder = decoder_of(model)
    attach(model, USER)
    plain = DynamicCache(config=text_config(model))
    full: list[Any] = plain.layers
    cache = OwnCache([_PrefillLayer() if i in scored_layers else layer for i, layer in enumerate(full)])
    ids = prompt.ids.to(input_device(model))[None]
    step, name = config.prefill_chunk_size, cache_keyword(decoder.forward)
    start = 0
    shown_bar = bar(ids.shape[1], "Prefilling", unit="tok", disable=not progress or ids.shape[1] <= step)
    with shown_bar as shown, maskless(), evaluating(model):
        for piece in ids.split(step, dim=1):
            decoder(input_ids=piece, use_cache=True, **{name: cache}, **positions(decoder, start, piece))
            start += piece.shape[1]
            shown.update(piece.shape[1])
    read: list[Any] = cache.layers
    for index, layer in enumerate(read):
        if index in scored_layers:
            full[index].lazy_initialization(layer.keys, layer.values)
            full[index].keys, full[index].values = layer.keys, layer.values
        else:
            full[index] = layer
    latent = any(read[index].latent for index in scored_layers)
    return PrefilledContext(model, prompt, plain, scored_layers, latent)


def positions(decoder: Any, start: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` from `start` on: some models count from 0 whatever the cache holds."""
    if not takes_positions(decoder):
        return {}
    return {"position_ids": torch.arange(start, start + ids.shape[1], device=ids.device)[None]}


class OwnCache(RoutedCache):
    """A cache of our own forwards: thrown away if one of them fails, so it needs no second copy to go back to."""

    atomic = False


class _PrefillLayer(DynamicLayer):
    """One global layer while the context comes in pieces: a piece sees itself causally, and all before it."""

    latent = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states)
        return (tag(keys, self), values) if self.latent else (tag(key_states, self), value_states)

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
        """Output (1, H, q, v) of one piece."""
        rules, rows = AttentionRules.of(scale, options), query.shape[2]
        cached: Any = (self.keys, self.values)
        keys, values = (key, value) if expanded else cached
        if expanded and cached[0].shape[1] != 1:
            raise ValueError(
                "the model changes the keys of several heads after they are cached; heads cannot be told apart"
            )
        self.latent = expanded
        before = keys.shape[2] - rows
        with no_autocast(query.device):
            query, keys, values = same_dtype(query, keys, values)
            result = attend(query, keys[:, :, before:], values[:, :, before:], causal=rows > 1, **rules.options)
            if before:
                result = merge(attend(query, keys[:, :, :before], values[:, :, :before], **rules.options), result)
            return rules.with_sinks(result)[0]
