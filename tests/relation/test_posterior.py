"""The mixture over given labels equals its definition, its gradient the differences of its cost, and the cut its promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import optimize

from hf_dataopt.relation import posterior as module
from hf_dataopt.relation.cut import flag, groups_of, most_expected_f1, one_of_each
from hf_dataopt.relation.nearest import Neighbours
from hf_dataopt.relation.posterior import label_posterior
from hf_dataopt.relation.rows import rows_of

from .data import make


def shares(rows: int = 60, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(classes, 0.5), rows).clip(1e-6, 1 - 1e-6), rng.integers(0, classes, rows)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_posterior_is_that_of_the_definition(classes: int) -> None:
    table, labels = shares(classes=classes)
    four = np.array([0.4, -0.3, -1.0, 0.2])
    beta, gamma = np.exp(0.4), 1.5 / (1 + np.exp(0.3))
    wrong, other = module._posterior(table, labels, four)
    for p, y, found, best in zip(table, labels, wrong, other, strict=True):
        rate = 1 / (1 + np.exp(-(-1.0 + 0.2 * np.log(p.max() / (1 - p.max())))))
        true = p**beta / (p**beta).sum()
        amiss = {
            c: rate * true[c] * p[y] ** gamma / sum(p[k] ** gamma for k in range(classes) if k != c)
            for c in range(classes)
            if c != y
        }
        total = sum(amiss.values())
        assert found == pytest.approx(total / (total + (1 - rate) * true[y]))
        assert best == max(amiss, key=lambda c: amiss[c])


def test_the_fit_follows_the_gradient_and_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    table, labels = shares()
    costs: list[Any] = []

    def minimize(cost: Any, *given: Any, **options: Any) -> Any:
        costs.append(cost)
        return whole(cost, *given, **options)

    whole = optimize.minimize
    monkeypatch.setattr(optimize, "minimize", minimize)
    found = module._fit(table, labels, module._START)
    (cost,) = costs
    for four in (module._START, np.array([0.2, -0.5, -1.0, 0.4]), found):
        differences = optimize.approx_fprime(four, lambda x: cost(x)[0], 1e-6)
        np.testing.assert_allclose(cost(four)[1], differences, atol=2e-6)
    assert cost(found)[0] < cost(module._START)[0] - 0.01 and np.abs(cost(found)[1]).max() < 1e-3


@pytest.mark.parametrize("block", [1, 20, 1 << 20])
def test_votes_are_counted_once_a_copy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 0 and 4 have three neighbours: one of label 1, and two copies of one row of label 2."""
    monkeypatch.setattr(module, "_BLOCK", block)
    near = Neighbours(
        np.array([[1, 2, 3], [0, -1, -1], [3, 0, -1], [2, 0, -1], [1, 2, 3]]),
        np.array([[1, 1, 1], [1, 0, 0], [1, 0.5, 0], [1, 0.5, 0], [1, 1, 1]], np.float32),
        np.array([0, 1, 2, 2, 4]),
    )
    labels = np.array([0, 1, 2, 2, 0])
    voters = module._voters(near)
    np.testing.assert_array_equal(voters.count, [2, 1, 1, 1, 2])
    np.testing.assert_allclose(
        voters.weights, [[1, 0.5, 0.5], [1, 0, 0], [0, 0.5**4, 0], [0, 0.5**4, 0], [1, 0.5, 0.5]]
    )
    prior = np.array([0.5, 0.25, 0.25])
    found = module._votes(voters, np.arange(2), labels, np.zeros(5), labels, prior)
    np.testing.assert_allclose(found[0], (2 * np.array([0, 0.5, 0.5]) + 2 * prior) / 4)
    np.testing.assert_allclose(found[1], (np.array([1, 0, 0]) + 2 * prior) / 3)
    half = module._votes(voters, np.arange(1), labels, np.array([0, 1.0, 0, 0, 0]), np.array([0, 0, 2, 2, 0]), prior)
    np.testing.assert_allclose(half[0], (2 * np.array([0.5, 0, 0.5]) + 2 * prior) / 4)


def _nearest(case: Any, k: int = 10) -> Neighbours:
    unit = case.features / np.linalg.norm(case.features, axis=1, keepdims=True)
    cosine = unit @ unit.T - 3 * np.eye(len(unit), dtype=np.float32)
    order = np.argsort(-cosine, axis=1)[:, :k]
    return Neighbours(order, np.take_along_axis(cosine, order, 1).clip(0), np.arange(len(unit)))


