"""Class probabilities out of sample, from features alone: a logistic probe for each fold, all copies of a row in one fold.

A model that was fitted to wrong labels says that they are right, and the more so the longer it was trained; the same is true of
a copy of the row among the training rows. What is asked of a label must not have seen it. With features of a model that was
not trained on these labels (self-supervised, CLIP, sentence embeddings) the probe is all that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..decoding import OnError, check_on_error
from ..progress import bar
from ..seeding import generator
from ..settings import check_array, check_dataset, check_flag, check_int, check_number, check_text, optional
from .config import RelationConfig
from .graph import RelationGraph
from .labels import read_labels
from .picture_copies import joined, picture_pairs
from .rows import Rows, check_new_column, rows_of_column
from .unfit import unfit_rows

Index = NDArray[np.int64]
Vector = NDArray[np.float64]
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # tried in this order while the held-out rows gain
_PASSES = 200
_COPIES = "copies"


def out_of_sample_probs(
    dataset: Any,
    label_column: str = "label",
    *,
    features_column: str = "features",
    probs_column: str = "probs",
    folds: int = 4,
    groups: Sequence[int] | str | None = _COPIES,
    strength: float | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
    quiet: bool = False,
) -> Any:
    """The dataset with class probabilities that no row's own label had a say in.

    Args:
        dataset: a `datasets.Dataset` with a feature column, rows of d numbers.
        label_column: as `RelationCleaner.fit` reads it; unlabelled rows get probabilities and are not learned from.
        features_column: what the probe reads.
        probs_column: name of the new column.
        folds: the rows are dealt to so many parts, class by class; each gets the probabilities of a probe that was fitted to
            the others, >= 2.
        groups: (n,) integers; rows of one number come into one fold and count as one row together (patients, or
            `report.group`). `"copies"`: near duplicates, found by a pass over all pairs; None: every row by itself.
        strength: ridge penalty on features of mean 0 and mean variance 1, > 0; default the one of `STRENGTHS` with the
            least log loss on the first fold.
        seed: deals the rows.
        on_error: "skip" gives rows without features, or with a number that is no class, NaN, which
            `RelationCleaner.fit(on_error="skip")` leaves out.
        quiet: no progress bar.

    Returns:
        The dataset with `probs_column`, float32, one probability for each label value as the cleaner numbers them: the classes
        of a `ClassLabel`, else the values in order.

    Raises:
        ValueError: no such columns, a column of that name already, unfit labels or features, fewer groups than folds.

    Source: the protocol of sections 5.2 and 5.4 has probabilities of a network trained on the noisy labels.
    Differs: not in the dissertation.
    Cost: 4 n d bytes; folds + 6 fits of up to 200 passes of 4 n d C operations; `"copies"`: half of f f^T, n^2 d.

    Example:
        >>> from datasets import Dataset
        >>> points = np.repeat(np.eye(3), 8, axis=0) + np.random.default_rng(0).normal(scale=0.1, size=(24, 3))
        >>> data = Dataset.from_dict({"features": points, "label": ["ape"] * 8 + ["bee"] * 8 + ["cat"] * 8})
        >>> np.argmax(out_of_sample_probs(data, quiet=True)["probs"][:], axis=1).tolist() == [0] * 8 + [1] * 8 + [2] * 8
        True
    """
    check_dataset("dataset", dataset)
    count = len(dataset)
    for name, text in (("label_column", label_column), ("features_column", features_column)):
        check_text(name, text, empty=False)
    check_new_column("probs_column", probs_column, dataset)
    folds, seed = check_int("folds", folds, 2), check_int("seed", seed, 0)
    strength = optional(check_number, "strength", strength, 0, above=True)
    quiet = check_flag("quiet", quiet)
    check_on_error(on_error)
    given = (
        None if groups is None or isinstance(groups, str) else check_array("groups", groups, 1, kinds="iu", rows=count)
    )
    if given is None and groups not in (None, _COPIES):
        raise ValueError(f"groups must be 'copies', None or one integer a row, got {groups!r}")
    config, whole, kept = RelationConfig(compatibility=False, seed=seed), dataset, np.arange(count)
    if on_error == "skip" and features_column in dataset.column_names and label_column in dataset.column_names:
        kept = np.setdiff1d(kept, list(unfit_rows(dataset, label_column, [(features_column, "")], config)))
        dataset = dataset if len(kept) == count else dataset.select(kept)
    labels, features = read_labels(dataset, label_column), rows_of_column(dataset, features_column)
    graph = RelationGraph(features, None, labels.codes, config)  # checks the features
    group = kept if given is None else given[kept].astype(np.int64)
    if groups is not None and given is None:
        nearest = graph.nearest_rows()
        graph.relation_sums(nearest=nearest, quiet=quiet)
        group = joined(nearest.result(graph.device).group, *picture_pairs(dataset, seed))
    found = fold_probs(features, labels.codes, len(labels.values), group, folds, strength, seed=seed, quiet=quiet)
    probs = np.full((count, found.shape[1]), np.nan, np.float32)
    probs[kept] = found
    return _with_column(whole, probs_column, probs)


def fold_probs(
    features: Rows,
    labels: Index,
    classes: int,
    group: Index,
    folds: int,
    strength: float | None = None,
    *,
    seed: int = 0,
    quiet: bool = False,
) -> NDArray[np.float32]:
    """(n, classes) probabilities of the probes; see `out_of_sample_probs`."""
    fold = deal(labels, group, folds, seed)
    probe = _Probe(features, labels, classes, _once(group))
    found = np.empty((len(labels), classes), np.float32)
    with bar(folds, "Logistic probe", unit="fold", disable=quiet) as progress:
        for k in range(folds):
            out = fold == k
            if strength is None:
                weights, strength = probe.best(~out)
            else:
                weights = probe.fit(~out, strength)
            found[out] = probe.say(weights, out)
            progress.update()
    return found


def deal(labels: Index, group: Index, folds: int, seed: int) -> Index:
    """Which fold each row is in: groups in random order, class by class (of their first row), dealt out one by one.

    Raises:
        ValueError: fewer groups than folds.
    """
    _, first, place = np.unique(group, return_index=True, return_inverse=True)
    if len(first) < folds:
        raise ValueError(f"{folds} folds need as many groups of rows, got {len(first)}; give fewer folds")
    order = torch.randperm(len(first), generator=generator(seed, epoch=3)).numpy()
    order = order[np.argsort(labels[first[order]], kind="stable")]
    fold = np.empty(len(first), np.int64)
    fold[order] = np.arange(len(first)) % folds
    return fold[place]


def _once(group: Index) -> Vector:
    """One over the size of a row's group; a caller numbers groups as they like, below 0 or beyond the rows too."""
    _, place, sizes = np.unique(group, return_inverse=True, return_counts=True)
    return np.asarray(1 / sizes[place])


