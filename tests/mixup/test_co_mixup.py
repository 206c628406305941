"""What must hold for any batch: masks that sum to 1, images and targets of those masks, optima against exhaustive search,
no NaN, conventions of the code and of the text, and refusals."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial

from hf_dataopt.mixup import co_mixup as module
from hf_dataopt.mixup import co_mixup_solver
from hf_dataopt.mixup import co_mixup_sweeps as sweeps
from hf_dataopt.mixup.co_mixup import co_mixup, compatibility, place_distances, prior_cost, salient_places
from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.result import MixResult
from hf_dataopt.mixup.statistics import inputs_per_output

from ..reference import co_mixup as slow

ENGINES = ["numpy"] + (["compiled"] if co_mixup_solver.compiled is not None else [])


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(co_mixup_solver, "compiled", None)
    return request.param


def batch_of(
    n: int, channels: int = 3, height: int = 16, width: int = 16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images, one-hot targets of 7 classes, blob-like saliency."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, channels, height, width, generator=generator)
    targets = torch.eye(7)[torch.randint(7, (n,), generator=generator)]
    coarse = torch.rand(n, 1, 5, 5, generator=generator) ** 3
    saliency = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[:, 0] + 1e-4
    return images, targets, saliency


def mix(config: CoMixupConfig, *batch: torch.Tensor, seed: int = 0) -> MixResult:
    return co_mixup(*batch, config, torch.Generator().manual_seed(seed))


def dense(result: MixResult, n: int) -> torch.Tensor:
    """(B', n, h, w) masks over all inputs of the batch."""
    full = torch.zeros(len(result.masks), n, *result.masks.shape[2:])
    return full.scatter_add_(1, result.sources[:, :, None, None].expand_as(result.masks), result.masks)


def check(result: MixResult, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Images and targets are those of the masks, by the dense sum; returns the dense masks."""
    masks = dense(result, len(images))
    height, width = images.shape[2:]
    rows = torch.arange(height) * masks.shape[2] // height
    columns = torch.arange(width) * masks.shape[3] // width
    enlarged = masks[:, :, rows][..., columns]
    torch.testing.assert_close(masks.sum(1), torch.ones_like(masks[:, 0]))
    assert set(masks.unique().tolist()) <= {0.0, 0.5, 1.0}
    torch.testing.assert_close(
        result.images, torch.einsum("jihw,ichw->jchw", enlarged, images.float()).to(images.dtype)
    )
    torch.testing.assert_close(result.targets, enlarged.mean((2, 3)) @ targets)
    torch.testing.assert_close(result.ratios.sum(1), torch.ones(len(masks)))
    for tensor in (result.images, result.targets, result.masks, result.ratios, result.energies, result.saliency):
        assert tensor is not None and bool(torch.isfinite(tensor).all())
    return masks


@given(
    n=st.integers(1, 9),
    channels=st.integers(1, 4),
    height=st.integers(4, 19),
    width=st.integers(4, 19),
    part_size=st.integers(1, 6),
    outputs=st.one_of(st.none(), st.integers(1, 5)),
    grid=st.sampled_from([None, 1, 2, 4, (1, 3), (4, 2), (3, 4)]),
    strict=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_size(
    n: int,
    channels: int,
    height: int,
    width: int,
    part_size: int,
    outputs: int | None,
    grid: Any,
    strict: bool,
    seed: int,
) -> None:
    batch = batch_of(n, channels, height, width, seed)
    config = CoMixupConfig(part_size=part_size, outputs_per_part=outputs, grid=grid, strict=strict, sweeps=2)
    result = mix(config, *batch, seed=seed)
    masks = check(result, batch[0], batch[1])
    if outputs is None:
        assert len(result.images) == n
        for j in range(n):
            used = torch.nonzero(masks[j].sum((1, 2)))[:, 0]
            assert bool((used // part_size == j // part_size).all())  # parts do not see each other


@pytest.mark.parametrize(("shape", "n_labels"), [((2, 2), 5), ((1, 4), 4), ((3, 2), 3), ((2, 4), 2), ((3, 3), 2)])
def test_sub_problems_equal_exhaustive_search(engine: str, shape: tuple[int, int], n_labels: int) -> None:
    """Potts, the reference code's halves, and the text's pair costs (whose diagonal is not 0); 5 x 3 x 8 problems."""
    rng = np.random.default_rng(shape[0] * 10 + shape[1])
    halves = 1 - np.eye(n_labels)
    halves[-1, :2] = halves[:2, -1] = 0.25
    mixes = np.eye(n_labels)
    mixes[-1, :] = 0
    mixes[-1, :2] = 0.5
    for pair in (1 - np.eye(n_labels), halves, 1 - mixes @ mixes.T):
        unary = rng.gamma(0.5, size=(8, *shape, n_labels))
        beta = float(rng.choice([0.1, 0.3, 1.0]))
        labels = co_mixup_solver.minimise_grid(unary, pair, beta)
        found = co_mixup_solver.grid_energy(unary, pair, beta, labels)
        expected = [slow.exhaustive(problem, pair, beta) for problem in unary]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_large_grids_at_or_below_swap_on_the_mean(engine: str) -> None:
    pytest.importorskip("gco")
    rng = np.random.default_rng(0)
    pair = 1 - np.eye(12)
    excess = []
    for n in (6, 8, 10):
        for _ in range(4):
            unary = -rng.gamma(0.5, size=(n, n, 12)) + np.where(rng.random(12) < 0.4, 0, 2)
            unary, beta = unary / n**2, 0.32 / n**2
            ours = co_mixup_solver.minimise_grid(unary[None], pair, beta)[0]
            excess.append(
                slow.energy(unary, pair, beta, ours) - slow.energy(unary, pair, beta, slow.swap(unary, pair, beta))
            )
    assert np.mean(excess) <= 1e-9


def test_strips_never_end_above_where_a_single_cell_can_improve() -> None:
    """A grid too wide for the exact search: no change of one cell lowers the energy."""
    rng = np.random.default_rng(1)
    unary, pair, beta = rng.random((2, 9, 14, 6)), 1 - np.eye(6), 0.4
    for compiled in {None, co_mixup_solver.compiled}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(co_mixup_solver, "compiled", compiled)
            labels = co_mixup_solver.minimise_grid(unary, pair, beta)
        best = co_mixup_solver.grid_energy(unary, pair, beta, labels)
        for r, c, label in itertools.product(range(9), range(14), range(6)):
            other = labels.copy()
            other[:, r, c] = label
            assert (co_mixup_solver.grid_energy(unary, pair, beta, other) >= best - 1e-9).all()


def test_engines_agree_on_small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(ENGINES) == 1:
        pytest.skip("numba is not installed")
    batch = batch_of(23)
    fast = mix(CoMixupConfig(part_size=8), *batch)
    monkeypatch.setattr(co_mixup_solver, "compiled", None)
    plain = mix(CoMixupConfig(part_size=8), *batch)
    torch.testing.assert_close(fast.images, plain.images)
    torch.testing.assert_close(fast.energies, plain.energies)


def parts_of(cost: np.ndarray, a: np.ndarray, init: np.ndarray) -> sweeps.Parts:
    return sweeps.Parts(
        cost=cost[None, None],
        compatibility=a[None],
        inputs=np.array([len(a)]),
        outputs=np.array([len(init)]),
        first=init[None].copy(),
        second=init[None].copy(),
    )


@pytest.mark.parametrize(
    "changes", [{}, {"tau_type": "soft", "tau": 0.7}, {"omega": 0.1}, {"tau": 0.3, "resolve": False}]
)
def test_sweeps_equal_the_transcribed_reference(changes: dict[str, Any]) -> None:
    """Same start, same rules, both with our solver of the sub-problems: the same masks, sweep by sweep."""
    config = CoMixupConfig(**{"keep_best": False, **changes})
    for seed, m, n_outputs in ((0, 6, 6), (1, 8, 5), (2, 7, 7)):
        rng = np.random.default_rng(seed)
        cost, a = slow.prepare(batch_of(m, seed=seed)[2], 4, config.alpha, config.eta, config.omega, rng)
        init = rng.integers(m, size=(n_outputs, 4, 4))
        terms = {"beta": config.beta, "gamma": config.gamma, "thres": config.tau, "thres_type": config.tau_type}
        terms |= {"niter": config.sweeps, "set_resolve": config.resolve}

        def solve(unary: np.ndarray, pair: np.ndarray, beta: float) -> np.ndarray:
            return co_mixup_solver.minimise_grid(unary[None], pair, beta)[0]

        def most(count: torch.Tensor) -> torch.Tensor:
            return torch.argsort(count, descending=True, stable=True)[:3]

        z = slow.masks(cost, a, init, terms, solve, most)
        parts = parts_of(cost, a, init)
        sweeps.sweep(parts, config)
        found = (np.eye(m)[parts.first[0]] + np.eye(m)[parts.second[0]]) / 2
        value = slow.joint_objective(found, cost, a, terms)
        expected = slow.joint_objective(z, cost, a, terms)
        assert value["total_clipped"] == pytest.approx(expected["total_clipped"], abs=1e-4)
        assert sweeps.objective(parts, config).sum() == pytest.approx(value["total_clipped"])
        assert sweeps.objective(parts, replace(config, strict=True)).sum() == pytest.approx(value["total_text"])


def test_keeping_the_best_lowers_the_objective_on_the_mean() -> None:
    changes = []
    for seed in range(4):
        batch = batch_of(12, seed=seed)
        kept, plain = (mix(CoMixupConfig(keep_best=keep), *batch, seed=seed).energies for keep in (True, False))
        changes.append(float(kept.sum() - plain.sum()))
    assert np.mean(changes) < 0


def test_strict_step_is_the_best_of_all_labellings() -> None:
    """max(tau', v'o) over all labellings with halves of a 1x2 grid, three inputs: the clipped step finds the optimum."""
    config = CoMixupConfig(grid=(1, 2), strict=True, tau=0.5)
    hits = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        cost = rng.random((1, 3, 3, 1, 2)) * 2
        init = rng.integers(3, size=(1, 3, 1, 2))
        a = compatibility(place_distances(rng.integers(3, size=(3, 2))), config)
        parts = sweeps.Parts(
            cost=cost, compatibility=a[None], inputs=np.array([3]), outputs=np.array([3]), first=init, second=init.copy(),
            half_cost=-0.01,
        )  # fmt: skip
        step = sweeps._Step(parts, config, np.array([0]), 1, parts.usage())
        parts.first[:, 1], parts.second[:, 1] = step.clipped()
        found = sweeps.objective(parts, config).sum()
        labels = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
        values = []
        for one, two in itertools.product(labels, labels):
            parts.first[0, 1, 0], parts.second[0, 1, 0] = (one[0], two[0]), (one[1], two[1])
            values.append(sweeps.objective(parts, config).sum())
        assert found >= min(values) - 1e-9
        hits.append(found <= min(values) + 1e-9)
    assert np.mean(hits) >= 0.75  # a multiplier cannot reach optima inside a duality gap


def test_half_labels_of_the_reference_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean less 5e-4, a quarter beside a constituent, one between different halves; the three most used of more."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def record(unary: np.ndarray, pair: np.ndarray, beta: float) -> np.ndarray:
        seen.append((unary[0, 0, 0], pair[0]))
        return np.full(unary.shape[:3], unary.shape[3] - 1)

    monkeypatch.setattr(sweeps, "minimise_grid", record)
    cost, a = np.arange(5.0)[:, None, None] + np.zeros((5, 2, 4)), np.eye(5)
    for init, pairs in (([0, 0, 0, 0, 4, 4, 4, 4], [(0, 4)]), ([1, 2, 2, 3, 3, 4, 4, 4], [(2, 3), (2, 4), (3, 4)])):
        parts = parts_of(cost, a, np.array(init).reshape(1, 2, 4))
        step = sweeps._Step(parts, CoMixupConfig(), np.array([0]), 0, parts.usage())
        first, second = step.modular(True, np.zeros((1, 5)), "hard")
        unary, pair = seen.pop()
        np.testing.assert_allclose(unary, [0, 1, 2, 3, 4] + [(i + k) / 2 - 5e-4 for i, k in pairs])
        expected = 1 - np.eye(5 + len(pairs))
        for e, members in enumerate(pairs):
            expected[5 + e, members] = expected[members, 5 + e] = 0.25
        np.testing.assert_array_equal(pair, expected)
        assert (first[0, 0, 0], second[0, 0, 0]) == pairs[-1]


def test_strict_conventions() -> None:
    text, code = CoMixupConfig.dissertation(eta=1.0, omega=0.1), CoMixupConfig(eta=1.0, omega=0.1)
    draw = np.array([0.25, 0.75])
    np.testing.assert_allclose(prior_cost(draw, 4, text), -np.log(draw) * 2 / 4)
    np.testing.assert_allclose(prior_cost(draw, 4, code), -np.log(draw + 1e-8) / 4)
    distances = np.array([[0.0, 3.0], [3.0, 0.0]])
    np.testing.assert_allclose(compatibility(distances, text), [[0.9, 0.3], [0.3, 0.9]])
    np.testing.assert_allclose(compatibility(distances, code), [[0.9, 0.1], [0.1, 0.9]])
    # smoothness of half and half beside one of its inputs, of itself, and of another pair: 1 - z'z, 1/2 |z - z'|^2
    for other, in_text, in_code in (((0, 0), 0.5, 0.25), ((0, 1), 0.5, 0.0), ((0, 2), 0.75, 0.25), ((2, 2), 1.0, 0.75)):
        first, second = np.array([[[[0, other[0]]]]]), np.array([[[[1, other[1]]]]])
        parts = sweeps.Parts(
            cost=np.zeros((1, 1, 3, 1, 2)), compatibility=np.eye(3)[None], inputs=np.array([3]), outputs=np.array([1]),
            first=first, second=second,
        )  # fmt: skip
        for strict, expected in ((True, in_text), (False, in_code)):
            config = CoMixupConfig(beta=2.0, gamma=0.0, strict=strict)
            assert sweeps.objective(parts, config)[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize("strict", [True, False])
def test_cells_cost_their_saliency_and_the_prior_of_the_draw(strict: bool) -> None:
    """-s + the negative logarithm of the prior's probability: in the text of z = n / 2, n ~ Multi(2, lambda)."""
    config = CoMixupConfig(eta=0.7, alpha=0.5, strict=strict)
    cells = np.random.default_rng(1).random((3, 2, 2))
    layout = module._Layout(np.ones(3, bool), config)
    parts = module._parts_of(cells, np.zeros((3, 2), int), layout, (2, 2), config, np.random.default_rng(0))
    for j, draw in enumerate(np.random.default_rng(0).dirichlet([0.5] * 3, 3 if strict else 1)):
        prior = parts.cost[0, j] + cells
        np.testing.assert_allclose(prior, np.broadcast_to(prior[:, :1, :1], prior.shape))  # the same in every cell
        for one, two in itertools.combinations_with_replacement(range(3), 2):
            counts = np.bincount([one, two], minlength=3)
            log_p = multinomial.logpmf(counts, 2, draw) if strict else np.log(draw + 1e-8)[[one, two]].mean()
            found = (prior[one, 0, 0] + prior[two, 0, 0]) / 2 + parts.half_cost * (one != two)
            assert found == pytest.approx(-0.7 / 4 * log_p)


def test_an_input_that_the_prior_never_drew_costs_much_but_not_endlessly() -> None:
    costs = prior_cost(np.array([0.0, 1.0]), 4, CoMixupConfig(eta=1.0))
    np.testing.assert_allclose(costs, [8 * math.log(10) / 4, 0.0], atol=1e-8)
    assert np.isfinite(prior_cost(np.array([0.0, 1.0]), 4, CoMixupConfig.dissertation(eta=1.0))).all()


@pytest.mark.parametrize(("each", "outputs"), [(1, [1, 1, 1]), (2, [2, 2, 1]), (4, [4, 4, 2])])
def test_a_shorter_last_part_gives_its_share_of_outputs_and_at_least_one(each: int, outputs: list[int]) -> None:
    layout = module._Layout(np.ones(10, bool), CoMixupConfig(part_size=4, outputs_per_part=each))
    assert [n for _, n in layout.members] == outputs


def test_salient_places_of_window_and_pixel() -> None:
    saliency = torch.zeros(1, 12, 20)
    saliency[0, 2, 17] = 9.0
    saliency[0, 4:12, 0:8] = 1.0
    assert salient_places(saliency, CoMixupConfig()).tolist() == [[4, 0]]
    assert salient_places(saliency, CoMixupConfig(distance_stride=4)).tolist() == [[1, 0]]
    assert salient_places(saliency, CoMixupConfig(strict=True)).tolist() == [[2, 17]]


def test_a_last_part_of_one_sample_passes_through() -> None:
    batch = batch_of(9)
    result = mix(CoMixupConfig(part_size=4), *batch)
    assert torch.equal(result.unmixed, inputs_per_output(result) == 1) and bool(result.unmixed[8])
    assert torch.equal(result.images[8], batch[0][8]) and torch.equal(result.targets[8], batch[1][8])
    check(result, batch[0], batch[1])


def test_equal_salient_places_do_not_collapse_the_batch() -> None:
    images, targets, saliency = batch_of(20)
    saliency = saliency.mean(0, keepdim=True).expand(20, -1, -1).contiguous()
    assert not place_distances(salient_places(saliency, CoMixupConfig()).numpy()).any()
    masks = check(mix(CoMixupConfig(), images, targets, saliency), images, targets)
    used = masks.sum((0, 2, 3))
    assert float(used.max()) < 4 * 16 and int((used > 0).sum()) >= 10


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("strict", [False, True])
def test_samples_without_saliency_stay_as_they_are(value: float, strict: bool) -> None:
    images, targets, saliency = batch_of(12)
    saliency[3] = value
    saliency[7, 0, 0] = value if value else saliency[7, 0, 0]
    bad = {3} if value == 0 else {3, 7}
    result = mix(CoMixupConfig(part_size=6, strict=strict, sweeps=2), images, targets, saliency)
    masks = check(result, images, targets)
    assert {int(i) for i in torch.nonzero(result.unmixed)} == bad
    for i in bad:
        assert torch.equal(result.images[i], images[i])
        assert float(masks[:, i].sum()) == 16  # nobody else shows it
    fewer = mix(CoMixupConfig(outputs_per_part=5, part_size=6), images, targets, saliency)
    check(fewer, images, targets)
    assert len(fewer.images) == 10 and int(fewer.unmixed.sum()) == len(bad)


def test_a_batch_without_any_saliency_comes_back() -> None:
    images, targets, saliency = batch_of(5)
    for config in (CoMixupConfig(), CoMixupConfig(outputs_per_part=20)):
        result = mix(config, images, targets, torch.zeros_like(saliency))
        assert torch.equal(result.images, images) and bool(result.unmixed.all())
        check(result, images, targets)


def test_singular_inputs_are_worse_than_two() -> None:
    """Two inputs, each salient in one half only: every output shows both halves; numbers of the penalty aside."""
    saliency = torch.full((2, 8, 8), 1e-3)
    saliency[0, :, :4] = saliency[1, :, 4:] = 1.0
    images, targets = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]), torch.eye(2)
    result = mix(CoMixupConfig(gamma=0.0), images, targets, saliency)
    expected = torch.cat([torch.zeros(8, 4), torch.ones(8, 4)], 1)
    assert torch.equal(result.images[0, 0], expected) and torch.equal(result.images[1, 0], expected)


