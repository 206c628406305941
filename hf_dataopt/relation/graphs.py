"""One relation graph per checkpoint, over the columns of a dataset, and the parts that its rows are split into."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..seeding import generator
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


def partitions(count: int, config: RelationConfig) -> list[NDArray[np.int64]]:
    """Random parts of nearly equal size, at most `partition_size` rows each (section 5.3.2, complexity analysis)."""
    size = config.partition_size
    if size is None or size >= count:
        return [np.arange(count)]
    order = torch.randperm(count, generator=generator(config.seed, epoch=1)).numpy()
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, -(-count // size))]
