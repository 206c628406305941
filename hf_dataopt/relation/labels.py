"""A dataset's label column as integer codes; multi-label and regression columns are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Labels:
    """Labels as codes.

    Args:
        codes: (n,) int64 in [0, classes).
        values: what each code stands for in the dataset: the class number of a `ClassLabel`, else the number or text.
        names: what each code is called.
    """

    codes: NDArray[np.int64]
    values: list[Any]
    names: list[str]


def read_labels(dataset: Any, column: str) -> Labels:
    """Codes of a label column.

    Args:
        dataset: a `datasets.Dataset`.
        column: `ClassLabel`, integers, booleans or texts, one a row.

    Raises:
        ValueError: no such column, missing or negative labels (-1 is unlabelled), several labels a row, real numbers, or
            one class only.

    Cost: the column is read once, n integers.
    """
    import pyarrow as pa
    from datasets import ClassLabel

    if column not in dataset.column_names:
        raise ValueError(f"the dataset has columns {dataset.column_names}, not {column!r}; set label_column=")
    if not len(dataset):
        raise ValueError("the dataset is empty; there is nothing to relate")
    data = dataset.data.column(column)
    if pa.types.is_nested(data.type):
        raise ValueError(
            f"label column {column!r} holds several labels a row ({data.type}); the relation graph compares one class a "
            "row. Split a multi-label set into one binary column per label."
        )
    if pa.types.is_floating(data.type) or pa.types.is_decimal(data.type):
        raise ValueError(
            f"label column {column!r} holds real numbers ({data.type}), a regression target; the relation graph compares "
            "classes. Bin the target, or cast an integer-valued column with `cast_column`."
        )
    if data.null_count and dataset._indices is not None:  # perhaps the missing ones were filtered out
        return read_labels(dataset.select_columns([column]).flatten_indices(), column)
    if data.null_count:
        raise ValueError(f"label column {column!r} misses {data.null_count} labels; filter those rows out first")
    raw = data.to_numpy()
    if dataset._indices is not None:
        raw = raw[dataset._indices.column(0).to_numpy()]
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        codes = raw.astype(np.int64)
        wrong = (codes < 0) | (codes >= feature.num_classes)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"row {row} has label {codes[row]}, outside the {feature.num_classes} classes of {column!r} "
                f"({int(wrong.sum())} such rows); filter unlabelled rows (-1) out first"
            )
        found = Labels(codes, list(range(feature.num_classes)), list(feature.names))
    else:
        if raw.dtype.kind == "i" and (raw < 0).any():
            row = int(np.flatnonzero(raw < 0)[0])
            raise ValueError(
                f"row {row} has label {raw[row]} ({int((raw < 0).sum())} such rows); -1 stands for unlabelled rows: filter "
                f"them out first. Where negative numbers are classes, dataset.cast_column({column!r}, Value('string'))"
            )
        values, inverse = np.unique(raw.astype(str) if raw.dtype == object else raw, return_inverse=True)
        plain = [value.item() for value in values]
        found = Labels(inverse.astype(np.int64), plain, [str(value) for value in plain])
    if len(np.unique(found.codes)) < 2:
        raise ValueError(f"all rows of {column!r} have one label; label errors need at least two classes")
    return found
