"""`score="combined"`: the probability that a given label is wrong, from what the model and the nearest rows say of it.

Not in the dissertation. Both opinions are shares over the classes; their mean P is taken for a blunt or sharp version of the
truth, and how blunt, and how many labels are wrong where P is sure and where it is not, is fitted to the given labels alone:

    a right label follows P^beta, a wrong one P^gamma among the other classes,
    the share of wrong labels is e = sigmoid(offset + slope logit(max P)).

Copies count once: a row with g copies has 1/g of a vote in all that is fitted, and a model that agrees with the label of
such a row may have learned it from them, and counts 1/g too.

Four numbers for a data set, found by maximum likelihood; the voters' labels are then replaced by what was found and the fit
is done once more. Both opinions lean to large classes: a right label of a class well below its even share follows
P^beta exp(lift) with one lift >= 0 a class, fitted too, and how little is known of it, three standard deviations, speaks for
labels of that class. Chosen on half of the rows of CIFAR-10N and VADER tweets, for small classes on CIFAR-10 rows
20,000-29,999, reported on the others (`benchmarks/relation_labels.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .nearest import Neighbours
from .rows import Rows

Index = NDArray[np.int64]
Vector = NDArray[np.float64]
Shares = NDArray[np.float64]
BETA = 1.85  # expected sharpness of the shares of nearest rows and model; see `_fit`
SMALL = 0.67  # of the even share of a class: below it a class has a lift
DOUBT = 3.0  # standard deviations of a lift that are added for labels of the class itself
FITTED = 1 << 18  # numbers of P that the fit reads at most, from rows drawn evenly
_BLOCK = 1 << 20  # numbers of P that are held at a time
_PRIOR = 2.0  # votes of the class shares of the data set, added to the votes of the nearest rows
_POWER = 4  # of the cosine that is a vote's weight
_START = np.array([np.log(BETA), 0.0, -2.0, -0.3])
_STIFF = np.array([0.02, 0.001, 0.001, 0.001])
_LEAST = 1e-6
_SPREAD = 3.0  # standard deviation of a lift that nothing is known of
_STEPS = 4  # of Newton's method for the lifts


@dataclass(frozen=True)
class Posterior:
    """What is known of every label.

    Args:
        wrong: (n,) float64, probability that the given label is wrong; 0 for unlabelled rows.
        other: (n,) int64 code of the likeliest label that was not given.
        beta, gamma, offset, slope: what was fitted.
        lift: (classes,) of each class, 0 where it is not small.
    """

    wrong: Vector
    other: Index
    beta: float
    gamma: float
    offset: float
    slope: float
    lift: Vector


def label_posterior(
    labels: Index, classes: int, neighbours: list[Neighbours], probs: list[Rows], columns: Index | None = None
) -> Posterior:
    """Fit the mixture and read every row off it.

    Args:
        labels: (n,) codes in [0, classes), -1 where there is no label.
        classes: number of codes, >= 2.
        neighbours: one per checkpoint.
        probs: one per checkpoint, (n, C); empty: the nearest rows alone are asked.
        columns: (classes,) column of `probs` of each code; default the codes themselves.

    Returns:
        A `Posterior`.

    Cost: 2 (C + k) n numbers are read, FITTED of them about 40 times; 12 (C + k) n where classes are small; 2^20 numbers are
        held.
    """
    columns = np.arange(classes) if columns is None else columns
    voters = [_voters(one) for one in neighbours]
    named = np.flatnonzero(labels >= 0)
    once = 1 / np.mean([np.bincount(one.group, minlength=len(labels))[one.group] for one in neighbours], axis=0)
    prior = np.bincount(labels[named], weights=once[named], minlength=classes) / once[named].sum()
    small = np.flatnonzero((prior > 0) & (prior < SMALL / (prior > 0).sum()))
    wrong, other, lift, doubt = np.zeros(len(labels)), labels.copy(), np.zeros(classes), np.zeros(classes)
    size = max(2000, FITTED // classes)
    drawn = named if len(named) <= size else named[np.linspace(0, len(named) - 1, size).astype(np.int64)]
    found = _START
    for _ in range(2):

        def terms(rows: Index, wrong: Vector = wrong, other: Index = other) -> _Terms:
            given = [_votes(one, rows, labels, wrong, other, prior) for one in voters]
            said = [_read(one, rows, columns) for one in probs]
            mixed = np.mean(given, axis=0)
            if said:
                model = np.mean(said, axis=0)
                weight = np.where(model.argmax(axis=1) == labels[rows], once[rows], 1)[:, None]
                mixed = (mixed + weight * model) / (1 + weight)
            mixed = np.clip(mixed / mixed.sum(axis=1, keepdims=True), _LEAST, 1 - _LEAST)
            return _Terms(mixed / mixed.sum(axis=1, keepdims=True), labels[rows], once[rows])

        found = _fit(terms(drawn), found, lift)
        pieces = _Pieces(terms, named, classes)
        if len(small):
            lift, doubt = _lifts(pieces, found, lift, small)
        wrong, other = np.zeros(len(labels)), np.where(labels < 0, -1, labels)
        for rows, piece in pieces:
            wrong[rows], other[rows] = _posterior(piece, found, lift, doubt)
    beta, gamma = np.exp(found[0]), sigmoid(found[1]) * 1.5
    return Posterior(wrong, other, float(beta), float(gamma), float(found[2]), float(found[3]), lift)


@dataclass(frozen=True)
class _Voters:
    """Nearest rows of every row, their weights, and how many of them have a vote of their own."""

    rows: Index
    weights: NDArray[np.float32]
    count: NDArray[np.float32]


def _voters(near: Neighbours) -> _Voters:
    """Copies of one row share its vote; a row's own copies have none."""
    weights = np.maximum(near.similarity, 0) ** _POWER
    heard = np.empty(len(weights), np.float32)
    copied = np.bincount(near.group, minlength=len(near.group)) > 1
    step = max(1, _BLOCK // weights.shape[1] ** 2)
    for start in range(0, len(weights), step):
        rows = np.arange(start, min(start + step, len(weights)))
        group, shared = near.group[near.rows[rows]], near.rows[rows] >= 0
        shared &= group != near.group[rows, None]
        weights[rows] *= shared
        heard[rows] = shared.sum(axis=1)
        some = np.flatnonzero((copied[group] & shared).any(axis=1))
        if len(some):
            alike = (group[some, :, None] == group[some, None, :]) & shared[some, None, :]
            share = 1 / np.maximum(alike.sum(axis=2), 1)
            weights[rows[some]] *= share
            heard[rows[some]] = (share * shared[some]).sum(axis=1)
    return _Voters(near.rows, weights.astype(np.float32), heard)


def _votes(voters: _Voters, rows: Index, labels: Index, wrong: Vector, other: Index, prior: Vector) -> Shares:
    """(a, classes) shares of the nearest rows' labels, the class shares of the data set counting as two votes."""
    count, classes = len(rows), len(prior)
    near, weight = voters.rows[rows], voters.weights[rows]
    place, flat = np.arange(count)[:, None] * classes, np.zeros(count * classes)
    for code, part in ((labels[near], weight * (1 - wrong[near])), (other[near], weight * wrong[near])):
        at = (place + np.maximum(code, 0)).ravel()  # rows without a label have no weight
        flat += np.bincount(at, weights=part.ravel(), minlength=count * classes)
    heard = voters.count[rows, None].astype(np.float64)
    votes = flat.reshape(count, classes) / np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)
    return np.asarray((heard * votes + _PRIOR * prior) / (heard + _PRIOR))


