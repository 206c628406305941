"""Masks of Puzzle Mix as exact minimum cuts: many small grids with K ordered labels, solved together."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError
from ..settings import check_array, numbers

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
_INTEGER_TOP = float(2**29)  # largest capacity; scipy's flows are int32
_BOUND_ROUNDS = 4
_CELLS_PER_CALL = 8192  # a call searches its whole graph in every phase: small calls stay in the cache


def grid_energy(unary: Floats, vertical: Floats, horizontal: Floats, labels: Labels) -> Floats:
    """Energy of labellings: unaries plus edges times squared mask differences.

    `E = sum_i unary[i, l_i] + sum_(i,j) w_ij ((l_i - l_j) / (K - 1))^2`

    Args:
        unary: (B, h, w, K) float64 cost of every label in every cell.
        vertical: (B, h-1, w) weights of edges between a cell and the one below it, >= 0.
        horizontal: (B, h, w-1) weights of edges between a cell and the one to its right, >= 0.
        labels: (B, h, w) int64 in [0, K).

    Returns:
        (B,) float64.

    Source: chapter 3, Eq. 3.4 after the substitution of Definition 3.

    Cost: O(B h w K).
    """
    problem = _Grids(unary, vertical, horizontal)
    labels = check_array("labels", labels, 3, kinds="iu", rows=len(unary))
    if labels.shape != problem.unary.shape[:3] or labels.min() < 0 or labels.max() >= problem.unary.shape[-1]:
        raise ValueError(
            f"labels must be {problem.unary.shape[:3]} in [0, {problem.unary.shape[-1]}), got {labels.shape}"
        )
    unary = problem.unary
    squared = float((unary.shape[-1] - 1) ** 2)
    chosen = np.take_along_axis(unary, labels[..., None], -1)[..., 0].sum((1, 2))
    down = (vertical * np.diff(labels, axis=1) ** 2).sum((1, 2))
    right = (horizontal * np.diff(labels, axis=2) ** 2).sum((1, 2))
    return chosen + (down + right) / squared


def solve_masks(unary: Floats, vertical: Floats, horizontal: Floats) -> Labels:
    """Labels of globally minimal energy for every grid of the batch.

    Eq. 3.4 with squared label differences. Unaries convex in the label make the energy L-natural-convex: from any start,
    one phase of upward and one of downward minimum cuts reach the global minimum; the cells that move furthest move in
    every cut of a phase (Kolmogorov and Shioura 2009), so a phase ends when none of them can go on. Cells that monotone
    best responses from the top and from the bottom agree on never enter a cut. Unaries that are not convex (the prior's
    logarithm at lam below 4e-5) are solved by one cut over K - 1 layers (Ishikawa), exact for any unary.

    Args:
        unary: (B, h, w, K) float64, finite, K >= 2.
        vertical: (B, h-1, w) float64 edge weights, finite, >= 0.
        horizontal: (B, h, w-1) float64 edge weights, finite, >= 0.

    Returns:
        (B, h, w) int64 labels in [0, K).

    Raises:
        ValueError: shapes do not fit, a value is not finite, or an edge weight is negative.

    Source: chapter 3, Eq. 3.4 (section 3.4.1).

    Differs: the text and the reference code stop at a local minimum of alpha-beta swap moves on truncated integers; this
        is the global minimum. Capacities are integers of 29 bits after a clip that changes no cut: the error of an
        energy is below 1e-8 of the largest edge sum per cell, and nothing overflows.

    Cost: about K - 1 maximum flows over the cells that bounds leave open.

    Example:
        >>> import numpy as np
        >>> unary = np.zeros((1, 1, 2, 3)); unary[0, 0, 0] = [0, 1, 2]; unary[0, 0, 1] = [0.3, 0.1, 0]
        >>> solve_masks(unary, np.zeros((1, 0, 2)), np.full((1, 1, 1), 10.0)).tolist()
        [[[0, 0]]]
    """
    problem = _Grids(unary, vertical, horizontal)
    curved = np.diff(problem.unary, n=2, axis=-1) if problem.unary.shape[-1] > 2 else np.zeros((len(unary), 1, 1, 1))
    convex = (curved >= -1e-12 * np.abs(problem.unary).max(initial=0)).all((1, 2, 3))
    labels = np.zeros(problem.unary.shape[:3], dtype=np.int64)
    if convex.any():
        labels[convex] = _descend(problem.part(convex))
    if not convex.all():
        labels[~convex] = _layered(problem.part(~convex))
    return labels


def solve_masks_pygco(unary: Floats, vertical: Floats, horizontal: Floats) -> Labels:
    """Labels as the reference code finds them: truncated integers, alpha-beta swap from label 0 (pygco).

    The same arguments and shapes as `solve_masks`. The result may be a local minimum, and integer overflow is possible
    as in the reference. gco-wrapper's bundled C++ code is for research use only.

    Raises:
        MissingExtraError: gco-wrapper is not installed.

    Source: chapter 3, section 3.5 (pyGCO); integer scales of the reference code.
    """
    try:
        import gco
    except ImportError as error:
        raise MissingExtraError("gco-wrapper", "pygco", "solver='pygco'") from error
    problem = _Grids(unary, vertical, horizontal)
    size, rows, columns, count = problem.unary.shape
    steps = np.arange(count)
    pairwise = (((steps[:, None] - steps[None]) / (count - 1)) ** 2).astype(np.float32)
    scale = 1000 * rows * columns
    units, downs, rights = (
        (scale * part).astype(np.int32) for part in (problem.unary, problem.vertical, problem.horizontal)
    )
    labels = [
        gco.cut_grid_graph(units[b], pairwise, downs[b], rights[b], algorithm="swap").reshape(rows, columns)
        for b in range(size)
    ]
    return np.stack(labels).astype(np.int64)


class _Grids:
    """A checked batch of problems; edge weights are divided by (K-1)^2, so that a step of one label costs them once."""

    def __init__(self, unary: Floats, vertical: Floats, horizontal: Floats) -> None:
        unary, vertical, horizontal = (
            numbers(name, given).astype(np.float64, copy=False)
            for name, given in (("unary", unary), ("vertical", vertical), ("horizontal", horizontal))
        )
        if unary.ndim != 4 or unary.shape[-1] < 2 or 0 in unary.shape:
            raise ValueError(f"unary is {unary.shape}; needed is (batch, rows, columns, at least 2 labels), none empty")
        size, rows, columns, _ = unary.shape
        for name, edges, shape in (
            ("vertical", vertical, (size, rows - 1, columns)),
            ("horizontal", horizontal, (size, rows, columns - 1)),
        ):
            if edges.shape != shape:
                raise ValueError(f"{name} edge weights are {edges.shape}; unaries {unary.shape} need {shape}")
            if not (np.isfinite(edges).all() and (edges >= 0).all()):
                raise ValueError(f"{name} edge weights must be finite and >= 0; check pixel range, beta and gamma")
        if not np.isfinite(unary).all():
            raise ValueError("unary costs must be finite; leave samples with non-finite saliency out")
        self.unary, self.vertical, self.horizontal = unary, vertical, horizontal

    def part(self, rows: NDArray[np.bool_]) -> _Grids:
        return self if rows.all() else _Grids(self.unary[rows], self.vertical[rows], self.horizontal[rows])


def _around(down: Floats, right: Floats, values: NDArray[np.int64] | NDArray[np.bool_] | None = None) -> Floats:
    """Per cell, the sum over its edges of the weight, times the neighbour's value if values are given."""
    total = np.zeros((down.shape[0], right.shape[1], down.shape[2]))
    if values is None:
        total[:, 1:] += down
        total[:, :-1] += down
        total[:, :, 1:] += right
        total[:, :, :-1] += right
    else:
        total[:, 1:] += down * values[:, :-1]
        total[:, :-1] += down * values[:, 1:]
        total[:, :, 1:] += right * values[:, :, :-1]
        total[:, :, :-1] += right * values[:, :, 1:]
    return total


