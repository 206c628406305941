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


def terms(table: np.ndarray, labels: np.ndarray, weights: Any = 1.0) -> module._Terms:
    return module._Terms(table, labels, np.zeros(len(labels)) + weights)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_posterior_is_that_of_the_definition(classes: int) -> None:
    table, labels = shares(classes=classes)
    four, lift, doubt = np.array([0.4, -0.3, -1.0, 0.2]), np.linspace(0, 0.7, classes), np.linspace(0.5, 0, classes)
    beta, gamma = np.exp(0.4), 1.5 / (1 + np.exp(0.3))
    wrong, other = module._posterior(terms(table, labels), four, lift, doubt)
    for p, y, found, best in zip(table, labels, wrong, other, strict=True):
        rate = 1 / (1 + np.exp(-(-1.0 + 0.2 * np.log(p.max() / (1 - p.max())))))
        true = p**beta * np.exp(lift)
        true[y] *= np.exp(doubt[y])
        true /= true.sum()
        amiss = {
            c: rate * true[c] * p[y] ** gamma / sum(p[k] ** gamma for k in range(classes) if k != c)
            for c in range(classes)
            if c != y
        }
        total = sum(amiss.values())
        assert found == pytest.approx(total / (total + (1 - rate) * true[y]))
        assert best == max(amiss, key=lambda c: amiss[c])


def _minimised(monkeypatch: pytest.MonkeyPatch, *given: Any) -> tuple[np.ndarray, Any]:
    """What `_fit` finds, and the cost that it looks at."""
    costs: list[Any] = []
    whole = optimize.minimize

    def minimize(cost: Any, *more: Any, **options: Any) -> Any:
        costs.append(cost)
        return whole(cost, *more, **options)

    with monkeypatch.context() as patched:
        patched.setattr(optimize, "minimize", minimize)
        found = module._fit(*given)
    return found, costs[0]


def test_the_fit_follows_the_gradient_and_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    table, labels = shares()
    weights, lift = np.random.default_rng(1).uniform(0.2, 1, len(labels)), np.array([0, 0.5, 0, 1.0])
    found, cost = _minimised(monkeypatch, terms(table, labels, weights), module._START, lift)
    for four in (module._START, np.array([0.2, -0.5, -1.0, 0.4]), found):
        differences = optimize.approx_fprime(four, lambda x: cost(x)[0], 1e-6)
        np.testing.assert_allclose(cost(four)[1], differences, atol=2e-6)
    assert cost(found)[0] < cost(module._START)[0] - 0.01 and np.abs(cost(found)[1]).max() < 1e-3


def test_two_halves_of_a_row_count_as_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    table, labels = shares()
    again, weights = np.append(np.arange(60), [3, 3]), np.ones(62)
    weights[[3, 60, 61]] = 1 / 3
    _, once = _minimised(monkeypatch, terms(table, labels), module._START, np.zeros(4))
    _, thrice = _minimised(monkeypatch, terms(table[again], labels[again], weights), module._START, np.zeros(4))
    four = np.array([0.2, -0.5, -1.0, 0.4])
    np.testing.assert_allclose(thrice(four)[1], once(four)[1], rtol=1e-9)
    assert thrice(four)[0] == pytest.approx(once(four)[0])


