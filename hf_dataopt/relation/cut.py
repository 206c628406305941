"""Which rows are flagged by a score, and which one of several copies stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..settings import brief, check_each, plain

Index = NDArray[np.int64]
Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]
LEAST = 0.2


def most_expected_f1(wrong: Vector) -> int:
    """How many of the highest probabilities to flag, so that the expected F1 of the flagged set is largest.

    Args:
        wrong: (n,) probabilities that labels are wrong; their sum is how many are expected to be.

    Returns:
        A count; the rows in it have at least half of that F1 as their probability, and at least `LEAST`: where nothing tells
        wrong labels from right ones, flagging all would be best.
    """
    falling = np.cumsum(-np.sort(-wrong))
    best = int((2 * falling / (np.arange(1, len(wrong) + 1) + wrong.sum())).argmax()) + 1
    return min(best, int((wrong >= LEAST).sum()))


def flag(scores: Vector, labels: Index, rule: str, value: float) -> Mask:
    """The labelled rows with the highest scores.

    Args:
        scores: (n,) higher = worse.
        labels: (n,) codes, -1 for unlabelled rows, which are never flagged.
        rule: "share" of the labelled rows, scores above a "threshold", or above a "quantile" of them.
        value: the number that the rule reads.

    Returns:
        (n,) mask; where scores tie at the end of a share, the first rows.
    """
    named = np.flatnonzero(labels >= 0)
    found, worst = np.zeros(len(labels), bool), scores[named]
    if rule == "share":
        found[named[np.argsort(-worst, kind="stable")[: int(value * len(named) + 1e-9)]]] = True
    else:
        found[named] = worst > (value if rule == "threshold" else np.quantile(worst, value))
    return found


def groups_of(group: Index, across: Sequence[Any] | None = None) -> list[Index]:
    """The groups of more than one row, the largest first.

    Args:
        group: (n,) the smallest row of each row's group.
        across: (n,) values; only groups with more than one of them.

    Raises:
        ValueError: `across` has another number of rows.
    """
    order = np.argsort(group, kind="stable")
    groups = [rows for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(rows) > 1]
    if across is not None:
        values = check_each("across", across, _check_value)
        if len(values) != len(group):
            raise ValueError(f"across must hold one value for each of the {len(group)} rows, got {len(values)}")
        groups = [rows for rows in groups if len({values[row] for row in rows}) > 1]
    return sorted(groups, key=lambda rows: (-len(rows), rows[0]))


def _check_value(name: str, value: Any) -> Any:
    value = plain(value)
    if value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"{name} must be a text or a number, got {brief(value)}")
    return value


def one_of_each(rows: Index, group: Index, scores: Vector, labels: Index) -> Index:
    """Of every group among `rows` the one with the lowest score, labelled ones first; ascending."""
    best = rows[np.lexsort((rows, scores[rows], labels[rows] < 0))]
    _, first = np.unique(group[best], return_index=True)
    return np.sort(best[first])


def rows_dropped(wrong: Mask, odd: Mask, copies: tuple[Index, Vector, Index] | None) -> dict[int, str]:
    """Which rows go, and why.

    Args:
        wrong, odd: (n,) label errors and outliers.
        copies: (n,) groups, scores and labels: of every group one of the rows that are left stays, as `one_of_each` picks it.

    Returns:
        "label error", "outlier" or "near duplicate of row N" by row number, ascending.
    """
    gone = dict.fromkeys(np.flatnonzero(odd).tolist(), "outlier")
    gone |= dict.fromkeys(np.flatnonzero(wrong).tolist(), "label error")
    if copies is not None:
        group, left = copies[0], np.setdiff1d(np.arange(len(wrong)), list(gone))
        kept = one_of_each(left, *copies)
        stays = dict(zip(group[kept].tolist(), kept.tolist(), strict=True))
        rest = np.setdiff1d(left, kept).tolist()
        gone |= {row: f"near duplicate of row {stays[int(group[row])]}" for row in rest}
    return dict(sorted(gone.items()))
