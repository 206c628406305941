"""Cleaning of a stream: partition after partition (section 5.3.2), each judged as `RelationCleaner.fit` judges a dataset.

A partition is what is held: its rows go on with their scores, or are dropped, before the next ones are read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..decoding import OnError, check_on_error
from ..settings import brief, check_choice, check_config, check_each, check_text
from ..thumbnails import COLUMN
from .cleaner import RelationCleaner
from .config import RelationConfig
from .labels import read_labels, values_of
from .report import RelationReport

logger = logging.getLogger(__name__)
PARTITION = 5000  # rows, where the settings say nothing
_KINDS = ("label errors", "outliers", "near duplicates")
_SCORES = {"label_noise_score": "float64", "is_label_error": "bool", "outlier_score": "float64", "is_outlier": "bool"}
_SUGGESTED = "suggested_label"


def clean_stream(
    stream: Any,
    label_column: str = "label",
    *,
    features_column: str = "features",
    probs_column: str = "probs",
    drop: Sequence[str] = (),
    on_error: OnError = "raise",
    config: RelationConfig | None = None,
) -> Any:
    """A stream with the cleaner's columns, or without flagged rows, in the memory of one partition.

    Args:
        stream: a `datasets.IterableDataset` with features and probabilities, as `map(FeatureExtractor(...), batched=True)` adds
            them. In random order: a partition of sorted rows would hold few classes; `stream.shuffle(buffer_size=...)`.
        label_column: as for `RelationCleaner.fit`; texts and bare numbers are told anew in each partition.
        features_column, probs_column: names.
        drop: what is left out of "label errors", "outliers" and "near duplicates" (within a partition); default nothing.
        on_error: "skip" leaves rows that cannot be related out, "raise" ends at the first one and says where it is.
        config: settings; `partition_size` rows are held at a time, 5,000 where it is None.

    Returns:
        An `IterableDataset` of plain rows (call `with_format` on it) with `label_noise_score`, `is_label_error`,
        `suggested_label`, `outlier_score` and `is_outlier`; columns that are encoded, such as pictures, are not decoded on the
        way. Shards and workers keep to themselves. A last partition of less than half the size is judged together with the
        first rows of the stream.

    Raises:
        ValueError: an empty stream, missing columns, columns of those names already, fewer than two classes, or another `drop`.
        TypeError: no `IterableDataset`.

    Source: section 5.3.2, partitions.
    Differs: how many rows are flagged is estimated in each partition.
    Cost: that of `fit` for each partition; the first `partition_size` rows are read once before, and their features,
        probabilities and labels kept.

    Example:
        >>> stream = load_dataset("me/photos", split="train", streaming=True).shuffle(buffer_size=10_000)  # doctest: +SKIP
        >>> rows = clean_stream(stream.map(FeatureExtractor(model), batched=True), drop=["label errors"])  # doctest: +SKIP
    """
    import datasets

    if not isinstance(stream, datasets.IterableDataset):
        raise TypeError(
            f"stream must be a datasets.IterableDataset, got {brief(stream)}; for a Dataset use RelationCleaner.fit"
        )
    for name, column in (
        ("label_column", label_column),
        ("features_column", features_column),
        ("probs_column", probs_column),
    ):
        check_text(name, column, empty=False)
    chosen = check_each("drop", drop, check_choice, _KINDS, least=0)
    check_on_error(on_error)
    config = check_config(config, RelationConfig)
    size = config.partition_size or PARTITION
    tables = stream.with_format("arrow")
    table = next(iter(tables.iter(batch_size=size)), None)
    if table is None or not len(table):
        raise ValueError("the stream is empty; there is nothing to relate")
    needed = [label_column, features_column, *([probs_column] if config.compatibility else [])]
    missing, taken = set(needed) - set(table.column_names), {*_SCORES, _SUGGESTED} & set(table.column_names)
    if missing or taken:
        raise ValueError(
            f"the stream has columns {table.column_names}: "
            + (f"not {sorted(missing)}" if missing else f"{sorted(taken)} are there already; remove them")
        )
    needed += [COLUMN] if COLUMN in table.column_names else []
    kinds = stream.features or datasets.Features.from_arrow_schema(table.schema)
    first = _dataset(table.select(needed), {name: kinds[name] for name in needed})
    try:
        read_labels(first, label_column)
    except ValueError as error:
        raise _of_rows(0, len(first) - 1, error) from error
    fitted = replace(config, partition_size=None)
    columns = (label_column, features_column, probs_column)
    clean = _Partition(fitted, columns, tuple(chosen), on_error, first, -(-size // 2))
    more = {**{name: datasets.Value(kind) for name, kind in _SCORES.items()}, _SUGGESTED: kinds[label_column]}
    found = datasets.Features({**kinds, **more}) if stream.features else None
    return tables.map(clean, batched=True, batch_size=size, with_indices=True, features=found).with_format(None)


@dataclass(frozen=True)
class _Partition:
    """One partition in, the same rows with columns, or some of them, out: what `IterableDataset.map` calls.

    Args:
        config: settings of its fit.
        columns: labels, features, probabilities.
        drop: kinds of rows that are left out.
        on_error: what rows that cannot be related do.
        first: columns that a fit reads of the stream's first rows.
        least: rows below which these are put beside the partition's own.
    """

    config: RelationConfig
    columns: tuple[str, str, str]
    drop: tuple[str, ...]
    on_error: OnError
    first: Any
    least: int

    def __call__(self, table: Any, indices: Sequence[int]) -> Any:
        """An Arrow table of rows, and their numbers in the stream."""
        from datasets import concatenate_datasets

        count = len(table)
        rows = _dataset(table.select(self.first.column_names), self.first.features)
        if count < self.least:
            rows = concatenate_datasets([rows, self.first])
        label, features, probs = self.columns
        try:
            report = RelationCleaner(self.config).fit(
                rows, label, features_column=features, probs_column=probs, on_error=self.on_error, quiet=True
            )
        except ValueError as error:
            raise _of_rows(indices[0], indices[-1], error) from error
        return self._written(table, report, count)

    def _written(self, table: Any, report: RelationReport, count: int) -> Any:
        """The table's own rows that stay, with the report's columns."""
        import pyarrow as pa

        gone = report.dropped(
            label_errors="label errors" in self.drop,
            outliers="outliers" in self.drop,
            near_duplicates="near duplicates" in self.drop,
        )
        kept: NDArray[np.int64] = np.setdiff1d(np.flatnonzero(report.rows < count), list(gone))
        skipped = count - int((report.rows < count).sum())
        if skipped:
            logger.warning("%d rows of a partition cannot be related and were left out", skipped)
        table = table.take(pa.array(report.rows[kept]))
        for name in _SCORES:
            table = table.append_column(name, pa.array(getattr(report, name)[kept]))
        suggested = values_of(report.suggested_label[kept], report.label_values)
        return table.append_column(_SUGGESTED, pa.array(suggested, type=table.schema.field(self.columns[0]).type))


def _of_rows(first: int, last: int, error: ValueError) -> ValueError:
    """The error of a partition, with where that is."""
    return ValueError(
        f"rows {first} to {last} of the stream, counted from row {first} on: {error}. Where a partition holds one label, "
        "shuffle the stream or give a larger partition_size"
    )


def _dataset(table: Any, features: Any) -> Any:
    """Some columns of an Arrow table as a `Dataset`, with the kinds they have in the stream."""
    from datasets import Dataset, DatasetInfo, Features

    kinds = Features(features)
    return Dataset(table.cast(kinds.arrow_schema), info=DatasetInfo(features=kinds))
