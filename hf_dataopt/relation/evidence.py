"""Why a row is flagged: the rows whose labels contradict it, and those that support it (Figures 5.3 and 5.10)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..settings import check_int


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Relations of one row (Eq. 5.1), strongest first.

    Args:
        row: its number.
        label: its label code.
        conflicting: (k,) rows with the most negative relation; fewer than asked where fewer are negative.
        conflicting_labels: (k,) their label codes.
        conflicting_relations: (k,) float32, in [-1, 0).
        supporting, supporting_labels, supporting_relations: the same for positive relations, in (0, 1].
        ranks: the share of rows with a lower score, by score (`"combined"`, `"label_noise"`).
    """

    row: int
    label: int
    conflicting: NDArray[np.int64]
    conflicting_labels: NDArray[np.int64]
    conflicting_relations: NDArray[np.float32]
    supporting: NDArray[np.int64]
    supporting_labels: NDArray[np.int64]
    supporting_relations: NDArray[np.float32]
    ranks: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def evidence_of(
    row: int,
    relations: NDArray[np.float32],
    labels: NDArray[np.int64],
    count: int,
    ranks: dict[str, float] | None = None,
) -> Evidence:
    """The strongest `count` relations of both signs.

    Args:
        row: number of the row that `relations` belong to.
        relations: (n,) `r(row, j)`, 0 at j = row.
        labels: (n,) codes.
        count: how many of each, >= 1.
        ranks: copied into the result.

    Raises:
        ValueError: count < 1.
    """
    count = check_int("count", count, 1, todo="ask for at least one row of evidence")

    def strongest(values: NDArray[np.float32]) -> NDArray[np.int64]:
        k = min(count, int((values > 0).sum()))
        top = np.argpartition(-values, min(k, len(values) - 1))[:k] if k else np.empty(0, np.int64)
        return top[np.argsort(-values[top], kind="stable")].astype(np.int64)

    against, support = strongest(-relations), strongest(relations)
    return Evidence(
        row=int(row),
        label=int(labels[row]),
        conflicting=against,
        conflicting_labels=labels[against],
        conflicting_relations=relations[against],
        supporting=support,
        supporting_labels=labels[support],
        supporting_relations=relations[support],
        ranks=ranks or {},
    )