def test_blocks_and_samples_give_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(n=3000, rate=0.2)
    near, probs = _nearest(case), rows_of(case.probs, "p")
    whole = label_posterior(case.labels, 5, [near], [probs])
    assert abs(whole.wrong.mean() - 0.2) < 0.02
    monkeypatch.setattr(module, "_BLOCK", 500)
    np.testing.assert_array_equal(label_posterior(case.labels, 5, [near], [probs]).wrong, whole.wrong)
    monkeypatch.setattr(module, "FITTED", 10_000)
    part = label_posterior(case.labels, 5, [near], [probs])
    assert abs(part.wrong.mean() - whole.wrong.mean()) < 0.02 and part.beta != whole.beta


def test_a_block_holds_no_more_numbers_than_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 12)
    assert [rows.tolist() for rows in module._blocks(8, 4)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [rows.tolist() for rows in module._blocks(2, 13)] == [[0], [1]]


def test_two_checkpoints_are_heard_alike() -> None:
    case, other = make(n=200), make(n=200, spread=0.9)
    near, probs = [_nearest(case), _nearest(other)], [rows_of(one.probs, "p") for one in (case, other)]
    found = label_posterior(case.labels, 5, near, probs)
    swapped = label_posterior(case.labels, 5, near[::-1], probs[::-1])
    np.testing.assert_allclose(found.wrong, swapped.wrong, rtol=1e-9)
    assert (found.wrong != label_posterior(case.labels, 5, near[:1], probs[:1]).wrong).any()


def test_the_model_of_copied_rows_is_not_believed() -> None:
    case = make(n=200)
    near = _nearest(case)
    said = np.full((200, 5), 0.1, np.float32)
    said[np.arange(200), case.labels] = 0.6  # a model that has learned the labels as they are
    learned = label_posterior(case.labels, 5, [near], [rows_of(said, "p")])
    group = near.group.copy()
    wrong = np.flatnonzero(case.wrong)[0]
    group[[wrong, wrong + 1]] = wrong
    half = label_posterior(case.labels, 5, [Neighbours(near.rows, near.similarity, group)], [rows_of(said, "p")])
    assert half.wrong[wrong] > learned.wrong[wrong]


def test_the_cut_has_the_largest_expected_f1() -> None:
    wrong = np.random.default_rng(0).beta(0.3, 1, 50)
    falling = -np.sort(-wrong)
    expected = [2 * falling[:m].sum() / (m + wrong.sum()) for m in range(1, 51)]
    count = most_expected_f1(wrong)
    assert count == int(np.argmax(expected)) + 1
    assert falling[count - 1] >= max(expected) / 2 > falling[count]
    assert most_expected_f1(np.full(50, 0.05)) == 0 and most_expected_f1(np.full(50, 0.2)) == 50


def test_flags_go_by_score_and_never_to_unlabelled_rows() -> None:
    scores, labels = np.array([0.9, 0.9, 0.1, 0.9, 0.5]), np.array([0, 1, 0, -1, 1])
    assert flag(scores, labels, "share", 0.25).tolist() == [True, False, False, False, False]
    assert flag(scores, labels, "threshold", 0.5).tolist() == [True, True, False, False, False]
    assert flag(scores, labels, "quantile", 0.5).tolist() == [True, True, False, False, False]


def test_groups_and_the_row_that_stays() -> None:
    group = np.array([0, 1, 0, 1, 4, 1])
    assert [rows.tolist() for rows in groups_of(group)] == [[1, 3, 5], [0, 2]]
    assert [rows.tolist() for rows in groups_of(group, ["a", "b", "c", "b", "a", "b"])] == [[0, 2]]
    scores, labels = np.array([0.3, 0.2, 0.1, 0.1, 0.0, 0.0]), np.array([0, 0, 0, 0, 0, -1])
    assert one_of_each(np.array([0, 1, 2, 3, 4, 5]), group, scores, labels).tolist() == [2, 3, 4]
    assert one_of_each(np.array([0, 1, 5]), group, scores, labels).tolist() == [0, 1]
    assert one_of_each(np.array([5]), group, scores, labels).tolist() == [5]
