"""Several labels a row: one graph over all rows, and a decision for each row and label.

Who is near whom does not depend on labels: one pass over the tiles finds the nearest rows and the copies (`nearest.py`). Every
label is then a question with two answers, and `answers.py` says for each row how likely the answer it was given is wrong, from
the label's probability and the answers of the nearest rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..settings import check_dataset, check_flag, check_int, check_path
from .answers import wrong_answers
from .config import RelationConfig
from .cut import flag, groups_of, most_expected_f1, rows_dropped
from .graph import RelationGraph
from .graphs import partitions
from .label_sets import LabelSets, read_label_sets
from .nearest import Neighbours, apart
from .outlier import is_outlier, outlier_scores, reference_rows, scores_of
from .picture_copies import joined
from .relabel import relabelled
from .row_scores import refuse_others, row_numbers
from .rows import Rows, rows_of_column
from .saved_sets import SCORES_OF_SETS, load_sets, save_sets
from .tiles import ReferenceSums

Index = NDArray[np.int64]
_READ = 8192  # rows of probabilities that are checked at a time


@dataclass(kw_only=True, eq=False)
class MultiLabelReport:
    """What `RelationCleaner.fit_multi_label` found. Higher scores are worse.

    Args:
        config: settings of the graph.
        label_column: column that was judged.
        sets: the given decisions, (n, L) int8 in `sets.given`, and what the labels are called.
        label_noise_score: (n, L) float32, the probability that a decision is wrong: a label that the row should not have, or
            one that it lacks. 0 where nobody said.
        is_label_error: (n, L) bool, flagged decisions.
        outlier_score: (n,) float64 of section 5.3.3, over features alone.
        is_outlier: (n,) bool: an outlier score above `outlier_level`.
        outlier_level: what outlier scores are compared with.
        group: (n,) int64, the smallest row number among the near duplicates of a row; its own where it has none.

    Example:
        >>> report = RelationCleaner().fit_multi_label(dataset, "labels")  # doctest: +SKIP
        >>> fixed = report.relabel(dataset)  # doctest: +SKIP
    """

    config: RelationConfig
    label_column: str
    sets: LabelSets
    label_noise_score: NDArray[np.float32]
    is_label_error: NDArray[np.bool_]
    outlier_score: NDArray[np.float64]
    is_outlier: NDArray[np.bool_]
    outlier_level: float
    group: Index

    def __len__(self) -> int:
        return len(self.group)

    @property
    def noise_rate(self) -> NDArray[np.float64]:
        """(L,) estimated share of wrong decisions of each label; NaN for a label that nobody decided on."""
        known = (self.sets.given >= 0).sum(axis=0)
        wrong = self.label_noise_score.sum(axis=0, dtype=np.float64)
        return np.divide(wrong, known, out=np.full(len(known), np.nan), where=known > 0)

    def review(self, count: int = 25) -> list[dict[str, Any]]:
        """The decisions that are most likely wrong.

        Args:
            count: how many at most, >= 1.

        Returns:
            Row number, label name, whether the label was given, and the probability that this is wrong; the worst first.
        """
        count = check_int("count", count, 1)
        worst = np.argsort(-self.label_noise_score, axis=None, kind="stable")[:count]
        rows, labels = np.unravel_index(worst, self.label_noise_score.shape)
        return [
            {
                "row": int(row),
                "label": self.sets.names[label],
                "given": bool(self.sets.given[row, label] > 0),
                "wrong": float(self.label_noise_score[row, label]),
            }
            for row, label in zip(rows, labels, strict=True)
            if self.sets.given[row, label] >= 0
        ]

    def annotate(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, Any]:
        """Columns of a batch: for `dataset.map(report.annotate, batched=True, with_indices=True)`.

        Args:
            batch: a batch of the fitted dataset, or of a copy with other columns.
            indices: its row numbers.

        Returns:
            label_noise_score (L float32 a row), is_label_error (L bool a row), outlier_score, is_outlier.

        Raises:
            ValueError: rows that are not in the report, or labels that differ from the fitted ones.
        """
        rows = row_numbers("indices", indices, len(self))
        given = batch.get(self.label_column) if isinstance(batch, Mapping) else None
        if given is not None:
            refuse_others(
                [int(row) for row, one in zip(rows, given, strict=True) if not self.sets.holds(int(row), one)],
                "other labels than were fitted",
            )
        names = ("label_noise_score", "is_label_error", "outlier_score", "is_outlier")
        return {name: list(getattr(self, name)[rows]) for name in names}

    def relabel(self, dataset: Any, *, given_column: str = "given_label") -> Any:
        """The dataset with flagged decisions turned around; what was given stays beside it.

        Args:
            dataset: the fitted `datasets.Dataset`, in the fitted order.
            given_column: name of the new column that holds the labels as they were given.

        Returns:
            A `datasets.Dataset` with all rows, its labels in the form that they had.

        Raises:
            ValueError: another dataset than was fitted, or a column of that name already.
        """
        self._check_same(dataset)
        rows = np.flatnonzero(self.is_label_error.any(axis=1))
        new = np.where(self.is_label_error, 1 - self.sets.given, self.sets.given).astype(np.int8)
        values = [self.sets.written(row, new[row]) for row in rows.tolist()]
        return relabelled(dataset, self.label_column, rows, values, given_column)

    def filter(
        self, dataset: Any, *, label_errors: bool = True, outliers: bool = False, near_duplicates: bool = False
    ) -> Any:
        """The dataset without flagged rows; `relabel` keeps them.

        Args:
            dataset: the fitted `datasets.Dataset`, in the fitted order.
            label_errors: drop rows with a flagged decision.
            outliers: drop rows with `is_outlier`; off, since a share of the rows is always marked.
            near_duplicates: of every group of near duplicates keep the row whose worst decision is best.

        Returns:
            A `datasets.Dataset`; nothing is copied.

        Raises:
            ValueError: another dataset than was fitted.
        """
        self._check_same(dataset)
        gone = self.dropped(label_errors=label_errors, outliers=outliers, near_duplicates=near_duplicates)
        return dataset.select(np.setdiff1d(np.arange(len(self)), list(gone)))

    def dropped(
        self, *, label_errors: bool = True, outliers: bool = False, near_duplicates: bool = False
    ) -> dict[int, str]:
        """Which rows `filter` drops, and why.

        Args:
            label_errors, outliers, near_duplicates: as for `filter`.

        Returns:
            "label error", "outlier" or "near duplicate of row N" by row number, ascending.
        """
        worst = self.label_noise_score.max(axis=1).astype(np.float64)
        known = self.sets.given.max(axis=1).astype(np.int64)
        flagged: NDArray[np.bool_] = np.asarray(self.is_label_error.any(axis=1))
        return rows_dropped(
            flagged & check_flag("label_errors", label_errors),
            self.is_outlier & check_flag("outliers", outliers),
            (self.group, worst, known) if check_flag("near_duplicates", near_duplicates) else None,
        )

    def near_duplicates(self, across: Sequence[Any] | None = None) -> list[Index]:
        """Groups of rows that are copies of each other, or nearly.

        Args:
            across: (n,) what to compare, such as splits: only groups that hold more than one value of it.

        Returns:
            Row numbers of each group, ascending; the largest group first.

        Raises:
            ValueError: `across` has another number of rows.
        """
        return groups_of(self.group, across)

    def summary(self) -> str:
        """What was found, in a few lines: estimated and flagged errors, the labels with the most, outliers, copies."""
        return "\n".join(f"{name}: {text}" for name, text in self.facts())

    def facts(self) -> list[tuple[str, str]]:
        """Names and texts of what was found and how, for `summary`, page and card."""
        given, flagged, rates = self.sets.given, self.is_label_error, self.noise_rate
        known = max(1, int((given >= 0).sum()))
        worst = np.argsort(-np.nan_to_num(rates), kind="stable")[:3]
        copies = groups_of(self.group)
        return [
            ("rows", f"{len(self):,}"),
            ("labels", f"{given.shape[1]:,}, {(given > 0).sum() / max(1, len(self)):.2f} a row"),
            ("estimated share of wrong decisions", f"{self.label_noise_score.sum(dtype=np.float64) / known:.2%}"),
            ("most often wrong", ", ".join(f"{self.sets.names[k]} ({np.nan_to_num(rates[k]):.1%})" for k in worst)),
            (
                "label errors",
                f"{int((flagged & (given > 0)).sum()):,} labels too many, {int((flagged & (given == 0)).sum()):,} missing, "
                f"in {int(flagged.any(axis=1).sum()):,} rows",
            ),
            ("outliers", f"{int(self.is_outlier.sum()):,} ({self.is_outlier.mean():.1%})"),
            ("near duplicates", f"{sum(map(len, copies)):,} rows in {len(copies):,} groups"),
            ("flagged", self.flagging_rule()),
        ]

    def flagging_rule(self) -> str:
        """What a decision was flagged by, in one phrase."""
        share = self.is_label_error.sum() / max(1, int((self.sets.given >= 0).sum()))
        how = "how many was estimated" if self.config.cut == "estimated" else "a share that was given"
        return f"the {share:.2%} of the decisions that are likeliest wrong; {how}"

    @property
    def rows(self) -> Index:
        """(n,) numbers of the rows in the fitted dataset."""
        return np.arange(len(self))

    def label_text(self, row: int) -> str:
        """What a row is labelled."""
        row = check_int("row", row, 0, len(self) - 1)
        names = [self.sets.names[label] for label in np.flatnonzero(self.sets.given[row] > 0)]
        return ", ".join(names) or ("no label" if (self.sets.given[row] >= 0).any() else "unlabelled")

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and `report.safetensors` and their record.

        Args:
            folder: made if missing; an earlier report in it is replaced as a whole.

        Raises:
            ValueError: the folder holds files that are no report's.
        """
        about = {
            "config": json.loads(self.config.to_json_string()),
            "label_column": self.label_column,
            "label_values": self.sets.values,
            "label_names": self.sets.names,
            "hot": self.sets.hot,
            "outlier_level": self.outlier_level,
        }
        arrays = {"given": self.sets.given, **{name: getattr(self, name) for name in SCORES_OF_SETS if name != "given"}}
        save_sets(check_path("folder", folder), about, arrays)

    @classmethod
    def load(cls, folder: str | Path) -> MultiLabelReport:
        """A report from `save`.

        Args:
            folder: where it was saved.

        Raises:
            ValueError: no such report in the folder, a corrupt file or a newer format.
        """
        found = load_sets(check_path("folder", folder))
        sets = LabelSets(*(found.pop(name) for name in ("given", "label_values", "label_names", "hot")))
        return cls(sets=sets, **found)

    def _check_same(self, dataset: Any) -> None:
        check_dataset("dataset", dataset)
        if len(dataset) != len(self):
            raise ValueError(f"the dataset has {len(dataset)} rows, the report {len(self)}; give the fitted dataset")
        names = None if self.sets.hot else [str(name) for name in self.sets.names]
        now = read_label_sets(dataset, self.label_column, len(self.sets.values), names).given
        refuse_others(np.flatnonzero((now != self.sets.given).any(axis=1)).tolist(), "other labels than were fitted")


