"""Chapter 8 written out slowly: dense attention, a loop per head, masks instead of eviction."""

from __future__ import annotations

import torch


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, visible: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and log-sum-exp in float64; query (B, H, q, d), key and value (B, Hkv, n, d), visible (B, H, q, n)."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1).double(), value.repeat_interleave(group, 1).double()
    logits = query.double() @ key.transpose(-1, -2) * scale
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return torch.softmax(logits, dim=-1) @ value, torch.logsumexp(logits, dim=-1)


def scores_of_attention(weights: torch.Tensor, kv_heads: int, start: int, end: int) -> torch.Tensor:
    """Eq. 8.2 from attention weights (H, q, n) of one layer: max over group and queries; (KV heads, end - start)."""
    grouped = weights.reshape(kv_heads, -1, weights.shape[-1])
    return grouped[:, :, start:end].amax(dim=1)


def top_share(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """The floor(N * ratio) best of all pairs, one at a time, earlier position first among equals."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda index: (-flat[index], index))
    keep = torch.zeros(len(flat), dtype=torch.bool)
    for index in order[: int(len(flat) * ratio)]:
        keep[index] = True
    return keep.reshape(scores.shape)


def whole_heads(scores: torch.Tensor, ratio: float, sinks: int, recent: int) -> torch.Tensor:
    """Head level, one pair at a time: windows in all heads while the budget lasts, then whole heads from the best one on."""
    layers, heads, n = scores.shape
    left = int(scores.numel() * ratio) if ratio < 1 else scores.numel()
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for place in [*range(min(sinks, n)), *range(n - 1, max(n - 1 - recent, -1), -1)]:
        if not keep[0, 0, place] and left >= layers * heads:
            keep[:, :, place] = True
            left -= layers * heads
    more = int((~keep[0, 0]).sum())
    order = sorted(range(layers * heads), key=lambda head: (-scores.reshape(-1, n)[head].max().item(), head))
    for head in order[: left // more if more else 0]:
        keep[head // heads, head % heads] = True
    return keep
