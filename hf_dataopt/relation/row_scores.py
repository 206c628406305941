"""Scores of every row of one dataset, checked, and what their numbers stand for: the data of a `RelationReport`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..settings import brief, check_array, check_dataset, check_int, check_kind, check_text, numbers, plain
from .config import RelationConfig
from .graph import RelationGraph
from .labels import values_of
from .outlier import Reference
from .saved import ARRAYS, CODES, INTEGERS

UNLABELLED = (None, -1)


@dataclass(kw_only=True, eq=False)
class RowScores:
    """The fields of a `RelationReport`, which says what each is."""

    config: RelationConfig
    label_column: str
    columns: list[tuple[str, str]]
    label_values: list[Any]
    label_names: list[str]
    labels: NDArray[np.int64]
    label_noise_score: NDArray[np.float64]
    is_label_error: NDArray[np.bool_]
    suggested_label: NDArray[np.int64]
    other_label: NDArray[np.int64]
    outlier_score: NDArray[np.float64]
    is_outlier: NDArray[np.bool_]
    outlier_level: float
    group: NDArray[np.int64]
    reference: list[Reference]
    parts: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    _graphs: list[RelationGraph] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """One value a row, of the right kind; results are built here and by `load`, seldom by hand."""
        check_kind("config", self.config, RelationConfig)
        check_text("label_column", self.label_column)
        count = len(check_array("labels", self.labels, 1, kinds="iu"))
        for name, kind in {**ARRAYS, **dict.fromkeys(INTEGERS, "iu")}.items():
            check_array(name, getattr(self, name), 1, kinds=kind, finite=False, rows=count)
            if kind == "f" and np.isnan(getattr(self, name)).any():
                raise ValueError(f"{name} must have no NaN; fit again")
        for name in ("columns", "label_values", "label_names", "reference"):
            check_kind(name, getattr(self, name), list)
        for name in ("parts", "about"):
            check_kind(name, getattr(self, name), dict)
        for name in CODES:
            codes = getattr(self, name)
            if not codes.min() >= -1 or not codes.max() < len(self.label_values):
                raise ValueError(
                    f"{name} run from {codes.min()} to {codes.max()}, there are {len(self.label_values)} label_values"
                )
        if not self.group.min() >= 0 or not self.group.max() < count:
            raise ValueError(
                f"group must hold row numbers, 0 to {count - 1}, got {self.group.min()} to {self.group.max()}"
            )
        level = plain(self.outlier_level)
        if isinstance(level, bool) or not isinstance(level, int | float) or level != level:
            raise TypeError(f"outlier_level must be a number, got {brief(level)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and `datasets` hashing see: scores and settings, never the graph over the dataset."""
        return {**self.__dict__, "_graphs": None}

    @property
    def noise_rate(self) -> float:
        """The estimated share of wrong labels among the labelled rows."""
        return float(self.about.get("noise_rate", np.nan))

    @property
    def rows(self) -> NDArray[np.int64]:
        """(n,) numbers that the fitted rows have in the dataset that was given to `fit`."""
        skipped = self.about.get("skipped", {}).get("rows", [])
        return np.setdiff1d(np.arange(len(self) + len(skipped)), skipped)

    def fitted(self, dataset: Any) -> Any:
        """The rows of a dataset that this report is about: all, without those that `fit(on_error="skip")` left out.

        Args:
            dataset: the `datasets.Dataset` that was given to `fit`, or one without those rows already.
        """
        check_dataset("dataset", dataset)
        skipped = self.about.get("skipped", {}).get("rows", [])
        if not skipped or len(dataset) != len(self) + len(skipped):
            return dataset
        return dataset.select(self.rows)

    def label_text(self, row: int) -> str:
        """What a row is labelled."""
        return self.name_of(self.labels[self._check_row(row)])

    def name_of(self, code: int) -> str:
        """What a label code is called; -1 is "unlabelled"."""
        code = check_int("code", code, -1, len(self.label_names) - 1)
        return self.label_names[code] if code >= 0 else "unlabelled"

    def _check_row(self, row: int) -> int:
        return check_int("row", row, 0, len(self) - 1, todo=f"the report has rows 0 to {len(self) - 1}")

    def _check_same(self, dataset: Any) -> None:
        """The fitted dataset has as many rows and, where the column is still there, the same labels in the same order."""
        if len(dataset) != len(self):
            raise ValueError(f"the dataset has {len(dataset)} rows, the report {len(self)}; give the fitted dataset")
        if self.label_column not in dataset.column_names:
            return
        given = dataset.select_columns([self.label_column]).with_format(None)[self.label_column][:]
        fitted = values_of(self.labels, self.label_values)
        differs = [
            row
            for row, (one, other) in enumerate(zip(given, fitted, strict=True))
            if one != other and not (other in UNLABELLED and one in UNLABELLED)
        ]
        refuse_others(differs, "another label than was fitted")


def row_numbers(name: str, given: Any, count: int) -> NDArray[np.int64]:
    """Numbers of fitted rows, any number of them.

    Args:
        name: of the argument.
        given: what was given.
        count: fitted rows.
    """
    empty = isinstance(given, list | tuple | range) and not given
    rows = np.empty(0, np.int64) if empty else numbers(name, given, kinds="iu")
    if rows.ndim != 1:
        raise ValueError(f"{name} must be row numbers, (n,), got shape {rows.shape}")
    if rows.size and (rows.min() < 0 or rows.max() >= count):
        row = rows.max() if rows.max() >= count else rows.min()
        raise ValueError(f"row {row} is not among the {count} fitted rows; {name} must be numbers of those")
    return rows.astype(np.int64)


def refuse_others(rows: Sequence[int], what: str) -> None:
    """A dataset whose rows are not the fitted ones.

    Args:
        rows: those that differ.
        what: they have.

    Raises:
        ValueError: there are some.
    """
    if len(rows):
        raise ValueError(
            f"row {rows[0]} (and {len(rows) - 1} more) has {what}: the dataset was shuffled, filtered or changed since; give "
            "the fitted dataset"
        )
