"""A dataset's column of several labels a row as a table of decisions: each label given, not given, or not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int8]


@dataclass(frozen=True)
class LabelSets:
    """Decisions of every row.

    Args:
        given: (n, L) int8, 1 where a row has the label, 0 where it has not, -1 where nobody said.
        values: what each label is in the column, in the order of the columns of probabilities.
        names: what each label is called.
        hot: a row is L numbers, 0 or 1; else a list of its labels.
    """

    given: Table
    values: list[Any]
    names: list[str]
    hot: bool

    def holds(self, row: int, value: Any) -> bool:
        """Whether a cell of the column says what row `row` was fitted with."""
        if value is None or not self.hot:
            given = np.full(len(self.values), -1 if value is None else 0)
            given[[k for k, one in enumerate(self.values) if value is not None and one in value]] = 1
        else:
            given = np.array([-1 if one is None else int(one) for one in value])
        return bool(np.array_equal(given, self.given[row]))

    def written(self, row: int, given: Table) -> list[Any]:
        """Other decisions of a row as its column holds them; labels that stay keep their order."""
        if self.hot:
            return [None if one < 0 else int(one) for one in given]
        was = [label for label in np.flatnonzero(self.given[row] > 0) if given[label] > 0]
        new = [label for label in np.flatnonzero(given > 0) if self.given[row, label] <= 0]
        return [self.values[label] for label in (*was, *new)]


def read_label_sets(dataset: Any, column: str, width: int | None, names: Sequence[str] | None) -> LabelSets:
    """The decisions of a column.

    Args:
        dataset: a `datasets.Dataset`.
        column: lists. Labels: class numbers (of a `ClassLabel` or not) or texts, each at most once a row; a row without a
            list is not labelled. Or L numbers a row, 1 where it has the label, 0 where not, -1 or None where nobody said.
        width: how many labels there are: columns of probabilities; None: as many as the column shows.
        names: what they are called; texts need it where `width` is given, in that order.

    Raises:
        ValueError: no such column, no lists, a label that is none or stands twice in a row, or fewer rows than one.

    Cost: the column is read once.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column not in dataset.column_names:
        raise ValueError(f"the dataset has columns {dataset.column_names}, not {column!r}; set label_column=")
    table = dataset.select_columns([column]).with_format("arrow")[:]
    data = table.column(column).combine_chunks()
    data = data.combine_chunks() if isinstance(data, pa.ChunkedArray) else data
    if not (pa.types.is_list(data.type) or pa.types.is_large_list(data.type) or pa.types.is_fixed_size_list(data.type)):
        raise ValueError(f"label column {column!r} holds one value a row ({data.type}); use fit for one label a row")
    lengths = pc.list_value_length(data).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = pc.list_flatten(data)
    rows = np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0))
    if pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type):
        return _named(flat.to_pylist(), rows, lengths, column, width, names)
    if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)):
        raise ValueError(f"label column {column!r} holds lists of {flat.type}; give class numbers, texts, or 0 and 1")
    numbers = pc.fill_null(pc.cast(flat, pa.float64()), -1.0).to_numpy(zero_copy_only=False)
    whole = pa.types.is_integer(flat.type)
    if _is_hot(numbers, rows, lengths, width, whole):
        return _hot(numbers, lengths, column, width, names)
    classes = getattr(getattr(dataset.features[column], "feature", None), "names", None)
    if not whole:
        row = int(rows[np.flatnonzero(~np.isin(numbers, (-1, 0, 1)))[0]]) if len(numbers) else 0
        raise ValueError(
            f"row {row} of {column!r} is not {'a list of' if width is None else width} numbers 0 or 1; 1 stands for a label "
            "that the row has"
        )
    count = width or (len(classes) if classes else int(numbers.max(initial=0)) + 1)
    names = names or (classes if classes and len(classes) == count else None)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= count))
    if len(wrong):
        raise ValueError(
            f"row {int(rows[wrong[0]])} has label {int(numbers[wrong[0]])}, there are {count} labels, 0 to {count - 1}"
        )
    values = list(range(count))
    return LabelSets(_filled(rows, numbers.astype(np.int64), lengths, count), values, _names(names, count), False)


def _is_hot(numbers: NDArray[Any], rows: NDArray[Any], lengths: NDArray[Any], width: int | None, whole: bool) -> bool:
    """L numbers a row: of lists that are all as long as there are labels, and hold no class numbers beyond 1."""
    known = np.unique(lengths[lengths >= 0])
    if len(known) != 1 or known[0] < 2 or (width is not None and known[0] != width):
        return False
    return bool(np.isin(numbers, (-1, 0, 1)).all()) and (not whole or width is not None or known[0] > 2)


def _hot(
    numbers: NDArray[Any], lengths: NDArray[Any], column: str, width: int | None, names: Sequence[str] | None
) -> LabelSets:
    count = int(lengths.max())
    given = np.full((len(lengths), count), -1, np.int8)
    given[lengths >= 0] = numbers.reshape(-1, count)
    return LabelSets(given, list(range(count)), _names(names, count), True)


def _named(
    texts: list[str | None],
    rows: NDArray[Any],
    lengths: NDArray[Any],
    column: str,
    width: int | None,
    names: Sequence[str] | None,
) -> LabelSets:
    if names is None and width is not None:
        raise ValueError(
            f"labels of {column!r} are texts; give label_names in the order of the columns of probabilities "
            "(model.config.id2label), or probs_column=None"
        )
    found = list(names) if names is not None else sorted({one for one in texts if one is not None})
    if width is not None and len(found) != width:
        raise ValueError(f"label_names has {len(found)} names, the probabilities {width} columns")
    place = {name: k for k, name in enumerate(found)}
    for row, text in zip(rows.tolist(), texts, strict=True):
        if text not in place:
            raise ValueError(f"row {row} has label {text!r}, none of label_names {found[:9]}")
    codes = np.array([place[str(text)] for text in texts], np.int64)
    return LabelSets(_filled(rows, codes, lengths, len(found)), found, list(found), False)


def _filled(rows: NDArray[Any], codes: NDArray[np.int64], lengths: NDArray[Any], count: int) -> Table:
    given = np.where(lengths < 0, -1, 0).astype(np.int8)[:, None].repeat(count, axis=1)
    given[rows, codes] = 1
    twice = np.flatnonzero((given == 1).sum(axis=1) < lengths)
    if len(twice):
        raise ValueError(f"row {int(twice[0])} has a label twice ({len(twice)} such rows)")
    return given


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [str(k) for k in range(count)]
    if len(names) != count:
        raise ValueError(f"label_names has {len(names)} names for {count} labels")
    return list(names)