def _read(probs: Rows, rows: Index, columns: Index) -> Shares:
    """(a, classes) probabilities of the labels that occur."""
    part = np.empty((len(rows), probs.width), np.float32)
    probs.take(rows, part)
    found = part[:, columns].astype(np.float64) + 1e-12
    return np.asarray(found / found.sum(axis=1, keepdims=True))


class _Pieces:
    """The terms of some rows, a block at a time; made once where one block holds them all."""

    def __init__(self, terms: Callable[[Index], _Terms], rows: Index, classes: int) -> None:
        step = max(1, _BLOCK // classes)
        self.terms, self.blocks = terms, [rows[start : start + step] for start in range(0, len(rows), step)]
        self._only: _Terms | None = None

    def __iter__(self) -> Iterator[tuple[Index, _Terms]]:
        for rows in self.blocks:
            found = self._only or self.terms(rows)
            if len(self.blocks) == 1:
                self._only = found
            yield rows, found


class _Terms:
    """What likelihood and posterior share, for labelled rows of P."""

    def __init__(self, shares: Shares, labels: Index, weights: Vector) -> None:
        self.log, self.rows, self.labels, self.weights = np.log(shares), np.arange(len(labels)), labels, weights
        top = shares.max(axis=1)
        self.sure = np.log(top) - np.log1p(-top)

    def at(self, four: Vector, lift: Vector) -> tuple[Shares, Shares, Vector, Vector]:
        """Shares of the true class, unnormalised shares of a wrong label, their sum, and e."""
        true = np.exp(four[0]) * self.log + lift
        true = np.exp(true - true.max(axis=1, keepdims=True))
        true /= true.sum(axis=1, keepdims=True)
        given = np.exp(1.5 * sigmoid(four[1]) * self.log)
        return true, given, given.sum(axis=1), sigmoid(four[2] + four[3] * self.sure)

    def own(self, table: Shares) -> Vector:
        """The column of the given label."""
        return np.asarray(table[self.rows, self.labels])

    def likely(self, four: Vector, lift: Vector, doubt: Vector | None = None) -> tuple[Shares, Shares]:
        """Shares of the true class after and before the label is seen; `doubt` raises the label's own before."""
        true, given, total, rate = self.at(four, lift)
        if doubt is not None:
            true[self.rows, self.labels] *= np.exp(doubt[self.labels])
            true /= true.sum(axis=1, keepdims=True)
        found = rate[:, None] * true / (total[:, None] - given) * self.own(given)[:, None]
        found[self.rows, self.labels] = (1 - rate) * self.own(true)
        return found / found.sum(axis=1, keepdims=True), true


def _fit(terms: _Terms, start: Vector, lift: Vector) -> Vector:
    """log beta, logit (gamma / 1.5), offset and slope of the largest likelihood, drawn weakly to where they start."""
    from scipy.optimize import minimize

    weights = terms.weights / terms.weights.sum()

    def cost(four: Vector) -> tuple[float, Vector]:
        """Mean negative log likelihood of the given labels, and its gradient."""
        true, given, total, rate = terms.at(four, lift)
        beta, gamma = np.exp(four[0]), 1.5 * sigmoid(four[1])
        rest = total[:, None] - given
        part = true / rest
        part[terms.rows, terms.labels] = 0
        own, mine = terms.own(true), terms.own(given)
        right, among = own, part.sum(axis=1) * mine
        like = np.maximum((1 - rate) * right + rate * among, 1e-300)
        mean = (true * terms.log).sum(axis=1)
        log_own = terms.own(terms.log)
        d_beta = (1 - rate) * own * (log_own - mean) + rate * mine * (
            (part * terms.log).sum(axis=1) - mean * part.sum(axis=1)
        )
        slope = (given * terms.log).sum(axis=1)
        d_gamma = log_own * among - mine * (part * (slope[:, None] - given * terms.log) / rest).sum(axis=1)
        d_rate = (among - right) * rate * (1 - rate)
        inner = np.stack([d_beta * beta, rate * d_gamma * gamma * (1 - gamma / 1.5), d_rate, d_rate * terms.sure])
        apart = four - _START
        return (
            float(-(weights * np.log(like)).sum() + (_STIFF * apart**2).sum()),
            -(weights * inner / like).sum(axis=1) + 2 * _STIFF * apart,
        )

    return np.asarray(minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": 60}).x)


def _lifts(pieces: _Pieces, four: Vector, lift: Vector, small: Index) -> tuple[Vector, Vector]:
    """The lifts of the largest likelihood given the four numbers, and `DOUBT` standard deviations of each.

    Args:
        pieces: all labelled rows, a block at a time.
        four: as `_fit` found them.
        lift: (classes,) to start from.
        small: classes that have one.

    Returns:
        (classes,) each, 0 for the other classes. The deviation is that of the outer product of scores.
    """
    lift, doubt = lift.copy(), np.zeros(len(lift))
    for step in range(_STEPS + 1):
        slope, curve = -lift[small] / _SPREAD**2, np.full((2, len(small)), _SPREAD**-2.0)
        for _, terms in pieces:
            after, before = (shares[:, small] for shares in terms.likely(four, lift))
            slope += terms.weights @ (after - before)
            curve += np.stack([terms.weights @ (before * (1 - before)), terms.weights @ (after - before) ** 2])
        if step < _STEPS:
            lift[small] = np.maximum(0, lift[small] + slope / curve[0])
    doubt[small] = DOUBT / np.sqrt(curve[1])
    return lift, doubt


def _posterior(terms: _Terms, four: Vector, lift: Vector, doubt: Vector) -> tuple[Vector, Index]:
    """Probability that each label is wrong, and the likeliest other one."""
    after, _ = terms.likely(four, lift, doubt)
    after[terms.rows, terms.labels] = 0
    return after.sum(axis=1), after.argmax(axis=1)


def sigmoid(value: float | Vector) -> Vector:
    """1 / (1 + exp(-value))."""
    return np.asarray(1 / (1 + np.exp(-np.clip(value, -60, 60))))