class _Probe:
    """Multinomial logistic regression with a ridge, on rows that are read and scaled once."""

    def __init__(self, features: Rows, labels: Index, classes: int, once: Vector) -> None:
        rows = np.empty((len(features), features.width), np.float32)
        features.take(np.arange(len(features)), rows)
        rows -= rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        rows /= max(np.sqrt(np.einsum("ij,ij->", rows, rows, dtype=np.float64) / rows.size), 1e-12)
        self.rows, self.classes = torch.from_numpy(rows), classes
        self.labels, self.counts = torch.from_numpy(np.maximum(labels, 0)), np.where(labels < 0, 0, once)

    def fit(self, rows: NDArray[np.bool_], strength: float, start: Vector | None = None) -> Vector:
        """(d + 1) C weights with the least mean log loss over `rows` plus strength / 2 of their squares, biases left out."""
        from scipy.optimize import minimize

        width, counts = self.rows.shape[1], torch.from_numpy(self.counts * rows).float()
        counts /= counts.sum()

        def cost(flat: Vector) -> tuple[float, Vector]:
            weights = torch.from_numpy(flat).view(width + 1, self.classes)
            logits = self.rows @ weights[:-1].float() + weights[-1].float()
            spread = logits.log_softmax(dim=1)
            loss = -(counts * spread.gather(1, self.labels[:, None])[:, 0]).sum(dtype=torch.float64)
            error = spread.exp_()
            error[torch.arange(len(error)), self.labels] -= 1
            error *= counts[:, None]
            inner = (error.T @ self.rows).T.double()  # six times as fast as rows.T @ error
            slope = torch.cat([inner + strength * weights[:-1], error.sum(dim=0).double()[None]])
            return float(loss + strength / 2 * (weights[:-1] ** 2).sum()), slope.flatten().numpy()

        begin = np.zeros((width + 1) * self.classes) if start is None else start
        options = {"maxiter": _PASSES, "gtol": 1e-4, "ftol": 1e-7}
        return np.asarray(minimize(cost, begin, jac=True, method="L-BFGS-B", options=options).x)

    def best(self, rows: NDArray[np.bool_]) -> tuple[Vector, float]:
        """The fit to `rows` whose strength does best on the others, from strong to weak while they gain; and the strength."""
        least, kept, weights = np.inf, (np.empty(0), STRENGTHS[0]), None
        for strength in STRENGTHS:
            weights = self.fit(rows, strength, weights)
            said = self.say(weights, ~rows)
            own = said[np.arange(len(said)), self.labels.numpy()[~rows]]
            loss = float(-(self.counts[~rows] * np.log(np.maximum(own, 1e-12))).sum())
            if loss >= least:
                break
            least, kept = loss, (weights, strength)
        return kept

    def say(self, weights: Vector, rows: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Probabilities of some rows."""
        table = torch.from_numpy(weights).view(-1, self.classes).float()
        return (self.rows[torch.from_numpy(rows)] @ table[:-1] + table[-1]).softmax(dim=1).numpy()


def _with_column(dataset: Any, name: str, values: NDArray[np.float32]) -> Any:
    """The dataset with one more column of lists of one length."""
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets

    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return concatenate_datasets([dataset, Dataset(pa.table({name: lists}))], axis=1)
