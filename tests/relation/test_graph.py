"""The tiled graph equals the O(n^2) loops of tests/reference: sums, subsets, rows, votes, under every option."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dataopt.relation import graph as graph_module
from hf_dataopt.relation import nearest as nearest_module
from hf_dataopt.relation import tiles
from hf_dataopt.relation.config import RelationConfig
from hf_dataopt.relation.graph import RelationGraph
from hf_dataopt.relation.label_noise import _of_cycle, find_label_noise, single_node_label_noise, top_share
from hf_dataopt.relation.nearest import Neighbours
from hf_dataopt.relation.outlier import outlier_scores
from hf_dataopt.relation.rows import Rows, rows_of
from hf_dataopt.relation.tiles import ExactSums, ReferenceSums, Workspace

from ..reference.relation import algorithm_4, cut_objective, weights
from .data import Case, make

CASE = make()
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "t1": {"temperature": 1},
    "t2.5": {"temperature": 2.5},
    "t6": {"temperature": 6},
    "no compatibility": {"compatibility": False},
    "rbf": {"similarity": "rbf", "rbf_gamma": 0.7},
    "rbf, no compatibility": {"similarity": "rbf", "compatibility": False, "temperature": 2},
    "no cut-off": {"edge_cutoff": 0.0},
    "cut-off 0.2": {"edge_cutoff": 0.2},
    "diagonal": {"diagonal": True},
    "small tiles": {"max_memory_gb": 1e-3},
}


def build(case: Case, config: RelationConfig, labels: bool = True) -> RelationGraph:
    features, probs = rows_of(case.features, "features"), rows_of(case.probs, "probs")
    return RelationGraph(features, probs, case.labels if labels else None, config)


def oracle(case: Case, config: RelationConfig, labels: bool = True, temperature: float | None = None) -> np.ndarray:
    return weights(
        case.features,
        case.probs,
        case.labels if labels else None,
        temperature=config.temperature if temperature is None else temperature,
        compatibility=config.compatibility,
        cutoff=config.edge_cutoff,
        diagonal=config.diagonal,
        rbf_gamma=config.rbf_gamma if config.similarity == "rbf" else None,
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_sums_scores_and_sets_equal_the_loops(name: str) -> None:
    config = RelationConfig(**OPTIONS[name], max_noisy_share=1.0, skip_share=1.0)
    graph, w = build(CASE, config), oracle(CASE, config)
    scale = np.abs(w.sum(axis=1)).max()
    np.testing.assert_allclose(graph.relation_sums(quiet=True), -w.sum(axis=1), atol=1e-5 * scale)
    subset = np.flatnonzero(CASE.wrong)
    np.testing.assert_allclose(graph.sums_against(subset, quiet=True), -w[:, subset].sum(axis=1), atol=1e-5 * scale)
    np.testing.assert_allclose(graph.row(7), -w[7] * (np.arange(300) != 7), atol=1e-6)
    level = 0.05 * scale
    absolute = RelationConfig(
        **OPTIONS[name], threshold="absolute", threshold_value=level, max_noisy_share=1.0, skip_share=1.0
    )
    found = find_label_noise(w.sum(axis=1), lambda rows: -graph.sums_against(rows, quiet=True), absolute)
    scores, noisy = algorithm_4(w, level, 100)
    assert found.stopped == "converged"
    np.testing.assert_array_equal(found.noisy, noisy)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5 * scale)
    assert found.objective == pytest.approx(cut_objective(w, noisy, level), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["default", "rbf", "no cut-off", "diagonal"])
def test_outlier_scores_equal_the_loops(name: str) -> None:
    config = RelationConfig(**OPTIONS[name])
    w = oracle(CASE, config, labels=False, temperature=1.0)
    reference = np.arange(0, 300, 3)
    found = outlier_scores(build(CASE, config, labels=False), reference, quiet=True)
    np.testing.assert_allclose(found, 1 / (-w[:, reference].sum(axis=1) + 1e-6), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1, 3])
@pytest.mark.parametrize("name", ["default", "rbf", "diagonal", "small tiles"])
def test_outlier_sums_of_the_symmetric_pass_equal_the_loops(name: str, temperature: float) -> None:
    labels = np.where(np.arange(300) % 5 == 2, -1, CASE.labels)
    case, config = replace(CASE, labels=labels), RelationConfig(**OPTIONS[name])
    reference, graph = np.arange(1, 300, 7), build(case, config)
    outside = ReferenceSums(300, reference, temperature)
    sums = graph.relation_sums(outside=outside, quiet=True)
    w = oracle(case, config, labels=False, temperature=temperature)
    np.testing.assert_allclose(outside.sums.total(torch.device("cpu")), -w[:, reference].sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(sums, graph.relation_sums(quiet=True))


@pytest.mark.parametrize("fails", [3, 12, 15])
def test_stripes_that_are_done_again_count_once(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory ends in the middle of a stripe: what was added or looked at until then is forgotten."""
    monkeypatch.setitem(tiles.LARGEST_TILE, "cpu", 64)
    monkeypatch.setattr(nearest_module, "_WAITING", 10**6)

    def run() -> tuple[np.ndarray, np.ndarray, Neighbours]:
        graph = build(CASE, RelationConfig())
        nearest, outside = graph.nearest_rows(), ReferenceSums(300, np.arange(100), 1)
        sums = graph.relation_sums(nearest=nearest, outside=outside, quiet=True)
        return sums, outside.sums.total(torch.device("cpu")), nearest.result(torch.device("cpu"))

    expected, kernel, calls = run(), Workspace.kernel, itertools.count(1)

    def once(*given: Any) -> torch.Tensor:
        if next(calls) == fails:
            raise torch.OutOfMemoryError
        return kernel(*given)

    monkeypatch.setattr(Workspace, "kernel", once)
    sums, outside, near = run()
    assert next(calls) > fails
    np.testing.assert_allclose(sums, expected[0], atol=1e-4)
    np.testing.assert_allclose(outside, expected[1], rtol=1e-5)
    np.testing.assert_array_equal(near.rows, expected[2].rows)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), processes=st.integers(1, 5))