def test_same_generator_same_batch_and_no_global_state() -> None:
    batch = batch_of(10)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    one, two, other = (mix(CoMixupConfig(), *batch, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.images, two.images) and not torch.equal(one.images, other.images)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_half_precision_and_gradient_free() -> None:
    images, targets, saliency = batch_of(6)
    images.requires_grad_()
    result = mix(CoMixupConfig(), images.to(torch.bfloat16), targets, saliency.to(torch.float16))
    assert result.images.dtype == torch.bfloat16 and not result.images.requires_grad
    assert result.targets.dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    batch = batch_of(8)
    plain = mix(CoMixupConfig(), *batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mix(CoMixupConfig(), *batch)
    assert torch.equal(plain.images, inside.images) and torch.equal(plain.targets, inside.targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu() -> None:
    batch = batch_of(20)
    plain, there = mix(CoMixupConfig(), *batch), mix(CoMixupConfig(), *(tensor.cuda() for tensor in batch))
    for name in ("images", "targets", "sources", "masks", "ratios", "unmixed", "energies", "saliency"):
        moved = getattr(there, name)
        assert moved.is_cuda
        torch.testing.assert_close(moved.cpu(), getattr(plain, name))


def test_presets_and_json() -> None:
    assert CoMixupConfig.cifar100() == CoMixupConfig.tiny_imagenet() == CoMixupConfig()
    imagenet = CoMixupConfig.imagenet(grid=(4, 6))
    assert (imagenet.part_size, imagenet.sweeps, imagenet.alpha, imagenet.distance_stride) == (16, 3, 1.0, 8)
    assert CoMixupConfig.from_json_string(imagenet.to_json_string()) == imagenet
    with pytest.raises(ValueError, match="unknown Co-Mixup settings"):
        CoMixupConfig.from_json_string('{"taus": 1}')


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"beta": -1.0}, ValueError),
        ({"omega": 1.5}, ValueError),
        ({"tau": math.nan}, ValueError),
        ({"alpha": 0.0}, ValueError),
        ({"grid": 0}, ValueError),
        ({"grid": (4, 65)}, ValueError),
        ({"grid": 2.5}, TypeError),
        ({"grid": (2, 2, 2)}, TypeError),
        ({"part_size": 0}, ValueError),
        ({"sweeps": True}, TypeError),
        ({"outputs_per_part": 0}, ValueError),
        ({"tau_type": "firm"}, ValueError),
        ({"strict": 1}, TypeError),
        ({"eta": "0.1"}, TypeError),
    ],
)
def test_config_refuses(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(changes))):
        CoMixupConfig(**changes)


def test_bad_batches_are_refused() -> None:
    images, targets, saliency = batch_of(4)
    config, generator = CoMixupConfig(), torch.Generator()
    nan = targets.clone()
    nan[0] = math.nan
    for arguments, error, words in (
        ((images[:0], targets[:0], saliency[:0]), ValueError, "empty"),
        ((images[0], targets, saliency), ValueError, r"\(B, C, H, W\)"),
        ((images, targets.argmax(1), saliency), TypeError, "floating"),
        ((images, targets[:3], saliency), ValueError, "one-hot"),
        ((images, targets, saliency[:, :8]), ValueError, "saliency must be"),
        ((images, targets, -saliency), ValueError, ">= 0"),
        ((images, nan, saliency), ValueError, "sum to 1"),
        ((images[..., :3], targets, saliency[..., :3]), ValueError, "finer"),
        (("images", targets, saliency), TypeError, "torch.Tensor"),
    ):
        with pytest.raises(error, match=words):
            co_mixup(*arguments, config, generator)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch.Generator\(\)"):
        co_mixup(images, targets, saliency, config, SimpleNamespace(device=torch.device("cuda")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2x2"):
        co_mixup(images[..., :1], targets, saliency[..., :1], CoMixupConfig(grid=None), generator)
