"""Chapter 5 from top to bottom: relate every row to every other, cut the graph, score label errors and outliers.

The kernel is in `kernel.py` (Eqs. 5.1, 5.4, 5.5), the tiled sums in `graph.py`, Algorithm 4 in `label_noise.py`, the
outlier score in `outlier.py`; what comes out, and why a row is flagged, in `report.py`.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .. import distributed
from ..checkpoint import PassCheckpoint, locked
from ..decoding import check_on_error
from ..progress import say
from ..publishing.writer import check_target
from ..seeding import generator
from ..settings import check_dataset, check_device, check_each, check_flag, check_kind, check_path, check_text, optional
from .combined import neighbour_margin, prob_columns, ranks, unary_scores
from .config import RelationConfig
from .graph import RelationGraph
from .graphs import graphs_of
from .label_noise import LabelNoise, find_label_noise, top_share
from .labels import Labels, read_labels
from .outlier import Reference, is_outlier, outlier_scores, reference_rows
from .report import RelationReport
from .saved import KIND, UNFINISHED
from .suggestion import suggest
from .unfit import summary_of, unfit_rows

logger = logging.getLogger(__name__)
Index = NDArray[np.int64]
_NO_ROWS = (
    "use Dataset.from_dict(...); an IterableDataset has no row numbers: fit a sample of it, then stream through "
    "report.score_outliers(iterable)"
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

    def __init__(self, config: RelationConfig | None = None, **fields: Any) -> None:
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
        """Build the graph over all rows and score them.

        Args:
            dataset: a `datasets.Dataset` with a feature column (rows of d numbers) and a probability column (rows of
                C numbers), as `FeatureExtractor` adds them or from anywhere else. Read from memory-mapped Arrow.
            label_column: `ClassLabel`, integers or texts.
            features_column, probs_column: one name, or one per checkpoint: scores are then averaged (Table 5.5) and
                relation maps drawn over the checkpoints (section 5.3.6).
            output_dir: finished stripes are kept here, and a killed run goes on from them; the report is saved here. One
                job at a time: the folder is locked.
            on_error: "skip" leaves rows that cannot be related out and counts them in `report.summary["skipped"]`; the
                report is then about `report.fitted(dataset)`.
            quiet: no estimate, no progress bars.

        Returns:
            A `RelationReport`.

        Raises:
            ValueError: missing columns; rows of different length; NaN, infinite or zero features; `probs` that are no
                probabilities; multi-label, regression, missing, negative or single-class labels. The first row at fault
                is named.
            TypeError: not a map-style `datasets.Dataset`.
            FolderInUseError: another job writes to `output_dir`.

        Source: Algorithm 4, section 5.3.3; Table 5.5 for several checkpoints (plain mean of the scores).
        Cost: per checkpoint n^2 (d + C) operations for the sums (half of f f^T + p p^T), 2 n m (d + C) for the outlier
            scores against m rows, `max_memory_gb` of working memory; with `partition_size=k` n k (d + C).
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
            report = self._fit(graphs, labels, label_column, views, work, quiet)
            if skipped:
                report.summary["skipped"] = summary_of(skipped)
            if folder is not None and distributed.is_main_process():
                report.save(folder)
                shutil.rmtree(work or "", ignore_errors=True)
            return report

    def _fit(
        self,
        graphs: list[RelationGraph],
        labels: Labels,
        label_column: str,
        views: list[tuple[str, str]],
        work: Path | None,
        quiet: bool,
    ) -> RelationReport:
        """The story of the chapter on graphs that were read and checked."""
        config = self.config
        if not quiet:
            for line in _estimate(graphs, config):
                say(line)
        reference = reference_rows(len(graphs[0]), config)
        found = [_score(graph, reference, _Work(work, str(k), quiet)) for k, graph in enumerate(graphs)]
        noise = [result.noise for result in found]
        scores = np.mean([one.scores for one in noise], axis=0)
        noisy = noise[0].noisy if len(noise) == 1 else _ensemble_set(scores, noise, config)
        parts: dict[str, NDArray[np.float64]] = {}
        if config.score == "combined":
            places = prob_columns(labels, graphs[0])
            scores, noisy, parts = _combine(graphs, places, scores, _Work(work, "neighbours", quiet))
        outlier = np.mean([result.outlier for result in found], axis=0)
        flagged, level = is_outlier(outlier, config.outlier_share)
        report = RelationReport(
            config=config,
            label_column=label_column,
            columns=views,
            label_values=labels.values,
            label_names=labels.names,
            labels=labels.codes,
            label_noise_score=scores,
            is_label_error=noisy,
            suggested_label=_suggest(graphs, noisy, labels.codes, _Work(work, "votes", quiet)),
            outlier_score=outlier,
            is_outlier=flagged,
            outlier_level=level,
            reference=[Reference.of(graph, reference, *view) for graph, view in zip(graphs, views, strict=True)],
            parts=parts,
            summary={"checkpoints": [result.about for result in found], "processes": distributed.world_size()},
        )
        report.attach(graphs)
        return report


@dataclass
class _Scores:
    noise: LabelNoise
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

    def votes(self, graph: RelationGraph, number: int, voters: Index, rows: Index) -> PassCheckpoint | None:
        """A checkpoint for the votes on some rows."""
        return self.keep(graph, f"{number}-{int(rows[0])}", voters, rows)


