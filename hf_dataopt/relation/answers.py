"""The probability that an answer to a question of two answers is wrong: one label of several, given to a row or not.

As in `posterior.py`, nearest rows and model each say how likely "yes" is; their mean is P. Unlike there, the two answers are
wrong at rates of their own, since labels are forgotten more often than made up. The share of given "yes" follows a logistic
curve with two floors (the four-parameter model of item response theory) whose rates may depend on how sure P is:

    P(given yes | P) = e0 (1 - t) + (1 - e1) t,   t = sigmoid(beta logit P + shift),
    logit e0 = offset0 + slope sure, logit e1 = offset1 + slope sure,   sure = |logit P|.

Five numbers a label, by maximum likelihood on the given answers; the voters' answers are then replaced by what was found and
the fit is done once more. Copies count once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .nearest import Neighbours
from .posterior import BETA, sigmoid

Index = NDArray[np.int64]
Vector = NDArray[np.float64]
DRAWN = 1 << 16  # answers that the fit reads at most, drawn evenly
_PRIOR = 2.0  # votes of the share of "yes" among all rows, added to those of the nearest
_POWER = 4  # of the cosine that is a vote's weight
_START = np.array([np.log(BETA), 0.0, -3.0, -3.0, -0.3])
_STIFF = np.array([0.02, 0.001, 0.001, 0.001, 0.001])
_LEAST = 1e-4


def wrong_answers(given: Index, near: Neighbours, probs: NDArray[np.float32] | None) -> Vector:
    """How likely each answer is wrong.

    Args:
        given: (n,) 1 yes, 0 no, -1 where nobody said; both occur.
        near: nearest rows and copies.
        probs: (n,) probability of yes by a model; None: the nearest rows alone are asked.

    Returns:
        (n,) float64; 0 where nobody said.

    Cost: 4 n neighbours numbers are read; the fit reads at most `DRAWN` about 40 times, twice.
    """
    weights, heard, once = _voices(given, near)
    known = np.flatnonzero(given >= 0)
    drawn = known if len(known) <= DRAWN else known[np.linspace(0, len(known) - 1, DRAWN).astype(np.int64)]
    share = float((once * given)[known].sum() / once[known].sum())
    wrong, five = np.zeros(len(given)), _START
    for _ in range(2):
        yes = np.where(given > 0, 1 - wrong, wrong)
        votes = (weights * yes[near.rows]).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-12)
        mixed = (heard * votes + _PRIOR * share) / (heard + _PRIOR)
        if probs is not None:
            own = np.where(
                (probs > 0.5) == (given > 0), once, 1
            )  # it may have learned the answer from the row's copies
            mixed = (mixed + own * probs) / (1 + own)
        mixed = np.clip(mixed, _LEAST, 1 - _LEAST)
        logits = np.log(mixed) - np.log1p(-mixed)
        five = _fit(logits[drawn], given[drawn], once[drawn], five)
        _, true, false_yes, false_no = _curve(logits[known], five)
        right = np.where(given[known] > 0, (1 - false_no) * true, (1 - false_yes) * (1 - true))
        other = np.where(given[known] > 0, false_yes * (1 - true), false_no * true)
        wrong[known] = other / (right + other)
    return wrong


def _voices(given: Index, near: Neighbours) -> tuple[NDArray[np.float32], Vector, Vector]:
    """Weights of the nearest rows, how many of them are heard, and the share of a vote that each row has for its copies."""
    copies = np.bincount(near.group, minlength=len(given))[near.group]
    once = 1 / copies
    speaks = (near.rows >= 0) & (given[near.rows] >= 0) & (near.group[near.rows] != near.group[:, None])
    shares = np.where(speaks, once[near.rows], 0)
    weights = np.maximum(near.similarity, 0) ** _POWER * shares
    return weights.astype(np.float32), np.asarray(shares.sum(axis=1)), once


def _curve(logits: Vector, five: Vector) -> tuple[Vector, Vector, Vector, Vector]:
    """P(given yes), t, e0 and e1."""
    true = sigmoid(np.exp(five[0]) * logits + five[1])
    false_yes, false_no = (sigmoid(offset + five[4] * np.abs(logits)) for offset in five[2:4])
    return false_yes * (1 - true) + (1 - false_no) * true, true, false_yes, false_no


def _fit(logits: Vector, given: Index, weights: Vector, start: Vector) -> Vector:
    """log beta, shift, two offsets and the slope of the largest likelihood, drawn weakly to where they start."""
    from scipy.optimize import minimize

    weights, sure = weights / weights.sum(), np.abs(logits)

    def cost(five: Vector) -> tuple[float, Vector]:
        """Mean negative log likelihood of the given answers, and its gradient."""
        yes, true, false_yes, false_no = _curve(logits, five)
        like = np.maximum(np.where(given > 0, yes, 1 - yes), 1e-300)
        steep = (1 - false_yes - false_no) * true * (1 - true)
        up, down = (1 - true) * false_yes * (1 - false_yes), -true * false_no * (1 - false_no)
        inner = np.stack([steep * np.exp(five[0]) * logits, steep, up, down, (up + down) * sure])
        apart = five - _START
        return (
            float(-(weights * np.log(like)).sum() + (_STIFF * apart**2).sum()),
            -(weights * np.where(given > 0, 1, -1) / like * inner).sum(axis=1) + 2 * _STIFF * apart,
        )

    return np.asarray(minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": 60}).x)
