"""KVzip written out on a plain cache: an attention function that hides evicted pairs, or writes down who looked at what.

It shares no code with the package: every key stays in a `DynamicCache`, and soft caps and sinks are one line each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hf_dataopt.kvzip.config import KVzipConfig
from hf_dataopt.kvzip.prompt import KVzipPrompt

from ..families.plain import cache_keyword

_NAME = "test_oracle_sdpa"
# called with the layer's index and the logits (H, q, k), which it may change in place, and the sinks of the heads
_LOOK: ContextVar[Callable[[int, torch.Tensor, Any], None] | None] = ContextVar("look", default=None)
_CACHE: ContextVar[Any] = ContextVar("cache", default=None)


def _layer_of(module: torch.nn.Module, key: torch.Tensor) -> int:
    """Index of the cache layer that a call reads: layers may share keys, and keys may be made anew from what is cached."""
    for index, layer in enumerate(_CACHE.get().layers):
        if getattr(layer, "keys", None) is key:
            return index
    return module.layer_idx


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    index = _layer_of(module, key)
    group = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    found = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        found = torch.tanh(found / softcap) * softcap
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(found.shape[-2:], dtype=torch.bool).tril(found.shape[3] - found.shape[2])
    if attention_mask is not None:
        visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        found = found.masked_fill(~visible, float("-inf"))
    look = _LOOK.get()
    if look is not None:
        look(index, found[0], s_aux)
    weights = _softmax(found, s_aux)
    return (weights @ values).transpose(1, 2).contiguous(), weights


def _softmax(found: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is None:
        return found.softmax(-1)
    column = sinks.reshape(-1, 1, 1).expand(*found.shape[:-1], 1)
    return torch.cat([found, column], dim=-1).softmax(-1)[..., :-1]


@contextmanager
def _looking(model: PreTrainedModel, cache: DynamicCache, look: Callable[..., None]) -> Iterator[None]:
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    config = model.config.get_text_config(decoder=True)
    before, config._attn_implementation = config._attn_implementation, _NAME
    tokens = _LOOK.set(look), _CACHE.set(cache)
    try:
        yield
    finally:
        _LOOK.reset(tokens[0])
        _CACHE.reset(tokens[1])
        config._attn_implementation = before


def _by_cached_head(values: torch.Tensor, cached: int) -> torch.Tensor:
    """(query heads, n) to (cached heads, n) by maximum.

    A key head of the call serves neighbouring query heads; where the model repeats its cached heads, they take turns.
    """
    heads, n = values.shape
    return values.reshape(-1, cached, heads // cached, n).amax(dim=(0, 2)) if cached > 1 else values.amax(0, True)


def masked_read(
    model: PreTrainedModel, full: DynamicCache, ids: torch.Tensor, keep: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, DynamicCache]:
    """Logits (q, vocabulary) of ids (q,) behind a full cache of which some pairs are hidden, and the longer cache.

    Args:
        model: not attached to anything.
        full: plain cache of prefix and context.
        ids: the question.
        keep: per scored layer, (cached heads, n) bool.
    """

    def hide(index: int, found: torch.Tensor, sinks: Any) -> None:
        if index in keep:
            kept = keep[index]
            group = found.shape[0] // kept.shape[0]
            found[:, :, : kept.shape[1]].masked_fill_(~kept.repeat_interleave(group, dim=0)[:, None], float("-inf"))

    cache = copy.deepcopy(full)
    with torch.no_grad(), _looking(model, cache, hide):
        return model(ids[None], **{cache_keyword(model): cache}).logits[0], cache


def masked_logits(
    model: PreTrainedModel, full: DynamicCache, ids: torch.Tensor, keep: dict[int, torch.Tensor]
) -> torch.Tensor:
    """The logits of `masked_read`."""
    return masked_read(model, full, ids, keep)[0]


def written_out_turn_scores(
    model: PreTrainedModel,
    full: DynamicCache,
    prompt: KVzipPrompt,
    begin: int,
    config: KVzipConfig,
    keep: dict[int, torch.Tensor],
) -> torch.Tensor:
    """Eq. 8.2 of what stands from `begin` on (scored layers, heads, turn tokens), behind a context of hidden pairs.

    Args:
        full: plain cache of prefix, context and turns.
        prompt: its ids are those of `full`.
        config: replay, chunks and overlap.
        keep: per scored layer, (heads, begin) bool.
    """
    ids, n_prefix, layers = prompt.ids, prompt.prefix_ids.numel(), sorted(keep)
    n, heads = ids.numel(), keep[layers[0]].shape[0]
    scores = torch.zeros(len(layers), heads, n - begin)
    for start in range(begin, n, config.chunk_size):
        end = min(start + config.chunk_size, n)
        before = ids[max(start - min(config.overlap, config.chunk_size), n_prefix) : start]
        repeat = torch.cat([prompt.next_repeat_ids, before, prompt.suffix_ids, ids[start:end]])
        near = torch.cat([torch.arange(n_prefix), torch.arange(start, end), torch.arange(n, n + repeat.numel())])

        def look(index: int, found: torch.Tensor, sinks: Any, start=start, end=end, near=near) -> None:
            if index not in layers:
                return
            kept = keep[index]
            hidden = torch.zeros(heads, found.shape[2], dtype=torch.bool)
            hidden[:, : kept.shape[1]] = ~kept
            if config.replay == "local":
                hidden[:] = True
                hidden[:, near] = False
            weights = _softmax(found[:, :, near], sinks)[:, :, n_prefix : n_prefix + end - start]
            scores[layers.index(index), :, start - begin : end - begin] = _by_cached_head(weights.amax(dim=1), heads)
            found.masked_fill_(hidden.repeat_interleave(found.shape[0] // heads, dim=0)[:, None], float("-inf"))

        cache = copy.deepcopy(full)
        with torch.no_grad(), _looking(model, cache, look):
            model(repeat[None], **{cache_keyword(model): cache})
    return scores


def written_out_scores(
    model: PreTrainedModel,
    full: DynamicCache,
    prompt: KVzipPrompt,
    config: KVzipConfig,
    layers: list[int],
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Eq. 8.2 (scored layers, cached heads, context tokens): the most attention of any query that repeats the context.

    `embed` makes embeddings (q, width) of a repeat input, where ids do not tell all.
    """
    n_prefix, n = prompt.prefix_ids.numel(), prompt.ids.numel()
    heads = full.layers[layers[0]].keys.shape[1]
    scores = torch.zeros(len(layers), heads, n - n_prefix)
    for start, end, ids in prompt.repeat_inputs(config.chunk_size, config.overlap):
        columns = torch.cat([torch.arange(n_prefix), torch.arange(n_prefix + start, n_prefix + end)])
        columns = torch.cat([columns, torch.arange(n, n + ids.numel())])

        def look(index: int, found: torch.Tensor, sinks: Any, columns=columns, start=start, end=end) -> None:
            if index in layers:
                weights = _softmax(found[:, :, columns], sinks)[:, :, n_prefix : n_prefix + end - start]
                row = scores[layers.index(index), :, start:end]
                torch.maximum(row, _by_cached_head(weights.amax(dim=1), row.shape[0]), out=row)

        cache = copy.deepcopy(full)
        with torch.no_grad(), _looking(model, cache, look):
            given = {"input_ids": ids[None]} if embed is None else {"inputs_embeds": embed(ids)[None]}
            model(**given, **{cache_keyword(model): cache})
    return scores