def test_lifts_are_where_the_likelihood_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes 0 and 1 are half as likely in P as among the labels; 1 has too few rows to say so surely."""
    rng, classes = np.random.default_rng(3), 3
    table = rng.dirichlet([1, 1, 2.0], 4000).clip(1e-6, 1)
    table /= table.sum(axis=1, keepdims=True)
    truer = table * [2, 2, 1]
    labels = (truer.cumsum(axis=1) / truer.sum(axis=1, keepdims=True) < rng.random((4000, 1))).sum(axis=1)
    kept = np.flatnonzero((labels != 1) | (np.arange(4000) % 8 == 0))
    table, labels, weights = table[kept], labels[kept], rng.uniform(0.5, 1, len(kept))
    four, small = np.array([0.0, 0.0, -4.0, 0.0]), np.array([0, 1])
    monkeypatch.setattr(module, "_BLOCK", 3000)
    given = module._Pieces(lambda rows: terms(table[rows], labels[rows], weights[rows]), np.arange(len(kept)), classes)
    assert len(given.blocks) > 1

    def log_like(lift: np.ndarray) -> float:
        true, wrong, total, rate = terms(table, labels).at(four, lift)
        own = np.arange(len(labels)), labels
        part = true / (total[:, None] - wrong)
        part[own] = 0
        like = (1 - rate) * true[own] + rate * part.sum(axis=1) * wrong[own]
        return float(weights @ np.log(like) - (lift**2).sum() / 2 / module._SPREAD**2)

    monkeypatch.setattr(module, "_STEPS", 60)
    lift, doubt = module._lifts(given, four, np.zeros(classes), small)
    slopes = optimize.approx_fprime(lift, log_like, 1e-5)
    assert abs(slopes[0]) < 0.02 and 0.5 < lift[0] < 1.2 and lift[2] == doubt[2] == 0
    assert lift[1] == 0 and slopes[1] < 0  # its labels are fewer than P says: nothing is lowered
    scores = np.stack(
        [optimize.approx_fprime(lift, lambda x, k=k: _one(table, labels, x, four, k), 1e-6)[:2] for k in range(300)]
    )
    known = module._SPREAD**-2.0 + (weights[:300, None] * scores**2).sum(axis=0)
    some = module._Pieces(lambda rows: terms(table[rows], labels[rows], weights[rows]), np.arange(300), classes)
    part = module._lifts(some, four, lift, small)
    np.testing.assert_allclose(module.DOUBT / np.sqrt(known), part[1][:2], rtol=0.02)
    assert doubt[1] > doubt[0]


def _one(table: np.ndarray, labels: np.ndarray, lift: np.ndarray, four: np.ndarray, row: int) -> float:
    """Log likelihood of one label."""
    true, wrong, total, rate = terms(table[row : row + 1], labels[row : row + 1]).at(four, lift)
    y = labels[row]
    among = sum(true[0, c] * wrong[0, y] / (total[0] - wrong[0, c]) for c in range(len(lift)) if c != y)
    return float(np.log((1 - rate[0]) * true[0, y] + rate[0] * among))


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
    for rows, classes, expected in ((8, 4, [[0, 1, 2], [3, 4, 5], [6, 7]]), (2, 13, [[0], [1]]), (3, 4, [[0, 1, 2]])):
        asked: list[list[int]] = []

        def ask(part: np.ndarray, asked: list[list[int]] = asked) -> Any:
            asked.append(part.tolist())
            return part.tolist()

        pieces = module._Pieces(ask, np.arange(rows), classes)
        for _ in range(2):
            assert [terms for _, terms in pieces] == expected
        assert asked == expected * (2 if len(expected) > 1 else 1)  # a block that is all is made once


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


def _uneven(n: int = 1500) -> tuple[Any, np.ndarray, Neighbours]:
    """Class 4 has a tenth of its even share, the model believes in it too little, and 8 % of the labels are flipped."""
    case, rng = make(n=n, rate=0.0), np.random.default_rng(0)
    kept = np.flatnonzero((case.labels != 4) | (np.arange(n) % 10 == 0))
    said = case.probs[kept] * [1, 1, 1, 1, 0.01]
    wrong = rng.random(len(kept)) < 0.08
    labels = np.where(wrong, (case.labels[kept] + rng.integers(1, 5, len(kept))) % 5, case.labels[kept])
    said /= said.sum(axis=1, keepdims=True)
    part = type(case)(case.features[kept], said.astype(np.float32), labels, wrong)
    return part, labels == 4, _nearest(part)


def test_a_small_class_is_lifted_and_its_clean_rows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case, rare, near = _uneven()
    found = label_posterior(case.labels, 5, [near], [rows_of(case.probs, "p")])
    assert found.lift[4] > 0.3 and not found.lift[:4].any()
    monkeypatch.setattr(module, "SMALL", 0.0)
    plain = label_posterior(case.labels, 5, [near], [rows_of(case.probs, "p")])
    right = rare & ~case.wrong
    assert not plain.lift.any() and found.wrong[right].mean() < plain.wrong[right].mean() / 2
    assert found.wrong[case.wrong & ~rare].mean() > 0.9


def test_what_is_not_known_of_a_small_class_speaks_for_its_own_labels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    case, rare, near = _uneven(600)
    monkeypatch.setattr(module, "DOUBT", 0.0)
    sure = label_posterior(case.labels, 5, [near], [rows_of(case.probs, "p")])
    monkeypatch.setattr(module, "DOUBT", 3.0)
    found = label_posterior(case.labels, 5, [near], [rows_of(case.probs, "p")])
    right = rare & ~case.wrong
    assert (found.wrong[rare] < sure.wrong[rare]).all()
    assert found.wrong[right].mean() < 0.3 * sure.wrong[right].mean()
    assert abs(found.wrong[~rare].mean() - sure.wrong[~rare].mean()) < 0.005


def test_a_class_without_labels_is_no_small_class() -> None:
    case = make(n=300)
    said = np.concatenate([case.probs * 0.9, np.full((300, 1), 0.1, np.float32)], axis=1)
    found = label_posterior(case.labels, 6, [_nearest(case)], [rows_of(said, "p")])
    assert not found.lift.any() and not (found.other == 5).all()


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
