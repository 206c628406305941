"""`score="combined"`: what the model says of a label and what the nearest rows of the graph say, by rank.

Not in the dissertation. On human label noise the relation score alone is behind plain loss, on confusable flips ahead of
it (`benchmarks/relation_quality.py`); the mean of the three ranks below was chosen on rows 0-4,999 of CIFAR-10N and
reported on the others.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint import PassCheckpoint
from . import baselines
from .graph import RelationGraph
from .labels import Labels
from .tiles import Tile

Index = NDArray[np.int64]
Vector = NDArray[np.float64]
BLOCK = 8192  # rows of probabilities read at a time


def prob_columns(labels: Labels, graph: RelationGraph) -> Index:
    """Which column of `probs` belongs to each label code: the class number of a `ClassLabel`, or the integer itself.

    Raises:
        ValueError: texts, whose order in the model is unknown, or numbers that are no columns.
    """
    width = 0 if graph.probs is None else graph.probs.width
    if not all(isinstance(value, int) and 0 <= value < width for value in labels.values):
        raise ValueError(
            f"score='combined' reads the probability of each label, but the labels {labels.values[:3]} ... are no columns of "
            f"probs (0 to {width - 1}); cast the label column to a ClassLabel in the order of the model's classes"
        )
    return np.asarray(labels.values, np.int64)


def unary_scores(graph: RelationGraph, places: Index) -> tuple[Vector, Vector]:
    """Loss and margin of every row, read in blocks.

    Args:
        graph: with labels and probabilities.
        places: (classes,) column of `probs` of each label code.

    Returns:
        (n,) float64 each, higher = more suspicious; a positive margin means that the model prefers another label.

    Raises:
        ValueError: a graph without probabilities or labels.
    """
    if graph.probs is None or graph.labels is None:
        raise ValueError("score='combined' needs labels and probabilities: use compatibility=True")
    loss, margin = np.empty(len(graph)), np.empty(len(graph))
    block = np.empty((BLOCK, graph.probs.width), np.float32)
    for start in range(0, len(graph), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(graph)))
        part, own = block[: len(rows)], places[graph.labels[rows]]
        graph.probs.take(rows, part)
        loss[rows] = baselines.loss(part, own)
        margin[rows] = baselines.margin(part, own)
    return loss, margin


def neighbour_margin(
    graph: RelationGraph, neighbours: int, *, checkpoint: PassCheckpoint | None = None, quiet: bool = False
) -> Vector:
    """Votes of the k most similar rows: `max_{y != y_i} V_i(y) - V_i(y_i)`, V the sum of `s(f_i, f_j)^t` by label.

    Args:
        graph: with labels.
        neighbours: k >= 1.
        checkpoint: where finished stripes are kept.
        quiet: no progress bar.

    Returns:
        (n,) float64; positive where another label has the stronger neighbours.

    Source: Eq. 5.4 without compatibility, cut to the k strongest edges of a row.
    Cost: 2 n^2 d operations, k numbers a row of one stripe.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; at least 1 edge a row is needed")
    bare = graph.features_only()
    margins = torch.zeros(len(graph), dtype=torch.float64)
    k = min(neighbours, len(graph) - 1)
    strongest: dict[str, Tensor] = {}
    first, last = int(bare.order[0]), int(bare.order[-1])

    def add(kernel: Tensor, left: Tile, right: Tile, rows: Index, columns: Index) -> None:
        if right.labels is None or left.labels is None:
            return
        if columns[0] == first:
            strongest.clear()  # of a stripe that is done again
        found, where = kernel.topk(min(k, kernel.shape[1]), dim=1)
        labels = right.labels[where]
        if strongest:
            found, labels = torch.cat([strongest["s"], found], 1), torch.cat([strongest["y"], labels], 1)
            found, where = found.topk(min(k, found.shape[1]), dim=1)
            labels = labels.gather(1, where)
        strongest.update(s=found, y=labels)
        if columns[-1] == last:
            margins.numpy()[rows] = _vote_margin(found**graph.config.temperature, labels, left.labels).cpu().numpy()
            strongest.clear()

    return bare.visit_all(add, margins, checkpoint=checkpoint, quiet=quiet)


def _vote_margin(votes: Tensor, labels: Tensor, own: Tensor) -> Tensor:
    """Strongest other label's votes minus the own label's, from (rows, k) votes and their labels, without an n x C table."""
    same = labels[:, :, None] == labels[:, None, :]
    of_label = (votes[:, None, :] * same).sum(dim=2)
    mine = labels == own[:, None]
    other = of_label.masked_fill(mine, 0).amax(dim=1)
    return (other - (votes * mine).sum(dim=1)).double()


def ranks(scores: Vector) -> Vector:
    """Average ranks in [0, 1]; ties share theirs."""
    from scipy.stats import rankdata

    return np.asarray((rankdata(scores) - 1) / max(1, len(scores) - 1), dtype=np.float64)
