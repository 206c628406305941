"""Every part of the NumPy solver against loops: what pruning keeps, the frontier, strips, moves, and who is sent which way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hf_dataopt.mixup import co_mixup_solver as solver

from ..reference import co_mixup as slow


@pytest.fixture(autouse=True)
def _numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "compiled", None)


def potts(count: int) -> np.ndarray:
    return 1 - np.eye(count)


def problem_of(seed: int, shape: tuple[int, ...], *, uneven: bool = False, strength: float = 0.3) -> solver._Problem:
    """All candidates of random problems, cheapest first; `uneven` leaves 1 to K of each cell in use."""
    rng = np.random.default_rng(seed)
    unary, pair = rng.random(shape), strength * rng.random((shape[0], shape[3], shape[3]))
    problem = solver._Problem._of(unary, pair + pair.swapaxes(1, 2), np.argsort(unary, axis=3))
    if uneven:
        problem.counts = rng.integers(1, shape[3] + 1, size=shape[:3])
    return problem


def energy(problem: solver._Problem, b: int, found: np.ndarray) -> float:
    """Of one problem and candidates (h, w), cell by cell."""
    total, (height, width) = 0.0, found.shape
    for r, c in itertools.product(range(height), range(width)):
        total += problem.unary[b, r, c, found[r, c]]
        if r + 1 < height:
            total += problem.down[b, r, c, found[r, c], found[r + 1, c]]
        if c + 1 < width:
            total += problem.right[b, r, c, found[r, c], found[r, c + 1]]
    return total


def best_of(problem: solver._Problem, b: int, choices: list[list[int]]) -> float:
    shape = problem.unary.shape[1:3]
    return min(energy(problem, b, np.array(labels).reshape(shape)) for labels in itertools.product(*choices))


def neighbours(r: int, c: int, height: int, width: int) -> list[tuple[int, int]]:
    near = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
    return [(i, k) for i, k in near if 0 <= i < height and 0 <= k < width]


@pytest.mark.parametrize("shared", [True, False])
def test_energy_is_the_sum_over_cells_and_edges(shared: bool) -> None:
    rng = np.random.default_rng(0)
    unary, pair = rng.random((3, 3, 4, 5)), rng.random((5, 5) if shared else (3, 5, 5))
    labels = rng.integers(5, size=(3, 3, 4))
    expected = [slow.energy(unary[b], pair if shared else pair[b], 0.7, labels[b]) for b in range(3)]
    np.testing.assert_allclose(solver.grid_energy(unary, pair, 0.7, labels), expected)


def possible(
    unary: np.ndarray, pair: np.ndarray, left: dict[tuple[int, int], list[int]], rivals: int
) -> dict[tuple[int, int], list[int]]:
    """Labels of one problem that no rival beats, in order of cost: the docstring of `_possible`, label by label."""
    kept = {}
    for (r, c), labels in left.items():

        def beaten(label: int, rival: int, cell: tuple[int, int] = (r, c)) -> bool:
            bound = 1e-9
            for near in neighbours(*cell, *unary.shape[:2]):
                bound += max(pair[rival, n] - pair[label, n] for n in left[near])
            return bool(unary[*cell, label] - unary[*cell, rival] > bound)

        kept[r, c] = [label for label in labels if not any(beaten(label, rival) for rival in labels[:rivals])]
    return kept


@pytest.mark.parametrize("shape", [(3, 3, 3, 5), (2, 1, 4, 4), (2, 4, 1, 4), (2, 4, 3, 6), (2, 1, 1, 3), (3, 2, 2, 4)])
@pytest.mark.parametrize("strength", [0.03, 0.1, 0.3])
def test_pruning_keeps_what_the_bounds_keep(shape: tuple[int, int, int, int], strength: float) -> None:
    """Degree times the largest pair cost for all cells at once, the cheapest as rival, then the two cheapest, four times."""
    rng = np.random.default_rng(shape[1] * 7 + shape[2])
    unary, pair = rng.random(shape), strength * rng.random((shape[0], shape[3], shape[3]))
    pair = pair + pair.swapaxes(1, 2)
    problem = solver._Problem.pruned(unary, pair)
    cells = list(itertools.product(range(shape[1]), range(shape[2])))
    order = np.argsort(unary, axis=3)
    count = max(
        sum(
            unary[b, r, c, label] - unary[b, r, c].min() <= len(neighbours(r, c, *shape[1:3])) * pair[b].max() + 1e-9
            for label in range(shape[3])
        )
        for b in range(shape[0])
        for r, c in cells
    )
    for b in range(shape[0]):
        left = {(r, c): order[b, r, c, :count].tolist() for r, c in cells}
        for rivals in (1, 2, 2, 2, 2):
            left = possible(unary[b], pair[b], left, rivals)
        for r, c in cells:
            assert problem.labels[b, r, c, : problem.counts[b, r, c]].tolist() == left[r, c]
    np.testing.assert_array_equal(problem.unary, np.take_along_axis(unary, problem.labels, 3))
    assert problem.labels.shape[3] == problem.counts.max()


@pytest.mark.parametrize("shape", [(3, 3), (1, 3), (3, 1), (2, 2), (4, 3)])
def test_a_label_that_pays_only_if_all_neighbours_agree_is_kept(shape: tuple[int, int]) -> None:
    """The bound is tight at every cell, corners and borders included, and no label above it is looked at."""
    for r, c in itertools.product(range(shape[0]), range(shape[1])):
        degree = len(neighbours(r, c, *shape))
        for share, chosen in ((0.999, 1), (1.001, 0)):
            unary = np.zeros((1, *shape, 2))
            unary[..., 0] = 10.0
            unary[0, r, c] = [0, share * degree * 0.5]
            labels = solver.minimise_grid(unary, potts(2), 0.5)
            assert labels[0, r, c] == chosen
            assert labels.sum() == shape[0] * shape[1] - 1 + chosen


def test_possible_among_the_labels_left() -> None:
    """Rivals that are themselves out do not count, nor do neighbours' labels that are out."""
    rng = np.random.default_rng(5)
    for shape in ((3, 3), (1, 4), (4, 1)):
        problem = problem_of(sum(shape), (4, *shape, 4), strength=0.1)
        left = rng.random(problem.unary.shape) < 0.7
        left[..., 0] |= ~left.any(3)
        for rivals in (1, 2, 3, 9):
            kept = problem._possible(left, rivals)
            for b, r, c, k in np.ndindex(*problem.unary.shape):
                expected = left[b, r, c, k]
                for rival in range(min(rivals, 4)):
                    bound = 1e-9
                    for i, j in neighbours(r, c, *shape):
                        if i == r:
                            cost = problem.right[b, r, min(c, j)] if j > c else problem.right[b, r, j].T
                        else:
                            cost = problem.down[b, min(r, i), c] if i > r else problem.down[b, i, c].T
                        bound += (cost[rival] - cost[k])[left[b, i, j]].max()
                    if left[b, r, c, rival] and problem.unary[b, r, c, k] - problem.unary[b, r, c, rival] > bound:
                        expected = False
                assert kept[b, r, c, k] == expected