def test_sums_do_not_hang_on_their_order(seed: int, processes: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(60, 7)) * 10.0 ** rng.uniform(-9, 3.5, size=(60, 7))).astype(np.float32)
    found = []
    for order, count in ((np.arange(60), 1), (rng.permutation(60), processes)):
        parts = [ExactSums(7) for _ in range(count)]
        for k, row in enumerate(order):
            parts[k % count].add(np.arange(7), values[row])
        coarse, fine = (sum(one.parts[which] for one in parts) for which in range(2))
        found.append((coarse + fine).numpy())
    assert found[0].tobytes() == found[1].tobytes()
    exact = [math.fsum(column) for column in values.astype(np.float64).T]
    np.testing.assert_allclose(found[0], exact, rtol=1e-15, atol=60 * 2.0**-59)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.sampled_from([1, 4, 8]), share=st.floats(0, 0.3))
def test_single_moves_never_lower_the_objective(seed: int, t: int, share: float) -> None:
    """Proposition 9."""
    case = make(n=40, seed=seed, rate=0.3)
    w = oracle(case, RelationConfig(temperature=t))
    level = share * float(np.abs(w.sum(axis=1)).max())
    scores, noisy, objectives = single_node_label_noise(w.sum(axis=1), lambda i: w[i], level)
    assert all(after >= before for before, after in zip(objectives, objectives[1:], strict=False))
    assert objectives[-1] == pytest.approx(cut_objective(w, noisy, level), abs=1e-6)
    np.testing.assert_allclose(scores, w.sum(axis=1) - 2 * w[:, noisy].sum(axis=1), atol=1e-8)
    flips = [cut_objective(w, noisy ^ (np.arange(40) == i), level) for i in range(40)]
    assert max(flips) <= objectives[-1] + 1e-6  # a local optimum


def test_a_cycle_ends_with_its_best_set() -> None:
    """Rows 0 and 1 gain alone and lose together: the set-level loop jumps between {0, 1} and {2}."""
    w = np.array([[0, 3.0, -1], [3.0, 0, -1], [-1, -1, 0]])
    config = RelationConfig(threshold="absolute", threshold_value=0.5, max_noisy_share=1, skip_share=1)
    found = find_label_noise(w.sum(axis=1), lambda rows: w[:, rows].sum(axis=1), config)
    assert found.stopped == "cycle"
    assert found.objective == max(found.objectives)
    moved = find_label_noise(w.sum(axis=1), lambda rows: w[:, rows].sum(axis=1), replace(config, on_cycle="moves"))
    best = max(cut_objective(w, np.array(bits, bool), 0.5) for bits in itertools.product([0, 1], repeat=3))
    assert moved.objective == pytest.approx(cut_objective(w, moved.noisy, 0.5)) == pytest.approx(best)
    assert best > found.objective and moved.stopped == "cycle"
    np.testing.assert_allclose(moved.scores, w.sum(axis=1) - 2 * w[:, moved.noisy].sum(axis=1))
    bound = replace(config, on_cycle="moves", max_noisy_share=0.4)
    assert find_label_noise(w.sum(axis=1), lambda rows: w[:, rows].sum(axis=1), bound).noisy.sum() <= 1


def test_sets_of_a_cycle_are_compared_at_one_lambda() -> None:
    """The first set is better at its own lambda, 1, the second at the mean of both, 3."""
    many, one = np.array([True, True, True, False]), np.array([False, False, False, True])
    cycle = [(many, np.zeros(4), 1.0, 10.0), (one, np.zeros(4), 5.0, 5.0)]
    noisy, _, level, objective = _of_cycle(cycle, 0, RelationConfig())
    assert noisy is one and level == 3 and objective == 7  # against 10 - 2 * 3


