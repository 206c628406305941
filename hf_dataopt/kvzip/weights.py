"""Attention weights as scores need them: the largest or the sum over queries, and what a pair adds to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._compat import output_projection
from ..errors import UnsupportedModelError
from .rules import same_dtype
from .score import Positions, ScoredLayer

# logits held at a time, in elements (16 MB in float32; a GPU has more, and launches cost)
_BLOCK_ELEMENTS, _BLOCK_ELEMENTS_GPU = 1 << 22, 1 << 26


def strongest(
    layer: ScoredLayer, queries: torch.Tensor, keys: torch.Tensor, log_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The most attention that any query pays to each key, query head by query head.

    Args:
        layer: gives the softmax.
        queries: (H, q, d). keys: (KV heads, n, d), all of them visible to every query.
        log_weights: (q,) float32, logarithm of what each query's attention is multiplied with, optional.

    Returns:
        (H, n) float32.

    Source: the maximum over queries of Eq. 8.2, as exp(max(logit - log-sum-exp)).
    Cost: O(H q n d) time in blocks of fixed memory.
    """
    kv_heads, n, _ = keys.shape
    best = torch.full((kv_heads, queries.shape[0] // kv_heads, n), float("-inf"), device=queries.device)
    for head, logits in _blocks(layer, queries, keys, log_weights):
        torch.maximum(best[:, head], logits.amax(dim=1), out=best[:, head])
    return best.exp_().reshape(-1, n)


def length(
    layer: ScoredLayer, queries: torch.Tensor, keys: torch.Tensor, log_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The length of the vector of attentions that all queries pay to each key, query head by query head.

    Args:
        layer, queries, keys, log_weights: as `strongest`.

    Returns:
        (H, n) float32, at least what `strongest` gives.

    Cost: as `strongest`, and an exponential for each query and key.
    """
    kv_heads, n, _ = keys.shape
    found = torch.zeros(kv_heads, queries.shape[0] // kv_heads, n, device=queries.device)
    for head, logits in _blocks(layer, queries, keys, log_weights):
        found[:, head] += logits.mul_(2).exp_().sum(dim=1)
    return found.sqrt_().reshape(-1, n)


def _blocks(
    layer: ScoredLayer, queries: torch.Tensor, keys: torch.Tensor, log_weights: torch.Tensor | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Logarithms of weighted attentions (KV heads, block, n), by place of the query head in its group."""
    queries, keys = same_dtype(queries, keys)
    kv_heads, n, _ = keys.shape
    keys_t, grouped = keys.transpose(1, 2), queries.reshape(kv_heads, -1, *queries.shape[1:])
    shift = layer.lse if log_weights is None else layer.lse - log_weights
    shift = shift.reshape(*grouped.shape[:3], 1)
    block = _rows_at_once(queries, kv_heads * n)
    for head in range(grouped.shape[1]):
        for start in range(0, grouped.shape[2], block):
            rows = slice(start, start + block)
            yield head, _log_weights(layer, grouped[:, head, rows], shift[:, head, rows], keys_t)


def _rows_at_once(queries: torch.Tensor, width: int) -> int:
    return max((_BLOCK_ELEMENTS_GPU if queries.is_cuda else _BLOCK_ELEMENTS) // width, 1)


def total(
    layer: ScoredLayer, queries: torch.Tensor, keys: torch.Tensor, positions: Positions, *, beyond: int = 0
) -> torch.Tensor:
    """All attention that the queries pay to each key, query head by query head.

    Args:
        layer: gives the softmax.
        queries: (H, q, d). keys: (KV heads, n, d).
        positions: a query sees the keys up to its own place.
        beyond: leave out what a query pays to the last so many keys, its own included.

    Returns:
        (H, n) float32.

    Cost: O(H q n d) time in blocks of fixed memory.
    """
    queries, keys = same_dtype(queries, keys)
    kv_heads, n, _ = keys.shape
    keys_t, grouped = keys.transpose(1, 2), queries.reshape(kv_heads, -1, *queries.shape[1:])
    shift = layer.lse.reshape(*grouped.shape[:3], 1)
    found = torch.zeros(kv_heads, grouped.shape[1], n, device=queries.device)
    block = _rows_at_once(queries, kv_heads * n)
    for start in range(0, grouped.shape[2], block):
        at = positions.queries[start : start + block]
        seen = int((positions.keys <= at[-1]).sum()) if len(at) else 0  # keys behind the last query are not computed
        hidden = positions.keys[None, :seen] > at[:, None] - beyond
        for head in range(grouped.shape[1]):
            part = grouped[:, head, start : start + block], shift[:, head, start : start + block]
            logits = _log_weights(layer, *part, keys_t[:, :, :seen])
            found[:, head, :seen] += logits.exp_().masked_fill_(hidden, 0).sum(dim=1)
    return found.reshape(-1, n)


def _log_weights(layer: ScoredLayer, part: torch.Tensor, shift: torch.Tensor, keys_t: torch.Tensor) -> torch.Tensor:
    """Logits minus log-sum-exp, (KV heads, block, n) float32."""
    rules = layer.rules
    if rules.softcap is not None:
        capped = torch.tanh(torch.bmm(part, keys_t).float() * (rules.scale / rules.softcap))
        return capped.mul_(rules.softcap).sub_(shift)
    if part.dtype == torch.float32:
        return torch.baddbmm(shift, part, keys_t, beta=-1, alpha=rules.scale)
    return torch.bmm(part, keys_t).float().mul_(rules.scale).sub_(shift)


def over_group(by_query_head: torch.Tensor, kv_heads: int, how: str = "max") -> torch.Tensor:
    """(H, n) to (KV heads, n), by `"max"`, `"mean"` or `"length"` over the query heads that share a KV head."""
    grouped = by_query_head.reshape(kv_heads, -1, by_query_head.shape[-1])
    return grouped.amax(dim=1) if how == "max" else grouped.mean(dim=1) if how == "mean" else grouped.norm(dim=1)


def output_norms(layer: ScoredLayer, values: torch.Tensor, heads: int) -> torch.Tensor:
    """Length of what each value adds to the residual stream, `||W_O v||`, per query head.

    Args:
        layer: with its attention module.
        values: (KV heads, n, v).
        heads: H, query heads.

    Returns:
        (H, n) float32.

    Raises:
        UnsupportedModelError: the module has no output projection of H v inputs.

    Differs: what a model does between attention and projection (gates, norms) is left out.
    Cost: the projection of H v rows, and O(H n v^2).
    """
    width = heads * values.shape[-1]
    projection = None if layer.module is None else output_projection(layer.module, width)
    if projection is None:
        raise UnsupportedModelError(
            f"layer {layer.index} has no output projection of {width} inputs that could be seen; use score='kvzip'"
        )
    given = torch.eye(width, device=values.device, dtype=values.dtype)
    # the rows of the identity through whatever the projection is: LoRA, quantised or offloaded weights; less its bias
    rows = (projection(given) - projection(torch.zeros_like(given[:1]))).float()
    rows = rows.reshape(heads, values.shape[-1], -1)
    gram = rows @ rows.transpose(1, 2)
    repeated = values.float().repeat_interleave(heads // values.shape[0], dim=0)
    return ((repeated @ gram) * repeated).sum(dim=-1).clamp_(min=0).sqrt_()
