"""One step of Algorithm 3 against loops: halves on offer, the best of three, the multiplier, parts that keep to themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from hf_dataopt.mixup import co_mixup_sweeps as sweeps
from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.co_mixup_solver import minimise_grid

from ..reference import co_mixup as slow


def parts_of(
    seed: int, sizes: list[tuple[int, int]], config: CoMixupConfig, grid: tuple[int, int] = (2, 3)
) -> sweeps.Parts:
    """Random parts of (inputs, outputs), padded to the largest, with a few halves among their labels."""
    rng, m, most = np.random.default_rng(seed), max(k for k, _ in sizes), max(n for _, n in sizes)
    cost = np.full((len(sizes), most if config.strict else 1, m, *grid), sweeps.FORBIDDEN)
    a = np.zeros((len(sizes), m, m))
    first = np.zeros((len(sizes), most, *grid), np.intp)
    second = first.copy()
    for p, (k, n) in enumerate(sizes):
        cost[p, :, :k] = rng.normal(size=cost[p, :, :k].shape) / 6
        a[p, :k, :k] = np.eye(k) + (near := rng.random((k, k))) + near.T
        first[p, :n] = rng.integers(k, size=(n, *grid))
        second[p, :n] = np.where(rng.random((n, *grid)) < 0.5, first[p, :n], rng.integers(k, size=(n, *grid)))
    return sweeps.Parts(
        cost=cost,
        compatibility=a,
        inputs=np.array([k for k, _ in sizes]),
        outputs=np.array([n for _, n in sizes]),
        first=first,
        second=second,
        half_cost=-0.02 if config.strict else 0.0,
    )


def one_part(parts: sweeps.Parts, p: int) -> sweeps.Parts:
    """A part without its padding."""
    k, n = int(parts.inputs[p]), int(parts.outputs[p])
    return replace(
        parts,
        cost=parts.cost[p : p + 1, :n, :k],
        compatibility=parts.compatibility[p : p + 1, :k, :k],
        inputs=parts.inputs[p : p + 1],
        outputs=parts.outputs[p : p + 1],
        first=parts.first[p : p + 1, :n].copy(),
        second=parts.second[p : p + 1, :n].copy(),
    )


SIZES = [(4, 4), (2, 3), (3, 5)]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"tau_type": "soft", "keep_best": False},
    {"resolve": False, "sweeps": 2},
    {"strict": True, "sweeps": 3},
    {"tau": 0.2, "beta": 0.1, "gamma": 3.0, "sweeps": 5},
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_parts_in_a_batch_are_what_they_are_alone(changes: dict[str, Any]) -> None:
    config = CoMixupConfig(**changes)
    for seed in range(3):
        parts = parts_of(seed, SIZES, config)
        alone = [one_part(parts, p) for p in range(3)]
        for clip in (True, False):
            whole = sweeps.objective(parts, config, clip=clip)
            for p, part in enumerate(alone):
                n = int(part.outputs[0])
                np.testing.assert_allclose(whole[p, :n], sweeps.objective(part, config, clip=clip)[0])
                assert not whole[p, n:].any(), "padded outputs cost nothing"
        sweeps.sweep(parts, config)
        for p, part in enumerate(alone):
            sweeps.sweep(part, config)
            n = int(part.outputs[0])
            np.testing.assert_array_equal(parts.first[p, :n], part.first[0])
            np.testing.assert_array_equal(parts.second[p, :n], part.second[0])


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_objective_term_by_term(gamma: float) -> None:
    """Of dense masks: the code's terms, the text's terms, and what the reference code watches."""
    code = CoMixupConfig(beta=0.4, gamma=gamma, tau=0.3)
    parts = parts_of(4, [(3, 4)], code)
    z = (np.eye(3)[parts.first[0]] + np.eye(3)[parts.second[0]]) / 2
    terms = slow.joint_objective(
        z, parts.cost[0, 0], parts.compatibility[0], {"beta": 0.4, "gamma": gamma, "thres": 0.3}
    )
    assert sweeps.objective(parts, code).sum() == pytest.approx(terms["total_clipped"])
    assert sweeps.objective(parts, replace(code, strict=True)).sum() == pytest.approx(terms["total_text"])
    used = z.sum((1, 2))
    crowd = float((used.sum(0) ** 2).sum() - (used**2).sum())
    watched = terms["unary"] + terms["smooth"] + gamma / 6 * crowd
    assert sweeps.objective(parts, code, clip=False).sum() == pytest.approx(watched)
    dearer = replace(parts, half_cost=0.25)
    halves = (parts.first[0] != parts.second[0]).sum((1, 2))
    np.testing.assert_allclose(sweeps.objective(dearer, code)[0] - sweeps.objective(parts, code)[0], 0.25 * halves)


def test_the_most_used_halves() -> None:
    """None for one input, the pair of two, the three pairs of the three most used (the first of equals); -1 where none is."""
    config = CoMixupConfig()
    rng = np.random.default_rng(0)
    for m in (2, 3, 5):
        parts = parts_of(0, [(m, 2)], config)
        step = sweeps._Step(parts, config, np.array([0]), 0, parts.usage())
        for rows in (1, 6):
            for _ in range(20):
                used = rng.integers(0, 3, size=(rows, m)).astype(float)
                used[:, 0] += ~used.any(1)
                table = step._halves(used)
                expected = []
                for row in used:
                    most = sorted(sorted(range(m), key=lambda i, row=row: -row[i])[: int((row > 0).sum())][:3])
                    expected.append(list(combinations(most, 2)))
                width = max(map(len, expected))
                assert table.shape == (rows, width, 2)
                padded = [pairs + [(-1, -1)] * (width - len(pairs)) for pairs in expected]
                assert table.tolist() == [[list(pair) for pair in pairs] for pairs in padded]


def test_the_last_sweep_keeps_the_best_of_old_hard_and_soft() -> None:
    """By the joint objective plus what pushes equal outputs apart, for every part by itself."""
    config, chosen = CoMixupConfig(tau=3.0, gamma=0.2), set()
    for seed in range(12):
        parts = parts_of(seed, SIZES, config)
        used, active, j = parts.usage(), np.arange(3), seed % 3
        apart = np.random.default_rng(seed).random((3, 4))
        old = parts.first[active, j].copy(), parts.second[active, j].copy()
        step = sweeps._Step(parts, config, active, j, used)
        first, second = step.best(True, apart, old)
        options = [old, step.modular(True, apart, "hard"), step.modular(True, apart, "soft")]
        for p in active:
            values = []
            for one, two in options:
                parts.first[:, j], parts.second[:, j] = one, two
                push = config.gamma / parts.cells * apart[p] @ sweeps._counts(one[p], two[p], 4)
                values.append(float(sweeps.objective(parts, config)[p].sum() + push))
            best = int(np.argmin(np.round(values, 12)))
            chosen.add(best)
            np.testing.assert_array_equal(first[p], options[best][0][p])
            np.testing.assert_array_equal(second[p], options[best][1][p])
    assert chosen == {0, 1, 2}


def test_both_penalties_of_one_call_are_the_single_ones() -> None:
    config = CoMixupConfig(tau=0.25, gamma=2.0)
    parts = parts_of(3, SIZES, config)
    step = sweeps._Step(parts, config, np.arange(3), 1, parts.usage())
    for halves in (True, False):
        both = step.modular(halves, np.zeros((3, 4)), "hard", "soft")
        for k, name in enumerate(("hard", "soft")):
            for stacked, single in zip(both, step.modular(halves, np.zeros((3, 4)), name), strict=True):
                np.testing.assert_array_equal(stacked[3 * k : 3 * k + 3], single)


def clipped_in_loops(part: sweeps.Parts, config: CoMixupConfig, j: int) -> tuple[list[float], np.ndarray, np.ndarray]:
    """The multipliers that are tried and the best labels, for one part, by its objective."""
    m, n = part.cost.shape[2], int(part.outputs[0])
    left, right, pair = sweeps._text_labels(m)
    used = part.usage()[0]
    others = [i for i in range(n) if i != j]
    v = 2 * part.compatibility[0] @ sum((used[i] for i in others), np.zeros(m)) * config.gamma / part.cells
    v = (v[left] + v[right]) / 2
    among = sum(float(used[i] @ part.compatibility[0] @ used[k]) for i in others for k in others if i != k)
    level = config.gamma / part.cells * (config.tau * part.cells**2 * n - among)
    cost = part.cost[0, j].transpose(1, 2, 0)
    base = (cost[..., left] + cost[..., right]) / 2 + part.half_cost * (left != right)
    tried, best, low, high = [], (np.inf, left, right), 0.0, 1.0
    for step in range(6):
        theta = 1.0 if step == 0 else 0.0 if step == 1 else (low + high) / 2
        tried.append(theta)
        labels = minimise_grid((base + theta * v)[None], pair, config.beta / part.cells)[0]
        use = float(v[labels].sum())
        part.first[0, j], part.second[0, j] = left[labels], right[labels]
        value = float(sweeps.objective(part, config).sum())
        if value < best[0] - 1e-12:
            best = value, left[labels], right[labels]
        if (step == 0 and use >= level) or (step == 1 and use <= level):
            break
        if step > 1:
            low, high = (theta, high) if use > level else (low, theta)
    return tried, best[1], best[2]


def test_the_texts_step_bisects_the_multiplier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops where the penalised problem stays above tau' or the free one below; the best labelling seen is kept."""
    lengths = set()
    calls: list[np.ndarray] = []

    def record(unary: np.ndarray, pair: np.ndarray, beta: float) -> np.ndarray:
        calls.append(unary)
        return minimise_grid(unary, pair, beta)

    for seed in range(12):
        config = CoMixupConfig(strict=True, tau=2.5, gamma=1.0)
        parts = parts_of(seed, [(3, 3)], config)
        part = one_part(parts, 0)
        tried, first, second = clipped_in_loops(part, config, 1)
        with monkeypatch.context() as patch:
            patch.setattr(sweeps, "minimise_grid", record)
            calls.clear()
            found = sweeps._Step(parts, config, np.array([0]), 1, parts.usage()).clipped()
        np.testing.assert_array_equal(found[0][0], first)
        np.testing.assert_array_equal(found[1][0], second)
        assert len(calls) == len(tried)
        lengths.add(len(tried))
    assert lengths == {1, 2, 6}