def _score(graph: RelationGraph, reference: Index, work: _Work) -> _Scores:
    """Label noise of all rows, in partitions if asked, and outlier scores."""
    config = graph.config
    parts = _partitions(len(graph), config)
    solved = []
    for k, part in enumerate(parts):
        sub = graph if len(parts) == 1 else graph.select(part)
        solved.append(_cut(sub, _Work(work.folder, f"{work.name}-{k}", work.quiet or len(parts) > 1)))
    noise = solved[0] if len(parts) == 1 else _joined(parts, solved, len(graph))
    about = {
        "objective": float(sum(one.objective for one in solved)),
        "threshold": noise.threshold,
        "passes": max(one.passes for one in solved),
        "stopped": sorted({one.stopped for one in solved}),
        "noisy": int(noise.noisy.sum()),
        "partitions": len(parts),
    }
    kept = work.keep(graph, "outlier", reference)
    return _Scores(noise, outlier_scores(graph, reference, checkpoint=kept, quiet=work.quiet), about)


def _cut(graph: RelationGraph, work: _Work) -> LabelNoise:
    """Algorithm 4 on one graph; w = -r."""
    initial = -graph.relation_sums(work.keep(graph, "sums"), quiet=work.quiet)
    calls = iter(range(10**9))

    def subset_sums(rows: Index) -> NDArray[np.float64]:
        return -graph.sums_against(rows, checkpoint=work.keep(graph, f"cut{next(calls)}", rows), quiet=work.quiet)

    return find_label_noise(initial, subset_sums, graph.config)


def _partitions(count: int, config: RelationConfig) -> list[Index]:
    """Random parts of nearly equal size, at most `partition_size` rows each (section 5.3.2, complexity analysis)."""
    size = config.partition_size
    if size is None or size >= count:
        return [np.arange(count)]
    order = torch.randperm(count, generator=generator(config.seed, epoch=1)).numpy()
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, -(-count // size))]


def _joined(parts: list[Index], solved: list[LabelNoise], count: int) -> LabelNoise:
    """Scores of all partitions, each put on the scale of one row's share of its partition's size."""
    scores, noisy = np.zeros(count), np.zeros(count, bool)
    for part, one in zip(parts, solved, strict=True):
        scores[part] = one.scores * (count / len(part))
        noisy[part] = one.noisy
    level = float(np.mean([one.threshold * count / len(part) for part, one in zip(parts, solved, strict=True)]))
    stopped = "skipped" if all(one.stopped == "skipped" for one in solved) else "converged"
    return LabelNoise(scores, noisy, level, stopped=stopped)


def _combine(
    graphs: list[RelationGraph], places: Index, relation: NDArray[np.float64], work: _Work
) -> tuple[NDArray[np.float64], NDArray[np.bool_], dict[str, NDArray[np.float64]]]:
    """The combined score, the rows it flags, and the ranks it is made of.

    Flagged are rows that model and nearest rows would both label otherwise (in most checkpoints), the worst
    `max_noisy_share` of all rows at most.
    """
    config = graphs[0].config
    found = [
        _combined_parts(graph, places, _Work(work.folder, f"{work.name}-{k}", work.quiet))
        for k, graph in enumerate(graphs)
    ]
    parts = {name: np.mean([one[name] for one, _ in found], axis=0) for name in found[0][0]}
    scores = np.mean(list(parts.values()), axis=0)
    noisy = np.mean([disagreed for _, disagreed in found], axis=0) > 0.5
    kept = np.argsort(np.where(noisy, -scores, 1.0), kind="stable")[: int(config.max_noisy_share * len(scores))]
    bounded = np.zeros_like(noisy)
    bounded[kept] = noisy[kept]
    return scores, bounded, {**parts, "relation": ranks(relation)}


def _combined_parts(
    graph: RelationGraph, places: Index, work: _Work
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.bool_]]:
    """The ranks of one checkpoint, neighbours within the partition."""
    loss, margin = unary_scores(graph, places)
    nearest = np.empty(len(graph))
    parts = _partitions(len(graph), graph.config)
    for k, part in enumerate(parts):
        sub = graph if len(parts) == 1 else graph.select(part)
        kept = work.keep(sub, str(k))
        nearest[part] = neighbour_margin(
            sub, graph.config.neighbours, checkpoint=kept, quiet=work.quiet or len(parts) > 1
        )
    return {"loss": ranks(loss), "margin": ranks(margin), "neighbours": ranks(nearest)}, (margin > 0) & (nearest > 0)


def _ensemble_set(scores: NDArray[np.float64], noise: list[LabelNoise], config: RelationConfig) -> NDArray[np.bool_]:
    """N of the mean scores: above the mean lambda of the checkpoints that formed a set, bounded as each of them is."""
    levels = [one.threshold for one in noise if one.stopped != "skipped"]
    if not levels:
        return np.zeros(len(scores), bool)
    return top_share(scores, config.max_noisy_share, float(np.mean(levels)))[0]


def _suggest(graphs: list[RelationGraph], noisy: NDArray[np.bool_], labels: Index, work: _Work) -> Index:
    """Suggestions for the rows of N, from their own partition."""
    parts = _partitions(len(labels), graphs[0].config)
    if len(parts) == 1:
        return suggest(graphs, noisy, labels, keep=work.votes, quiet=work.quiet)
    suggested = labels.copy()
    for k, part in enumerate(parts):
        subs = [graph.select(part) for graph in graphs]
        kept = _Work(work.folder, f"{work.name}-{k}", True).votes
        suggested[part] = suggest(subs, noisy[part], labels[part], keep=kept, quiet=True)
    return suggested


def _estimate(graphs: list[RelationGraph], config: RelationConfig) -> list[str]:
    """One line per job: rows, bytes, seconds."""
    graph, count = graphs[0], len(graphs[0])
    part = min(config.partition_size or count, count)
    reference = min(config.outlier_reference or count, count)
    tiles = (
        count * part * (0.5 + 2 * config.max_noisy_share * 0.3) + count * reference
    )  # sums, cuts and votes, outliers
    tiles += count * part if config.score == "combined" else 0
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
