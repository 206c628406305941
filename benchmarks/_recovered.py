"""The share of a gap between no context and full context that a method recovers."""

from __future__ import annotations

from typing import Any

import numpy as np


def shares(
    runs: list[dict[str, Any]], none: list[dict[str, Any]], full: list[dict[str, Any]]
) -> tuple[float, list[float]]:
    """Recovered share of the gap, of means over seeds, and its 95 % bootstrap interval over conversations."""
    groups = np.array(none[0]["group"])
    each = [np.mean([run["nll"] for run in method], axis=0) for method in (none, full, runs)]
    sums = np.array([[one[groups == group].sum() for one in each] for group in dict.fromkeys(groups)])

    def recovered(rows: np.ndarray) -> float:
        low, high, mine = sums[rows].sum(0)
        return float((low - mine) / (low - high))

    draws = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    spread = np.percentile([recovered(rows) for rows in draws], [2.5, 97.5])
    return recovered(np.arange(len(sums))), [round(float(end), 3) for end in spread]
