"""Compress again: what was said about a context since is scored as the context was, and all of it is cut to one budget.

The pairs that a cache holds keep the scores that they were given. Turns are repeated chunk by chunk like a context (Eq. 8.2,
section 8.3.4), seen together with the prefix (`replay="local"`) or with every pair that is left (`"exact"`); gates score them
in one forward over them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from .._compat import causal_model_of, copied_layer, decoder_of, input_device, text_config
from ..routing.attach import attach
from ..routing.verdicts import evaluating
from ..settings import check_flag, check_kind
from ..text.positions import warn_beyond_positions
from .config import KVzipConfig
from .layers import KVzipLayer, kept_layer
from .live import Scores, folded, keep_live
from .prompt import KVzipPrompt
from .ragged import RaggedContext
from .reading import USER, OwnCache, PrefilledContext, hearing, read_text
from .score import Score
from .scores import score_of
from .scoring import score_context

if TYPE_CHECKING:
    from .gates import KVzipGates


@dataclass
class HeldLayer:
    """What one layer holds while turns are scored.

    Args:
        keys, values: (1, KV heads, n, d), prefix and turns; of latents, all that is held, the context behind the turns.
        rest: the context without the prefix; None for latents.
        more: latents of it, behind those of prefix and turns.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rest: RaggedContext | None
    more: int

    @classmethod
    def of(cls, layer: Any, n_prefix: int) -> HeldLayer:
        """From a layer of a cache, `n_prefix` pairs of every head being the prefix."""
        context, parts = layer.context, []
        for rows, tail in zip(context.opened(), (layer.keys, layer.values), strict=True):
            heads = rows.split(context.lengths)
            dense = torch.stack([head[:n_prefix] for head in heads])[None].to(tail.dtype)
            left = torch.cat([head[n_prefix:] for head in heads])
            parts.append((torch.cat([dense, tail, *([left[None, None]] if layer.latent else [])], dim=2), left))
        (keys, old_keys), (values, old_values) = parts
        lengths = [length - n_prefix for length in context.lengths]
        if layer.latent:
            return cls(keys, values, None, lengths[0])
        return cls(keys, values, RaggedContext(old_keys, old_values, lengths, context.n_tokens - n_prefix), 0)


@torch.no_grad()
def compress_turns(
    layers: list[Any],
    pristine: list[Any],
    prompt: KVzipPrompt,
    config: KVzipConfig,
    model: Any,
    gates: KVzipGates | None = None,
    *,
    progress: bool = True,
) -> list[Any]:
    """Layers of a cache, cut to a budget again.

    Args:
        layers: as they stand, each `KVzipLayer` with scores.
        pristine: as they stood before the turns.
        prompt: whose turns include those behind the layers' contexts.
        config: the new budget, and how turns are scored.
        model: that made the cache; only asked where there are turns.
        gates: score turns instead of a scoring pass.
        progress: show a bar.

    Returns:
        Layers that share nothing with the given ones that is written to.
    """
    held = [layer for layer in layers if isinstance(layer, KVzipLayer)]
    n, n_prefix = prompt.ids.numel(), prompt.prefix_ids.numel()
    scores: Scores = [list(layer.scores or ()) for layer in held]
    n_turns = n - held[0].context.n_tokens
    if n_turns and config.level == "head":
        # what a head is worth does not change
        scores = [[_longer(row, n_prefix, n_turns) for row in layer] for layer in scores]
    elif n_turns:
        if all(layer.tail_scores is not None for layer in held):  # at hand
            more = torch.stack([layer.tail_scores.cpu() for layer in held])
        elif gates is None:
            more = _by_repeating(layers, prompt, config, model, progress)
        else:
            more = _by_gates(pristine, prompt, config, model, gates)
        scores = [
            [torch.cat([row, new.to(row)]) for row, new in zip(*pair, strict=True)]
            for pair in zip(scores, more.cpu(), strict=True)
        ]
    keep = keep_live(scores, config, n - n_prefix, n_prefix)
    made: list[Any] = []
    for layer in layers:
        if not isinstance(layer, KVzipLayer):
            made.append(kept_layer(layer, getattr(layer, "chunked", False)))
            continue
        kept, rows = keep.pop(0), scores.pop(0)
        tail: Any = (layer.keys, layer.values) if n_turns else None
        left = [row[stays] for row, stays in zip(rows, kept, strict=True)]
        context = layer.context  # quantised pairs of which none goes are not quantised again
        if n_turns or not all(bool(stays.all()) for stays in kept):
            context = folded(context, tail, kept, n).stored(config.storage)
        made.append(KVzipLayer(context, layer.latent, left))
    return made


def _longer(row: torch.Tensor, n_prefix: int, more: int) -> torch.Tensor:
    worth = row[n_prefix:].max() if len(row) > n_prefix else row.new_tensor(float("-inf"))
    return torch.cat([row, worth.expand(more)])


