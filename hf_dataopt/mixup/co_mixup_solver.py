"""One output's labelling: many labels on a small grid, unary costs and one pair cost between neighbours.

Labels that cannot be in an optimum are removed first (few are left: an input used above tau is out everywhere). What is
left is minimised exactly by dynamic programming over a moving frontier where that fits, and otherwise in strips of columns
and rows, each exact given the rest, and by moves of any set of cells to one label, until neither improves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

try:
    from . import co_mixup_compiled as compiled
except (ImportError, RuntimeError):  # numba is optional; it refuses to load where it has no folder to cache in
    compiled = None  # type: ignore[assignment]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

_EXACT_STATES = 16384  # largest frontier that is searched exactly, in all problems at once
_ALONE_WORK = 2**25  # most states times cells, the same in one problem by itself: 256 MB
_STRIP_STATES = 2048  # of one strip
_MAX_ROUNDS = 12
_RIVALS = (1, 2, 2, 2, 2)  # rounds of pruning: each label is compared with this many of the cheapest
_SLACK = 1e-9  # rounding: labels this close to their bound are kept


def grid_energy(unary: Floats, pair: Floats, beta: float, labels: Ints) -> Floats:
    """Sum of the unaries plus beta times the pair costs of 4-neighbours.

    Args:
        unary: (B, h, w, L).
        pair: (B, L, L) or (L, L).
        beta: weight of a pair, >= 0.
        labels: (B, h, w) int.

    Returns:
        (B,) float64.
    """
    unary = np.asarray(unary, np.float64)
    pair = np.broadcast_to(pair, (len(unary), *pair.shape[-2:]))
    which = np.arange(len(unary))[:, None, None]
    chosen = np.take_along_axis(unary, labels[..., None], 3).sum((1, 2, 3))
    down = pair[which, labels[:, :-1], labels[:, 1:]].sum((1, 2))
    right = pair[which, labels[:, :, :-1], labels[:, :, 1:]].sum((1, 2))
    return chosen + beta * (down + right)


def minimise_grid(unary: Floats, pair: Floats, beta: float) -> Ints:
    """Labels of (nearly) least energy for a batch of problems.

    Args:
        unary: (B, h, w, L) finite; a label that must not be used costs a large number.
        pair: (B, L, L) or (L, L), symmetric, >= 0.
        beta: weight of a pair, >= 0.

    Returns:
        (B, h, w) labels. The optimum whenever the frontier of the remaining labels fits (always seen at 4x4); else a
        labelling that no strip and no move to one label can improve.

    Source: the sub-problem of Algorithm 3; the reference code runs alpha-beta swap on it.
    Cost: O(h w K^(min(h, w) + 1)) with K labels left per cell (about 2; 256 MB at most), or O(h w 2048 K) per round of strips.
    """
    unary = np.asarray(unary, np.float64)
    if unary.shape[2] > unary.shape[1]:
        return minimise_grid(unary.transpose(0, 2, 1, 3), pair, beta).transpose(0, 2, 1)
    batch, _, _, n_labels = unary.shape
    pair = beta * np.broadcast_to(np.asarray(pair, np.float64), (batch, n_labels, n_labels))
    if compiled is not None:
        return compiled.minimise(unary, pair)
    problem = _Problem.pruned(unary, pair)
    found = _search(problem)
    return np.take_along_axis(problem.labels, found[..., None], 3)[..., 0]


@dataclass
class _Problem:
    """Problems with K candidates per cell, cheapest first: unary (B, h, w, K), labels (B, h, w, K), down (B, h - 1, w, K, K)
    and right (B, h, w - 1, K, K) pair costs, and how many candidates are in use, counts (B, h, w)."""

    unary: Floats
    labels: Ints
    down: Floats
    right: Floats
    counts: Ints

    @property
    def sizes(self) -> Ints:
        """(h, w): most candidates in use at each place."""
        return self.counts.max(0)

    @property
    def left(self) -> npt.NDArray[np.bool_]:
        """(B, h, w, K): the candidates in use."""
        return np.arange(self.labels.shape[3]) < self.counts[..., None]

    def some(self, which: Ints) -> _Problem:
        """Some of the problems."""
        return _Problem(
            unary=self.unary[which],
            labels=self.labels[which],
            down=self.down[which],
            right=self.right[which],
            counts=self.counts[which],
        )

    @classmethod
    def pruned(cls, unary: Floats, pair: Floats) -> _Problem:
        """Keep the labels that may be in an optimum.

        Exchanging label l for the cheapest one, b, saves u_l - u_b and costs at most the sum over neighbours of
        max_n pair(b, n) - pair(l, n): where that is less, l is in no optimum. First with n over all labels, then, in
        rounds, over the labels left at the neighbour.
        """
        batch, height, width, _ = unary.shape
        gap = unary - unary.min(3, keepdims=True)
        degree = np.full((height, width, 1), 4.0)
        degree[[0, -1]] -= 1
        degree[:, [0, -1]] -= 1
        if height == 1:
            degree -= 1
        if width == 1:
            degree -= 1
        reach = pair.max((1, 2))[:, None, None, None]
        count = int((gap <= degree * reach + _SLACK).sum(3).max())
        labels = np.argsort(unary, axis=3)[..., :count]
        left = np.full(labels.shape[:3], count)
        for rivals in _RIVALS:
            kept = cls._of(unary, pair, labels)._possible(np.arange(labels.shape[3]) < left[..., None], rivals)
            left = kept.sum(3)
            order = np.argsort(~kept, axis=3, kind="stable")[..., : int(left.max())]
            labels = np.take_along_axis(labels, order, 3)
            if labels.shape[3] == 1:
                break
        problem = cls._of(unary, pair, labels)
        problem.counts = left
        return problem

    @classmethod
    def _of(cls, unary: Floats, pair: Floats, labels: Ints) -> _Problem:
        which = np.arange(len(unary)).reshape(-1, 1, 1, 1, 1)
        return cls(
            unary=np.take_along_axis(unary, labels, 3),
            labels=labels,
            down=pair[which, labels[:, :-1, :, :, None], labels[:, 1:, :, None, :]],
            right=pair[which, labels[:, :, :-1, :, None], labels[:, :, 1:, None, :]],
            counts=np.full(labels.shape[:3], labels.shape[3]),
        )

    def restricted(self, index: Ints, counts: Ints) -> _Problem:
        """The problems with only the candidates of `index` (B, h, w, k), `counts` of them in use."""
        which = np.ogrid[tuple(slice(n) for n in self.unary.shape[:3])]
        up, low, left, right = index[:, :-1], index[:, 1:], index[:, :, :-1], index[:, :, 1:]
        b, r, c = (array[..., None, None] for array in which)
        return _Problem(
            unary=np.take_along_axis(self.unary, index, 3),
            labels=np.take_along_axis(self.labels, index, 3),
            down=self.down[b, r[:, :-1], c, up[..., None], low[..., None, :]],
            right=self.right[b, r, c[:, :, :-1], left[..., None], right[..., None, :]],
            counts=counts,
        )

    def transposed(self) -> _Problem:
        """The same problems with rows and columns exchanged."""
        return _Problem(
            unary=self.unary.transpose(0, 2, 1, 3),
            labels=self.labels.transpose(0, 2, 1, 3),
            down=self.right.transpose(0, 2, 1, 3, 4),
            right=self.down.transpose(0, 2, 1, 3, 4),
            counts=self.counts.transpose(0, 2, 1),
        )

    def _possible(self, left: npt.NDArray[np.bool_], rivals: int) -> npt.NDArray[np.bool_]:
        """(B, h, w, K): no rival among the cheapest `rivals` is better whatever the neighbours, of the labels left, are."""
        never = np.where(left, 0.0, -np.inf)
        rivals = min(rivals, left.shape[3])
        bound = np.full((*left.shape[:3], rivals, left.shape[3]), _SLACK)
        low, far = self.down.swapaxes(3, 4), self.right.swapaxes(3, 4)
        bound[:, :-1] += _most_lost(self.down, never[:, 1:], rivals)
        bound[:, 1:] += _most_lost(low, never[:, :-1], rivals)
        bound[:, :, :-1] += _most_lost(self.right, never[:, :, 1:], rivals)
        bound[:, :, 1:] += _most_lost(far, never[:, :, :-1], rivals)
        saves = self.unary[..., None, :] - self.unary[..., :rivals, None]
        return left & ~((saves > bound) & left[..., :rivals, None]).any(3)


def _most_lost(pair: Floats, never: Floats, rivals: int) -> Floats:
    """(..., R, K): by how much the pair cost of each rival can be above that of each label, over the neighbour's labels."""
    most = np.full((*pair.shape[:3], rivals, pair.shape[3]), -np.inf)
    for n in range(pair.shape[4]):
        lost = pair[..., :rivals, None, n] - pair[..., None, :, n]
        lost += never[..., n, None, None]
        np.maximum(most, lost, out=most)
    return most


