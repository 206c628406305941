"""Which key-value pairs stay: the global top share of section 8.4.1 and its uniform and head-level forms."""

from __future__ import annotations

import torch

from ..settings import check_int, check_kind, check_tensor
from .config import KVzipConfig

# DuoAttention's windows are meant for long contexts; in short ones they would leave no budget for whole heads
_WINDOW_SHARE = 16


def keep_mask(scores: torch.Tensor, config: KVzipConfig, n_prefix: int = 0) -> torch.Tensor:
    """Pairs that stay, for a budget over all scored layers and heads.

    Args:
        scores: (layers, KV heads, n) float, importance of every context pair, higher stays; NaN is refused.
        config: budget (`keep_ratio` or `max_kv_tokens`), `level` and `ties`.
        n_prefix: tokens kept in front of the context, counted by `max_kv_tokens`.

    Returns:
        (layers, KV heads, n) bool, True = stays.

    Raises:
        ValueError: scores of another rank, empty, or with NaN; a token budget that the prefix alone exceeds.

    Source: section 8.4.1 (non-uniform budget), sections 8.3 and 8.4.2 (head level; a dropped head keeps sinks and a recent
        window, as in DuoAttention, and these count).
    Differs: `ties="position"` keeps floor(N * keep_ratio) pairs exactly, as the text says; the reference code's strict
        threshold keeps one less, and far fewer where scores are equal (`ties="reference"`). Its code drops the whole context
        of a head (`head_sinks=0, head_recent=0`).
    Cost: one sort of all scores.

    Example:
        >>> keep_mask(torch.tensor([[[0.1, 0.9, 0.5, 0.5]]]), KVzipConfig(keep_ratio=0.5))
        tensor([[[False,  True,  True, False]]])
    """
    check_tensor("scores", scores, ("layers", "KV heads", "tokens"))
    check_kind("config", config, KVzipConfig)
    n_prefix = check_int("n_prefix", n_prefix, 0)
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN; score the context again in float32 or check the model's weights")
    ratio = budget_ratio(config, scores.shape[-1], n_prefix)
    if ratio >= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    if config.level == "pair":
        return _top(scores.reshape(1, -1), ratio, config.ties).reshape(scores.shape)
    if config.level == "pair-uniform":
        # equal budgets per head are exact in the reference code as well
        return _top(scores.reshape(-1, scores.shape[-1]), ratio, "position").reshape(scores.shape)
    return _whole_heads(scores, config, ratio, n_prefix)


def _whole_heads(scores: torch.Tensor, config: KVzipConfig, ratio: float, n_prefix: int) -> torch.Tensor:
    """Heads keep all pairs or those of sinks and recent window alone, as many heads as the budget has room for."""
    heads, n = scores.amax(dim=-1), scores.shape[-1]
    count, budget = heads.numel(), int(scores.numel() * ratio)
    sinks, recent = windows(config, budget // count, n, n_prefix)
    always = torch.zeros(n, dtype=torch.bool, device=scores.device)
    always[:sinks], always[n - recent :] = True, True
    if config.ties == "reference":
        expanded = heads[..., None].expand_as(scores).reshape(1, -1)
        return _top(expanded, ratio, "reference").reshape(scores.shape) | always
    whole = (budget - count * (sinks + recent)) // (n - sinks - recent)
    return first(heads.reshape(1, -1), whole).reshape(heads.shape)[..., None] | always


def windows(config: KVzipConfig, room: int, n: int, n_prefix: int) -> tuple[int, int]:
    """Sinks and recent tokens that a dropped head keeps of n behind the prefix, with `room` tokens for every head."""
    sinks = min(max(config.head_sinks - n_prefix, 0), n // _WINDOW_SHARE)
    recent = min(config.head_recent, n // _WINDOW_SHARE)
    # a budget below the windows leaves no head whole
    sinks = min(sinks, room)
    return sinks, min(recent, max(room - sinks, 0))


def budget_ratio(config: KVzipConfig, n_context: int, n_prefix: int) -> float:
    """The share of context pairs that stays, from `keep_ratio` or from `max_kv_tokens`.

    Raises:
        ValueError: `max_kv_tokens` leaves nothing for the context.
    """
    check_kind("config", config, KVzipConfig)
    n_context, n_prefix = check_int("n_context", n_context, 1), check_int("n_prefix", n_prefix, 0)
    if config.max_kv_tokens is None:
        return config.keep_ratio
    left = config.max_kv_tokens - n_prefix
    if left < 1:
        raise ValueError(
            f"max_kv_tokens={config.max_kv_tokens} leaves no room beside the {n_prefix} prefix tokens; allow more"
        )
    return min(left / n_context, 1.0)


def _top(scores: torch.Tensor, ratio: float, ties: str) -> torch.Tensor:
    """True at the top `int(n * ratio)` of each row of (rows, n)."""
    count = int(scores.shape[1] * ratio)
    if ties == "reference":
        threshold = scores.sort(dim=1, descending=True).values[:, max(count - 1, 0)]
        return scores > threshold[:, None]
    return first(scores, count)


def first(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` highest of each row of (rows, n), earlier places first among equals."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
