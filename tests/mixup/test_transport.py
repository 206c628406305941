"""Transport equals Algorithm 1 as printed, run to convergence; every plan is a permutation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from hf_dataopt.mixup import transport
from hf_dataopt.mixup.transport import grid_distances, masked_transport

from ..reference import puzzle_mix as slow


def problems(seed: int, size: int, n: int, *, peaky: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Saliency that sums to 1 per problem, and binary masks."""
    rng = np.random.default_rng(seed)
    saliency = np.exp(peaky * rng.normal(size=(size, n)))
    saliency = saliency / saliency.sum(1, keepdims=True)
    return saliency.astype(np.float32), (rng.random((size, n)) < rng.random((size, 1))).astype(np.float32)


def costs(saliency: np.ndarray, mask: np.ndarray, grid: tuple[int, int], cost: float) -> np.ndarray:
    return np.float32(cost) * slow.squared_distances(*grid) - np.outer(saliency, mask)


def test_distances() -> None:
    for grid in ((1, 1), (1, 5), (4, 4), (3, 7)):
        np.testing.assert_array_equal(grid_distances(*grid), slow.squared_distances(*grid))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 1), (1, 6), (2, 2), (4, 4), (3, 5), (8, 8)]),
    st.sampled_from([0.001, 0.05, 0.2, 0.8, 3.0]),
    st.sampled_from([0.5, 2.0]),
)
def test_equals_algorithm_1(seed: int, grid: tuple[int, int], cost: float, peaky: float) -> None:
    saliency, mask = problems(seed, 3, grid[0] * grid[1], peaky=peaky)
    found = masked_transport(saliency, mask, grid, cost=cost)
    for b in range(3):
        expected, steps = slow.algorithm_1(costs(saliency[b], mask[b], grid, cost))
        np.testing.assert_array_equal(found[b], expected)
        assert steps <= len(expected) * (len(expected) - 1) // 2 + 1, "Proposition 5"
    np.testing.assert_array_equal(np.sort(found, 1), np.broadcast_to(np.arange(found.shape[1]), found.shape))


def test_equal_saliency_and_zeros_have_the_printed_ties() -> None:
    rng = np.random.default_rng(1)
    for cost in (0.1, 0.5):
        for _ in range(30):
            saliency = rng.integers(0, 3, size=(1, 9)).astype(np.float32)
            mask = rng.integers(0, 2, size=(1, 9)).astype(np.float32)
            found = masked_transport(saliency, mask, (3, 3), cost=cost)
            expected, _ = slow.algorithm_1(costs(saliency[0], mask[0], (3, 3), cost))
            np.testing.assert_array_equal(found[0], expected)


def test_masks_with_shares_are_algorithm_1_too() -> None:
    saliency, mask = problems(5, 6, 16)
    mask = np.where(np.random.default_rng(0).random(mask.shape) < 0.3, 0.5, mask).astype(np.float32)
    found = masked_transport(saliency, mask, (4, 4), cost=0.1)
    for b in range(len(mask)):
        expected, _ = slow.algorithm_1(costs(saliency[b], mask[b], (4, 4), 0.1))
        np.testing.assert_array_equal(found[b], expected)


def test_moves_only_improve_and_stay_above_the_hungarian_optimum() -> None:
    saliency, mask = problems(9, 12, 64)
    found = masked_transport(saliency, mask, (8, 8), cost=0.1)
    gaps = []
    for b in range(len(mask)):
        cost, visible = costs(saliency[b], mask[b], (8, 8), 0.1), mask[b] > 0
        columns = np.arange(64)
        value = cost[found[b], columns][visible].sum()
        assert value <= cost[columns, columns][visible].sum() + 1e-6, "Proposition 4"
        only = np.where(visible[None], cost, 0)
        rows, best = linear_sum_assignment(only)
        optimum = only[rows, best].sum()
        gaps.append((value - optimum) / abs(optimum))
    assert min(gaps) >= -1e-6
    assert np.mean(gaps) < 0.05