def judge(
    features: Rows,
    probs: NDArray[np.float32] | None,
    sets: LabelSets,
    config: RelationConfig,
    label_column: str,
    pictures: tuple[Index, Index],
    *,
    quiet: bool = False,
) -> MultiLabelReport:
    """Score every decision.

    Args:
        features: (n, d).
        probs: (n, L) probability of each label; None: nearest rows alone are asked.
        sets: the given decisions.
        label_column: where they come from.
        config: `cut` may be "estimated" or a share of all decisions; of `score` only "combined" is there.
        pictures: pairs of rows whose pictures are copies.
        quiet: no progress bars.

    Cost: that of `RelationCleaner.fit` without probabilities, and 4 n neighbours numbers read a label.
    """
    someone = (sets.given >= 0).any(axis=1)
    graph = RelationGraph(features, None, np.where(someone, 0, -1), config)
    near, outlier = _nearest(graph, quiet)
    near = replace(near, group=joined(near.group, *pictures))
    scores = np.zeros(sets.given.shape, np.float32)
    for label in range(sets.given.shape[1]):
        given = sets.given[:, label].astype(np.int64)
        if len(np.unique(given[given >= 0])) < 2:
            continue  # all rows have it, or none: there is nothing to compare
        scores[:, label] = wrong_answers(given, near, None if probs is None else probs[:, label])
    flat, decisions = scores.reshape(-1).astype(np.float64), sets.given.reshape(-1).astype(np.int64)
    said = flat[decisions >= 0]
    share = most_expected_f1(said) / max(1, len(said)) if config.cut == "estimated" else float(config.cut)
    flagged = flag(flat, decisions, "share", share)
    odd, level = is_outlier(outlier, config.outlier_share)
    return MultiLabelReport(
        config=config,
        label_column=label_column,
        sets=sets,
        label_noise_score=scores,
        is_label_error=flagged.reshape(scores.shape),
        outlier_score=outlier,
        is_outlier=odd,
        outlier_level=level,
        group=near.group,
    )


