"""The mask solver finds the global optimum: against every labelling, against Ishikawa's cut, at extreme scales."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dataopt.errors import MissingExtraError
from hf_dataopt.mixup import graph_cut
from hf_dataopt.mixup.graph_cut import grid_energy, solve_masks, solve_masks_pygco

from ..reference import puzzle_mix as slow


def random_problems(
    seed: int, size: int, rows: int, columns: int, count: int, *, convex: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unaries with or without the convex shape the prior gives, and edges of several strengths."""
    rng = np.random.default_rng(seed)
    shape = (size, rows, columns)
    if convex:
        steps = np.arange(count)
        bend = np.cumsum(rng.random((size, 1, 1, count)).cumsum(-1), -1) * rng.random((size, 1, 1, 1))
        unary = rng.normal(size=shape)[..., None] * steps + bend - 0.5 * bend[..., -1:] * steps
    else:
        unary = rng.normal(size=(*shape, count))
    strength = rng.choice([0.0, 0.1, 1.0, 5.0], size=(size, 1, 1))
    return unary, strength * rng.random((size, rows - 1, columns)), strength * rng.random((size, rows, columns - 1))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (3, 2), (3, 3)])
@pytest.mark.parametrize("convex", [True, False])
def test_equals_the_best_of_all_labellings(count: int, grid: tuple[int, int], convex: bool) -> None:
    size = 6 if (count, grid) == (4, (3, 3)) else 40
    unary, vertical, horizontal = random_problems(7 * count + grid[0], size, *grid, count, convex=convex)
    found = grid_energy(unary, vertical, horizontal, solve_masks(unary, vertical, horizontal))
    best = [slow.least_energy(*problem) for problem in zip(unary, vertical, horizontal, strict=True)]
    np.testing.assert_allclose(found, best, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("side", "count"), [(1, 3), (5, 3), (9, 2), (8, 4), (16, 3)])
def test_descent_equals_the_layered_cut(side: int, count: int) -> None:
    problems = random_problems(side, 6, side, side + 1, count, convex=True)
    fast, layered = solve_masks(*problems), graph_cut._layered(graph_cut._Grids(*problems))
    np.testing.assert_allclose(grid_energy(*problems, fast), grid_energy(*problems, layered), rtol=0, atol=1e-7)


@pytest.mark.parametrize("convex", [True, False])
def test_integer_labels_of_any_scale(convex: bool) -> None:
    unary, vertical, horizontal = random_problems(3, 30, 4, 4, 3, convex=convex)
    expected = grid_energy(unary, vertical, horizontal, solve_masks(unary, vertical, horizontal))
    for scale in (1e-9, 1e9):
        labels = solve_masks(unary * scale, vertical * scale, horizontal * scale)
        np.testing.assert_allclose(grid_energy(unary, vertical, horizontal, labels), expected, rtol=0, atol=1e-7)


def responses_in_loops(unary: np.ndarray, down: np.ndarray, right: np.ndarray, start: int) -> np.ndarray:
    """Four rounds in which every cell of one grid answers its neighbours' labels of the round before; the outer of equals."""
    rows, columns, count = unary.shape
    labels = np.full((rows, columns), start)
    for _ in range(4):
        answer = labels.copy()
        for y in range(rows):
            for x in range(columns):
                cost = unary[y, x].copy()
                edges = [(down[y - 1, x], y - 1, x)] if y else []
                edges += [(down[y, x], y + 1, x)] if y + 1 < rows else []
                edges += [(right[y, x - 1], y, x - 1)] if x else []
                edges += [(right[y, x], y, x + 1)] if x + 1 < columns else []
                for weight, r, c in edges:
                    cost += weight * (np.arange(count) - labels[r, c]) ** 2
                answer[y, x] = min(range(count), key=lambda k, cost=cost: (round(cost[k], 9), -k if start else k))
        labels = answer
    return labels


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("grid", "count"), [((3, 4), 3), ((1, 5), 6), ((4, 1), 2), ((5, 5), 9)])
def test_bounds_are_four_rounds_of_best_responses(grid: tuple[int, int], count: int, whole: bool) -> None:
    """With whole numbers there are ties: the lower bound takes the lowest of equal labels, the upper the highest."""
    unary, vertical, horizontal = random_problems(count, 12, *grid, count, convex=True)
    if whole:
        unary, vertical, horizontal = np.rint(2 * unary), np.rint(vertical), np.rint(horizontal)
    weight = graph_cut._around(vertical, horizontal)
    for start in (0, count - 1):
        found = graph_cut._best_responses(unary, vertical, horizontal, weight, start)
        for b in range(len(unary)):
            np.testing.assert_array_equal(found[b], responses_in_loops(unary[b], vertical[b], horizontal[b], start))


