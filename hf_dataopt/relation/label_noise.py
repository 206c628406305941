"""Algorithm 4: the set-level Kernighan-Lin search for the noisy set, on cached initial scores (section 5.3.2)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..settings import check_array, check_callable, check_config, check_int, check_number, optional
from .config import RelationConfig

logger = logging.getLogger(__name__)
Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass
class LabelNoise:
    """What Algorithm 4 found.

    Args:
        scores: (n,) label noisiness s, higher = more likely mislabelled.
        noisy: (n,) the noisy set N that `scores` were computed with.
        threshold: lambda of the last pass.
        passes: updates of the scores, at least 1.
        stopped: "converged", "cycle", "max_passes" or "skipped".
        objectives: Eq. 5.2 of the set of each pass, before any bound changes the meaning of lambda.
    """

    scores: Vector
    noisy: Mask
    threshold: float
    passes: int = 0
    stopped: str = "skipped"
    objectives: list[float] = field(default_factory=list)

    @property
    def objective(self) -> float:
        """Max-cut objective (Eq. 5.2) of `noisy`; 0 for the empty set."""
        if not self.noisy.any() or not self.objectives:
            return 0.0
        return self._objective

    _objective: float = 0.0


def select(scores: Vector, config: RelationConfig, initial: Vector | None = None) -> tuple[Mask, float]:
    """`N = {i : s[i] > lambda}` with lambda as the settings say, and lambda; the bound on N is applied.

    Args:
        scores: (n,) current scores.
        config: `threshold`, `threshold_value`, `max_noisy_share`.
        initial: (n,) initial scores, for the quantile; default `scores`.

    Returns:
        (n,) mask and lambda. Where the bound cuts, lambda is the score of the best row left out.

    Source: Algorithm 4; "relative" and its strict comparison are the reference code's.
    """
    if config.threshold == "noise_rate":
        return top_share(scores, min(config.threshold_value, config.max_noisy_share), 0.0)
    if config.threshold == "absolute":
        level = float(config.threshold_value)
    elif config.threshold == "quantile":
        level = float(np.quantile(scores if initial is None else initial, config.threshold_value))
    else:
        level = config.threshold_value * float(np.abs(scores).max(initial=0.0))
    noisy = scores > level
    if noisy.sum() > int(config.max_noisy_share * len(scores) + 1e-9):
        return top_share(scores, config.max_noisy_share, level)
    return noisy, level


def top_share(scores: Vector, share: float, level: float = -np.inf) -> tuple[Mask, float]:
    """The highest `share` of the rows, none at or below `level`; ties by row number. Returns mask and cut."""
    count = min(int(share * len(scores) + 1e-9), int((scores > level).sum()))
    order = np.argsort(-scores, kind="stable")
    noisy = np.zeros(len(scores), bool)
    noisy[order[:count]] = True
    return noisy, float(scores[order[count]]) if count < len(scores) else level


def find_label_noise(
    initial: Vector, subset_sums: Callable[[NDArray[np.int64]], Vector], config: RelationConfig | None = None
) -> LabelNoise:
    """Alternate between the noisy set and the scores until neither changes.

    Args:
        initial: (n,) initial scores `sum_j w(i, j)`, with w = -r.
        subset_sums: maps row numbers S to `sum_{j in S} w(i, j)`, (n,).
        config: lambda, bound, passes, what to do on a cycle.

    Returns:
        Scores, noisy set, lambda, passes, how it stopped, objectives.

    Source: Algorithm 4, Eq. 5.2; Proposition 9 covers single moves only (`single_node_label_noise`).
    Differs: a set-level update may return to an earlier set: found and ended here. The bound and the skip are ours.
        Only rows that enter or leave N are summed after the first pass.
    Cost: one `subset_sums` over the changed rows a pass; with `on_cycle="moves"` one over each row that is moved.

    Example:
        >>> w = np.array([[0, -1, 1.0], [-1, 0, 1], [1, 1, 0]])
        >>> find_label_noise(w.sum(1), lambda rows: w[:, rows].sum(1)).noisy
        array([False, False, False])
    """
    config = check_config(config, RelationConfig)
    initial = check_array("initial", initial, 1).astype(np.float64, copy=False)
    check_callable("subset_sums", subset_sums)
    wrong = float((initial > 0).mean()) if len(initial) else 0.0
    if wrong > config.skip_share:
        logger.warning(
            "%.0f %% of the rows have relations that speak against their own label (more than skip_share=%.2f): the "
            "features do not fit the labels, no noisy set was formed. Use a better model, a higher temperature, or "
            "RelationConfig(skip_share=1).",
            100 * wrong,
            config.skip_share,
        )
        return LabelNoise(initial.copy(), np.zeros(len(initial), bool), select(initial, config)[1])
    in_noisy = np.zeros_like(initial)
    noisy = np.zeros(len(initial), bool)
    seen: dict[bytes, int] = {noisy.tobytes(): 0}
    history = [(noisy, in_noisy, 0.0, 0.0)]  # set, sums over it, lambda, objective, by pass
    stopped = "max_passes"
    for _ in range(config.max_passes):
        chosen, level = select(initial - 2 * in_noisy, config, initial)
        changed = in_noisy.copy()
        for rows, sign in ((chosen & ~noisy, 1.0), (noisy & ~chosen, -1.0)):
            if rows.any():
                changed += sign * subset_sums(np.flatnonzero(rows))
        objective = float((initial - changed)[chosen].sum()) - level * int(chosen.sum())
        earlier = seen.get(chosen.tobytes())
        if earlier == len(history) - 1:
            stopped = "converged"
            history[1:] = history[1:] or [(chosen, changed, level, objective)]
            break
        history.append((chosen, changed, level, objective))
        noisy, in_noisy = chosen, changed
        if earlier is not None:
            stopped = "cycle"
            noisy, in_noisy, level, objective = _of_cycle(history[earlier:-1], earlier, config)
            if config.on_cycle == "moves":
                noisy, in_noisy, objective = _moved(initial, noisy, in_noisy, level, subset_sums, config)
            break
        seen[chosen.tobytes()] = len(history) - 1
    passes = len(history) - 1
    level, objective = (level, objective) if stopped == "cycle" else history[-1][2:]
    found = LabelNoise(initial - 2 * in_noisy, noisy, level, passes, stopped, [entry[3] for entry in history[1:]])
    found._objective = objective
    return found


_State = tuple[Mask, Vector, float, float]


def _of_cycle(cycle: list[_State], start: int, config: RelationConfig) -> _State:
    """The state of a cycle that is returned: with the largest objective, or that of pass `max_passes`.

    Lambda may differ from pass to pass (`threshold="relative"`): the sets are compared by Eq. 5.2 at the mean of the cycle's.
    """
    if config.on_cycle == "last":
        return cycle[(config.max_passes - start) % len(cycle)]
    common = float(np.mean([level for _, _, level, _ in cycle]))
    at_common = [(*state[:2], common, state[3] + (state[2] - common) * int(state[0].sum())) for state in cycle]
    return max(at_common, key=lambda state: state[3])


def _moved(
    initial: Vector,
    noisy: Mask,
    in_noisy: Vector,
    level: float,
    subset_sums: Callable[..., Vector],
    config: RelationConfig,
) -> tuple[Mask, Vector, float]:
    """A set of a cycle, moved one row at a time into a local optimum: set, sums over it, objective."""
    most = int(config.max_noisy_share * len(initial) + 1e-9)
    start = initial - 2 * in_noisy, noisy
    scores, noisy, _ = single_node_label_noise(
        initial, lambda i: subset_sums(np.array([i])), max(level, 0.0), most=most, start=start
    )
    in_noisy = (initial - scores) / 2
    return noisy, in_noisy, float((initial - in_noisy)[noisy].sum()) - level * int(noisy.sum())


def single_node_label_noise(
    initial: Vector,
    row: Callable[[int], Vector],
    threshold: float,
    max_moves: int | None = None,
    *,
    most: int | None = None,
    start: tuple[Vector, Mask] | None = None,
) -> tuple[Vector, Mask, list[float]]:
    """Algorithm 4 moving one node at a time, always the one that gains most: ends in a local optimum.

    Args:
        initial: (n,) `sum_j w(i, j)` with w(i, i) = 0.
        row: maps i to `w(i, .)`, (n,).
        threshold: lambda of Eq. 5.2, >= 0.
        max_moves: stop after so many moves; default none.
        most: rows that the set may hold; default all.
        start: scores and noisy set to start from; default the empty set.

    Returns:
        Scores, noisy set, and what the moves have added to the objective of the start after each (strictly increasing, from 0).

    Raises:
        ValueError: negative lambda.

    Source: Proposition 9 and its proof: a move changes the objective by v[i] (s[i] - lambda).
    Cost: one row, n values, a move.
    """
    threshold = check_number("threshold", threshold, 0, todo="it is lambda of Eq. 5.2")
    initial = check_array("initial", initial, 1)
    check_callable("row", row)
    max_moves = optional(check_int, "max_moves", max_moves, 0)
    most = len(initial) if most is None else check_int("most", most, 0)
    scores, noisy = initial.astype(np.float64).copy(), np.zeros(len(initial), bool)
    if start is not None:
        scores = check_array("start[0]", start[0], 1, rows=len(initial)).astype(np.float64)
        noisy = check_array("start[1]", start[1], 1, kinds="b", rows=len(initial)).copy()
    objectives = [0.0]
    while max_moves is None or len(objectives) <= max_moves:
        gain = np.where(noisy, -1.0, 1.0) * (scores - threshold)
        if noisy.sum() >= most:
            gain[~noisy] = 0.0
        best = int(gain.argmax())
        if gain[best] <= 1e-12 * max(1.0, float(np.abs(initial).max())):
            break
        scores += (2.0 if noisy[best] else -2.0) * row(best)
        noisy[best] = ~noisy[best]
        objectives.append(objectives[-1] + float(gain[best]))
    return scores, noisy, objectives
