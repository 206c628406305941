"""Outlier and out-of-distribution scores from the same kernel (section 5.3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import PassCheckpoint
from ..seeding import generator
from ..settings import check_array, check_flag, check_kind, check_number, optional
from .config import RelationConfig
from .graph import RelationGraph
from .rows import Rows, rows_of, rows_of_column


def reference_rows(count: int, config: RelationConfig) -> NDArray[np.int64]:
    """The uniform random subset S, sorted; all rows where `outlier_reference` is None or not smaller than `count`."""
    import torch

    if config.outlier_reference is None or config.outlier_reference >= count:
        return np.arange(count)
    drawn = torch.randperm(count, generator=generator(config.seed))[: config.outlier_reference]
    return np.sort(drawn.numpy()).astype(np.int64)


def outlier_scores(
    graph: RelationGraph,
    reference: NDArray[np.int64],
    queries: RelationGraph | None = None,
    *,
    checkpoint: PassCheckpoint | None = None,
    quiet: bool = False,
    alone: bool = False,
) -> NDArray[np.float64]:
    """`1 / (sum_{j in S} k(x, x_j) + epsilon)`: higher = fewer similar rows.

    Args:
        graph: the fitted rows.
        reference: (m,) rows of the graph that form S.
        queries: new rows (any labels are ignored); default: the graph's own rows, each without itself.
        checkpoint: where finished stripes are kept.
        quiet: no progress bar.
        alone: this process does all of it; the others need not call.

    Returns:
        (n,) float64, at most 1 / epsilon; infinite where epsilon is 0 and nothing is similar.

    Raises:
        ValueError: rows that the graph does not have, or queries of other columns.
        TypeError: no graph, no row numbers.

    Source: section 5.3.3.
    Differs: the reference code's epsilon and edge cut-off are settings; a row that is in S does not count itself unless
        `config.diagonal` is set.
    Cost: 2 n m (d + C) operations.
    """
    check_kind("graph", graph, RelationGraph)
    reference = check_array("reference", reference, 1, kinds="iu")
    if not 0 <= reference.min() <= reference.max() < len(graph):
        raise ValueError(
            f"reference must hold rows of the graph, 0 to {len(graph) - 1}, got {reference.min()} to {reference.max()}"
        )
    optional(check_kind, "queries", queries, RelationGraph)
    optional(check_kind, "checkpoint", checkpoint, PassCheckpoint)
    quiet, alone = check_flag("quiet", quiet), check_flag("alone", alone)
    if queries is not None and _widths(queries) != _widths(graph):
        raise ValueError(
            f"queries have rows of {_widths(queries)} features and probabilities, the graph {_widths(graph)}"
        )
    config = graph.config
    sums = graph.sums_against(
        reference,
        temperature=config.outlier_temperature,
        signed=False,
        queries=queries,
        checkpoint=checkpoint,
        quiet=quiet,
        alone=alone,
    )
    return scores_of(sums, config)


def scores_of(sums: NDArray[np.float64], config: RelationConfig) -> NDArray[np.float64]:
    """Outlier scores of rows whose kernel over S sums to `sums`."""
    with np.errstate(divide="ignore"):
        return np.asarray(1.0 / (sums + config.outlier_epsilon), dtype=np.float64)


def _widths(graph: RelationGraph) -> tuple[int, int]:
    return graph.features.width, 0 if graph.probs is None else graph.probs.width


def is_outlier(scores: NDArray[Any], share: float = 0.01) -> tuple[NDArray[np.bool_], float]:
    """The `share` of the rows with the highest scores (fewer where the last ones tie), and the level they exceed.

    Raises:
        ValueError: share outside [0, 1).
    """
    share = check_number("share", share, 0, 1, below=True, todo="it is the part of the rows to call outliers")
    scores = check_array("scores", scores, 1, finite=False)
    if np.isnan(scores).any():
        raise ValueError("scores must have no NaN; drop those rows")
    level = float(np.sort(scores)[-1 - int(share * len(scores) + 1e-9)])
    return scores > level, level


@dataclass(frozen=True)
class Reference:
    """The reference set S of section 5.3.3, copied out of the graph, so that new rows can be scored anywhere.

    Args:
        features: (m, d) float32, as they were given.
        probs: (m, C) float32, or None without compatibility.
        features_column, probs_column: where new data hold the same.
    """

    features: NDArray[np.float32]
    probs: NDArray[np.float32] | None
    features_column: str
    probs_column: str

    @classmethod
    def of(cls, graph: RelationGraph, rows: NDArray[np.int64], features_column: str, probs_column: str) -> Reference:
        """The given rows of a graph; 4 m (d + C) bytes."""
        parts = []
        for source in (graph.features, graph.probs):
            part = None if source is None else np.empty((len(rows), source.width), np.float32)
            if source is not None and part is not None:
                source.take(rows, part)
            parts.append(part)
        features, probs = parts
        return cls(np.empty((0, 0), np.float32) if features is None else features, probs, features_column, probs_column)

    def scores(self, data: Any, config: RelationConfig, *, quiet: bool = False) -> NDArray[np.float64]:
        """Outlier scores of a `Dataset`'s rows, or of a mapping with (n, d) and (n, C) columns."""
        width = self.features.shape[1]
        features = self._rows(data, self.features_column, width)
        probs = None if self.probs is None else self._rows(data, self.probs_column, self.probs.shape[1])
        mine = RelationGraph(rows_of(self.features, "features"), _rows_or_none(self.probs), None, config)
        asked = RelationGraph(features, probs, None, config)
        return outlier_scores(mine, np.arange(len(mine)), asked, quiet=quiet, alone=True)

    @staticmethod
    def _rows(data: Any, column: str, width: int) -> Rows:
        if hasattr(data, "column_names"):
            rows = rows_of_column(data, column)
        elif column in data:
            rows = rows_of(data[column], column)
        else:
            raise ValueError(f"the data have columns {sorted(data)}, not {column!r}, which the report was fitted with")
        if rows.width != width:
            raise ValueError(
                f"column {column!r} has rows of {rows.width} numbers, {width} were fitted; same model needed"
            )
        return rows

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """What is saved."""
        return {"features": self.features} | ({} if self.probs is None else {"probs": self.probs})

    @classmethod
    def from_arrays(
        cls, arrays: dict[str, NDArray[Any]], number: int, features_column: str, probs_column: str
    ) -> Reference:
        """The `number`-th reference set of a saved report."""
        features, probs = (arrays.get(f"reference.{number}.{name}") for name in ("features", "probs"))
        if features is None:
            raise KeyError(f"reference.{number}.features")
        return cls(features, probs, features_column, probs_column)


def _rows_or_none(values: NDArray[np.float32] | None) -> Rows | None:
    return None if values is None else rows_of(values, "probs")