def sets_by_cost(cost: Callable[[np.ndarray], float], cells: int) -> list[np.ndarray]:
    """Every set of cells, cheapest first, the smaller of equals first."""
    every = [np.array(one, dtype=bool) for one in itertools.product([False, True], repeat=cells)]
    return sorted(every, key=lambda one: (round(cost(one), 9), one.sum()))


@pytest.mark.parametrize("grid", [(2, 3), (1, 4), (4, 1), (1, 1), (3, 2)])
def test_one_cut_is_the_smallest_set_of_least_cost(grid: tuple[int, int]) -> None:
    """Whole numbers, so that there are ties; real ones, so that capacities must be fine; a grid without edges beside."""
    rng = np.random.default_rng(grid[0])
    rows, columns = grid
    gain = np.concatenate([rng.integers(-3, 4, size=(25, *grid)), rng.normal(size=(15, *grid)) * 1e3]).astype(float)
    edges = [
        rng.integers(0, 3, size=(40, *shape)).astype(float) for shape in ((rows - 1, columns), (rows, columns - 1))
    ]
    for edge in edges:
        edge[25:] *= 400 * rng.random(edge[25:].shape)
        edge[:2] = 0
    with np.errstate(all="raise"):
        found = graph_cut._grid_cut(gain, *edges)
    for b in range(len(gain)):

        def cost(one: np.ndarray, b: int = b) -> float:
            chosen = one.reshape(grid)
            total = gain[b][chosen].sum() + edges[0][b][chosen[1:] != chosen[:-1]].sum()
            return total + edges[1][b][chosen[:, 1:] != chosen[:, :-1]].sum()

        np.testing.assert_array_equal(found[b].ravel(), sets_by_cost(cost, rows * columns)[0])


