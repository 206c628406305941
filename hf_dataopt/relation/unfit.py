"""Rows that cannot be related: which they are and why, so that they can be left out and counted instead of ending a fit."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import RelationConfig

logger = logging.getLogger(__name__)
_BLOCK = 1000


def unfit_rows(
    dataset: Any, label_column: str, columns: list[tuple[str, str]], config: RelationConfig
) -> dict[int, str]:
    """What is wrong with each row that a fit would refuse.

    Args:
        dataset: a `datasets.Dataset` that has the columns.
        label_column: numbers that are no classes; -1 and missing labels are unlabelled rows, which are fit.
        columns: (features, probs) of each checkpoint: missing, of another length than most, NaN or infinite, all zero, no
            probabilities.
        config: whether probabilities are used.

    Returns:
        Reason by row number, ascending. A column that holds no numbers at all is nobody's fault: no rows are named.

    Cost: one pass over the columns, in blocks.
    """
    found = _unfit_labels(dataset, label_column)
    for features, probs in columns:
        for column, is_probs in [(features, False), *([(probs, True)] if config.compatibility else [])]:
            for row, why in _unfit_values(dataset, column, is_probs).items():
                found.setdefault(row, why)
    return dict(sorted(found.items()))


def summary_of(skipped: dict[int, str]) -> dict[str, Any]:
    """The rows left out and how many of each kind, for a report's summary."""
    return {"rows": list(skipped), "reasons": dict(Counter(skipped.values()))}


def _unfit_labels(dataset: Any, column: str) -> dict[int, str]:
    names = getattr(dataset.features[column], "names", None)
    found = {}
    for row, value in enumerate(dataset.select_columns([column]).with_format(None)[column][:]):
        if isinstance(value, int) and not isinstance(value, bool) and not -1 <= value < (len(names or ()) or value + 1):
            found[row] = f"has label {value}, which is no class"
    return found


def _unfit_values(dataset: Any, column: str, is_probs: bool) -> dict[int, str]:
    """Faults of one matrix column; the width that most rows have is the right one."""
    found: dict[int, str] = {}
    widths = np.zeros(len(dataset), np.int64)
    source = dataset.select_columns([column]).with_format("arrow")
    for start in range(0, len(dataset), _BLOCK):
        array = source[start : start + _BLOCK].column(column).combine_chunks()
        block = _matrix(array)
        if block is not None:
            widths[start : start + len(block)] = block.shape[1]
            found |= {start + offset: why for offset, why in _faults(block, is_probs).items()}
            continue
        for offset, one in enumerate(map(_vector, array.to_pylist())):
            if one is None:
                found[start + offset] = f"has missing values in {column!r}"
                continue
            widths[start + offset] = len(one)
            for why in _faults(one[None], is_probs).values():
                found[start + offset] = why
    usual = np.bincount(widths[widths > 0]).argmax() if (widths > 0).any() else 0
    for row in np.flatnonzero(widths != usual):
        found.setdefault(int(row), f"has another number of values in {column!r} than most rows")
    return {} if len(found) == len(dataset) else found


def _matrix(array: Any) -> NDArray[Any] | None:
    """A block of lists as a matrix, where nothing is missing and all have one length."""
    import pyarrow as pa

    flat, count = getattr(array, "storage", array), len(array)
    while pa.types.is_nested(flat.type) and not pa.types.is_struct(flat.type):
        if flat.null_count:
            return None
        if not pa.types.is_fixed_size_list(flat.type) and len(np.unique(np.diff(flat.offsets.to_numpy()))) > 1:
            return None
        flat = flat.flatten()
    if flat.null_count or not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)) or not count:
        return None
    values: NDArray[Any] = flat.to_numpy(zero_copy_only=False).reshape(count, -1)
    return values


def _vector(value: Any) -> NDArray[np.float32] | None:
    try:
        row = np.asarray(value, np.float32).reshape(-1)
    except (TypeError, ValueError):
        return None
    return row if len(row) else None


def _faults(block: NDArray[Any], is_probs: bool) -> dict[int, str]:
    """Offsets of the rows that the graph refuses, by the graph's own rules."""
    values = block.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        if is_probs:
            wrong = [(~(np.abs(values.sum(axis=1) - 1) < 0.02) | (values.min(axis=1) < 0), "has no probabilities")]
        else:
            norms = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float32))
            wrong = [
                (~np.isfinite(norms), "has NaN or infinite features"),
                (norms == 0, "has features that are all zero"),
            ]
    return {int(offset): why for mask, why in wrong for offset in np.flatnonzero(mask)}