def test_single_moves_go_on_from_a_set_within_a_bound() -> None:
    w = oracle(make(n=40, rate=0.3), RelationConfig(temperature=4))
    initial, begin = w.sum(axis=1), np.arange(40) < 3
    start = initial - 2 * w[:, begin].sum(axis=1), begin
    scores, noisy, gains = single_node_label_noise(initial, lambda i: w[i], 0.1, start=start)
    assert cut_objective(w, begin, 0.1) + gains[-1] == pytest.approx(cut_objective(w, noisy, 0.1)) and gains[-1] > 0
    np.testing.assert_allclose(scores, initial - 2 * w[:, noisy].sum(axis=1), atol=1e-8)
    assert begin.sum() == 3  # what was given is left as it was
    free = single_node_label_noise(initial, lambda i: w[i], 0.1)[1].sum()
    assert single_node_label_noise(initial, lambda i: w[i], 0.1, most=2)[1].sum() <= 2 < free


def test_the_noisy_set_is_bounded() -> None:
    case = make(rate=0.6)
    graph = build(case, RelationConfig(skip_share=1.0))
    initial = -graph.relation_sums(quiet=True)
    found = find_label_noise(initial, lambda rows: -graph.sums_against(rows, quiet=True), graph.config)
    assert 0 < found.noisy.sum() <= 90


def test_the_cut_is_the_best_score_left_out_or_the_level_where_none_is() -> None:
    scores = np.array([3.0, 1.0, 2.0, 2.0])
    for share, count, cut in ((0.25, 1, 2.0), (0.5, 2, 2.0), (0.75, 3, 1.0), (1.0, 4, 0.5)):
        noisy, level = top_share(scores, share, 0.5)
        assert noisy.sum() == count and level == cut
    assert top_share(scores, 0.5, 0.5)[0].tolist() == [True, False, True, False]  # of equal ones the first
    assert top_share(scores, 1.0, 1.0)[0].tolist() == [True, False, True, True]  # none at the level


def test_skipping_warns_and_keeps_the_initial_scores(caplog: pytest.LogCaptureFixture) -> None:
    initial = np.array([1.0, 2, 3, -1])
    found = find_label_noise(initial, lambda rows: np.zeros(4), RelationConfig())
    assert found.stopped == "skipped" and not found.noisy.any()
    np.testing.assert_array_equal(found.scores, initial)
    assert "skip_share" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype: str) -> None:
    exact = build(CASE, RelationConfig()).relation_sums(quiet=True)
    half = build(CASE, RelationConfig(dtype=dtype)).relation_sums(quiet=True)
    assert np.abs(half - exact).max() < 0.02 * np.abs(exact).max()


def test_permuting_the_rows_permutes_the_sums() -> None:
    order = np.random.default_rng(1).permutation(300)
    shuffled = Case(CASE.features[order], CASE.probs[order], CASE.labels[order], CASE.wrong[order])
    one, two = (build(c, RelationConfig()).relation_sums(quiet=True) for c in (CASE, shuffled))
    np.testing.assert_allclose(two, one[order], atol=1e-5 * np.abs(one).max())


def test_chunks_and_selections_are_read_in_place() -> None:
    chunks = [CASE.features[:100], CASE.features[100:130], CASE.features[130:].astype(np.float64)]
    order = np.random.default_rng(1).permutation(300)
    out = np.empty((300, 12), np.float32)
    Rows(chunks, order).take(np.arange(300), out)
    np.testing.assert_array_equal(out, CASE.features[order])
    Rows(chunks).select(order[:5]).take(np.arange(5), out[:5])
    np.testing.assert_array_equal(out[:5], CASE.features[order[:5]])


def test_memory_picks_the_tile() -> None:
    wide = make(n=2000, d=500)
    small, large = (build(wide, RelationConfig(max_memory_gb=gb)) for gb in (2e-3, 1))
    assert small.nbytes <= 2e6 and small.tile_rows < large.tile_rows <= graph_module.LARGEST_TILE["cpu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, p: f.__setitem__((3, 0), np.nan), "row 3 .*NaN"),
        (lambda f, p: f.__setitem__((3, 0), np.inf), "row 3 .*infinite"),
        (lambda f, p: f.__setitem__(4, 0), "row 4 .*all zero"),
        (lambda f, p: p.__setitem__((5, 0), 3.0), "row 5 .*softmax"),
        (lambda f, p: p.__setitem__((5, 0), -0.001), "row 5 .*softmax"),
    ],
)
def test_bad_rows_are_named(change: Any, message: str) -> None:
    case = make(n=50)
    change(case.features, case.probs)
    with pytest.raises(ValueError, match=message):
        build(case, RelationConfig())


def test_no_buffer_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build(CASE, RelationConfig()).relation_sums(quiet=True)
    empty = torch.empty
    monkeypatch.setattr(graph_module.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    np.testing.assert_array_equal(build(CASE, RelationConfig()).relation_sums(quiet=True), expected)
