"""A token budget that holds while the model reads questions and writes answers: gates score every token as it is read.

Once more is held than the budget, the older part of what came after the context joins it, and the best of all that is held
stays (section 8.4.1), a block below the budget; the newest tokens are not cut before they are half a block old.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..routing.layer_inputs import LayerInputs, deaf, listen
from .config import KVzipConfig
from .layers import KVzipLayer, Padding
from .live import Budget, Scores, folded

_BLOCK = 64


def ears(layers: list[Any], config: KVzipConfig, gates: Any, batch: int, padding: Padding | None) -> LayerInputs | None:
    """What hears the layers' inputs of one call, where a standing budget needs their scores.

    Raises:
        ValueError: no gates, no scores of the context's pairs, or more than one row.
    """
    deaf()  # whatever an interrupted call left
    if not config.standing:
        return None
    if gates is None:
        raise ValueError("standing=True scores tokens by gates as they are read; set `cache.gates`")
    if any(layer.scores is None for layer in layers if isinstance(layer, KVzipLayer)):
        raise ValueError(
            "standing=True needs the scores that gates gave the context, which files of 0.1 leave out; read it again"
        )
    if batch != 1 or padding is not None:
        raise ValueError(
            f"standing=True keeps one request within its budget, got {batch} rows or padding; ask questions one by one, "
            "without beams, or use a cache without it"
        )
    return listen()


@torch.no_grad()
def score_tokens(layers: list[Any], index: int, heard: LayerInputs, gates: Any) -> None:
    """Score what layer `index` was given and is about to cache.

    Raises:
        UnsupportedModelError: it cannot be seen.
    """
    given = heard.take(index)
    if given is None:
        raise UnsupportedModelError(
            f"what layer {index} of this model is given cannot be seen: use a cache without standing=True"
        )
    place = [at for at, one in enumerate(layers) if isinstance(one, KVzipLayer)].index(index)
    layer, found = layers[index], gates.score(place, given[0].detach())
    layer.tail_scores = found if layer.tail_scores is None else torch.cat([layer.tail_scores, found], dim=1)


@torch.no_grad()
def keep_within(layers: list[Any], config: KVzipConfig, n_prefix: int) -> None:
    """Cut the layers of one fork in place, where they hold more than `max_kv_tokens` pairs a head on average.

    Args:
        layers: of a cache behind a forward; what each holds behind its context has scores (`tail_scores`).
        config: `max_kv_tokens`, and level `"pair"` or `"pair-uniform"`.
        n_prefix: tokens of the prefix.

    Source: section 8.4.1, with the scores of gates.
    Cost: one sort of all scores, once a block.
    """
    held = [layer for layer in layers if isinstance(layer, KVzipLayer)]
    heads, n_tail = sum(len(layer.context.lengths) for layer in held), held[0].n_tail
    most: int = config.max_kv_tokens or 0
    pairs = sum(sum(layer.context.lengths) for layer in held) + heads * n_tail
    if pairs <= most * heads:
        return
    block = min(_BLOCK, (most - n_prefix) // 4)
    recent = min(block // 2, n_tail)
    joins = n_tail - recent
    device = held[0].context.device
    scores: Scores = [
        [
            torch.cat([old.to(device), new[:joins].to(device)])
            for old, new in zip(layer.scores or (), layer.tail_scores, strict=True)
        ]
        for layer in held
    ]
    uniform = config.level == "pair-uniform"
    keep = Budget((1 if uniform else heads) * (most - block - recent), uniform, False).keep(scores)
    for layer, kept, found in zip(held, keep, scores, strict=True):
        tail: Any = (layer.keys, layer.values)
        piece = (tail[0][:, :, :joins], tail[1][:, :, :joins])
        new: torch.Tensor = layer.tail_scores
        layer.context = folded(layer.context, piece, kept, layer.context.n_tokens + joins)
        layer.scores = [row[stays].cpu() for row, stays in zip(found, kept, strict=True)]
        layer.reset()
        if recent:
            layer.lazy_initialization(tail[0], tail[1])
            # copies: views would keep the evicted ones alive
            layer.keys, layer.values = (one[:, :, joins:].clone() for one in tail)
            layer.tail_scores = new[:, joins:]
