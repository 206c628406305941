"""The data relation map: a row's relations over the training process as one picture (section 5.3.6, Figure 5.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError
from ..settings import check_each, check_int, check_kind, check_text
from .graph import RelationGraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = NDArray[np.float64]


def relation_values(graphs: list[RelationGraph], row: int) -> NDArray[np.float32]:
    """`r_k(row, j)` for every checkpoint k and row j, at temperature 1 so that weak relations stay visible.

    Returns:
        (checkpoints, n) float32, 0 at j = row.

    Source: section 5.3.6. Differs: the map's temperature is not stated there.
    """
    return np.stack([graph.row(row, temperature=1.0) for graph in graphs])


def draw_relation_map(graphs: list[RelationGraph], row: int, *, title: str, max_points: int = 3000) -> Figure:
    """Scatter of mean and standard deviation over the checkpoints; colour: the relation at the last one.

    Args:
        graphs: one per checkpoint, in the order of training.
        row: number of the row.
        title: above the picture.
        max_points: other rows drawn at most.

    Returns:
        A matplotlib figure, not shown and not registered with pyplot.

    Raises:
        ValueError: max_points < 2, no graph, graphs of different rows, or a row that they do not have.
        TypeError: something else than a graph.
        MissingExtraError: matplotlib is not installed.

    Source: section 5.3.6, Figure 5.1.
    """
    max_points, title = check_int("max_points", max_points, 2), check_text("title", title)
    graphs = list(check_each("graphs", graphs, check_kind, RelationGraph))
    row = check_int("row", row, 0, len(graphs[0]) - 1)
    if len({len(graph) for graph in graphs}) > 1:
        raise ValueError(
            f"graphs have {[len(graph) for graph in graphs]} rows; give one graph per checkpoint of the same data"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "drawing a relation map") from error
    values = relation_values(graphs, row).astype(np.float64)
    mean, last = values.mean(axis=0), values[-1]
    if len(graphs) > 1:
        spread, name = values.std(axis=0), "standard deviation over checkpoints"
    else:
        spread, name = (
            graphs[0].features_only().row(row, temperature=1.0, signed=False),
            "feature similarity (one checkpoint)",
        )
    shown = _picked(mean, row, max_points)
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes: Any = figure.add_subplot()
    reach = max(float(np.abs(values).max()), 1e-3)
    points = axes.scatter(
        mean[shown], spread[shown], c=last[shown], cmap="coolwarm_r", vmin=-reach, vmax=reach, s=9, linewidths=0
    )
    axes.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlim(-1.05 * reach, 1.05 * reach)
    axes.set_xlabel("relation value" if len(graphs) == 1 else "mean relation value")
    axes.set_ylabel(name)
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.colorbar(points, label="relation at the last checkpoint" if len(graphs) > 1 else "relation")
    return figure


def _picked(mean: Values, row: int, max_points: int) -> NDArray[np.int64]:
    """Half of the points by strength, the other half evenly over the rest; weak ones first, so that strong ones show."""
    order = np.argsort(np.abs(mean), kind="stable")
    order = order[order != row]
    strong = order[-(max_points // 2) :]
    rest = order[: len(order) - len(strong)]
    step = max(1, -(-len(rest) // max(1, max_points - len(strong))))
    return np.concatenate([rest[::step], strong])
