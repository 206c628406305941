"""`co_mixup_solver` as loops for numba, where it is installed: same problem, less time, wider searches.

Importing this module needs numba; `co_mixup_solver` falls back to NumPy without it.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

_SLACK = 1e-9
_WORK = 1 << 18  # most states times cells of an exact search
_STRIP_STATES = 512
_MOVE_STATES = 1024  # two candidates per cell: 9 columns at once
_MAX_ROUNDS = 10

_compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


def minimise(unary: npt.NDArray[np.float64], pair: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Labels of least energy found: (B, h, w, L) unaries, w <= h, and (B, L, L) weighted pair costs -> (B, h, w)."""
    batch, height, width, n = unary.shape
    found = np.empty((batch, height * width), np.intp)
    flat = np.ascontiguousarray(unary).reshape(batch, height * width, n)
    _batch(flat, np.ascontiguousarray(pair), found, height, width)
    return found.reshape(batch, height, width)


@_compiled
def _batch(unary, pair, found, height, width):  # type: ignore[no-untyped-def]
    for b in range(len(unary)):
        _one(unary[b], pair[b], found[b], height, width)


@_compiled
def _one(unary, pair, labels, height, width):  # type: ignore[no-untyped-def]
    """Prune; search everything at once if that fits, else strips and single-label moves until nothing improves."""
    cells, n = unary.shape
    domain, size = _prune(unary, pair, height, width)
    for cell in range(cells):
        labels[cell] = domain[cell, 0]
    if _peak(size, height, width, width, 1, 0, width) <= max(_STRIP_STATES, _WORK // cells):
        _strip(unary, pair, domain, size, labels, (height, width, width, 1), 0, width)
        return
    two, few = np.empty((cells, 2), np.int64), np.empty(cells, np.int64)
    quiet = 0  # moves in a row that changed nothing; move 0 is the strips, move l + 1 the label l
    for step in range(_MAX_ROUNDS * (n + 1)):
        label, offered = step % (n + 1) - 1, False
        if label < 0:
            changed = _cover(unary, pair, domain, size, labels, height, width, _STRIP_STATES)
        else:
            for cell in range(cells):
                two[cell, 0], few[cell] = labels[cell], 1
                for k in range(size[cell]):
                    if domain[cell, k] == label and labels[cell] != label:
                        two[cell, 1], few[cell], offered = label, 2, True
            changed = offered and _cover(unary, pair, two, few, labels, height, width, _MOVE_STATES)
        quiet = 0 if changed else quiet + 1
        if quiet > n:
            break


@_compiled
def _prune(unary, pair, height, width):  # type: ignore[no-untyped-def]
    """Labels that may be in an optimum, cheapest first: (cells, L) and their number (cells,).

    Label l goes if some b saves more than it can cost at the neighbours: u_l - u_b > sum_n max_x pair(b, x) - pair(l, x).
    """
    cells, n = unary.shape
    domain, size = np.empty((cells, n), np.int64), np.zeros(cells, np.int64)
    reach = 0.0
    for label in range(n):
        for other in range(n):
            reach = max(reach, pair[label, other])
    for cell in range(cells):
        r, c = cell // width, cell % width
        degree = (r > 0) + (r < height - 1) + (c > 0) + (c < width - 1)
        bound = np.inf
        for label in range(n):
            bound = min(bound, unary[cell, label])
        bound += degree * reach + _SLACK
        for label in range(n):
            if unary[cell, label] <= bound:
                k = size[cell]
                while k > 0 and unary[cell, domain[cell, k - 1]] > unary[cell, label]:
                    domain[cell, k] = domain[cell, k - 1]
                    k -= 1
                domain[cell, k] = label
                size[cell] += 1
    changed = True
    while changed:
        changed = False
        for cell in range(cells):
            k = size[cell] - 1
            while k > 0:
                if _dominated(unary, pair, domain, size, cell, k, height, width):
                    for i in range(k, size[cell] - 1):
                        domain[cell, i] = domain[cell, i + 1]
                    size[cell] -= 1
                    changed = True
                k -= 1
    return domain, size


@_compiled
def _dominated(unary, pair, domain, size, cell, k, height, width):  # type: ignore[no-untyped-def]
    r, c = cell // width, cell % width
    label = domain[cell, k]
    for i in range(k):
        rival = domain[cell, i]
        slack = unary[cell, label] - unary[cell, rival] - _SLACK
        for side in range(4):
            if side == 0 and r > 0:
                near = cell - width
            elif side == 1 and r < height - 1:
                near = cell + width
            elif side == 2 and c > 0:
                near = cell - 1
            elif side == 3 and c < width - 1:
                near = cell + 1
            else:
                continue
            worst = -np.inf
            for x in range(size[near]):
                worst = max(worst, pair[rival, domain[near, x]] - pair[label, domain[near, x]])
            slack -= worst
            if slack < 0:
                break
        if slack > 0:
            return True
    return False


@_compiled
def _peak(size, rows, columns, step_row, step_column, start, end):  # type: ignore[no-untyped-def]
    """Most joint states while a frontier runs over the rows of columns start..end - 1."""
    width = end - start
    n = rows * width
    most = 1.0
    for first in range(max(1, n - width)):
        states = 1.0
        for i in range(first, min(first + width + 1, n)):
            states *= size[(i // width) * step_row + (start + i % width) * step_column]
        most = max(most, states)
    return most


@_compiled
def _cover(unary, pair, domain, size, labels, height, width, limit):  # type: ignore[no-untyped-def]
    """Strips of columns, then of rows, as wide as their frontier allows, each overlapping the last by half.

    Returns whether a label changed.
    """
    changed = False
    for turned in range(2):
        rows, columns = (height, width) if turned == 0 else (width, height)
        step_row, step_column = (width, 1) if turned == 0 else (1, width)
        start = 0
        while start < columns:
            end = start + 1
            while end < columns and (_peak(size, rows, columns, step_row, step_column, start, end + 1) <= limit):
                end += 1
            changed |= _strip(unary, pair, domain, size, labels, (rows, columns, step_row, step_column), start, end)
            if end == columns:
                break
            start += max(1, (end - start) // 2)
        if start == 0:
            break  # one strip was everything
    return changed


@_compiled
def _strip(unary, pair, domain, size, labels, shape, start, end):  # type: ignore[no-untyped-def]
    """Exact minimum over columns start..end - 1 given the labels of the others, written into `labels`.

    Dynamic programming over cells row by row. A state is the index of the labels of the last `width` cells, first
    cell most significant: (cells of this row so far) x (cells of the row above from here on).
    """
    rows, columns, step_row, step_column = shape
    width = end - start
    n = rows * width
    cells, ks = np.empty(n, np.int64), np.empty(n, np.int64)
    for i in range(n):
        cells[i] = (i // width) * step_row + (start + i % width) * step_column
        ks[i] = size[cells[i]]
    done_of, ahead_of, offset = np.ones(n, np.int64), np.ones(n, np.int64), np.zeros(n + 1, np.int64)
    for i in range(n):
        done, ahead = 1, 1
        for q in range(i - i % width, i):
            done *= ks[q]
        if i >= width:
            for q in range(i - width + 1, i - i % width):
                ahead *= ks[q]
        done_of[i], ahead_of[i] = done, ahead
        offset[i + 1] = offset[i] + done * ks[i] * ahead
    most = 1
    for i in range(n):
        most = max(most, offset[i + 1] - offset[i])
    state, new = np.zeros(most), np.empty(most)
    choice = np.zeros(offset[n], np.int16)
    for i in range(n):
        cell, k, done, ahead = cells[i], ks[i], done_of[i], ahead_of[i]
        column = i % width
        above = cells[i - width] if i >= width else -1
        left = cells[i - 1] if column > 0 else -1
        ups = ks[i - width] if i >= width else 1
        lefts = ks[i - 1] if column > 0 else 1
        for x in range(k):
            label = domain[cell, x]
            base = unary[cell, label]
            if column == 0 and start > 0:
                base += pair[labels[cell - step_column], label]
            if column == width - 1 and end < columns:
                base += pair[label, labels[cell + step_column]]
            for a in range(done):
                cost = base
                if left >= 0:
                    cost += pair[domain[left, a % lefts], label]
                for c in range(ahead):
                    best, which = np.inf, 0
                    for y in range(ups):
                        value = state[(a * ups + y) * ahead + c]
                        if above >= 0:
                            value += pair[domain[above, y], label]
                        if value < best:
                            best, which = value, y
                    place = (a * k + x) * ahead + c
                    new[place] = best + cost
                    choice[offset[i] + place] = which
        state, new = new, state
    place, changed = 0, False
    for q in range(offset[n] - offset[n - 1]):
        if state[q] < state[place]:
            place = q
    for i in range(n - 1, -1, -1):
        k, ahead = ks[i], ahead_of[i]
        a, x, c = place // (k * ahead), (place // ahead) % k, place % ahead
        ups = ks[i - width] if i >= width else 1
        place = (a * ups + choice[offset[i] + place]) * ahead + c
        if labels[cells[i]] != domain[cells[i], x]:
            labels[cells[i]], changed = domain[cells[i], x], True
    return changed