def test_restricting_and_turning_keep_the_costs() -> None:
    problem, rng = problem_of(3, (2, 3, 4, 5)), np.random.default_rng(0)
    index = rng.integers(5, size=(2, 3, 4, 3))
    few = problem.restricted(index, np.full((2, 3, 4), 3))
    turned = few.transposed()
    found = rng.integers(3, size=(2, 3, 4))
    for b in range(2):
        chosen = np.take_along_axis(index[b], found[b, ..., None], 2)[..., 0]
        whole = energy(problem, b, chosen)
        assert energy(few, b, found[b]) == pytest.approx(whole, abs=1e-12)
        assert energy(turned, b, found[b].T) == pytest.approx(whole, abs=1e-12)
        np.testing.assert_array_equal(
            np.take_along_axis(few.labels[b], found[b, ..., None], 2),
            np.take_along_axis(problem.labels[b], chosen[..., None], 2),
        )
    np.testing.assert_array_equal(turned.labels, few.labels.swapaxes(1, 2))
    np.testing.assert_array_equal(turned.counts, few.counts.swapaxes(1, 2))


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 3, 2, 3), (2, 1, 5, 3), (2, 5, 1, 3), (3, 3, 3, 2)])
def test_the_frontier_search_is_exact_among_the_candidates_in_use(shape: tuple[int, int, int, int]) -> None:
    for seed in range(3):
        problem = problem_of(seed, shape, uneven=True)
        problem.counts[:] = problem.counts[:1]  # the search reads what is in use at each place from the whole batch
        found = solver._frontier_search(problem)
        choices = [list(range(k)) for k in problem.counts[0].ravel()]
        assert (found < problem.counts).all()
        for b in range(shape[0]):
            assert energy(problem, b, found[b]) == pytest.approx(best_of(problem, b, choices), abs=1e-12)