def test_labels_of_the_text() -> None:
    left, right, pair = sweeps._text_labels(3)
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
    mixes = (np.eye(3)[left] + np.eye(3)[right]) / 2
    np.testing.assert_allclose(pair, 1 - mixes @ mixes.T)


def test_outputs_of_equal_inputs_are_pushed_apart() -> None:
    rng, some = np.random.default_rng(1), 0.0
    for _ in range(20):
        inputs = rng.random((3, 5, 3)) < 0.6
        found = sweeps._push_apart(inputs)
        for p in range(3):
            expected = np.zeros((5, 3))
            for one, two in combinations(range(5), 2):
                sources = np.flatnonzero(inputs[p, one])
                if len(sources) > 1 and (inputs[p, one] == inputs[p, two]).all():
                    expected[one, sources[0]] = expected[two, sources[1]] = 1
            np.testing.assert_array_equal(found[p], expected)
        some += found.sum()
    assert some > 20


@pytest.mark.parametrize("m", [2, 3])
def test_few_inputs_many_outputs_are_the_transcribed_sweeps(m: int) -> None:
    """Where outputs share their inputs and halves are few: pushing apart before the last sweep, and stopping early."""
    for seed, rounds, resolve in ((0, 4, True), (1, 3, True), (2, 2, False), (3, 6, True), (4, 9, True), (5, 2, True)):
        config = CoMixupConfig(keep_best=False, sweeps=rounds, resolve=resolve, tau=0.4 + 0.1 * seed)
        parts = parts_of(seed, [(m, 5)], config, (4, 4))
        parts.second[:] = parts.first
        terms = {"beta": config.beta, "gamma": config.gamma, "thres": config.tau, "thres_type": config.tau_type}
        terms |= {"niter": rounds, "set_resolve": resolve}
        z = slow.masks(
            parts.cost[0, 0],
            parts.compatibility[0],
            parts.first[0],
            terms,
            lambda unary, pair, beta: minimise_grid(unary[None], pair, beta)[0],
            lambda count: count.argsort(descending=True, stable=True)[:3],
        )
        sweeps.sweep(parts, config)
        found = (np.eye(m)[parts.first[0]] + np.eye(m)[parts.second[0]]) / 2
        np.testing.assert_array_equal(found, z)
