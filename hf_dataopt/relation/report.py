"""What the cleaner found: scores to look up, thresholds to move, reasons to read, rows to drop."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..settings import (
    brief,
    check_dataset,
    check_each,
    check_flag,
    check_int,
    check_kind,
    check_number,
    check_path,
    optional,
    plain,
)
from .cut import flag, groups_of, rows_dropped
from .evidence import Evidence, evidence_of
from .graph import RelationGraph
from .graphs import graphs_of
from .labels import values_of
from .outlier import is_outlier
from .relabel import relabelled
from .row_scores import UNLABELLED, RowScores, row_numbers
from .saved import ARRAYS, load_report, save_report
from .summary import confusion_of, facts, review_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(kw_only=True, eq=False)
class RelationReport(RowScores):
    """Scores of every row of the dataset that a `RelationCleaner` was fitted to. Higher scores are worse.

    Args:
        config: settings of the graph.
        label_column: column that was judged.
        columns: (features, probs) column names, one pair per checkpoint.
        label_values, label_names: what each label code stands for in the dataset, and what it is called.
        labels: (n,) int64 codes, -1 for unlabelled rows.
        label_noise_score: (n,) float64 as `config.score` says: the probability that the label is wrong, or the noisiness s of
            Algorithm 4, > 0 where the graph speaks against the label. 0 for unlabelled rows.
        is_label_error: (n,) bool, rows flagged as `about["cut"]` says.
        suggested_label: (n,) int64 code of the likeliest other label of flagged rows; the row's own, or -1, for the others.
        other_label: (n,) int64 code of the likeliest label that a row was not given; -1 for unlabelled rows.
        outlier_score: (n,) float64 of section 5.3.3.
        is_outlier: (n,) bool: an outlier score above `outlier_level`.
        outlier_level: what the outlier score of a row, old or new, is compared with.
        group: (n,) int64, the smallest row number among the near duplicates of a row; its own where it has none.
        reference: features and probabilities of the reference set S, for rows that were not in the graph.
        parts: (n,) float64 scores of both kinds, `"combined"` and `"label_noise"`.
        about: how it was found, ready for JSON: objective (Eq. 5.2), lambda, passes and how they stopped, one entry per
            checkpoint; estimated noise rate, cut, and which column of `probs` was taken for which label.

    Source: chapter 5.
    Cost: 74 bytes a row; evidence and maps read one row of the graph, n (d + C) operations.

    Example:
        >>> report = RelationCleaner().fit(dataset)  # doctest: +SKIP
        >>> dataset.map(report.annotate, batched=True, with_indices=True)  # doctest: +SKIP
    """

    def annotate(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, Any]:
        """The five columns of a batch, looked up: for `dataset.map(report.annotate, batched=True, with_indices=True)`.

        Args:
            batch: a batch of the fitted dataset, or of a copy with other columns.
            indices: its row numbers.

        Returns:
            label_noise_score (float64), is_label_error (bool), suggested_label (as in the label column), outlier_score
            (float64), is_outlier (bool).

        Raises:
            ValueError: rows that are not in the report, or labels that differ from the fitted ones (the dataset was
                shuffled, filtered or changed since).

        Cost: a look-up. Hashes by scores and settings in `datasets`; works with `num_proc`.
        """
        check_kind("batch", batch, Mapping, "use dataset.map(..., batched=True, with_indices=True)")
        rows = row_numbers("indices", indices, len(self))
        given = batch.get(self.label_column)
        if given is not None:
            fitted = values_of(self.labels[rows], self.label_values)
            if not hasattr(given, "__len__") or len(given) != len(fitted):
                raise ValueError(
                    f"{len(fitted)} indices need as many labels in {self.label_column!r}, got {brief(given)}"
                )
            for row, one, other in zip(rows, given, fitted, strict=True):
                if plain(one) != other and not (other in UNLABELLED and plain(one) in UNLABELLED):
                    raise ValueError(
                        f"row {row} has label {one!r} but {other!r} was fitted: the dataset was shuffled, filtered or "
                        "changed since; annotate before that, or fit again"
                    )
        return {
            "label_noise_score": self.label_noise_score[rows],
            "is_label_error": self.is_label_error[rows],
            "suggested_label": values_of(self.suggested_label[rows], self.label_values),
            "outlier_score": self.outlier_score[rows],
            "is_outlier": self.is_outlier[rows],
        }

    def filter(
        self, dataset: Any, *, label_errors: bool = True, outliers: bool = False, near_duplicates: bool = False
    ) -> Any:
        """The dataset without flagged rows.

        Args:
            dataset: the fitted `datasets.Dataset`, in the fitted order; rows that the fit left out are dropped.
            label_errors: drop rows with `is_label_error`.
            outliers: drop rows with `is_outlier`; off, since a share of the rows is always marked.
            near_duplicates: of every group of near duplicates keep one of the rows that are left: the one with the lowest
                `label_noise_score`, a labelled one first.

        Returns:
            A `datasets.Dataset`; nothing is copied.

        Raises:
            ValueError: another number of rows than was fitted.
        """
        dataset = self.fitted(dataset)
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
        copies = (
            (self.group, self.label_noise_score, self.labels)
            if check_flag("near_duplicates", near_duplicates)
            else None
        )
        return rows_dropped(
            self.is_label_error & check_flag("label_errors", label_errors),
            self.is_outlier & check_flag("outliers", outliers),
            copies,
        )

    def relabel(self, dataset: Any, *, rows: Sequence[int] | None = None, given_column: str = "given_label") -> Any:
        """The dataset with the likeliest other label on flagged rows; what they were labelled before stays beside it.

        Args:
            dataset: the fitted `datasets.Dataset`, in the fitted order; rows that the fit left out keep their label.
            rows: row numbers to relabel, such as those of `review` that were looked at; default those with
                `is_label_error`. Unlabelled ones stay so.
            given_column: name of the new column that holds the labels as they were given.

        Returns:
            A `datasets.Dataset` with all rows. Features are not copied.

        Raises:
            ValueError: another dataset than was fitted, a column of that name already, or no such row.
        """
        part = self.fitted(dataset)
        self._check_same(part)
        chosen = np.flatnonzero(self.is_label_error) if rows is None else row_numbers("rows", rows, len(self))
        chosen = chosen[self.labels[chosen] >= 0]
        at = chosen if len(part) == len(dataset) else self.rows[chosen]
        return relabelled(
            dataset, self.label_column, at, values_of(self.other_label[chosen], self.label_values), given_column
        )

    def near_duplicates(self, across: Sequence[Any] | None = None) -> list[NDArray[np.int64]]:
        """Groups of rows that are copies of each other, or nearly.

        Args:
            across: (n,) what to compare, such as the split that each row came from: only groups that hold more than one
                value of it. To find what a test set shares with its training set, fit both in one dataset.

        Returns:
            Row numbers of each group, ascending; the largest group first.

        Raises:
            ValueError: `across` has another number of rows.
        """
        return groups_of(self.group, across)

    def rethreshold(
        self,
        *,
        noise_rate: float | None = None,
        threshold: float | None = None,
        quantile: float | None = None,
        outlier_share: float | None = None,
        outlier_threshold: float | None = None,
    ) -> RelationReport:
        """The same scores with other cuts; nothing is computed again.

        Args:
            noise_rate: share of the labelled rows to call label errors, [0, 1]: the highest scores, whatever their sign.
            threshold: rows with a larger score: a probability, or lambda.
            quantile: that threshold as a quantile of the scores, [0.5, 1].
            outlier_share: share of rows to call outliers, [0, 1).
            outlier_threshold: outlier score above which a row is one.

        Returns:
            A new report that shares the arrays.

        Raises:
            ValueError: two rules for one cut, or a number out of range.
        """
        noise_rate = optional(check_number, "noise_rate", noise_rate, 0, 1)
        threshold = optional(check_number, "threshold", threshold, 0)
        quantile = optional(check_number, "quantile", quantile, 0.5, 1)
        outlier_share = optional(check_number, "outlier_share", outlier_share, 0, 1, below=True)
        outlier_threshold = optional(check_number, "outlier_threshold", outlier_threshold)
        rules = {"noise_rate": noise_rate, "threshold": threshold, "quantile": quantile}
        given = {name: value for name, value in rules.items() if value is not None}
        if len(given) > 1 or (outlier_share is not None and outlier_threshold is not None):
            raise ValueError("two rules for one cut; give one of noise_rate, threshold, quantile, and one for outliers")
        changed = replace(self, _graphs=self._graphs, about={**self.about})
        for name, value in given.items():
            changed.about["cut"] = {"rule": name, "value": value}
            rule = "share" if name == "noise_rate" else name
            changed.is_label_error = flag(self.label_noise_score, self.labels, rule, value)
            changed.suggested_label = np.where(changed.is_label_error, self.other_label, self.labels)
        if outlier_share is not None:
            changed.is_outlier, changed.outlier_level = is_outlier(self.outlier_score, outlier_share)
        if outlier_threshold is not None:
            changed.is_outlier, changed.outlier_level = self.outlier_score > outlier_threshold, float(outlier_threshold)
        return changed

    def summary(self) -> str:
        """What was found, in a few lines: sizes, classes, estimated and flagged label errors, which classes are taken for
        which, outliers, copies, which score and which cut. `report.html` and the card begin with the same facts."""
        return "\n".join(f"{name}: {text}" for name, text in facts(self))

    def confusion(self) -> NDArray[np.float64]:
        """How many rows of each label are likely of each class.

        Returns:
            (classes, classes) float64 expected counts in the order of `label_names`, [given, likely]: a row counts with the
            probability that its label is wrong for its likeliest other class, and with the rest for its own. Rows sum to
            the class sizes.
        """
        return confusion_of(self)

    def review(self, count: int = 25) -> NDArray[np.int64]:
        """The rows that are most worth a look by a person: those whose flag is least sure.

        Args:
            count: how many, >= 1.

        Returns:
            Row numbers: probability that the label is wrong nearest to one half first (`worst` has the surest errors first);
            a row with copies counts as many times, and one of its copies is asked for.

        Source: uncertainty sampling; not in the dissertation.
        """
        return review_order(self)[: check_int("count", count, 1)]

    def worst(self, count: int = 25) -> NDArray[np.int64]:
        """Row numbers by falling `label_noise_score`."""
        return np.argsort(-self.label_noise_score, kind="stable")[: check_int("count", count, 1)]

    def evidence(self, row: int, count: int = 5) -> Evidence:
        """The rows that contradict a row's label most, and those that support it.

        Args:
            row: number of the row, [0, n).
            count: how many of each.

        Returns:
            An `Evidence`: rows, labels and relation values (Eq. 5.1; mean over the checkpoints), and the row's ranks in
            both scores. An unlabelled row has neither.

        Raises:
            ValueError: no such row, or a loaded report without its dataset.

        Source: Figures 5.3 and 5.10.
        Cost: n (d + C) operations.
        """
        row, count = self._check_row(row), check_int("count", count, 1, todo="ask for at least one row of evidence")
        graphs = self._need_graphs()
        relations = np.mean([graph.row(row) for graph in graphs], axis=0)
        ranks = {name: float((values < values[row]).mean()) for name, values in self.parts.items()}
        return evidence_of(row, relations, self.labels, count, ranks)

    def relation_map(self, row: int, *, max_points: int = 3000) -> Figure:
        """Mean and spread of a row's relation values over the checkpoints, as a picture.

        Args:
            row: number of the row, [0, n).
            max_points: other rows drawn; all of the strongest half, the rest evenly picked.

        Returns:
            A matplotlib figure. With one checkpoint there is no spread: the vertical axis is the feature similarity then.

        Raises:
            ValueError: no such row, or a loaded report without its dataset.
            MissingExtraError: matplotlib is not installed.

        Source: section 5.3.6, Figure 5.1.
        Cost: n (d + C) operations a checkpoint.
        """
        from .relation_map import draw_relation_map

        row, max_points = self._check_row(row), check_int("max_points", max_points, 2)
        graphs = self._need_graphs()
        title = f"row {row}, label {self.name_of(self.labels[row])}"
        if self.is_label_error[row]:
            title += f", suggested {self.name_of(self.suggested_label[row])}"
        return draw_relation_map(graphs, row, title=title, max_points=max_points)

    def score_outliers(self, data: Any, *, quiet: bool = False) -> Any:
        """Outlier scores of rows that were not in the graph, against the fitted reference set S.

        Args:
            data: a `datasets.Dataset`, or a mapping with the feature and probability columns as (n, d) and (n, C)
                arrays; or an `IterableDataset`, which is mapped lazily.
            quiet: no progress bar.

        Returns:
            (n,) float64, higher = fewer similar rows; for an `IterableDataset` an `IterableDataset` with the columns
            `outlier_score` and `is_outlier` (above the level of the fitted rows).

        Raises:
            ValueError: missing columns, other widths than fitted, NaN.

        Source: section 5.3.3, Figure 5.7.
        Cost: 2 m (d + C) operations a row, m rows in S.
        """
        import datasets

        quiet = check_flag("quiet", quiet)
        if not isinstance(data, datasets.IterableDataset | datasets.Dataset | Mapping):
            raise TypeError(f"data must be a Dataset, an IterableDataset or a mapping of arrays, got {brief(data)}")
        if isinstance(data, datasets.IterableDataset):
            return data.map(self._annotate_outliers, batched=True)
        scores = [one.scores(data, self.config, quiet=quiet) for one in self.reference]
        return np.mean(scores, axis=0)

    def _annotate_outliers(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        scores = self.score_outliers(batch, quiet=True)
        return {"outlier_score": scores.tolist(), "is_outlier": (scores > self.outlier_level).tolist()}

    def attach(self, graphs: list[RelationGraph]) -> None:
        """Give the report the graph over its dataset, which evidence and maps read."""
        for graph in check_each("graphs", graphs, check_kind, RelationGraph, least=len(self.columns)):
            if len(graph) != len(self):
                raise ValueError(
                    f"a graph has {len(graph)} rows, the report {len(self)}; give those of the fitted dataset"
                )
        self._graphs = list(graphs)

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and `report.safetensors` (scores and the reference set) and their record.

        Args:
            folder: made if missing; an earlier report in it is replaced as a whole.

        Raises:
            ValueError: the folder holds files that are no report's.
        """
        folder = check_path("folder", folder)
        about = {
            "config": json.loads(self.config.to_json_string()),
            "label_column": self.label_column,
            "columns": self.columns,
            "label_values": self.label_values,
            "label_names": self.label_names,
            "outlier_level": self.outlier_level,
            "summary": self.about,
        }
        arrays = {name: getattr(self, name) for name in ARRAYS}
        save_report(folder, about, arrays, self.parts, self.reference)

    @classmethod
    def load(cls, folder: str | Path, dataset: Any = None) -> RelationReport:
        """A report from `save`.

        Args:
            folder: where it was saved.
            dataset: the fitted dataset; needed for `evidence` and `relation_map` only.

        Raises:
            ValueError: no report in the folder, a corrupt file, a newer format, or another dataset.
        """
        optional(check_dataset, "dataset", dataset)
        report = cls(**load_report(check_path("folder", folder)))
        if dataset is not None:
            report._check_same(dataset)
            report.attach(graphs_of(dataset, report.columns, report.labels, report.config))
        return report

    def _need_graphs(self) -> list[RelationGraph]:
        if self._graphs is None:
            raise ValueError(
                "the report has no graph (it was loaded or sent to another process); use RelationReport.load(folder, dataset)"
            )
        return self._graphs
