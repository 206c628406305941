"""Chapter 5 from top to bottom: relate every row to every other, cut the graph, score label errors and outliers.

The kernel is in `kernel.py` (Eqs. 5.1, 5.4, 5.5), the tiled sums in `graph.py`, Algorithm 4 in `label_noise.py`, the
outlier score in `outlier.py`. From the same tiles: nearest rows and copies (`nearest.py`), and what they and the model say of
a label (`posterior.py`). What comes out, and why a row is flagged, is in `report.py`.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from .. import distributed
from ..checkpoint import PassCheckpoint, locked
from ..decoding import check_on_error
from ..progress import say
from ..publishing.writer import check_target
from ..settings import check_dataset, check_device, check_each, check_flag, check_kind, check_path, check_text, optional
from .config import RelationConfig
from .cut import flag, most_expected_f1
from .graph import RelationGraph
from .graphs import graphs_of, partitions
from .label_noise import LabelNoise, find_label_noise, top_share
from .label_sets import read_label_sets
from .labels import Labels, prob_columns, read_labels
from .multi_label import MultiLabelReport, judge, probs_of
from .nearest import Neighbours, apart
from .outlier import Reference, is_outlier, outlier_scores, reference_rows, scores_of
from .picture_copies import joined, picture_pairs
from .posterior import Posterior, label_posterior
from .report import RelationReport
from .rows import rows_of_column
from .saved import KIND, UNFINISHED
from .tiles import ReferenceSums
from .unfit import summary_of, unfit_rows

if TYPE_CHECKING:
    from .fields import RelationFields

logger = logging.getLogger(__name__)
Index = NDArray[np.int64]
_NO_ROWS = (
    "use Dataset.from_dict(...); clean_stream takes an IterableDataset, a partition at a time, and report.score_outliers one "
    "that was not fitted"
)


class RelationCleaner:
    """Finds label errors and outliers of a dataset from its feature-embedded structure.

    Args:
        config: all settings; or give the fields of `RelationConfig` as keywords.
        **fields: fields of `RelationConfig`, such as `temperature=4`.

    Raises:
        ValueError: both `config` and fields, or a field out of its range.

    Source: chapter 5.
    Differs: defaults of `RelationConfig`.
    Cost: see `fit`.

    Example:
        >>> RelationCleaner(temperature=6).config.temperature
        6
    """

    def __init__(self, config: RelationConfig | None = None, **fields: Unpack[RelationFields]) -> None:
        optional(check_kind, "config", config, RelationConfig, "single fields go as keywords")
        if config is not None and fields:
            raise ValueError(f"give config= or single fields, not both; got config and {sorted(fields)}")
        self.config = config or RelationConfig(**fields)

    def fit(
        self,
        dataset: Any,
        label_column: str = "label",
        *,
        features_column: str | Sequence[str] = "features",
        probs_column: str | Sequence[str] = "probs",
        output_dir: str | Path | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        quiet: bool = False,
    ) -> RelationReport:
        """Build the graph over all rows and score them. Near duplicates are found by features and, where the dataset has a
        column "thumbnail" (of `FeatureExtractor` or `Thumbnails`), by pictures, encoded or scaled again as they may be.

        Args:
            dataset: a `datasets.Dataset` with a feature column (rows of d numbers) and a probability column (rows of
                C numbers), as `FeatureExtractor` adds them or from anywhere else. Read from memory-mapped Arrow.
            label_column: `ClassLabel`, integers or texts; rows with -1 or None are unlabelled: they get an outlier score, and
                have no say.
            features_column, probs_column: one name, or one per checkpoint: scores are then averaged (Table 5.5) and
                relation maps drawn over the checkpoints (section 5.3.6).
            output_dir: finished stripes are kept here, and a killed run goes on from them; the report is saved here. One
                job at a time: the folder is locked.
            on_error: "skip" leaves rows that cannot be related out and counts them in `report.about["skipped"]`; the
                report is then about `report.fitted(dataset)`.
            quiet: no estimate, no progress bars.

        Returns:
            A `RelationReport`.

        Raises:
            ValueError: missing columns; rows of different length; NaN, infinite or zero features; `probs` that are no
                probabilities; multi-label, regression or single-class labels, or numbers that are no classes. The first
                row at fault is named.
            TypeError: not a map-style `datasets.Dataset`.
            FolderInUseError: another job writes to `output_dir`.

        Source: Algorithm 4, section 5.3.3; Table 5.5 for several checkpoints (plain mean of the scores).
        Differs: `score="combined"` and `cut="estimated"` (`RelationConfig`), and copies, are not in the dissertation.
        Cost: per checkpoint n^2 (d + C) operations for sums, nearest rows, copies and outlier scores (half of f f^T + p p^T),
            2 n m (d + C) for Algorithm 4's set of m rows, `max_memory_gb` of working memory and 8 n (neighbours + 1) bytes;
            with `partition_size=k` n k (d + C), and 2 n m (d + C) for outlier scores against m rows.
        """
        check_on_error(on_error)
        check_dataset("dataset", dataset, _NO_ROWS)
        views = _views(features_column, probs_column)
        check_text("label_column", label_column, empty=False)
        quiet = check_flag("quiet", quiet)
        optional(check_device, "device", self.config.device, here=True)
        folder = optional(check_path, "output_dir", output_dir)
        work = None if folder is None else folder / UNFINISHED
        if folder is not None and distributed.is_main_process():
            check_target(folder, KIND, besides=(UNFINISHED,))
        with nullcontext() if work is None else locked(work):
            skipped: dict[int, str] = {}
            if on_error == "skip":
                dataset, skipped = _without_unfit(dataset, label_column, views, self.config)
            try:
                labels = read_labels(dataset, label_column)
                graphs = graphs_of(dataset, views, labels.codes, self.config)
            except ValueError as error:
                raise _with_row(error, dataset, label_column, views, self.config) from error
            pictures = picture_pairs(dataset, self.config.seed)
            report = self._fit(graphs, labels, label_column, views, pictures, _Work(work, "", quiet))
            if skipped:
                report.about["skipped"] = summary_of(skipped)
            if folder is not None and distributed.is_main_process():
                report.save(folder)
                shutil.rmtree(work or "", ignore_errors=True)
            return report

    def fit_multi_label(
        self,
        dataset: Any,
        label_column: str = "labels",
        *,
        features_column: str = "features",
        probs_column: str | None = "probs",
        label_names: Sequence[str] | None = None,
        quiet: bool = False,
    ) -> MultiLabelReport:
        """Several labels a row: one graph over all rows, and a decision for each row and label.

        Args:
            dataset: a `datasets.Dataset` with a feature column and, for L labels, rows of L independent probabilities
                (sigmoids, as `FeatureExtractor` adds them for a multi-label model).
            label_column: lists of labels (class numbers or texts, none twice; a missing list: not labelled), or L numbers a
                row: 1 where it has the label, 0 where not, -1 or None where nobody said.
            features_column, probs_column: names; `probs_column=None` asks the nearest rows alone.
            label_names: what labels are called, in the order of `probs`; texts need it, a `ClassLabel` has them.
            quiet: no progress bars.

        Returns:
            A `MultiLabelReport`.

        Raises:
            ValueError: missing columns, rows that are no such labels or probabilities (the first is named), or
                `score="label_noise"` or `cut="algorithm4"`, which compare one class a row.
            TypeError: not a map-style `datasets.Dataset`.

        Differs: not in the dissertation, which has one class a row.
        Cost: n^2 d operations for nearest rows and copies, whatever L, `max_memory_gb`, and 9 n L + 8 n (neighbours + 1) bytes.

        Example:
            >>> RelationCleaner().fit_multi_label(dataset, "tags", probs_column=None)  # doctest: +SKIP
        """
        check_dataset("dataset", dataset, _NO_ROWS)
        for name, column in (("label_column", label_column), ("features_column", features_column)):
            check_text(name, column, empty=False)
        optional(check_text, "probs_column", probs_column, empty=False)
        names = None if label_names is None else check_each("label_names", label_names, check_text)
        quiet = check_flag("quiet", quiet)
        optional(check_device, "device", self.config.device, here=True)
        if self.config.score != "combined" or self.config.cut == "algorithm4":
            raise ValueError(
                f"score={self.config.score!r} with cut={self.config.cut!r}: Algorithm 4 compares one class a row; several "
                "labels need score='combined' and cut='estimated' or a share"
            )
        if not len(dataset):
            raise ValueError("the dataset is empty; there is nothing to relate")
        probs = None if probs_column is None else probs_of(dataset, probs_column)
        sets = read_label_sets(dataset, label_column, None if probs is None else probs.shape[1], names)
        features, pictures = rows_of_column(dataset, features_column), picture_pairs(dataset, self.config.seed)
        return judge(features, probs, sets, self.config, label_column, pictures, quiet=quiet)

    def _fit(
        self,
        graphs: list[RelationGraph],
        labels: Labels,
        label_column: str,
        views: list[tuple[str, str]],
        pictures: tuple[Index, Index],
        work: _Work,
    ) -> RelationReport:
        """The story of the chapter on graphs that were read and checked."""
        config = self.config
        if not work.quiet:
            for line in _estimate(graphs, config):
                say(line)
        reference = reference_rows(len(graphs[0]), config)
        found = [_score(graph, reference, replace(work, name=str(k))) for k, graph in enumerate(graphs)]
        for one in found:
            one.near = replace(one.near, group=joined(one.near.group, *pictures))
        about: dict[str, Any] = {"checkpoints": [one.about for one in found], "processes": distributed.world_size()}
        relation = np.mean([one.noise.scores for one in found], axis=0)
        posterior, about["columns"] = _posterior(graphs, labels, found)
        about["noise_rate"] = float(posterior.wrong.sum() / (labels.codes >= 0).sum())
        about["mixture"] = {name: getattr(posterior, name) for name in ("beta", "gamma", "offset", "slope")}
        score = posterior.wrong if config.score == "combined" else relation
        named = labels.codes >= 0
        if config.cut == "algorithm4":
            noisy, rule = _ensemble_set(relation, [one.noise for one in found], config), "algorithm4"
        else:
            estimated = config.cut == "estimated"
            share = most_expected_f1(posterior.wrong[named]) / named.sum() if estimated else float(config.cut)
            noisy, rule = flag(score, labels.codes, "share", share), "estimated" if estimated else "noise_rate"
        about["cut"] = {"rule": rule, "value": float(noisy.sum() / named.sum())}
        outlier = np.mean([one.outlier for one in found], axis=0)
        odd, level = is_outlier(outlier, config.outlier_share)
        report = RelationReport(
            config=config,
            label_column=label_column,
            columns=views,
            label_values=labels.values,
            label_names=labels.names,
            labels=labels.codes,
            label_noise_score=score,
            is_label_error=noisy,
            suggested_label=np.where(noisy, posterior.other, labels.codes),
            other_label=posterior.other,
            outlier_score=outlier,
            is_outlier=odd,
            outlier_level=level,
            group=_common([one.near.group for one in found]),
            reference=[Reference.of(graph, reference, *view) for graph, view in zip(graphs, views, strict=True)],
            parts={"combined": posterior.wrong, "label_noise": relation},
            about=about,
        )
        report.attach(graphs)
        return report


@dataclass
class _Scores:
    noise: LabelNoise
    near: Neighbours
    outlier: NDArray[np.float64]
    about: dict[str, Any]


@dataclass
class _Work:
    """Where the unfinished passes of one checkpoint are kept, and whether bars are shown."""

    folder: Path | None
    name: str
    quiet: bool

    def keep(self, graph: RelationGraph, step: str, *rows: Index) -> PassCheckpoint | None:
        """A checkpoint for one pass over `graph`; another data set, setting or subsets of rows start afresh."""
        if self.folder is None:
            return None
        split = f"{distributed.rank()}-of-{distributed.world_size()}"
        subsets = " ".join(hashlib.blake2b(part.tobytes(), digest_size=16).hexdigest() for part in rows)
        return PassCheckpoint(
            self.folder / f"{self.name}-{step}-{split}.safetensors", {**graph.key, "process": split, "rows": subsets}
        )


def _score(graph: RelationGraph, reference: Index, work: _Work) -> _Scores:
    """Label noise of all rows and who is near whom, in partitions if asked, and outlier scores."""
    config = graph.config
    parts = partitions(len(graph), config)
    whole = len(parts) == 1
    outside = ReferenceSums(len(graph), reference, config.outlier_temperature) if whole else None
    solved = []
    for k, part in enumerate(parts):
        sub = graph if whole else graph.select(part)
        solved.append(_cut(sub, _Work(work.folder, f"{work.name}-{k}", work.quiet or not whole), outside))
    noises, nears = [one for one, _ in solved], [one for _, one in solved]
    noise = noises[0] if whole else _joined(parts, noises, len(graph))
    about = {
        "objective": float(sum(one.objective for one in noises)),
        "threshold": noise.threshold,
        "passes": max(one.passes for one in noises),
        "stopped": sorted({one.stopped for one in noises}),
        "noisy": int(noise.noisy.sum()),
        "partitions": len(parts),
    }
    if outside:
        outlier = scores_of(outside.sums.total(graph.device), config)
    else:
        outlier = outlier_scores(graph, reference, checkpoint=work.keep(graph, "outlier", reference), quiet=work.quiet)
    return _Scores(noise, nears[0] if whole else apart(parts, nears, len(graph)), outlier, about)


def _cut(graph: RelationGraph, work: _Work, outside: ReferenceSums | None) -> tuple[LabelNoise, Neighbours]:
    """One pass over all pairs, then Algorithm 4 on the labelled rows; w = -r."""
    nearest = graph.nearest_rows()
    kept = work.keep(graph, "sums")
    initial = -graph.relation_sums(kept, nearest=nearest, outside=outside, quiet=work.quiet)
    calls = iter(range(10**9))
    named = np.arange(len(graph)) if graph.labels is None else np.flatnonzero(graph.labels >= 0)

    def subset_sums(some: Index) -> NDArray[np.float64]:
        rows = named[some]
        kept = work.keep(graph, f"cut{next(calls)}", rows)
        return -graph.sums_against(rows, checkpoint=kept, quiet=work.quiet)[named]

    found, near = find_label_noise(initial[named], subset_sums, graph.config), nearest.result(graph.device)
    if len(named) < len(graph):
        scores, noisy = np.zeros(len(graph)), np.zeros(len(graph), bool)
        scores[named], noisy[named] = found.scores, found.noisy
        found.scores, found.noisy = scores, noisy
    return found, near


def _joined(parts: list[Index], solved: list[LabelNoise], count: int) -> LabelNoise:
    """Scores of all partitions, each put on the scale of one row's share of its partition's size."""
    scores, noisy = np.zeros(count), np.zeros(count, bool)
    for part, one in zip(parts, solved, strict=True):
        scores[part] = one.scores * (count / len(part))
        noisy[part] = one.noisy
    level = float(np.mean([one.threshold * count / len(part) for part, one in zip(parts, solved, strict=True)]))
    stopped = "skipped" if all(one.stopped == "skipped" for one in solved) else "converged"
    return LabelNoise(scores, noisy, level, stopped=stopped)


def _common(groups: list[Index]) -> Index:
    """Rows are copies where every checkpoint says so; each group is named by its smallest row."""
    _, first, place = np.unique(np.stack(groups, axis=1), axis=0, return_index=True, return_inverse=True)
    return np.asarray(first[place.reshape(-1)], np.int64)


def _posterior(graphs: list[RelationGraph], labels: Labels, found: list[_Scores]) -> tuple[Posterior, dict[str, Any]]:
    """What nearest rows and model say of every label, and how labels and columns of probabilities were put together."""
    probs = [graph.probs for graph in graphs if graph.probs is not None]
    columns, matched = prob_columns(labels, probs[0]) if probs else (None, False)
    about = {"matched": matched, "columns": [] if columns is None else columns.tolist()}
    near = [one.near for one in found]
    return label_posterior(labels.codes, len(labels.values), near, probs if about["columns"] else [], columns), about


def _ensemble_set(scores: NDArray[np.float64], noise: list[LabelNoise], config: RelationConfig) -> NDArray[np.bool_]:
    """N; with several checkpoints of the mean scores: above the mean lambda of those that formed a set, bounded as each is."""
    if len(noise) == 1:
        return noise[0].noisy
    levels = [one.threshold for one in noise if one.stopped != "skipped"]
    if not levels:
        return np.zeros(len(scores), bool)
    return top_share(scores, config.max_noisy_share, float(np.mean(levels)))[0]


def _estimate(graphs: list[RelationGraph], config: RelationConfig) -> list[str]:
    """One line per job: rows, bytes, seconds."""
    graph, count = graphs[0], len(graphs[0])
    part = min(config.partition_size or count, count)
    reference = min(config.outlier_reference or count, count)
    tiles = count * part * (0.75 + config.max_noisy_share * 0.3) + count * reference  # sums and nearest, cuts, outliers
    seconds = len(graphs) * graph.seconds_per_tile() * tiles / graph.tile_rows**2 / distributed.world_size()
    width = graph.features.width + (graph.probs.width if graph.probs else 0)
    return [
        f"Relation graph: {count:,} rows x {width:,} numbers ({count * width * 4 / 1e6:,.0f} MB, read where they lie)"
        + (f", {len(graphs)} checkpoints" if len(graphs) > 1 else "")
        + f"; {graph.nbytes / 1e6:,.0f} MB of working memory; about {max(seconds, 1):,.0f} s"
        + (f" on each of {distributed.world_size()} processes" if distributed.world_size() > 1 else "")
    ]


def _views(features: str | Sequence[str], probs: str | Sequence[str]) -> list[tuple[str, str]]:
    left, right = (
        check_each(name, [given] if isinstance(given, str) else given, check_text, empty=False)
        for name, given in (("features_column", features), ("probs_column", probs))
    )
    if not left or len(left) != len(right):
        raise ValueError(
            f"features_column names {len(left)} columns and probs_column {len(right)}; give one of each per checkpoint"
        )
    return list(zip(left, right, strict=True))


def _unfit(dataset: Any, label_column: str, views: list[tuple[str, str]], config: RelationConfig) -> dict[int, str]:
    """Rows at fault; none where the columns themselves are missing."""
    wanted = {label_column, *(view[0] for view in views), *(view[1] for view in views if config.compatibility)}
    return {} if wanted - set(dataset.column_names) else unfit_rows(dataset, label_column, views, config)


def _without_unfit(
    dataset: Any, label_column: str, views: list[tuple[str, str]], config: RelationConfig
) -> tuple[Any, dict[int, str]]:
    """The rows that can be related, and why the others cannot."""
    skipped = _unfit(dataset, label_column, views, config)
    if not skipped:
        return dataset, {}
    row, why = next(iter(skipped.items()))
    logger.warning(
        "%d of %d rows cannot be related and are left out, first row %d, which %s", len(skipped), len(dataset), row, why
    )
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), list(skipped))), skipped


def _with_row(
    error: ValueError, dataset: Any, label_column: str, views: list[tuple[str, str]], config: RelationConfig
) -> ValueError:
    """The error, with the first row at fault where rows are at fault."""
    unfit = _unfit(dataset, label_column, views, config)
    if not unfit:
        return error
    row, why = next(iter(unfit.items()))
    first = "" if f"row {row} " in str(error) else f"row {row} {why}; "
    return ValueError(f"{error} ({first}on_error='skip' leaves such rows out, {len(unfit)} of {len(dataset)})")