def probs_of(dataset: Any, column: str) -> NDArray[np.float32]:
    """A column of independent probabilities, (n, L) float32.

    Raises:
        ValueError: the first row with a number outside [0, 1].
    """
    rows = rows_of_column(dataset, column)
    found = np.empty((len(rows), rows.width), np.float32)
    for start in range(0, len(rows), _READ):
        some = np.arange(start, min(start + _READ, len(rows)))
        rows.take(some, found[some[0] : some[-1] + 1])
    wrong = np.flatnonzero(~((found >= 0) & (found <= 1)).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"row {int(wrong[0])} of {column!r} holds numbers outside [0, 1] ({len(wrong)} such rows); give the sigmoid of "
            "each label's logit"
        )
    return found


def _nearest(graph: RelationGraph, quiet: bool) -> tuple[Neighbours, NDArray[np.float64]]:
    """Nearest rows and copies, in partitions if asked, and outlier scores: of one pass without."""
    config, count = graph.config, len(graph)
    parts, reference, found = partitions(count, config), reference_rows(count, config), []
    outside = ReferenceSums(count, reference, config.outlier_temperature) if len(parts) == 1 else None
    for part in parts:
        sub = graph if outside else graph.select(part)
        nearest = sub.nearest_rows()
        sub.relation_sums(nearest=nearest, outside=outside, quiet=quiet or not outside)
        found.append(nearest.result(sub.device))
    if outside:
        return found[0], scores_of(outside.sums.total(graph.device), config)
    return apart(parts, found, count), outlier_scores(graph, reference, quiet=quiet)