def _descend(problem: _Grids) -> Labels:
    """Minimum of an L-natural-convex energy: bounds, an upward phase, a downward phase."""
    count = problem.unary.shape[-1]
    step = float((count - 1) ** 2)
    down, right = problem.vertical / step, problem.horizontal / step
    weight = _around(down, right)
    low = _best_responses(problem.unary, down, right, weight, 0)
    high = _best_responses(problem.unary, down, right, weight, count - 1)
    labels = np.clip((count - 1) // 2, low, high)
    for sign, bound in ((1, high), (-1, low)):
        runners = labels != bound
        while runners.any():
            movable = (labels != bound) & runners.any((1, 2), keepdims=True)
            moved = _cut(problem.unary, down, right, weight, labels, movable, sign)
            labels = labels + sign * moved
            runners &= moved & (labels != bound)
    return labels


def _best_responses(unary: Floats, down: Floats, right: Floats, weight: Floats, start: int) -> Labels:
    """Simultaneous best responses from all cells at `start` (0 or K-1): after any number of rounds a bound of every optimum."""
    count = unary.shape[-1]
    labels = np.full(unary.shape[:3], start, dtype=np.int64)
    steps = np.arange(count)
    own = np.ascontiguousarray(np.moveaxis(unary + weight[..., None] * steps**2, -1, 0))
    rise = np.diff(own, axis=0)
    for _ in range(_BOUND_ROUNDS):
        pull = 2 * _around(down, right, labels)
        best, least, level = np.zeros_like(labels), np.zeros_like(pull), np.zeros_like(pull)
        for k in range(1, count):
            level = level + rise[k - 1] - pull
            better = level <= least if start else level < least
            best = np.where(better, k, best)
            least = np.where(better, level, least)
        if (best == labels).all():
            break
        labels = best
    return labels


def _cut(
    unary: Floats, down: Floats, right: Floats, weight: Floats, labels: Labels, movable: NDArray[np.bool_], sign: int
) -> NDArray[np.bool_]:
    """The cells whose common move by `sign` lowers the energy most (the smallest such set)."""
    count = unary.shape[-1]
    here = np.take_along_axis(unary, labels[..., None], -1)[..., 0]
    there = np.take_along_axis(unary, np.clip(labels + sign, 0, count - 1)[..., None], -1)[..., 0]
    slope = 2 * sign * (weight * labels - _around(down, right, labels))
    gain = there - here + slope + _around(down, right, ~movable)
    moved = np.zeros(labels.shape, dtype=bool)
    busy = np.flatnonzero((movable & (gain < 0)).any((1, 2)))
    share = max(1, _CELLS_PER_CALL // (labels.shape[1] * labels.shape[2]))
    for first in range(0, len(busy), share):
        rows = busy[first : first + share]
        free = movable[rows]
        open_down = down[rows] * (free[:, :-1] & free[:, 1:])
        open_right = right[rows] * (free[:, :, :-1] & free[:, :, 1:])
        moved[rows] = _grid_cut(np.where(free, gain[rows], 0.0), open_down, open_right) & free
    return moved


@lru_cache(maxsize=32)
def _grid_arcs(rows: int, columns: int) -> tuple[Labels, Labels, Labels]:
    """Arcs of one grid in CSR order: every cell to its neighbours up, left, right, down, then to source and sink.

    Returns:
        Places of the arcs that exist among (rows, columns, 6); their heads (-2 source, -1 sink); arcs of every cell.
    """
    cells = np.arange(rows * columns).reshape(rows, columns)
    heads = np.full((rows, columns, 6), -3)
    heads[1:, :, 0], heads[:, 1:, 1] = cells[:-1], cells[:, :-1]
    heads[:, :-1, 2], heads[:-1, :, 3] = cells[:, 1:], cells[1:]
    heads[..., 4:] = -2, -1
    places = np.flatnonzero(heads > -3)
    return places, heads.ravel()[places], (heads > -3).sum(-1).ravel()


def _grid_cut(gain: Floats, down: Floats, right: Floats) -> NDArray[np.bool_]:
    """Smallest sets X of least `sum_X gain + sum of edges that leave X`, one per grid, by one maximum flow.

    A terminal capacity above the sum of a cell's edges decides that cell: clipping at twice the sum keeps the decision
    strict and bounds every capacity by the edges, so that integers of 29 bits hold them whatever the unaries are.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    size, rows, columns = gain.shape
    places, heads, degrees = _grid_arcs(rows, columns)
    nodes = gain.size
    reach = 2 * _around(down, right)
    top = reach.max((1, 2))
    scale = (_INTEGER_TOP / np.where(top > 0, top, 1.0))[:, None, None]
    terminal = np.rint(np.clip(gain, -reach, reach) * scale).astype(np.int32)
    arcs = np.zeros((size, rows, columns, 6), dtype=np.int32)
    arcs[:, 1:, :, 0] = arcs[:, :-1, :, 3] = np.rint(down * scale)
    arcs[:, :, 1:, 1] = arcs[:, :, :-1, 2] = np.rint(right * scale)
    arcs[..., 5] = np.maximum(terminal, 0)
    wanted = np.maximum(-terminal, 0).ravel()
    capacity = np.concatenate([arcs.reshape(size, -1)[:, places].ravel(), wanted, np.zeros(nodes, dtype=np.int32)])
    shift = (np.arange(size) * (rows * columns))[:, None]
    inner = np.where(heads >= 0, heads + shift, nodes + 2 + heads).ravel()
    everyone = np.arange(nodes)
    indices = np.concatenate([inner, everyone, everyone]).astype(np.int32)
    starts = np.zeros(nodes + 3, dtype=np.int32)
    np.cumsum(np.concatenate([np.tile(degrees, size), [nodes, nodes]]), out=starts[1:])
    graph = csr_array((capacity, indices, starts), shape=(nodes + 2, nodes + 2))
    graph.has_sorted_indices = True
    flow = maximum_flow(graph, nodes, nodes + 1).flow  # arcs come in pairs, so the flow has the same pattern
    left = capacity > flow.data
    passed = np.zeros(len(left) + 1, dtype=np.int32)
    np.cumsum(left, out=passed[1:])
    residual = csr_array((np.ones(passed[-1], dtype=np.int8), indices[left], passed[starts]), shape=graph.shape)
    reached = np.zeros(nodes + 2, dtype=bool)
    reached[breadth_first_order(residual, nodes, return_predecessors=False)] = True
    return reached[:nodes].reshape(gain.shape) | ((reach == 0) & (gain < 0))


def _minimum_cut(
    gain: Floats,
    owner: Labels,
    tail: Labels,
    head: Labels,
    forward: Floats,
    backward: Floats,
    instance: Labels,
    instances: int,
) -> NDArray[np.bool_]:
    """Smallest set X of least `sum_X gain + sum of arcs that leave X`, for several problems side by side.

    A node's terminal capacity above the sum of its arcs decides it: clipping at twice the sum keeps the decision strict and
    bounds every capacity by the arcs, so that integers of 29 bits hold them exactly enough whatever the unaries are.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    nodes = len(gain)
    reach = 2 * (np.bincount(tail, forward + backward, nodes) + np.bincount(head, forward + backward, nodes))
    if not len(tail):
        return gain < 0
    terminal = np.clip(gain, -reach, reach)
    top = np.zeros(instances)
    np.maximum.at(top, owner, reach)
    scale = _INTEGER_TOP / np.where(top > 0, top, 1)
    caps = np.rint(terminal * scale[owner]).astype(np.int64)
    gaining, losing = np.flatnonzero(caps < 0), np.flatnonzero(caps > 0)
    ahead, back = (np.rint(arcs * scale[instance]).astype(np.int64) for arcs in (forward, backward))
    source, sink = nodes, nodes + 1
    start = np.concatenate([tail, head, np.full(len(gaining), source), losing])
    end = np.concatenate([head, tail, gaining, np.full(len(losing), sink)])
    capacity = np.concatenate([ahead, back, -caps[gaining], caps[losing]]).astype(np.int32)
    graph = csr_array((capacity, (start, end)), shape=(nodes + 2, nodes + 2))
    graph.sort_indices()
    flow = maximum_flow(graph, source, sink).flow
    left = graph - flow
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    reached = np.zeros(nodes + 2, dtype=bool)
    reached[breadth_first_order(left, source, return_predecessors=False)] = True
    isolated = (reach == 0) & (gain < 0)
    return reached[:nodes] | isolated


def _layered(problem: _Grids) -> Labels:
    """Ishikawa's cut over K-1 layers: exact for any unary. Node (i, k) moves if and only if the label of i is above k."""
    size, rows, columns, count = problem.unary.shape
    layers, cells = count - 1, rows * columns
    step = float(layers**2)
    index = np.arange(cells).reshape(rows, columns)
    pairs = np.concatenate(
        [
            np.stack([index[:-1].ravel(), index[1:].ravel()], 1),
            np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()], 1),
        ]
    )
    found = np.zeros((size, rows, columns), dtype=np.int64)
    for b in range(size):
        weight = np.concatenate([problem.vertical[b].ravel(), problem.horizontal[b].ravel()]) / step
        tails, heads, ahead, back = [], [], [], []
        for k in range(layers):  # (l_i - l_j)^2 = sum over layers k, m of x_ik (1 - x_jm) times 1 (k = m) or 2 (k > m)
            for m in range(k + 1):
                share = weight if k == m else 2 * weight
                for a, c in ((pairs[:, 0], pairs[:, 1]), (pairs[:, 1], pairs[:, 0])):
                    tails.append(a * layers + k)
                    heads.append(c * layers + m)
                    ahead.append(share)
                    back.append(np.zeros_like(share))
        unary = problem.unary[b].reshape(cells, count)
        gain = np.diff(unary, axis=1).ravel()
        wall = np.abs(gain).sum()  # no set of nodes is worth a broken chain
        for k in range(1, layers):
            tails.append(np.arange(cells) * layers + k)
            heads.append(np.arange(cells) * layers + k - 1)
            ahead.append(np.full(cells, wall))
            back.append(np.zeros(cells))
        arcs = (np.concatenate(part) for part in (tails, heads, ahead, back))
        tail, head, forward, backward = arcs
        zeros = np.zeros(len(tail), dtype=np.int64)
        moved = _minimum_cut(gain, np.zeros(len(gain), dtype=np.int64), tail, head, forward, backward, zeros, 1)
        found[b] = moved.reshape(rows, columns, layers).sum(-1)
    return found