def test_cuts_of_arcs_with_a_direction() -> None:
    """Two problems of very different scale in one call, arcs that cost more one way, a node without arcs."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        gain = rng.integers(-3, 4, size=10).astype(float)
        tail, head = np.array([[a, b] for a, b in itertools.combinations(range(4), 2)]).T
        tail, head = np.concatenate([tail, tail + 5]), np.concatenate([head, head + 5])
        forward, backward = rng.integers(0, 4, size=(2, 12)).astype(float)
        owner, instance = np.repeat([0, 1], 5), np.repeat([0, 1], 6)
        scale = np.array([1.0, 1e7])
        with np.errstate(all="raise"):
            found = graph_cut._minimum_cut(
                gain * scale[owner],
                owner,
                tail,
                head,
                forward * scale[instance],
                backward * scale[instance],
                instance,
                2,
            )
        for part in (0, 1):
            arcs, nodes = slice(6 * part, 6 * part + 6), slice(5 * part, 5 * part + 5)
            ends = list(zip(tail[arcs] - 5 * part, head[arcs] - 5 * part, forward[arcs], backward[arcs], strict=True))

            def cost(one: np.ndarray, own: np.ndarray = gain[nodes], ends: list[tuple[Any, ...]] = ends) -> float:
                leaving = sum(ahead * (one[a] > one[b]) + back * (one[b] > one[a]) for a, b, ahead, back in ends)
                return float(own[one].sum() + leaving)

            assert cost(found[nodes]) == cost(sets_by_cost(cost, 5)[0])
    alone = graph_cut._minimum_cut(np.array([-1.0, 0.0, 1.0]), np.zeros(3, int), *np.zeros((2, 0), int), *np.zeros((2, 0)),
                                   np.zeros(0, int), 1)  # fmt: skip
    assert alone.tolist() == [True, False, False]
    with np.errstate(all="raise"):
        free = graph_cut._minimum_cut(np.array([-1.0, 2.0, 0.0]), np.zeros(3, int), np.array([0, 1]), np.array([1, 2]),
                                      np.zeros(2), np.zeros(2), np.zeros(2, int), 1)  # fmt: skip
    assert free.tolist() == [True, False, False]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_common_move_is_the_best_of_all_sets(sign: int) -> None:
    """Of the cells that may move, with the others held, labels anywhere."""
    rng = np.random.default_rng(sign + 1)
    unary, vertical, horizontal = (np.rint(2 * part) for part in random_problems(8, 30, 2, 3, 5, convex=True))
    labels = rng.integers(1, 4, size=(30, 2, 3))
    movable = rng.random(labels.shape) < 0.8
    weight = graph_cut._around(vertical, horizontal)
    found = graph_cut._cut(unary, vertical, horizontal, weight, labels, movable, sign)
    for b in range(30):

        def cost(one: np.ndarray, b: int = b) -> float:
            if (one.reshape(2, 3) & ~movable[b]).any():
                return np.inf
            moved = labels[b] + sign * one.reshape(2, 3)
            return slow.energy(unary[b], 16 * vertical[b], 16 * horizontal[b], moved)

        assert cost(found[b]) == pytest.approx(cost(sets_by_cost(cost, 6)[0]), abs=1e-9)


def test_cuts_take_grids_up_to_a_number_of_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids that gain nothing are left out, and one that is larger than the number goes alone."""
    _, vertical, horizontal = random_problems(8, 12, 2, 3, 5, convex=True)
    unary = np.broadcast_to(np.arange(5.0), (12, 2, 3, 5)).copy()
    weight, sizes = graph_cut._around(vertical, horizontal), []
    labels, movable = np.full((12, 2, 3), 4), np.ones((12, 2, 3), dtype=bool)
    movable[5], unary[7] = False, 0.0
    one_call = graph_cut._grid_cut

    def record(gain: np.ndarray, *edges: np.ndarray) -> np.ndarray:
        sizes.append(len(gain))
        return one_call(gain, *edges)

    monkeypatch.setattr(graph_cut, "_grid_cut", record)
    for cells, expected in ((18, [3, 3, 3, 1]), (17, [2] * 5), (6, [1] * 10), (5, [1] * 10)):
        sizes.clear()
        monkeypatch.setattr(graph_cut, "_CELLS_PER_CALL", cells)
        found = graph_cut._cut(unary, vertical, horizontal, weight, labels, movable, -1)
        assert sizes == expected
        assert found.all((1, 2)).tolist() == [b not in (5, 7) for b in range(12)]