def _by_repeating(
    layers: list[Any], prompt: KVzipPrompt, config: KVzipConfig, model: Any, progress: bool
) -> torch.Tensor:
    """Scores (scored layers, KV heads, turn tokens) of what stands behind the layers' contexts."""
    score = score_of(config.score)
    if getattr(score, "looks_at", Score.looks_at) != "repeat":
        raise ValueError(
            f"score={config.score!r} ranks a context by how all of it was read, which turns cannot be added to; make the cache "
            "with a score that looks at a repetition (kvzip, kvzip_plus, kvgrad, ...) or with gates"
        )
    scored = [index for index, layer in enumerate(layers) if isinstance(layer, KVzipLayer)]
    old, n_prefix = layers[scored[0]].context.n_tokens, prompt.prefix_ids.numel()
    before = prompt.ids[n_prefix:old]
    picture = getattr(model.config, "image_token_id", None)
    if picture is not None and bool((before[-max(config.overlap, 1) :] == picture).any()):
        config = replace(config, overlap=0)  # an image has no words to be named by
    parts: list[Any] = [
        HeldLayer.of(layer, n_prefix) if isinstance(layer, KVzipLayer) else copied_layer(layer) for layer in layers
    ]
    full = DynamicCache(config=text_config(model))
    full.layers = parts
    turns = replace(prompt, context_ids=prompt.ids[old:], turn_ids=prompt.turn_ids[:0])
    known = PrefilledContext(model, turns, full, scored, layers[scored[0]].latent, before=before)
    warn_beyond_positions(text_config(model), prompt.ids.numel(), "the context with its turns")
    return score_context(known, config, progress=progress)


def _by_gates(
    pristine: list[Any], prompt: KVzipPrompt, config: KVzipConfig, model: Any, gates: KVzipGates
) -> torch.Tensor:
    """The same, from one forward over the turns."""
    scored = [index for index, layer in enumerate(pristine) if isinstance(layer, KVzipLayer)]
    old = pristine[scored[0]].context.n_tokens
    found: list[list[torch.Tensor]] = [[] for _ in scored]

    def on_input(layer: int, given: torch.Tensor) -> None:
        place = scored.index(layer)
        found[place].append(gates.score(place, given))

    attach(model, USER)
    layers = [copied_layer(layer) for layer in pristine]
    ids = prompt.ids[old:].to(input_device(model))[None]
    with evaluating(causal_model_of(model)), hearing(model, scored, on_input) as heard:
        read_text(model, ids, OwnCache(layers, heard), config.prefill_chunk_size, start=old, progress=False)
    return torch.stack([torch.cat(parts, dim=1).to(found[0][0].device) for parts in found])


def compress_again(
    cache: Any, keep_ratio: float | None, max_kv_tokens: int | None, model: Any, progress: bool
) -> tuple[list[Any], KVzipPrompt, KVzipConfig]:
    """Layers, prompt and settings of a cache once it was compressed again; see `KVzipCache.compress_again`."""
    progress = check_flag("progress", progress)
    if keep_ratio is not None and max_kv_tokens is not None:
        raise ValueError("keep_ratio and max_kv_tokens are two budgets; give one of them")
    config: KVzipConfig = cache.config
    if keep_ratio is not None:
        config = replace(config, keep_ratio=keep_ratio, max_kv_tokens=None)
    if max_kv_tokens is not None:
        config = replace(config, max_kv_tokens=max_kv_tokens)
    if model is not None:
        causal = causal_model_of(check_kind("model", model, torch.nn.Module))
        if not cache.knows(causal):
            cache.attach(model)
        model = causal
    if cache.opened_by is not None:
        raise ValueError("this cache is in the middle of a forward; compress it again once that has come to its end")
    if cache.rows is not None:
        raise ValueError(
            "this cache holds several contexts; one that is to be compressed again needs a cache of its own"
        )
    held = [layer for layer in cache.layers if isinstance(layer, KVzipLayer)]
    if any(layer.scores is None for layer in held):
        raise ValueError(
            "this cache does not hold the scores of its pairs (it was read from a file that has none); make it with "
            "KVzipCache.from_context or from_scores"
        )
    known: KVzipPrompt = cache.prompt
    n_turns = held[0].get_seq_length() - known.ids.numel()
    if not n_turns:
        return compress_turns(cache.layers, cache.pristine_layers, known, config, model), known, config
    at_hand = all(layer.tail_scores is not None for layer in held)
    if cache.scored_by is not None and cache.gates is None and not at_hand:
        raise ValueError(
            "gates scored the pairs of this cache, and turns need the same; set `cache.gates` to those it was made with"
        )
    ids = cache.read_ids
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            "this cache was given embeddings, so the tokens that came after its context have no ids and cannot be repeated; "
            "`reset()` it, or read ids"
        )
    if ids.shape[0] != 1:
        raise ValueError(
            f"this cache went on with a batch of {ids.shape[0]} rows, and rows that keep different pairs need caches of their "
            "own; ask the questions one by one, or take one row first: `cache.batch_select_indices(torch.tensor([0]))`"
        )
    if cache.padded:
        raise ValueError("this cache read a padded batch, and padding has no scores; ask the question alone")
    if model is None:
        modules = list(cache._models)
        model = next((one for one in modules if decoder_of(one) is not one), None)
    if model is None:
        raise ValueError("the model that this cache was made for is gone; pass it: `compress_again(..., model=model)`")
    prompt = replace(known, turn_ids=torch.cat([known.turn_ids, ids[0].cpu()]))
    layers = compress_turns(cache.layers, cache.pristine_layers, prompt, config, model, cache.gates, progress=progress)
    return layers, prompt, config
