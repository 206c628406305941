"""One output's labelling: many labels on a small grid, unary costs and one pair cost between neighbours.

Labels that cannot be in an optimum are removed first (few are left: an input used above tau is out everywhere). What is
left is minimised exactly by dynamic programming over a moving frontier where that fits, and otherwise in strips of columns
and rows, each exact given the rest, and by moves of any set of cells to one label, until neither improves.
"""

from __future__ import annotations

from dataclasses import dataclass

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
_RIVALS = (1, 2, 2)  # rounds of pruning: each label is compared with this many of the cheapest
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
        max_n pair(b, n) - pair(l, n): where that is less, l is in no optimum. First with n over all labels, then, twice,
        over the labels left at the neighbour.
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
        kept = left.copy()
        for b in range(min(rivals, self.unary.shape[3])):
            bound = np.full(self.unary.shape, _SLACK)
            bound[:, :-1] += (self.down[..., b, None, :] - self.down + never[:, 1:, :, None]).max(4)
            bound[:, :, :-1] += (self.right[..., b, None, :] - self.right + never[:, :, 1:, None]).max(4)
            bound[:, 1:] += (self.down[..., b, None] - self.down + never[:, :-1, ..., None]).max(3)
            bound[:, :, 1:] += (self.right[..., b, None] - self.right + never[:, :, :-1, :, None]).max(3)
            saves = self.unary - self.unary[..., b, None]
            kept &= (saves <= bound) | ~left[..., b, None]
        return kept


def _largest_frontier(sizes: Ints) -> int:
    """Most joint states of a row-major frontier, the cell that leaves it included."""
    flat = np.log(sizes.ravel())
    width = sizes.shape[1]
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    ends = np.minimum(np.arange(len(flat)) + width + 1, len(flat))
    return int(np.ceil(np.exp((sums[ends] - sums[:-1]).max()) - 1e-6))


def _frontier_search(problem: _Problem) -> Ints:
    """Exact minimum by dynamic programming: cells row by row; the state is the last label of every column."""
    batch, height, width, _ = problem.unary.shape
    sizes = problem.sizes.tolist()
    # the unary of a cell rides on the pair cost that brings it in
    down = problem.down + problem.unary[:, 1:, :, None, :]
    state = problem.unary[:, 0, 0, : sizes[0][0]]
    for c in range(1, width):
        left, k = sizes[0][c - 1], sizes[0][c]
        cost = problem.right[:, 0, c - 1, :left, :k] + problem.unary[:, 0, c, None, :k]
        state = (state.reshape(batch, -1, left, 1) + cost[:, None]).reshape(batch, -1)
    before = []
    for r in range(1, height):
        done, ahead = 1, state.shape[1]
        for c in range(width):
            up, k = sizes[r - 1][c], sizes[r][c]
            ahead //= up
            before.append(state)
            cost = down[:, r - 1, c, :up, :k]
            view = state.reshape(batch, done, up, 1, ahead)
            if up == 1:
                state = view[:, :, 0] + cost[:, 0, None, :, None].reshape(batch, 1, k, 1)
            else:
                state = (view + cost[:, None, :, :, None]).min(2)
            if c:
                left = sizes[r][c - 1]
                side = problem.right[:, r, c - 1, :left, :k]
                state = state.reshape(batch, done // left, left, k, ahead) + side[:, None, :, :, None]
            done *= k
            state = state.reshape(batch, -1)
    return _trace(state, before, down, sizes)


def _trace(state: Floats, before: list[Floats], down: Floats, sizes: list[list[int]]) -> Ints:
    """Labels of the best final state, from the last cell back to the first."""
    batch, height, width = len(state), len(sizes), len(sizes[0])
    which = np.arange(batch)
    found = np.zeros((batch, height, width), np.intp)
    flat = state.argmin(1)
    for r in range(height - 1, 0, -1):
        ahead = 1
        for c in range(width - 1, -1, -1):
            up, k = sizes[r - 1][c], sizes[r][c]
            rest, after = np.divmod(flat, ahead)
            done, label = np.divmod(rest, k)
            found[:, r, c] = label
            if up > 1:
                options = before.pop().reshape(batch, -1, up, ahead)[which, done, :, after]
                above = (options + down[which, r - 1, c, :up, label]).argmin(1)
                flat = (done * up + above) * ahead + after
            else:
                before.pop()
                flat = done * ahead + after
            ahead *= up
    for c in range(width - 1, -1, -1):
        flat, found[:, 0, c] = np.divmod(flat, sizes[0][c])
    return found


def _search(problem: _Problem) -> Ints:
    """Exact if the frontier fits, of all at once or of each; else strips and moves."""
    found = np.zeros(problem.unary.shape[:3], np.intp)
    if problem.counts.max() == 1:
        return found
    if _largest_frontier(problem.sizes) <= _EXACT_STATES:
        return _frontier_search(problem)
    sizes = np.array([[_largest_frontier(side) for side in (counts, counts.T)] for counts in problem.counts])
    wide = sizes.min(1) > max(_EXACT_STATES, _ALONE_WORK // problem.counts[0].size)
    for i in np.flatnonzero(~wide):
        one = problem.some(np.array([i]))
        turned = sizes[i, 1] < sizes[i, 0]
        labels = _frontier_search(one.transposed() if turned else one)
        found[i : i + 1] = labels.transpose(0, 2, 1) if turned else labels
    if wide.any():
        found[wide] = _wide_search(problem.some(np.flatnonzero(wide)))
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
