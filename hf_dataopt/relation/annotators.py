"""Several annotators: one label a row out of their votes, how sure it is, and how good each of them is.

The likeliest class of a row has prior times votes: P(class | row) prod_a P(vote of a | class). What an annotator says of each
class is estimated together with the classes (Dawid and Skene 1979, expectation maximisation), drawn to what all annotators say
of it where an annotator has few votes. The prior is the share of the classes, or what a model says that has not seen the votes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..settings import check_dataset, check_each, check_text, optional
from .labels import Index, one_coding, prob_columns, values_of
from .rows import check_new_column, rows_of_column

Vector = NDArray[np.float64]
_PASSES = 100
_STILL = 1e-6  # largest change of a probability that ends the passes
_DRAWN = 20.0  # votes that what all annotators say of a class counts for, for each of them


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """What `consensus_labels` found.

    Args:
        dataset: the dataset with the consensus as one more column, and its probability as another.
        label_names: what each class is called.
        quality: by annotator, the expected share of right votes, [0, 1].
        votes: by annotator, how many rows have one.
        confusion: by annotator, (classes, classes) float64: P(vote | class), rows sum to 1.
    """

    dataset: Any
    label_names: list[str]
    quality: dict[str, float]
    votes: dict[str, int]
    confusion: dict[str, Vector]


def consensus_labels(
    dataset: Any,
    annotator_columns: Sequence[str],
    *,
    label_column: str = "label",
    probability_column: str = "label_probability",
    probs_column: str | None = None,
) -> Consensus:
    """One label a row out of several annotators' votes.

    Args:
        dataset: a `datasets.Dataset` with one column of votes for each annotator: classes as in a label column, -1 or None
            where an annotator did not vote.
        annotator_columns: their names, at least two; all of one kind.
        label_column: new column of the likeliest class; -1 or None in rows without any vote.
        probability_column: new column of its probability, 0 in rows without any vote.
        probs_column: (n, C) class probabilities of a model, as the prior of each row; best from `out_of_sample_probs` on a
            first consensus without it. Default: the shares of the classes.

    Returns:
        A `Consensus`. Its dataset goes on to `RelationCleaner.fit`.

    Raises:
        ValueError: missing columns, columns of those names already, classes that differ between annotators, or probabilities
            with fewer columns than classes.

    Source: Dawid and Skene 1979, with a model as prior (compare CROWDLAB, Goh et al. 2022); not in the dissertation.
    Cost: up to 100 passes of n A C operations; 8 n (A + 2 C) bytes.

    Example:
        >>> from datasets import Dataset
        >>> votes = {"ann": ["cat", "dog", "dog"], "bo": ["cat", "dog", None], "cy": ["dog", "dog", "dog"]}
        >>> consensus_labels(Dataset.from_dict(votes), ["ann", "bo", "cy"]).dataset["label"][:]
        ['cat', 'dog', 'dog']
    """
    from datasets import Value

    check_dataset("dataset", dataset)
    names = check_each("annotator_columns", annotator_columns, check_text, least=2, empty=False)
    for option, name in (("label_column", label_column), ("probability_column", probability_column)):
        check_new_column(option, name, dataset)
    if len(set(names)) < len(names) or label_column == probability_column:
        raise ValueError(f"columns must differ, got {[*names, label_column, probability_column]}")
    optional(check_text, "probs_column", probs_column, empty=False)
    coded, feature = one_coding(dataset, list(names))
    votes, classes = np.stack([one.codes for one in coded], axis=1), len(coded[0].values)
    said = None
    if probs_column is not None:
        rows = rows_of_column(dataset, probs_column)
        majority = coded[0].with_codes(_first(votes, classes))
        columns, _ = prob_columns(majority, rows)
        if columns is None:
            raise ValueError(f"{probs_column!r} has {rows.width} columns for {classes} classes; give one for each")
        given = np.empty((len(rows), rows.width), np.float32)
        rows.take(np.arange(len(rows)), given)
        said = given[:, columns].astype(np.float64) + 1e-6
        if not np.isfinite(said).all() or (said <= 0).any():
            raise ValueError(f"{probs_column!r} holds NaN, infinite or negative values; give probabilities")
        said /= said.sum(axis=1, keepdims=True)
    after, table = _agree(votes, classes, said)
    asked = (votes >= 0).any(axis=1)
    best = np.where(asked, after.argmax(axis=1), -1)
    named = {name: votes[:, k] >= 0 for k, name in enumerate(names)}
    right = {name: after[mask, votes[mask, k]] for k, (name, mask) in enumerate(named.items())}
    return Consensus(
        dataset=(
            dataset.with_format(None)
            .add_column(label_column, values_of(best, coded[0].values), feature=feature)
            .add_column(probability_column, np.where(asked, after.max(axis=1), 0), feature=Value("float64"))
        ),
        label_names=coded[0].names,
        quality={name: float(one.mean()) if len(one) else float("nan") for name, one in right.items()},
        votes={name: int(mask.sum()) for name, mask in named.items()},
        confusion={name: table[k] for k, name in enumerate(names)},
    )


def _first(votes: Index, classes: int) -> Index:
    """The class with the most votes, -1 without any."""
    counts = _counts(votes, classes)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), -1)


def _counts(votes: Index, classes: int) -> Vector:
    counts = np.zeros((len(votes), classes))
    for one in votes.T:
        rows = np.flatnonzero(one >= 0)
        counts[rows, one[rows]] += 1
    return counts


def _agree(votes: Index, classes: int, said: Vector | None) -> tuple[Vector, Vector]:
    """(n, classes) probabilities of the classes, and (annotators, classes, classes) of votes given the class."""
    counts = _counts(votes, classes)
    after = (counts + (1 / classes if said is None else said)) / (counts.sum(axis=1, keepdims=True) + 1)
    table = np.empty((votes.shape[1], classes, classes))
    for _ in range(_PASSES):
        heard = np.stack([_heard(one, after, classes) for one in votes.T])
        pooled = heard.sum(axis=0) + np.eye(classes) + 1 / classes
        pooled /= pooled.sum(axis=1, keepdims=True)
        table = heard + _DRAWN * pooled
        table /= table.sum(axis=2, keepdims=True)
        logs = np.log(after.mean(axis=0) + 1e-12) + np.zeros_like(after) if said is None else np.log(said)
        for one, says in zip(votes.T, table, strict=True):
            rows = np.flatnonzero(one >= 0)
            logs[rows] += np.log(says[:, one[rows]]).T
        before, after = after, np.exp(logs - logs.max(axis=1, keepdims=True))
        after /= after.sum(axis=1, keepdims=True)
        if np.abs(after - before).max() < _STILL:
            break
    return after, table


def _heard(votes: Index, after: Vector, classes: int) -> Vector:
    """(classes, classes) expected votes of one annotator, [class, vote]."""
    rows = np.flatnonzero(votes >= 0)
    found = np.zeros((classes, classes))
    np.add.at(found.T, votes[rows], after[rows])
    return found