def _largest_frontier(sizes: Ints) -> Ints:
    """(..., h, w) to (...,): most joint states of a row-major frontier, the cell that leaves it included."""
    flat = np.log(sizes).reshape(*sizes.shape[:-2], -1)
    sums = np.concatenate([np.zeros_like(flat[..., :1]), np.cumsum(flat, -1)], -1)
    ends = np.minimum(np.arange(flat.shape[-1]) + sizes.shape[-1] + 1, flat.shape[-1])
    most = np.ceil(np.exp((sums[..., ends] - sums[..., :-1]).max(-1)) - 1e-6)
    return np.minimum(most, 2.0**62).astype(np.intp)  # beyond that it is no integer, and too many all the same


def _frontier_search(problem: _Problem) -> Ints:
    """Exact minimum by dynamic programming: cells row by row; the state is the last label of every column.

    States run over the newest cell slowest and over the oldest, which leaves next, fastest. A cell with one candidate has no
    choice: its pair costs are its neighbours' own, and it is passed over.
    """
    batch = len(problem.unary)
    sizes = problem.sizes.tolist()
    unary = _with_settled(problem)
    state, steps = np.zeros((batch, 1)), []
    for r, row in enumerate(sizes):
        for c, k in enumerate(row):
            up, left = sizes[r - 1][c] if r else 1, row[c - 1] if c else 1
            if k == up == 1:
                continue
            steps.append((r, c, up, k, state))
            if k == 1:
                ends = state.reshape(batch, -1, up)
                state = reduce(np.minimum, [ends[..., i] for i in range(up)])
                continue
            cost = unary[:, r, c, None, :k, None]  # (B, up, k, left)
            if left > 1:
                cost = cost + problem.right[:, r, c - 1, None, :left, :k].swapaxes(2, 3)
            if up > 1:
                cost = cost + problem.down[:, r - 1, c, :up, :k, None]
            before = state.reshape(batch, left, -1, up).transpose(0, 3, 1, 2)
            costs = np.empty((batch, up, k, *before.shape[2:]))  # in this order, so that the inner loops are long
            np.add(before[:, :, None], cost[..., None], out=costs)
            state = (np.minimum.reduce(costs, axis=1) if up > 1 else costs).reshape(batch, -1)
    return _trace(problem, state, steps)


