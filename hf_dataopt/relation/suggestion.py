"""Which label a flagged row should have: the vote of similar rows that are not flagged themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import PassCheckpoint
from .graph import RelationGraph

Index = NDArray[np.int64]
Mask = NDArray[np.bool_]
TABLE = 2_000_000  # votes held at a time, 16 MB


def suggest(
    graphs: list[RelationGraph],
    noisy: Mask,
    labels: Index,
    wanted: Mask | None = None,
    *,
    keep: Callable[[RelationGraph, int, Index, Index], PassCheckpoint | None] | None = None,
    quiet: bool = False,
    alone: bool = False,
) -> Index:
    """The label with the largest `sum_j k(i, j)` over the rows j outside N that carry it, summed over checkpoints.

    Args:
        graphs: one per checkpoint.
        noisy: (n,) the noisy set N, which has no vote.
        labels: (n,) label codes.
        wanted: (n,) rows to vote on, default N.
        keep: makes the checkpoint of one graph's pass from its number, the voters and the rows.
        quiet: no progress bars.
        alone: this process does all of it; the others need not call.

    Returns:
        (n,) codes; the own label for rows not in `wanted`, and where no unflagged row is similar.

    Differs: not in the dissertation, which detects label errors and does not correct them.
    Cost: 2 |wanted| n (d + C) operations a checkpoint.
    """
    rows, voters = np.flatnonzero(noisy if wanted is None else wanted), np.flatnonzero(~noisy)
    suggested = labels.copy()
    if not len(rows) or not len(voters):
        return suggested
    classes = int(labels.max()) + 1
    for block in np.array_split(rows, -(-len(rows) * classes // TABLE)):
        votes = np.zeros((len(block), classes))
        for k, graph in enumerate(graphs):
            kept = keep(graph, k, voters, block) if keep else None
            votes += graph.votes_against(voters, block, classes, checkpoint=kept, quiet=quiet, alone=alone)
        suggested[block] = np.where(votes.max(axis=1) > 0, votes.argmax(axis=1), labels[block])
    return suggested
