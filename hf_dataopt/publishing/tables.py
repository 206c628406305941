"""Parquet files that somebody else wrote: what they would unpack to is counted before it is unpacked.

A file states its rows, the values of each column and their bytes before compression. What a dictionary page holds once may be
referred to any number of times: such columns are looked at as indices into their dictionary, and counted, before they are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyarrow.lib import ArrowException

# a table may be this many times as large as its file, and always this large
MAX_RATIO, LEAST = 100, 256 * 2**20
UNREADABLE = (
    ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
    NotImplementedError, AssertionError, MemoryError,
)  # fmt: skip
_ROWS = 256  # read at a time
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}


def allowed(path: Path) -> int:
    """Bytes that the table in a file may take."""
    return max(LEAST, MAX_RATIO * path.stat().st_size)


def opened(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile` whose footer claims nothing absurd.

    Raises:
        UNREADABLE: no parquet file, or too many rows, values or bytes for its size.
    """
    import pyarrow.parquet

    # pages that carry a checksum, as ours do, are compared with it when they are read
    file, limit = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True), allowed(path)
    whole, values = 0, file.metadata.num_rows
    for column in _columns(file):
        whole += column.total_uncompressed_size
        values += column.num_values * _WIDTHS.get(column.physical_type, 4)
    if max(whole, values) > limit:
        raise ValueError(f"it unpacks to more than {limit:,} bytes")
    return file


def read(path: Path, file: Any) -> Any:
    """The Arrow table of an `opened` file.

    Raises:
        UNREADABLE: broken pages, or more bytes than are `allowed`.
    """
    import pyarrow

    limit, held, parts = allowed(path), 0, []
    _check_repeated(path, file, limit)
    for batch in file.iter_batches(batch_size=_ROWS):
        held += batch.nbytes
        if held > limit:
            raise ValueError(f"it unpacks to more than {limit:,} bytes")
        parts.append(batch)
    return pyarrow.Table.from_batches(parts, schema=file.schema_arrow)


def _check_repeated(path: Path, file: Any, limit: int) -> None:
    """Count what texts and pictures take that are kept once and referred to many times."""
    import pyarrow.parquet

    # no value is larger than all pages of its column
    doubtful = {
        column.path_in_schema
        for column in _columns(file)
        if column.physical_type == "BYTE_ARRAY" and column.num_values * column.total_uncompressed_size > limit
    }
    if not doubtful:
        return
    seen, held = pyarrow.parquet.ParquetFile(path, read_dictionary=sorted(doubtful)), 0
    for batch in seen.iter_batches(batch_size=_ROWS):
        held += sum(_bytes(column) for column in batch.columns)
        if held > limit:
            raise ValueError(f"it unpacks to more than {limit:,} bytes")


def _bytes(array: Any) -> int:
    """Bytes of an array when every reference into a dictionary is replaced by what it stands for."""
    import pyarrow
    import pyarrow.compute as pc

    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _bytes(array.storage)
    if pyarrow.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pyarrow.types.is_struct(kind):
        return sum(_bytes(one) for one in array.flatten())
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _bytes(array.flatten())
    return int(array.nbytes)


def _columns(file: Any) -> Any:
    about = file.metadata
    for group in range(about.num_row_groups):
        for index in range(about.num_columns):
            yield about.row_group(group).column(index)