def _with_settled(problem: _Problem) -> Floats:
    """(B, h, w, K): the unaries, and the pair costs at neighbours that have one candidate in all problems."""
    settled, unary = (problem.sizes == 1)[..., None], problem.unary.copy()
    unary[:, 1:] += problem.down[:, :, :, 0] * settled[:-1]
    unary[:, :-1] += problem.down[..., 0] * settled[1:]
    unary[:, :, 1:] += problem.right[:, :, :, 0] * settled[:, :-1]
    unary[:, :, :-1] += problem.right[..., 0] * settled[:, 1:]
    return unary


def _trace(problem: _Problem, state: Floats, steps: list[tuple[int, int, int, int, Floats]]) -> Ints:
    """Labels of the best final state, from the last cell back to the first.

    `steps` are row, column, candidates above and here, and all states before.
    """
    found = np.zeros(problem.unary.shape[:3], np.intp)
    for b, flat in enumerate(state.argmin(1).tolist()):  # problem by problem: plain numbers cost less than short arrays
        for r, c, up, k, before in reversed(steps):
            label, rest = divmod(flat, before.shape[1] // up)
            found[b, r, c], flat = label, rest * up
            if up > 1:
                options = before[b, flat : flat + up]
                if k > 1:
                    options = options + problem.down[b, r - 1, c, :up, label]
                flat += int(options.argmin())
    return found


def _search(problem: _Problem) -> Ints:
    """Exact if the frontier fits, of all at once or of each; else strips and moves."""
    found = np.zeros(problem.unary.shape[:3], np.intp)
    if problem.counts.max() == 1:
        return found
    if _largest_frontier(problem.sizes) <= _EXACT_STATES:
        return _frontier_search(problem)
    wide = []
    states = np.stack([_largest_frontier(side) for side in (problem.counts, problem.counts.swapaxes(1, 2))], 1)
    for i, (by_rows, by_columns) in enumerate(states.tolist()):
        if min(by_rows, by_columns) > max(_EXACT_STATES, _ALONE_WORK // found[i].size):
            wide.append(i)
            continue
        one, turned = problem.some(np.array([i])), by_columns < by_rows
        found[i] = _frontier_search(one.transposed())[0].T if turned else _frontier_search(one)[0]
    if wide:
        found[wide] = _wide_search(problem.some(np.array(wide)))
    return found


def _wide_search(problem: _Problem) -> Ints:
    """Strips, then moves of any set of cells to one label, until nothing improves."""
    found = _strips(problem, np.zeros(problem.unary.shape[:3], np.intp))
    if problem.unary.shape[3] == 2:
        return found
    offered = [np.unique(labels[left]) for labels, left in zip(problem.labels, problem.left, strict=True)]
    for _ in range(_MAX_ROUNDS):
        before = found
        for i in range(max(map(len, offered))):  # each problem its own label, all at once
            found = _move(problem, found, np.array([labels[min(i, len(labels) - 1)] for labels in offered]))
        if np.array_equal(found, before):
            break
        found = _strips(problem, found)
    return found


def _move(problem: _Problem, found: Ints, label: Ints) -> Ints:
    """The best exchange of any cells' labels for `label` (B,): two candidates per cell."""
    same = (problem.labels == label[:, None, None, None]) & problem.left
    other = np.where(same.any(3), same.argmax(3), found)
    counts = 1 + (other != found)
    if counts.max() == 1:
        return found
    pair = np.stack([found, other], 3)
    return np.take_along_axis(pair, _search(problem.restricted(pair, counts))[..., None], 3)[..., 0]


def _strips(problem: _Problem, found: Ints) -> Ints:
    """Exact minimum over every strip of columns, then of rows, given the rest, until a whole round changes nothing.

    Strips of one pass leave a column between them, so that they do not see each other; the next pass is shifted.
    """
    sides = (problem, problem.transposed())
    widths = [_strip_width(side.sizes) for side in sides]
    for _ in range(_MAX_ROUNDS):
        before = found
        for side, width, turned in zip(sides, widths, (False, True), strict=True):
            labels = found.transpose(0, 2, 1) if turned else found
            for shift in sorted({0, (width + 1) // 2}):
                labels = _strip_pass(side, labels, width, shift)
            found = labels.transpose(0, 2, 1) if turned else labels
        if np.array_equal(found, before):
            break
    return found


def _strip_width(sizes: Ints) -> int:
    """Most columns of which every run has a small enough frontier."""
    columns = sizes.shape[1]
    for width in range(columns - 1, 1, -1):
        runs = (sizes[:, start : start + width] for start in range(columns - width + 1))
        if all(_largest_frontier(run) <= _STRIP_STATES for run in runs):
            return width
    return 1


def _strip_pass(problem: _Problem, found: Ints, width: int, shift: int) -> Ints:
    """Labels after one pass over strips `width` columns wide, the first of which starts at `shift`."""
    columns, batch = found.shape[2], len(found)
    starts = list(range(shift, columns - width + 1, width + 1))
    which, rows = np.arange(batch)[:, None], np.arange(found.shape[1])
    if not starts:
        return found
    parts = []
    for start in starts:
        end = start + width
        unary = problem.unary[:, :, start:end].copy()
        if start:
            unary[:, :, 0] += problem.right[which, rows, start - 1, found[:, :, start - 1]]
        if end < columns:
            unary[:, :, -1] += problem.right[which, rows, end - 1, :, found[:, :, end]]
        parts.append(
            (
                unary,
                problem.down[:, :, start:end],
                problem.right[:, :, start : end - 1],
                problem.counts[:, :, start:end],
            )
        )
    unary, down, right, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    best = _frontier_search(_Problem(unary=unary, labels=problem.labels, down=down, right=right, counts=counts))
    result = found.copy()
    for i, start in enumerate(starts):
        result[:, :, start : start + width] = best[i * batch : (i + 1) * batch]
    return result