def test_largest_frontier_and_strip_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "_STRIP_STATES", 512)
    rng = np.random.default_rng(2)
    for _ in range(60):
        sizes = rng.integers(1, 5, size=rng.integers(1, 7, size=2))
        flat, width = sizes.ravel().tolist(), sizes.shape[1]

        def largest(flat: list[int], width: int) -> int:
            return max(int(np.prod(flat[i : i + width + 1])) for i in range(len(flat)))

        assert solver._largest_frontier(sizes) == largest(flat, width)
        turned = sizes[:, ::-1]
        both = [largest(flat, width), largest(turned.ravel().tolist(), width)]
        assert solver._largest_frontier(np.stack([sizes, turned])).tolist() == both
        fits = [
            w
            for w in range(2, width)
            if all(largest(sizes[:, i : i + w].ravel().tolist(), w) <= 512 for i in range(width - w + 1))
        ]
        assert solver._strip_width(sizes) == max(fits, default=1)
    assert solver._largest_frontier(np.full((16, 16), 40)) == 2**62


@pytest.mark.parametrize(("width", "shift"), [(1, 0), (1, 1), (2, 0), (2, 1), (2, 3), (3, 2), (4, 0), (5, 1)])
def test_a_strip_is_the_best_given_the_rest(width: int, shift: int) -> None:
    problem, columns = problem_of(width, (2, 2, 5, 2)), 5
    before = np.random.default_rng(1).integers(2, size=(2, 2, 5))
    after = solver._strip_pass(problem, before, width, shift)
    inside: list[int] = []
    for start in range(shift, columns - width + 1, width + 1):
        inside += range(start, start + width)
    for b in range(2):
        fixed = [[0, 1] if c in inside else [int(before[b, r, c])] for r in range(2) for c in range(columns)]
        assert energy(problem, b, after[b]) == pytest.approx(best_of(problem, b, fixed), abs=1e-12)
    outside = [c for c in range(columns) if c not in inside]
    np.testing.assert_array_equal(after[:, :, outside], before[:, :, outside])


def test_strips_go_over_columns_and_rows_twice_until_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, calls = problem_of(0, (2, 6, 5, 4)), []
    one_pass = solver._strip_pass

    def record(side: solver._Problem, found: np.ndarray, width: int, shift: int) -> np.ndarray:
        calls.append((found.shape[1:], width, shift))
        return one_pass(side, found, width, shift)

    monkeypatch.setattr(solver, "_strip_pass", record)
    monkeypatch.setattr(solver, "_STRIP_STATES", 64)
    found = solver._strips(problem, np.zeros((2, 6, 5), np.intp))
    assert calls[:4] == [((6, 5), 2, 0), ((6, 5), 2, 1), ((5, 6), 2, 0), ((5, 6), 2, 1)]
    assert len(calls) % 4 == 0 and 8 <= len(calls) < 12 * 4
    np.testing.assert_array_equal(solver._strips(problem, found), found)
    monkeypatch.setattr(solver, "_strip_width", lambda sizes: 3)
    calls.clear()
    solver._strips(problem, found)
    assert [shift for _, _, shift in calls] == [0, 2, 0, 2]


@pytest.mark.parametrize("label", [0, 3])
def test_a_move_is_the_best_of_all_sets(label: int) -> None:
    problem = problem_of(7, (3, 2, 3, 4), uneven=True)
    found = np.random.default_rng(3).integers(problem.counts)
    after = solver._move(problem, found, np.array([label, 1, 2]))
    for b, offered in enumerate((label, 1, 2)):
        choices = []
        for r, c in itertools.product(range(2), range(3)):
            in_use = problem.labels[b, r, c, : problem.counts[b, r, c]].tolist()
            choices.append([int(found[b, r, c])] + ([in_use.index(offered)] if offered in in_use else []))
        assert energy(problem, b, after[b]) == pytest.approx(best_of(problem, b, choices), abs=1e-12)
        alone = solver._move(problem.some(np.array([b])), found[b : b + 1], np.array([offered]))
        assert energy(problem, b, alone[0]) == pytest.approx(best_of(problem, b, choices), abs=1e-12)


