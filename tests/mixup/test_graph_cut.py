"""The mask solver finds the global optimum: against every labelling, against Ishikawa's cut, at extreme scales."""

from __future__ import annotations

import importlib.util

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


def test_integer_labels_of_any_scale() -> None:
    unary, vertical, horizontal = random_problems(3, 30, 4, 4, 3, convex=True)
    expected = grid_energy(unary, vertical, horizontal, solve_masks(unary, vertical, horizontal))
    for scale in (1e-9, 1e9):
        labels = solve_masks(unary * scale, vertical * scale, horizontal * scale)
        np.testing.assert_allclose(grid_energy(unary, vertical, horizontal, labels), expected, rtol=0, atol=1e-7)


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
    with pytest.raises(ValueError, match=">= 0"):
        solve_masks(unary, vertical, horizontal - 100)
    unary[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="non-finite"):
        solve_masks(unary, vertical, horizontal)
