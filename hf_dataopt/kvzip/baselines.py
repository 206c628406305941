"""What KVzip is compared with: scores that know nothing of the context, for `KVzipCache.from_scores`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..settings import check_each, check_generator, check_int


def random_scores(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Random eviction: uniform scores, each layer and head on its own.

    Args:
        shape: (scored layers, KV heads, context tokens).
        generator: where the numbers come from.

    Returns:
        float32 of that shape in [0, 1).
    """
    sizes = check_each("shape", shape, check_int, 1, least=3)
    return torch.rand(*sizes, generator=check_generator("generator", generator))


def recency_scores(shape: Sequence[int]) -> torch.Tensor:
    """Keep-last: a pair's position is its score, so that every head keeps the end of the context.

    Args:
        shape: (scored layers, KV heads, context tokens).

    Returns:
        float32 of that shape in (0, 1].
    """
    sizes = check_each("shape", shape, check_int, 1, least=3)
    return (torch.arange(1, sizes[-1] + 1) / sizes[-1]).expand(*sizes).contiguous()
