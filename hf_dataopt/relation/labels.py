"""A dataset's label column as integer codes; multi-label and regression columns are refused."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import Rows

logger = logging.getLogger(__name__)
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Labels:
    """Labels as codes.

    Args:
        codes: (n,) int64 in [0, classes), -1 where a row has no label.
        values: what each code stands for in the dataset: the class number of a `ClassLabel`, else the number or text.
        names: what each code is called.
    """

    codes: Index
    values: list[Any]
    names: list[str]

    def with_codes(self, codes: Index) -> Labels:
        """The same classes with other codes."""
        return replace(self, codes=codes)


def values_of(codes: Index, values: list[Any]) -> list[Any]:
    """What codes stand for in a dataset; for -1 None where classes are texts, else -1."""
    none = None if values and isinstance(values[0], str) else -1
    return [values[code] if code >= 0 else none for code in codes]


def read_labels(dataset: Any, column: str) -> Labels:
    """Codes of a label column. Rows with -1 or without a value are unlabelled.

    Args:
        dataset: a `datasets.Dataset`.
        column: `ClassLabel`, integers, booleans or texts, one a row.

    Raises:
        ValueError: no such column, labels below -1 or above the last class, several labels a row, real numbers, or fewer
            than two classes.

    Cost: the column is read once, n integers.
    """
    from datasets import ClassLabel

    if column not in dataset.column_names:
        raise ValueError(f"the dataset has columns {dataset.column_names}, not {column!r}; set label_column=")
    if not len(dataset):
        raise ValueError("the dataset is empty; there is nothing to relate")
    feature = dataset.features[column]
    raw, missing = _values(dataset, column)
    if raw.dtype.kind in "iu":
        missing |= raw == -1
        most = feature.num_classes if isinstance(feature, ClassLabel) else None
        wrong = ~missing & ((raw < 0) | (False if most is None else raw >= most))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"row {row} has label {raw[row]}, no class of {column!r} ({int(wrong.sum())} such rows): classes are "
                f"0{'' if most is None else f' to {most - 1}'} and up, -1 stands for unlabelled rows. "
                f"Where negative numbers are classes, dataset.cast_column({column!r}, Value('string'))"
            )
    codes = np.full(len(raw), -1)
    if isinstance(feature, ClassLabel):
        codes[~missing] = raw[~missing]
        found = Labels(codes, list(range(feature.num_classes)), list(feature.names))
    else:
        named = raw[~missing]
        values, codes[~missing] = np.unique(named.astype(str) if raw.dtype == object else named, return_inverse=True)
        plain = [value.item() for value in values]
        found = Labels(codes, plain, [str(value) for value in plain])
    if missing.any():
        logger.warning(
            "%d of %d rows of %r have no label (-1 or missing): they get an outlier score and no vote",
            missing.sum(),
            len(missing),
            column,
        )
    if len(np.unique(codes[~missing])) < 2:
        raise ValueError(
            f"all labelled rows of {column!r} have one label; label errors need at least two classes. "
            f"-1 stands for unlabelled rows: where it is a class, dataset.cast_column({column!r}, Value('string'))"
        )
    return found


def one_coding(dataset: Any, columns: list[str]) -> tuple[list[Labels], Any]:
    """Several columns of labels with one set of codes, and the kind of column that holds such labels.

    Args:
        dataset: a `datasets.Dataset`.
        columns: `ClassLabel` of the same classes, or integers, or texts; -1 or None where there is none.

    Raises:
        ValueError: a column that is not there or of another kind, other classes, or fewer than two.
    """
    from datasets import ClassLabel

    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"the dataset has columns {dataset.column_names}, not {column!r}")
    kinds = [dataset.features[column] for column in columns]
    raws = [_values(dataset, column) for column in columns]
    texts = [raw.dtype == object for raw, _ in raws]
    if any(isinstance(kind, ClassLabel) and kind != kinds[0] for kind in kinds) or len(set(texts)) > 1:
        raise ValueError(f"columns {columns} are of different kinds: {kinds}; cast them to one")
    raws = [(raw.astype(object), missing) if texts[0] else (raw, missing | (raw == -1)) for raw, missing in raws]
    there = [raw[~missing] for raw, missing in raws]
    found = np.unique(np.concatenate([one.astype(str) if texts[0] else one.astype(np.int64) for one in there]))
    values = list(range(kinds[0].num_classes)) if isinstance(kinds[0], ClassLabel) else [one.item() for one in found]
    if len(found) < 2 or (not texts[0] and (found[0] < 0 or found[-1] > values[-1])):
        raise ValueError(
            f"columns {columns} hold the classes {found[:9].tolist()}; at least two are needed, none below 0"
        )
    names = list(kinds[0].names) if isinstance(kinds[0], ClassLabel) else [str(one) for one in values]
    coded = []
    for raw, missing in raws:
        codes = np.full(len(raw), -1)
        own = raw[~missing]
        codes[~missing] = np.searchsorted(np.asarray(values), own.astype(str) if texts[0] else own.astype(np.int64))
        coded.append(Labels(codes, values, names))
    return coded, kinds[0]


def _values(dataset: Any, column: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The column as the dataset's rows have it, and which rows have no value."""
    import pyarrow as pa

    data = dataset.data.column(column)
    if pa.types.is_nested(data.type):
        raise ValueError(
            f"label column {column!r} holds several labels a row ({data.type}); fit compares one class a row. "
            "RelationCleaner.fit_multi_label takes several."
        )
    if pa.types.is_floating(data.type) or pa.types.is_decimal(data.type):
        raise ValueError(
            f"label column {column!r} holds real numbers ({data.type}), a regression target; the relation graph compares "
            "classes. Bin the target, or cast an integer-valued column with `cast_column`."
        )
    missing = data.is_null().to_numpy()
    if data.null_count and (pa.types.is_integer(data.type) or pa.types.is_boolean(data.type)):
        data = data.cast(pa.int64()).fill_null(-1)
    raw = data.to_numpy()
    if dataset._indices is not None:
        rows = dataset._indices.column(0).to_numpy()
        raw, missing = raw[rows], missing[rows]
    return raw, np.array(missing)


def prob_columns(labels: Labels, probs: Rows) -> tuple[Index | None, bool]:
    """Which column of `probs` belongs to each label code, and whether that was found by agreement.

    Args:
        labels: with integers that are columns, the numbers themselves are; texts and other numbers are matched one to one
            so that the rows of a label have the largest probabilities in its column.
        probs: (n, C).

    Returns:
        (classes,) columns, None where there are fewer columns than labels; True for matched ones.

    Cost: one pass over `probs` for texts.
    """
    if all(isinstance(value, int) and 0 <= value < probs.width for value in labels.values):
        return np.asarray(labels.values, np.int64), False
    if probs.width < len(labels.values):
        logger.warning(
            "probs have %d columns for %d labels: the model's classes are others, its opinion is left out",
            probs.width,
            len(labels.values),
        )
        return None, False
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((len(labels.values), probs.width))
    for start in range(0, len(probs), 8192):
        rows = np.arange(start, min(start + 8192, len(probs)))
        rows = rows[labels.codes[rows] >= 0]
        part = np.empty((len(rows), probs.width), np.float32)
        probs.take(rows, part)
        np.add.at(table, labels.codes[rows], part)
    counts = np.bincount(labels.codes[labels.codes >= 0], minlength=len(table))
    columns = linear_sum_assignment(-table / np.maximum(counts, 1)[:, None])[1].astype(np.int64)
    logger.info(
        "labels were matched to the columns of probs: %s", dict(zip(labels.names, columns.tolist(), strict=True))
    )
    return columns, True