def test_each_problem_is_searched_exactly_if_its_own_frontier_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once; if not, those that fit one by one; strips and moves only for the rest."""
    problem = problem_of(4, (3, 3, 3, 3))
    problem.counts[0] = 1
    problem.counts[1, 1:] = 1  # a frontier of 3^3
    sent: list[tuple[str, int]] = []
    exact = solver._frontier_search

    def record_exact(part: solver._Problem) -> np.ndarray:
        sent.append(("exact", len(part.unary)))
        return exact(part)

    def record_wide(part: solver._Problem) -> np.ndarray:
        sent.append(("wide", len(part.unary)))
        return np.full(part.unary.shape[:3], 2)

    monkeypatch.setattr(solver, "_frontier_search", record_exact)
    monkeypatch.setattr(solver, "_wide_search", record_wide)
    monkeypatch.setattr(solver, "_ALONE_WORK", 0)
    for states, expected in ((81, [("exact", 3)]), (80, [("exact", 1), ("exact", 1), ("wide", 1)]), (27, None)):
        monkeypatch.setattr(solver, "_EXACT_STATES", states)
        found = solver._search(problem)
        assert sent == (expected or [("exact", 1), ("exact", 1), ("wide", 1)])
        if states < 81:
            assert (found[0] == 0).all() and (found[2] == 2).all()
            choices = [list(range(k)) for k in problem.counts[1].ravel()]
            assert energy(problem, 1, found[1]) == pytest.approx(best_of(problem, 1, choices), abs=1e-12)
        sent.clear()
    assert not solver._search(problem.some(np.array([0]))).any() and not sent, "one candidate each: nothing to search"


def test_a_problem_alone_may_hold_more_and_is_searched_along_its_cheaper_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates in one row, or in one column: the largest frontier is 9 states one way and 27 the other."""
    problem = problem_of(5, (3, 3, 3, 3))
    problem.counts[:] = 1
    problem.counts[0, 1] = problem.counts[1, :, 1] = 3
    problem.counts[2, :2] = 3  # 27 states at best
    seen: list[tuple[int, ...]] = []
    exact = solver._frontier_search

    def record(part: solver._Problem) -> np.ndarray:
        seen.append(tuple(part.counts[0].ravel()))
        return exact(part)

    monkeypatch.setattr(solver, "_frontier_search", record)
    monkeypatch.setattr(solver, "_wide_search", lambda part: np.full(part.unary.shape[:3], 2))
    monkeypatch.setattr(solver, "_EXACT_STATES", 2)
    down = (1, 3, 1) * 3
    for work, wide in ((9 * 9, {2}), (9 * 27, set())):
        monkeypatch.setattr(solver, "_ALONE_WORK", work)
        seen.clear()
        found = solver._search(problem)
        assert seen[:2] == [down, down]
        assert {b for b in range(3) if (found[b] == 2).all()} == wide
        for b in {0, 1, 2} - wide:
            choices = [list(range(k)) for k in problem.counts[b].ravel()]
            assert energy(problem, b, found[b]) == pytest.approx(best_of(problem, b, choices), abs=1e-12)


def test_wide_grids_end_where_neither_strips_nor_moves_improve(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, least in (("_EXACT_STATES", 8), ("_STRIP_STATES", 8), ("_ALONE_WORK", 0)):
        monkeypatch.setattr(solver, name, least)
    for seed in range(4):
        problem = problem_of(seed, (2, 3, 3, 3), strength=0.5)
        found = solver._wide_search(problem)
        np.testing.assert_array_equal(solver._strips(problem, found), found)
        for label in range(3):
            after = solver._move(problem, found, np.full(2, label))
            for b in range(2):
                assert energy(problem, b, after[b]) >= energy(problem, b, found[b]) - 1e-12
    fewer = problem_of(2, (2, 3, 3, 3), strength=0.5)
    fewer.labels[0], fewer.counts[0] = 0, 1  # one label on offer beside three
    alone = fewer.some(np.array([1]))
    found = solver._wide_search(fewer)
    assert energy(fewer, 1, found[1]) <= energy(alone, 0, solver._strips(alone, found[:1] * 0)[0])
    two = problem_of(9, (1, 3, 3, 2), strength=0.5)
    np.testing.assert_array_equal(solver._wide_search(two), solver._strips(two, np.zeros((1, 3, 3), np.intp)))
