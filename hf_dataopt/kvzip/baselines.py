"""What KVzip is compared with: scores that know nothing of the context, for `KVzipCache.from_scores`."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def random_scores(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Random eviction: uniform scores, each layer and head on its own.

    Args:
        shape: (scored layers, KV heads, context tokens).
        generator: where the numbers come from.

    Returns:
        float32 of that shape in [0, 1).
    """
    return torch.rand(*shape, generator=generator)


def recency_scores(shape: Sequence[int]) -> torch.Tensor:
    """Keep-last: a pair's position is its score, so that every head keeps the end of the context.

    Args:
        shape: (scored layers, KV heads, context tokens).

    Returns:
        float32 of that shape in (0, 1].
    """
    return (torch.arange(1, shape[-1] + 1) / shape[-1]).expand(*shape).contiguous()
