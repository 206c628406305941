"""Masked transport: which cell of an input is shown at each cell of the output (Algorithm 1)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..settings import check_each, check_int, check_number, numbers, optional

Floats = NDArray[np.float32]
Cells = NDArray[np.int64]
_COSTS_AT_ONCE = 1 << 19  # candidate costs looked at in one piece
_MOST_CELLS = 2**14  # a distance for every pair of them
_NEAR = 24  # columns looked at first: squared distances up to 8 cells away from a border


def grid_distances(rows: int, columns: int) -> Floats:
    """Squared distances between the cells of a grid, 1 for a step along the whole longer side.

    `C_ij = |p_i - p_j|^2 / (max(rows, columns) - 1)^2`; a single cell is at distance 0 of itself.

    Args:
        rows: cells from top to bottom, >= 1; 1 for transport along one line.
        columns: cells from left to right, >= 1.

    Returns:
        (rows columns, rows columns) float32, cells in row-major order.

    Source: chapter 3, section 3.4.2; squared and normalised as in the reference code.

    Cost: O(n^2) for n cells.
    """
    rows, columns = check_int("rows", rows, 1, _MOST_CELLS), check_int("columns", columns, 1, _MOST_CELLS)
    if rows * columns > _MOST_CELLS:
        raise ValueError(
            f"{rows} x {columns} cells have too many distances, at most {_MOST_CELLS} cells; use larger cells"
        )
    y, x = np.divmod(np.arange(rows * columns), columns)
    squared = (y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2
    return (squared / max(1, (max(rows, columns) - 1) ** 2)).astype(np.float32)


@lru_cache(maxsize=32)
def _structure(rows: int, columns: int) -> tuple[Floats, Cells]:
    """Distances, and every cell's other cells from near to far."""
    distances = grid_distances(rows, columns)
    return distances, np.argsort(distances, axis=1, kind="stable")[:, 1:]


def masked_transport(
    saliency: Floats, mask: Floats, grid: tuple[int, int], *, cost: float = 0.8, rounds: int | None = None
) -> Cells:
    """The cell that moves to each cell, by Algorithm 1 run to convergence.

    Cost of moving cell i to cell j: `C'_ij = cost C_ij - s_i z_j` (Eq. 3.5). Every row proposes its cheapest column, a
    column keeps its cheapest proposer, losers go on to their next column: deferred acceptance. With z in {0, 1} a
    visible column is never worse off than with its own cell, so only pairs better than that are ever looked at.

    Args:
        saliency: (P, n) float32 >= 0 of each problem's cells.
        mask: (P, n) float32 in [0, 1]: the z_j. The reference code rounds up: any visible share counts as 1.
        grid: rows and columns of the cells, rows * columns = n; (1, n) for transport along a line.
        cost: xi of Eq. 3.5, > 0 (`t_eps` of the reference code), default 0.8.
        rounds: None: until convergence. A number: that many rounds of the reference code's variant (losers get +1, no
            v(1 - Pi) term); cells that it leaves without a source get their own.

    Returns:
        (P, n) int64 source cell of each cell; a permutation of each row unless `rounds` is given.

    Raises:
        ValueError: shapes do not fit, `cost` is not positive, or saliency is not finite.

    Source: chapter 3, Algorithm 1, Eq. 3.5.

    Differs: the reference code stops after a fixed number of rounds and leaves a visible cell with zero saliency without
        a source (black); here every cell has one.

    Cost: O(R n) for R cells that could improve on some visible cell, plus the proposals made.

    Example:
        >>> import numpy as np
        >>> saliency, mask = np.array([[0.9, 0.1, 0.0]], dtype=np.float32), np.array([[0, 1, 1]], dtype=np.float32)
        >>> masked_transport(saliency, mask, (1, 3), cost=0.1).tolist()
        [[2, 0, 1]]
    """
    saliency, mask = (
        numbers(name, given).astype(np.float32, copy=False) for name, given in (("saliency", saliency), ("mask", mask))
    )
    sides = check_each("grid", grid, check_int, 1)
    if len(sides) != 2:
        raise ValueError(f"grid must be (rows, columns), got {len(sides)} of them")
    grid = (sides[0], sides[1])
    rounds = optional(check_int, "rounds", rounds, 1, 10_000)
    if saliency.ndim != 2 or mask.shape != saliency.shape or saliency.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"saliency {saliency.shape}, mask {mask.shape} and grid {grid} do not fit; "
            f"needed are (problems, n), (problems, n) and rows * columns = n"
        )
    cost = check_number("cost", cost, 0, above=True, todo="it must be positive: without it any far cell would do")
    if not np.isfinite(saliency).all():
        raise ValueError("saliency must be finite; leave samples with non-finite saliency out")
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError(f"mask must be in [0, 1], got {mask.min():g} to {mask.max():g}")
    distances, near = _structure(*grid)
    priced = np.float32(cost) * distances
    if rounds is not None:
        return np.stack(
            [_reference_rounds(priced - np.outer(s, z), rounds) for s, z in zip(saliency, mask, strict=True)]
        )
    if ((mask == 0) | (mask == 1)).all():
        return _sparse(saliency, mask > 0, priced, near)
    return np.stack([_dense(priced - np.outer(s, z)) for s, z in zip(saliency, mask, strict=True)])


