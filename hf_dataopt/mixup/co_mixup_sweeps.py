"""Algorithm 3 on a batch of parts: outputs take turns, each solving its grid against what the others use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from .co_mixup_config import CoMixupConfig
from .co_mixup_solver import Floats, Ints, grid_energy, minimise_grid

FORBIDDEN = 1e6  # unary of a label that does not exist; finite, so that sums stay finite
_HALF_BONUS = 5e-4  # the reference code's: halves win ties
_STOP = 1e-6  # relative change of the objective
_CLIP_STEPS = 4  # bisection of the multiplier of the text's scalar clip


@dataclass
class Parts:
    """P parts of a batch that are mixed among themselves; shorter parts are padded.

    Args:
        cost: (P, J or 1, m, h, w) float64: negative saliency plus prior, per output or the same for all.
        compatibility: (P, m, m) float64: A.
        inputs: (P,) int: inputs of each part, <= m.
        outputs: (P,) int: outputs of each part, <= J.
        first, second: (P, J, h, w) int: the two halves of every cell's label; equal: one input.
        half_cost: extra unary of a label with two inputs (the prior's multinomial coefficient in the text, 0 in the code).
    """

    cost: Floats
    compatibility: Floats
    inputs: Ints
    outputs: Ints
    first: Ints
    second: Ints
    half_cost: float = 0.0

    @property
    def cells(self) -> int:
        """Cells of the grid."""
        return self.first.shape[2] * self.first.shape[3]

    def usage(self) -> Floats:
        """(P, J, m): cells of each input in each output, o_j; padded outputs use none."""
        used = _counts(self.first, self.second, self.cost.shape[2])
        used[np.arange(used.shape[1]) >= self.outputs[:, None]] = 0
        return used


def _counts(first: Ints, second: Ints, n_inputs: int) -> Floats:
    """(..., h, w) labels to (..., m) cells per input; a half label counts one half for each."""
    names = np.arange(n_inputs)
    flat = (*first.shape[:-2], -1, 1)
    total = (first.reshape(flat) == names).sum(-2) + (second.reshape(flat) == names).sum(-2)
    return 0.5 * total


def _dot(a: tuple[Ints, Ints], b: tuple[Ints, Ints]) -> Floats:
    """z'z of two arrays of labels."""
    same = [(x == y).astype(np.float64) for x in a for y in b]
    return 0.25 * (same[0] + same[1] + same[2] + same[3])


def objective(parts: Parts, config: CoMixupConfig, *, clip: bool = True) -> Floats:
    """Eq. 4.1 of every output, with the smoothness and the clip that the settings name.

    Args:
        parts: problem and labels.
        config: weights.
        clip: False leaves the clip and A out: what the reference code watches to stop.

    Returns:
        (P, J) float64; their sum over a part is the part's objective. The text's clip, one number for a part, is spread
        evenly over its outputs. 0 for padded outputs.

    Source: Eq. 4.1; `penalty` in hard form, gamma sum_j sum_i [(A p_j)_i > tau] (A p_j)_i o_ji with p_j the use by all
        other outputs, where the code and the text differ and `strict` is off.
    """
    n_outputs = parts.first.shape[1]
    own = _own_terms(parts.cost, (parts.first, parts.second), parts.half_cost, config)
    penalty = _penalties(parts.usage(), parts.compatibility, parts.outputs, parts.cells, config, clip=clip)
    total = own + config.gamma / parts.cells * penalty
    return np.where(np.arange(n_outputs) < parts.outputs[:, None], total, 0.0)


def _own_terms(cost: Floats, labels: tuple[Ints, Ints], half_cost: float, config: CoMixupConfig) -> Floats:
    """Unary, prior and smoothness: (P, J or 1, m, h, w) costs and (P, J, h, w) labels -> (P, J)."""
    first, second = labels
    cost = np.broadcast_to(cost, (*first.shape[:2], *cost.shape[2:]))
    a, b = (np.take_along_axis(cost, side[:, :, None], 2)[:, :, 0] for side in labels)
    unary = ((a + b) / 2 + half_cost * (first != second)).sum((2, 3))
    smooth = np.zeros(first.shape[:2])
    for low, high in (
        ((first[:, :, :-1], second[:, :, :-1]), (first[:, :, 1:], second[:, :, 1:])),
        ((first[..., :-1], second[..., :-1]), (first[..., 1:], second[..., 1:])),
    ):
        product = _dot(low, high)
        pair = 1 - product if config.strict else (_dot(low, low) + _dot(high, high)) / 2 - product
        smooth += pair.sum((2, 3))
    return unary + config.beta / (first.shape[2] * first.shape[3]) * smooth


def _penalties(
    used: Floats, a: Floats, outputs: Ints, cells: int, config: CoMixupConfig, *, clip: bool = True
) -> Floats:
    """f_c of Eq. 4.1 without gamma: (P, J, m) cells of each input in each output -> (P, J)."""
    others = used.sum(-2, keepdims=True) - used
    if not clip:
        return (others * used).sum(-1)
    near = others @ a
    if config.strict:
        most = config.tau * cells * cells * outputs
        return np.broadcast_to((np.maximum((near * used).sum((-2, -1)), most) / outputs)[:, None], used.shape[:2])
    return (near * used * (near > config.tau * cells)).sum(-1)


def sweep(parts: Parts, config: CoMixupConfig) -> None:
    """Algorithm 3, in place on `parts.first` and `parts.second`.

    Args:
        parts: problem, and the labels to start from.
        config: weights, number of sweeps, conventions.

    Source: Algorithm 3 with Eq. 4.2.
    Differs: the reference code also proposes half-and-half labels from the second sweep on, for the three most used
        inputs of an output, and pushes outputs with equal inputs apart before the last sweep; `strict` does not.
    Cost: sweeps x outputs steps, each over all parts at once.
    """
    used = parts.usage()
    running = np.ones(len(used), bool)
    apart: Floats | None = None
    last = objective(parts, config, clip=config.strict).sum(1)
    for t in range(config.sweeps):
        for j in range(used.shape[1]):
            active = np.flatnonzero(running & (parts.outputs > j))
            if len(active):
                step = _Step(parts, config, active, j, used[active])
                extra = np.zeros_like(used[active, j]) if apart is None else apart[active, j]
                if config.strict:
                    first, second = step.clipped()
                elif config.keep_best and t == config.sweeps - 1:
                    first, second = step.best(t > 0, extra, (parts.first[active, j], parts.second[active, j]))
                else:
                    first, second = step.modular(t > 0, extra, config.tau_type)
                parts.first[active, j], parts.second[active, j] = first, second
                used[active, j] = _counts(first, second, used.shape[2])
        if t == config.sweeps - 2 and config.resolve and not config.strict:
            apart = _push_apart(used > 0)
        now = objective(parts, config, clip=config.strict).sum(1)
        running &= np.abs(last - now) >= _STOP * np.abs(now)
        last = now
        if not running.any():
            break


class _Step:
    """The sub-problem of output j in the active parts: everything but z_j is held."""

    def __init__(self, parts: Parts, config: CoMixupConfig, active: Ints, j: int, used: Floats) -> None:
        self.parts, self.config, self.cells = parts, config, parts.cells
        self.used, self.j = used, j
        self.a = parts.compatibility[active]
        cost = parts.cost[active, min(j, parts.cost.shape[1] - 1)]
        self.cost = cost.transpose(0, 2, 3, 1)  # (P, h, w, m)
        self.others = used.sum(1) - used[:, j]
        self.outputs = parts.outputs[active]

    def modular(self, halves: bool, apart: Floats, *tau_types: str) -> tuple[Ints, Ints]:
        """The reference code's step: a threshold per input, halves of the inputs in use. Types are stacked: (T P, h, w)."""
        near = _times(self.a, self.others)
        tau = self.config.tau * self.cells
        # operator precedence of the reference code: A (mask p), not mask (A p)
        penalties = [
            _times(self.a, (near > tau) * self.others) if tau_type == "hard" else np.maximum(near - tau, 0)
            for tau_type in tau_types
        ]
        weight = self.config.gamma / self.cells
        unary = np.concatenate([self.cost + (weight * (2 * p + apart))[:, None, None] for p in penalties])
        table = self._halves(self.used[:, self.j]) if halves else np.empty((len(near), 0, 2), np.intp)
        return self._solve(unary, np.concatenate([table] * len(tau_types)))

    def best(self, halves: bool, apart: Floats, old: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
        """The best of the old labels, a step with the hard and a step with the soft penalty, in terms of Eq. 4.1."""
        n = len(self.used)
        new = self.modular(halves, apart, "hard", "soft")
        first, second = (np.concatenate(sides).reshape(3, n, *old[0].shape[1:]) for sides in zip(old, new, strict=True))
        cost = self.cost.transpose(0, 3, 1, 2)[:, None]
        own = _own_terms(cost, (first.swapaxes(0, 1), second.swapaxes(0, 1)), self.parts.half_cost, self.config).T
        used = np.repeat(self.used[None], 3, 0)
        used[:, :, self.j] = counts = _counts(first, second, used.shape[3])
        shared = _penalties(used, self.a, self.outputs, self.cells, self.config).sum(-1) + (apart * counts).sum(-1)
        choice, which = np.argmin(own + self.config.gamma / self.cells * shared, 0), np.arange(n)
        return first[choice, which], second[choice, which]

    def _halves(self, used: Floats) -> Ints:
        """(P, E, 2) half labels: the pair of an output with two inputs, the three pairs of the three most used of more.

        Rows that a part does not have are (-1, -1).
        """
        count = (used > 0).sum(1)
        most = np.sort(np.argsort(-used, axis=1, kind="stable")[:, :3], axis=1)
        table = np.full((len(used), 3, 2), -1)
        if used.shape[1] > 2:
            three = count >= 3
            table[three] = most[three][:, [[0, 1], [0, 2], [1, 2]]]
        two = np.flatnonzero(count == 2)
        table[two, 0] = np.nonzero(used[two] > 0)[1].reshape(-1, 2)
        return table[:, : 3 if (count >= 3).any() else int((count == 2).any())]

    def _solve(self, unary: Floats, table: Ints) -> tuple[Ints, Ints]:
        batch, height, width, m = unary.shape
        which, extra = np.arange(batch)[:, None], table.shape[1]
        pair = np.broadcast_to(1 - np.eye(m + extra), (batch, m + extra, m + extra))
        names = np.broadcast_to(np.arange(m)[:, None], (batch, m, 2))
        if extra:
            missing = table[..., 0] < 0
            half = (unary[which, ..., table[..., 0]] + unary[which, ..., table[..., 1]]) / 2 - _HALF_BONUS
            half[missing] = FORBIDDEN
            unary = np.concatenate([unary, np.moveaxis(half, 1, 3)], 3)
            pair = pair.copy()
            for side in (0, 1):
                p, e = np.nonzero(~missing)
                pair[p, m + e, table[p, e, side]] = pair[p, table[p, e, side], m + e] = 0.25
            names = np.concatenate([names, table], 1)
        labels = minimise_grid(unary, pair, self.config.beta / self.cells)
        chosen = names[which, labels.reshape(batch, -1)].reshape(batch, height, width, 2)
        return chosen[..., 0], chosen[..., 1]

    def clipped(self) -> tuple[Ints, Ints]:
        """The text's step: max(tau', v'o) with every half-and-half pair a label.

        max(tau', x) is the largest of theta x + (1 - theta) tau' over theta in [0, 1]: each theta is a modular problem;
        the multiplier is bisected and the best labelling in terms of the clipped objective is kept. Where the penalised
        problem stays above tau', or the free one below, that is the optimum.
        """
        cells, config = self.cells, self.config
        left, right, pair = _text_labels(self.cost.shape[3])
        base = (self.cost[..., left] + self.cost[..., right]) / 2 + self.parts.half_cost * (left != right)
        v = 2 * _times(self.a, self.others)
        v = (v[:, left] + v[:, right]) / 2 * (config.gamma / cells)
        rest = self.used.copy()
        rest[:, self.j] = 0
        among = ((rest.sum(1, keepdims=True) - rest) @ self.a * rest).sum((1, 2))
        level = config.gamma / cells * (config.tau * cells * cells * self.outputs - among)  # tau' = tau - c
        low, high, settled = np.zeros(len(v)), np.ones(len(v)), np.zeros(len(v), bool)
        best, best_value = np.zeros(base.shape[:3], np.intp), np.full(len(v), np.inf)
        for step in range(_CLIP_STEPS + 2):
            theta = np.ones(len(v)) if step == 0 else np.zeros(len(v)) if step == 1 else (low + high) / 2
            labels = minimise_grid(base + (theta[:, None] * v)[:, None, None], pair, config.beta / cells)
            use = np.take_along_axis(v, labels.reshape(len(v), -1), 1).sum(1)
            value = grid_energy(base, pair, config.beta / cells, labels) + np.maximum(use, level)
            better = value < best_value
            best[better], best_value[better] = labels[better], value[better]
            if step > 1:
                low, high = np.where(use > level, theta, low), np.where(use > level, high, theta)
            else:
                settled |= use >= level if step == 0 else use <= level
            if settled.all():
                break
        return left[best], right[best]


@lru_cache(maxsize=8)
def _text_labels(m: int) -> tuple[Ints, Ints, Floats]:
    """Both inputs of the text's labels for L = 2, one input first, then every pair; and 1 - z'z between labels."""
    labels = np.array([(i, i) for i in range(m)] + list(combinations(range(m), 2)), np.intp)
    left, right = labels.T
    return left, right, 1 - _dot((left[:, None], right[:, None]), (left, right))


def _times(matrices: Floats, vectors: Floats) -> Floats:
    """(P, m, m) times (P, m)."""
    return (matrices @ vectors[..., None])[..., 0]


def _push_apart(inputs: np.ndarray) -> Floats:
    """Extra cost (P, J, m) of one source each, for every two outputs with the same set of more than one input."""
    extra = np.zeros(inputs.shape)
    same = (inputs[:, :, None] == inputs[:, None]).all(3) & (inputs.sum(2) > 1)[:, :, None]
    for p, one, two in zip(*np.nonzero(np.triu(same, 1)), strict=True):
        sources = np.flatnonzero(inputs[p, one])
        extra[p, one, sources[0]] = extra[p, two, sources[1]] = 1.0
    return extra