def test_phases_start_in_the_middle_and_stop_with_the_furthest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cell drawn to the top of nine labels, one to the bottom, bounds that leave them open: one cut for each step."""
    count, moves = 9, []
    steps = np.arange(count)
    unary = np.zeros((1, 1, 4, count))
    unary[0, 0, :2] = -20.0 * steps
    unary[0, 0, 2:] = 20.0 * steps
    edges = np.zeros((1, 0, 4)), 64 * np.array([[[100.0, 0.0, 100.0]]])
    monkeypatch.setattr(graph_cut, "_BOUND_ROUNDS", 1)
    one_cut = graph_cut._cut

    def record(*given: object) -> np.ndarray:
        moved = one_cut(*given)  # type: ignore[arg-type]
        moves.append((given[-1], moved.sum()))
        return moved

    monkeypatch.setattr(graph_cut, "_cut", record)
    assert solve_masks(unary, *edges).tolist() == [[[8, 8, 0, 0]]]
    assert moves == [(1, 2)] * 4 + [(-1, 2)] * 4


def test_arcs_of_a_grid() -> None:
    places, heads, degrees = graph_cut._grid_arcs(2, 3)
    arcs = [[] for _ in range(6)]
    for place, head in zip(places.tolist(), heads.tolist(), strict=True):
        arcs[place // 6].append((place % 6, head))
    terminals = [(4, -2), (5, -1)]
    assert arcs == [
        [(2, 1), (3, 3), *terminals],
        [(1, 0), (2, 2), (3, 4), *terminals],
        [(1, 1), (3, 5), *terminals],
        [(0, 0), (2, 4), *terminals],
        [(0, 1), (1, 3), (2, 5), *terminals],
        [(0, 2), (1, 4), *terminals],
    ]
    assert degrees.tolist() == [4, 5, 4, 4, 5, 4]


def test_labels_are_checked_before_they_are_priced() -> None:
    unary, vertical, horizontal = random_problems(0, 2, 3, 3, 3, convex=True)
    fine = np.zeros((2, 3, 3), dtype=np.int64)
    for value in (-1, 3):
        bad = fine.copy()
        bad[1, 2, 2] = value
        with pytest.raises(ValueError, match=r"in \[0, 3\)"):
            grid_energy(unary, vertical, horizontal, bad)
    with pytest.raises(ValueError, match="labels must be"):
        grid_energy(unary, vertical, horizontal, fine[:, :2])
    fine[1, 2, 2] = 2
    grid_energy(unary, vertical, horizontal, fine)


def test_one_huge_cell_does_not_disturb_the_others() -> None:
    """What overflows in pygco: one cell 10^6 times as costly as the rest."""
    unary, vertical, horizontal = random_problems(4, 20, 3, 3, 3, convex=True)
    unary[:, 1, 1] *= 1e6
    found = grid_energy(unary, vertical, horizontal, solve_masks(unary, vertical, horizontal))
    best = np.array([slow.least_energy(*problem) for problem in zip(unary, vertical, horizontal, strict=True)])
    assert (np.abs(found - best) <= 1e-7 + 1e-12 * np.abs(best)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 7), st.integers(1, 7))
def test_no_single_cell_can_improve_and_batches_do_not_mix(seed: int, count: int, rows: int, columns: int) -> None:
    problems = random_problems(seed, 3, rows, columns, count, convex=bool(seed % 2))
    labels = solve_masks(*problems)
    energies = grid_energy(*problems, labels)
    np.testing.assert_allclose(
        energies, [slow.energy(*problem) for problem in zip(*problems, labels, strict=True)], rtol=0, atol=1e-9
    )
    rng = np.random.default_rng(seed)
    for _ in range(10):
        other = labels.copy()
        other[:, rng.integers(rows), rng.integers(columns)] = rng.integers(count)
        assert (grid_energy(*problems, other) >= energies - 1e-7).all()
    alone = [solve_masks(*(part[b : b + 1] for part in problems))[0] for b in range(3)]
    lonely = grid_energy(*problems, np.stack(alone))
    np.testing.assert_allclose(lonely, energies, rtol=0, atol=1e-7)


def test_swap_moves_are_never_better() -> None:
    pytest.importorskip("gco")
    rng = np.random.default_rng(0)
    steps = np.arange(3)
    unary = rng.random((20, 8, 8, 1)) / 64 * (1 - steps / 2) + rng.random((20, 8, 8, 1)) / 64 * steps / 2
    edges = np.full((20, 7, 8), 0.003), np.full((20, 8, 7), 0.003)
    swap, exact = (grid_energy(unary, *edges, solver(unary, *edges)) for solver in (solve_masks_pygco, solve_masks))
    assert (exact <= swap + 1e-9).all()
    assert (exact < swap - 1e-9).any(), "at this strength the swap moves miss some optimum"


def test_pygco_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gco", None)
    with pytest.raises(MissingExtraError, match=r"hf-dataopt\[pygco\]"):
        solve_masks_pygco(*random_problems(0, 1, 2, 2, 3, convex=True))
    assert importlib.util.find_spec("scipy"), "the exact solver needs no extra"


def test_bad_problems_are_refused() -> None:
    unary, vertical, horizontal = random_problems(0, 2, 3, 3, 3, convex=True)
    with pytest.raises(ValueError, match="at least 2 labels"):
        solve_masks(unary[..., :1], vertical, horizontal)
    with pytest.raises(ValueError, match="vertical edge weights are"):
        solve_masks(unary, vertical[:, :1], horizontal)
    for name, edges in (("vertical", (vertical - 100, horizontal)), ("horizontal", (vertical, horizontal - 100))):
        with pytest.raises(ValueError, match=f"{name} edge weights must be finite and >= 0"):
            solve_masks(unary, *edges)
    with pytest.raises(ValueError, match="horizontal edge weights must be finite"):
        solve_masks(unary, vertical, horizontal + np.inf)
    with pytest.raises(ValueError, match="none empty"):
        solve_masks(unary[:0], vertical[:0], horizontal[:0])
    with pytest.raises(ValueError, match="batch, rows"):
        solve_masks(unary[0], vertical, horizontal)
    unary[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="non-finite"):
        solve_masks(unary, vertical, horizontal)
