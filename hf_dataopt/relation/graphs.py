"""One relation graph per checkpoint, over the columns of a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import RelationConfig
from .graph import RelationGraph
from .rows import rows_of_column


def graphs_of(
    dataset: Any, columns: list[tuple[str, str]], labels: NDArray[np.int64], config: RelationConfig
) -> list[RelationGraph]:
    """One graph per checkpoint over a dataset's columns, read where they lie."""
    return [
        RelationGraph(
            rows_of_column(dataset, features),
            rows_of_column(dataset, probs) if config.compatibility else None,
            labels,
            config,
        )
        for features, probs in columns
    ]
