"""Outlier and out-of-distribution scores from the same kernel (section 5.3.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..seeding import generator
from .config import RelationConfig
from .graph import RelationGraph


def reference_rows(count: int, config: RelationConfig) -> NDArray[np.int64]:
    """The uniform random subset S, sorted; all rows where `outlier_reference` is None or not smaller than `count`."""
    import torch

    if config.outlier_reference is None or config.outlier_reference >= count:
        return np.arange(count)
    drawn = torch.randperm(count, generator=generator(config.seed))[: config.outlier_reference]
    return np.sort(drawn.numpy()).astype(np.int64)


def outlier_scores(
    graph: RelationGraph, reference: NDArray[np.int64], queries: RelationGraph | None = None, *, quiet: bool = False
) -> NDArray[np.float64]:
    """`1 / (sum_{j in S} k(x, x_j) + epsilon)`: higher = fewer similar rows.

    Args:
        graph: the fitted rows.
        reference: (m,) rows of the graph that form S.
        queries: new rows (any labels are ignored); default: the graph's own rows, each without itself.
        quiet: no progress bar.

    Returns:
        (n,) float64, at most 1 / epsilon; infinite where epsilon is 0 and nothing is similar.

    Source: section 5.3.3.
    Differs: the reference code's epsilon and edge cut-off are settings; a row that is in S does not count itself unless
        `config.diagonal` is set.
    Cost: 2 n m (d + C) operations.
    """
    config = graph.config
    sums = graph.sums_against(
        reference, temperature=config.outlier_temperature, signed=False, queries=queries, quiet=quiet
    )
    with np.errstate(divide="ignore"):
        return np.asarray(1.0 / (sums + config.outlier_epsilon), dtype=np.float64)


def is_outlier(scores: NDArray[Any], share: float = 0.01) -> tuple[NDArray[np.bool_], float]:
    """Rows above the (1 - share) quantile of their scores, and that level.

    Raises:
        ValueError: share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}; it is the part of the rows to call outliers")
    level = float(np.quantile(scores, 1 - share, method="higher")) if len(scores) else 0.0
    return scores > level, level
