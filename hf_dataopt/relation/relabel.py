"""Another label for some rows, the given ones beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import check_new_column


def relabelled(dataset: Any, column: str, rows: NDArray[np.int64], values: list[Any], given_column: str) -> Any:
    """A dataset whose `column` has new values in some rows, and `given_column` all the old ones.

    Args:
        dataset: a `datasets.Dataset`.
        column: the labels, of any kind.
        rows: (m,) row numbers.
        values: their new labels, as the column holds them.
        given_column: new column, put behind the others.

    Returns:
        A `datasets.Dataset` in the same format; only the label column is made anew.

    Raises:
        ValueError: no such column, or one of the new name already.
    """
    from datasets import Dataset, Features, concatenate_datasets

    if column not in dataset.column_names:
        raise ValueError(f"the dataset has columns {dataset.column_names}, not the labels {column!r}")
    check_new_column("given_column", given_column, dataset)
    labels = dataset.select_columns([column]).with_format(None)[column][:]
    for row, value in zip(rows.tolist(), values, strict=True):
        labels[row] = value
    new = Dataset.from_dict({column: labels}, features=Features({column: dataset.features[column]}))
    whole = concatenate_datasets([dataset.with_format(None).rename_column(column, given_column), new], axis=1)
    names = [name for name in dataset.column_names if name != column]
    place = dataset.column_names.index(column)
    whole = whole.select_columns([*names[:place], column, *names[place:], given_column])
    kind, options = dataset.format["type"], dataset.format["format_kwargs"]
    return whole if kind is None else whole.with_format(kind, **options)
