"""Rows of a feature column, read a tile at a time: tensors, numpy arrays, or memory-mapped Arrow that is never copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..settings import check_text


class Rows:
    """A matrix whose rows are gathered by index, from one or many zero-copy chunks.

    Args:
        chunks: (n_k, d) arrays, one after the other.
        index: (n,) which row of the chunks is row i (a shuffled or selected dataset); None: as they come.

    Raises:
        ValueError: no rows, or chunks of different width.
    """

    def __init__(self, chunks: Sequence[NDArray[Any]], index: NDArray[np.int64] | None = None) -> None:
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        widths = {chunk.shape[1] for chunk in self.chunks}
        if len(widths) != 1:
            raise ValueError(f"rows must be non-empty and of one width, got widths {sorted(widths)}")
        self.width = widths.pop()
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])
        self.index = index

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.index is None else len(self.index)

    def select(self, rows: NDArray[np.int64]) -> Rows:
        """The same chunks seen through a subset of row numbers."""
        return Rows(self.chunks, rows if self.index is None else self.index[rows])

    def take(self, rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Copy `rows` into `out`, (len(rows), width) float32."""
        if self.index is not None:
            rows = self.index[rows]
        if len(self.chunks) == 1:
            _gather(self.chunks[0], rows, out)
            return
        which = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(which, kind="stable")
        found, first = np.unique(which[order], return_index=True)
        for k, here in zip(found, np.split(order, first[1:]), strict=True):
            out[here] = self.chunks[k].take(rows[here] - self.starts[k], axis=0)


def _gather(chunk: NDArray[Any], rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    if chunk.dtype == np.float32:
        np.take(chunk, rows, axis=0, out=out, mode="clip")
    else:
        out[...] = chunk[rows]


def rows_of(values: Any, name: str) -> Rows:
    """`Rows` over a tensor, an array, or a nested list.

    Raises:
        ValueError: not a matrix of numbers.
    """
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be a matrix of numbers (n, d), got shape {array.shape}, dtype {array.dtype}")
    return Rows([array])


def rows_of_column(dataset: Any, column: str) -> Rows:
    """`Rows` over a column of a `datasets.Dataset`, zero-copy and without flattening an index selection.

    Args:
        dataset: a `datasets.Dataset`.
        column: lists of numbers, all of one length (`List`, with or without `length`, `Array2D`).

    Raises:
        ValueError: no such column, rows of different length, missing values, or no numbers.

    Cost: no copy; memory-mapped pages are read when a tile asks for them.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"the dataset has columns {dataset.column_names}, not {column!r}; "
            "map a FeatureExtractor over it first, or name the column that holds the values"
        )
    try:
        chunks = _chunks(dataset, column)
    except ValueError:
        if dataset._indices is None:
            raise
        # perhaps the rows at fault were filtered out: look at what is left only (writes a cache file)
        dataset = dataset.select_columns([column]).flatten_indices()
        chunks = _chunks(dataset, column)
    index = None
    if dataset._indices is not None:
        index = dataset._indices.column(0).to_numpy().astype(np.int64)
    return Rows(chunks, index)


def check_new_column(argument: str, name: Any, dataset: Any) -> None:
    """A name for one more column of a `datasets.Dataset`.

    Raises:
        ValueError: no name that Arrow can hold, or one that is taken.
        TypeError: no text.
    """
    check_text(argument, name, empty=False)
    if "\0" in name:
        raise ValueError(f"{argument} {name!r} holds a zero byte; give a plain name")
    if name in dataset.column_names:
        raise ValueError(f"the dataset has a column {name!r} already; remove it, or name another {argument}")


def _chunks(dataset: Any, column: str) -> list[NDArray[Any]]:
    """The column's Arrow chunks as matrices, zero-copy."""
    import pyarrow as pa

    chunks = []
    for chunk in dataset.data.column(column).chunks:
        if isinstance(chunk, pa.ExtensionArray):
            chunk = chunk.storage
        count = len(chunk)
        if not count:
            continue
        if chunk.null_count:
            raise ValueError(f"column {column!r} has {chunk.null_count} missing rows; filter them out first")
        flat = chunk
        while pa.types.is_nested(flat.type) and not pa.types.is_struct(flat.type):
            lengths = _lengths(flat)
            if lengths is not None and len(lengths) and lengths.min() != lengths.max():
                raise ValueError(
                    f"column {column!r} has rows of {lengths.min()} to {lengths.max()} values; all must have one length"
                )
            flat = flat.flatten()
        if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)) or flat.null_count:
            raise ValueError(f"column {column!r} holds {chunk.type} with missing values or no numbers; need floats")
        chunks.append(flat.to_numpy(zero_copy_only=False).reshape(count, -1))
    return chunks


def _lengths(array: Any) -> NDArray[np.int64] | None:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(array.type):
        return None
    return np.diff(array.offsets.to_numpy())