def _sparse(saliency: Floats, visible: NDArray[np.bool_], priced: Floats, near: Cells) -> Cells:
    """Deferred acceptance over the pairs that can change a visible column, then over what is left."""
    problems, n = saliency.shape
    source = np.broadcast_to(np.arange(n), (problems, n)).copy()
    if n == 1:
        return source
    problem, row, column, price = _candidates(saliency, visible, priced, near)
    if not len(row):
        return source
    holder = np.where(visible, np.arange(n), -1)
    held = np.where(visible, -saliency, np.float32(np.inf))
    hidden = ~visible[problem, row]
    homeless = _propose(problem, row, column, price, holder, held, np.unique(problem[hidden] * n + row[hidden]))
    # rows that hold no visible column: hidden ones stay at home; displaced ones share the homes that were left
    back = homeless[~visible.reshape(-1)[homeless]]
    lost = homeless[visible.reshape(-1)[homeless]]
    quiet = np.ones(problems * n, dtype=bool)
    quiet[problem[hidden] * n + row[hidden]] = False
    quiet[back] = True
    at_home = ~visible & quiet.reshape(problems, n)
    holder[at_home] = np.nonzero(at_home)[1]
    empty = np.flatnonzero(holder.reshape(-1) < 0)
    if len(lost):
        tails, heads = _pairs_within(lost // n, empty // n)
        row, column = lost[tails] % n, empty[heads] % n
        _propose(lost[tails] // n, row, column, priced[row, column], holder, held, lost)
    return holder


def _candidates(
    saliency: Floats, visible: NDArray[np.bool_], priced: Floats, near: Cells
) -> tuple[Cells, Cells, Cells, NDArray[np.float32]]:
    """Pairs (row, column) cheaper than the visible column's own cell (ties go to the lower row).

    A row can only gain where the way costs less than its saliency beyond the weakest visible cell, which for most rows
    leaves a few columns around it.
    """
    problems, n = saliency.shape
    sorted_price = np.take_along_axis(priced, near, 1)
    spare = saliency - np.where(visible, saliency, np.inf).min(1, keepdims=True)
    own = np.where(visible, -saliency, np.float32(-np.inf)).astype(np.float32)
    width = min(_NEAR, n - 1)
    few = (spare >= sorted_price[:, 0]) & (spare < sorted_price[:, width - 1])
    found = []
    for chosen, reach in ((few, width), (spare >= sorted_price[:, width - 1], n - 1)):
        rows = np.flatnonzero(chosen)
        step = max(1, _COSTS_AT_ONCE // n)
        for first in range(0, len(rows), step):
            problem, row = np.divmod(rows[first : first + step], n)
            column = near[row, :reach]
            price = sorted_price[row, :reach] - saliency[problem, row][:, None]
            limit = own[problem[:, None], column]
            hit = np.flatnonzero(price <= limit)
            price, limit, column = price.ravel()[hit], limit.ravel()[hit], column.ravel()[hit]
            problem, row = problem[hit // reach], row[hit // reach]
            keep = (price < limit) | (row < column)
            found.append((problem[keep], row[keep], column[keep], price[keep]))
    if not found:
        nothing = np.empty(0, dtype=np.int64)
        return nothing, nothing, nothing, np.empty(0, dtype=np.float32)
    problem, row, column, price = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return problem, row, column, price


def _propose(
    problem: Cells,
    row: Cells,
    column: Cells,
    price: NDArray[np.float32],
    holder: Cells,
    held: NDArray[np.float32],
    active: Cells,
) -> Cells:
    """Deferred acceptance over listed pairs; changes `holder` and `held`, returns the rows that ran out of columns.

    Rows are numbered problem * n + row. Ties go to the lower column (rows' choice) and the lower row (columns' choice).
    """
    n = holder.shape[1]
    owner, holder, held = problem * n + row, holder.reshape(-1), held.reshape(-1)
    if not _in_order(owner, price, column):
        order = np.lexsort((column, price, owner))
        problem, owner, price, column = problem[order], owner[order], price[order], column[order]
    target = problem * n + column
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    first, last = np.zeros(held.size, dtype=np.int64), np.zeros(held.size, dtype=np.int64)
    first[owner[starts]], last[owner[starts]] = starts, np.append(starts[1:], len(owner))
    pointer = first.copy()
    homeless = []
    while len(active):
        out = pointer[active] >= last[active]
        homeless.append(active[out])
        active = active[~out]
        if not len(active):
            break
        pair = pointer[active]
        pointer[active] += 1
        bids = np.lexsort((active, price[pair], target[pair]))
        best = np.ones(len(bids), dtype=bool)
        best[1:] = target[pair][bids][1:] != target[pair][bids][:-1]
        top, losers = bids[best], active[bids[~best]]
        bidder, asked, bid = active[top], target[pair][top], price[pair][top]
        now = holder[asked]
        wins = (now < 0) | (bid < held[asked]) | ((bid == held[asked]) & (bidder % n < now))
        evicted = asked[wins] // n * n + now[wins]
        evicted = evicted[now[wins] >= 0]
        holder[asked[wins]] = bidder[wins] % n
        held[asked[wins]] = bid[wins]
        active = np.concatenate([losers, bidder[~wins], evicted])
    return np.concatenate(homeless) if homeless else np.empty(0, dtype=np.int64)


def _in_order(owner: Cells, price: NDArray[np.float32], column: Cells) -> bool:
    """Every row's pairs stand together, cheapest first: what `_candidates` gives but for ties made by rounding."""
    same = owner[1:] == owner[:-1]
    down = (price[1:] < price[:-1]) | ((price[1:] == price[:-1]) & (column[1:] < column[:-1]))
    runs = len(owner) - np.count_nonzero(same)
    return not (same & down).any() and len(np.unique(owner[np.flatnonzero(np.diff(owner, prepend=-1))])) == runs


def _pairs_within(left: Cells, right: Cells) -> tuple[Cells, Cells]:
    """All index pairs (a, b) with left[a] == right[b]; both sorted."""
    left_order = np.argsort(left, kind="stable")
    start, stop = (np.searchsorted(right, left[left_order], side=side) for side in ("left", "right"))
    counts = stop - start
    tails = np.repeat(left_order, counts)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return tails, np.repeat(start, counts) + offset


def _dense(cost: Floats) -> Cells:
    """Algorithm 1 to convergence on a full cost matrix (any mask)."""
    n = len(cost)
    row, column = np.divmod(np.arange(n * n), n)
    holder, held = np.full((1, n), -1), np.full((1, n), np.inf, dtype=np.float32)
    _propose(np.zeros(n * n, dtype=np.int64), row, column, cost.reshape(-1), holder, held, np.arange(n))
    return holder[0]


def _reference_rounds(cost: Floats, rounds: int) -> Cells:
    """`rounds` rounds as the reference code runs them: an unproposed entry counts as 0 when a column chooses."""
    n = len(cost)
    cost = cost.copy()
    everyone = np.arange(n)
    source = np.full(n, -1)
    for _ in range(rounds):
        target = cost.argmin(1)
        offers = np.zeros_like(cost)
        offers[everyone, target] = cost[everyone, target]
        winner = offers.argmin(0)
        source = np.where(target[winner] == everyone, winner, -1)
        lost = source[target] != everyone
        cost[everyone[lost], target[lost]] += 1
    return np.where(source < 0, everyone, source)