def test_visible_cells_always_have_content() -> None:
    """The reference leaves a visible cell of zero saliency black; both ways here keep its own."""
    saliency = np.zeros((1, 16), dtype=np.float32)
    saliency[0, :5] = 0.2
    for rounds in (None, 4):
        plan = masked_transport(saliency, np.ones((1, 16), dtype=np.float32), (4, 4), rounds=rounds)
        assert plan[0].tolist() == list(range(16))


def test_rounds_converge_to_the_same_plan() -> None:
    saliency, mask = problems(2, 8, 16)
    converged = masked_transport(saliency, mask, (4, 4), cost=0.1)
    late = masked_transport(saliency, mask, (4, 4), cost=0.1, rounds=200)
    early = masked_transport(saliency, mask, (4, 4), cost=0.1, rounds=1)
    visible = mask > 0
    np.testing.assert_array_equal(late[visible], converged[visible])
    assert (early[visible] != converged[visible]).any()


def rounds_cell_by_cell(cost: np.ndarray, rounds: int) -> list[int]:
    """The reference code's rounds in loops: a column sees its proposers' costs and 0 from everybody else."""
    cost, n, source = cost.copy(), len(cost), [-1] * len(cost)
    for _ in range(rounds):
        target = [min(range(n), key=lambda j, i=i: (cost[i, j], j)) for i in range(n)]
        for j in range(n):
            offers = [cost[i, j] if target[i] == j else 0.0 for i in range(n)]
            winner = offers.index(min(offers))
            source[j] = winner if target[winner] == j else -1
        for i in range(n):
            if source[target[i]] != i:
                cost[i, target[i]] += 1
    return [i if found < 0 else found for i, found in enumerate(source)]


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_are_those_of_the_reference_code(rounds: int) -> None:
    saliency, mask = problems(3, 10, 12, peaky=2.0)
    found = masked_transport(saliency, mask, (3, 4), cost=0.1, rounds=rounds)
    expected = [rounds_cell_by_cell(costs(s, z, (3, 4), 0.1), rounds) for s, z in zip(saliency, mask, strict=True)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("at_once", [1, 70, 64 * 3, 64 * 5 + 1])
def test_costs_looked_at_in_pieces_give_the_same_plans(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    saliency, mask = problems(6, 5, 64)
    whole = {cost: masked_transport(saliency, mask, (8, 8), cost=cost) for cost in (0.002, 0.1)}
    monkeypatch.setattr(transport, "_COSTS_AT_ONCE", at_once)
    for cost, expected in whole.items():
        np.testing.assert_array_equal(masked_transport(saliency, mask, (8, 8), cost=cost), expected)


@pytest.mark.parametrize("grid", [(1, 2), (3, 3), (1, 33), (6, 5)])
@pytest.mark.parametrize("top", [3, 60])
def test_candidates_are_the_pairs_cheaper_than_a_columns_own_cell(grid: tuple[int, int], top: int) -> None:
    """Every such pair once; whole 64ths of a price, so that there are ties: those count for the lower row."""
    rng, n = np.random.default_rng(grid[1]), grid[0] * grid[1]
    distances, near = transport._structure(*grid)
    priced = np.rint(distances * 64).astype(np.float32)
    saliency = rng.integers(0, top, size=(6, n)).astype(np.float32)
    visible = rng.random((6, n)) < 0.6
    visible[0], visible[1] = True, False
    found = list(zip(*transport._candidates(saliency, visible, priced, near), strict=True))
    expected = []
    for p, i, j in np.ndindex(6, n, n):
        price, own = priced[i, j] - saliency[p, i], -saliency[p, j]
        if i != j and visible[p, j] and (price < own or (price == own and i < j)):
            expected.append((p, i, j, price))
    assert sorted(found) == expected


def test_order_of_pairs() -> None:
    def ordered(*pairs: tuple[int, float, int]) -> bool:
        owner, price, column = (np.array(part) for part in zip(*pairs, strict=True))
        return transport._in_order(owner, price.astype(np.float32), column)

    assert ordered((3, 0.5, 7))
    assert ordered((0, 0.1, 4), (0, 0.2, 1), (0, 0.2, 2), (1, 0.0, 0))
    assert ordered((5, 0.1, 4), (1, 0.0, 0)), "rows in any order"
    assert not ordered((0, 0.2, 1), (0, 0.1, 4)), "a dearer pair first"
    assert not ordered((0, 0.2, 2), (0, 0.2, 1)), "equal prices, the higher column first"
    assert not ordered((0, 0.1, 1), (1, 0.1, 1), (0, 0.2, 2)), "a row in two places"


def test_pairs_within_equal_numbers() -> None:
    tails, heads = transport._pairs_within(np.array([0, 0, 2, 3]), np.array([0, 1, 2, 2]))
    assert list(zip(tails.tolist(), heads.tolist(), strict=True)) == [(0, 0), (1, 0), (2, 2), (2, 3)]


def test_proposals_in_any_order_of_pairs() -> None:
    """Rows that nobody keeps come back; ties go to the lower column for rows and to the lower row for columns."""
    problem, row = np.array([1, 1, 1, 0, 0, 0]), np.array([2, 2, 0, 1, 0, 2])
    column = np.array([1, 0, 0, 2, 2, 2])
    price = np.array([0.5, 0.5, 0.25, 0.5, 0.5, 0.75], dtype=np.float32)
    holder, held = np.full((2, 3), -1), np.full((2, 3), np.inf, dtype=np.float32)
    homeless = transport._propose(problem, row, column, price, holder, held, np.array([0, 1, 2, 3, 5]))
    assert holder.tolist() == [[-1, -1, 0], [0, 2, -1]]
    assert sorted(homeless.tolist()) == [1, 2]
    assert held[0, 2] == 0.5 and held[1].tolist() == [0.25, 0.5, np.inf]
    none = transport._propose(problem, row, column, price, holder, held, np.empty(0, dtype=np.int64))
    assert none.tolist() == [] and holder.tolist() == [[-1, -1, 0], [0, 2, -1]]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_MOST_CELLS", 12)
    assert grid_distances(3, 4).shape == grid_distances(1, 12).shape[::-1] == (12, 12)
    for bad in ((4, 4), (1, 13), (13, 1), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match=r"cells have too many|rows must|columns must"):
            grid_distances(*bad)
    with pytest.raises(ValueError, match="4 x 4 cells have too many distances, at most 12"):
        grid_distances(4, 4)
    saliency, mask = problems(0, 2, 4)
    for rounds in (0, 10_001):
        with pytest.raises(ValueError, match="rounds"):
            masked_transport(saliency, mask, (2, 2), rounds=rounds)
    for grid in ((2, 2, 1), (4,)):
        with pytest.raises(ValueError, match=f"got {len(grid)} of them"):
            masked_transport(saliency, mask, grid)  # type: ignore[arg-type]
    for side in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="grid"):
            masked_transport(saliency[:, :0], mask[:, :0], side)
    for value in (-0.25, 1.25):
        shares = mask.copy()
        shares[1, 2] = value
        with pytest.raises(ValueError, match=r"mask must be in \[0, 1\]"):
            masked_transport(saliency, shares, (2, 2))


def test_bad_arguments() -> None:
    saliency, mask = problems(0, 2, 4)
    for bad in (
        (saliency, mask, (3, 3)),
        (saliency, mask, (2, 1)),
        (saliency, mask[:1], (2, 2)),
        (saliency[0], mask[0], (2, 2)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            masked_transport(*bad)
    for cost in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            masked_transport(saliency, mask, (2, 2), cost=cost)
    for value in (np.nan, np.inf):
        one = saliency.copy()
        one[1, 3] = value
        with pytest.raises(ValueError, match="finite"):
            masked_transport(one, mask, (2, 2))
