"""Puzzle Mix: against the slow version, on any size and channel count, with bad saliency, along one axis, attacked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hf_dataopt.mixup.adversarial import finish_attack, start_attack
from hf_dataopt.mixup.cells import Axis, border_strips, cell_means, upsample
from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.puzzle_mix import PuzzleDraws, draw, mask_problem, puzzle_mix, solve
from hf_dataopt.seeding import generator

from ..reference import puzzle_mix as slow


def batch(
    size: int = 6, channels: int = 3, height: int = 16, width: int = 16, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(size, channels, height, width, generator=random)
    saliency = torch.randn(size, height, width, generator=random).exp()
    return images, torch.eye(size), saliency


def fixed(size: int, grid: int, lam: float = 0.5) -> PuzzleDraws:
    return PuzzleDraws(partner=torch.arange(size).roll(1), grid=grid, lam=lam)


@pytest.mark.parametrize("transport_cost", [0.01, 0.8])
def test_images_equal_moving_one_cell_at_a_time(transport_cost: float) -> None:
    images, targets, saliency = batch()
    config = PuzzleMixConfig(transport_cost=transport_cost)
    result = puzzle_mix(images, targets, saliency, config, draws=fixed(6, 4))
    assert result.plans is not None
    for b in range(6):
        expected = slow.mixed_image(
            [images[b].numpy(), images[(b - 1) % 6].numpy()],
            list(result.masks[b].numpy()),
            list(result.plans[b].numpy()),
        )
        np.testing.assert_allclose(result.images[b].numpy(), expected, atol=1e-6)
    home = torch.arange(16)
    assert transport_cost > 0.5 or (result.plans != home).any(), "cheap transport moves something here"
    torch.testing.assert_close(result.ratios[:, 0], result.masks[:, 0].mean((1, 2)))
    torch.testing.assert_close(
        result.targets, result.ratios[:, :1] * targets + result.ratios[:, 1:] * targets.roll(1, 0)
    )


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_text_s_energy_differs_by_a_constant(count: int) -> None:
    """`data_term="text"`: unaries plus edges equal Eq. 3.4 with Definition 3 up to a constant, and its least mask is found."""
    images, _, saliency = batch(2, 1, 8, 8)
    config = PuzzleMixConfig(data_term="text", n_labels=count, beta=3.0, neighbourhood=4)
    lam, grid = 0.3, 2
    problem = mask_problem(images, saliency, fixed(2, grid), config)
    assert not problem.down.any()
    cells = images.reshape(2, 2, 4, 2, 4).mean((2, 4)).numpy()
    parts = saliency.reshape(2, 2, 4, 2, 4).mean((2, 4)).double().numpy()
    parts /= parts.sum((1, 2), keepdims=True)
    own, other = 0, 1
    phi = {
        (a, b): (
            np.abs(cells[own if a else other][:-1] - cells[own if b else other][1:]).astype(np.float64),
            np.abs(cells[own if a else other][:, :-1] - cells[own if b else other][:, 1:]).astype(np.float64),
        )
        for a, b in itertools.product((0, 1), repeat=2)
    }
    beta = config.beta / (16 * grid)
    weights = beta, beta * config.gamma, config.eta / grid**2
    masks, _ = solve(problem, lam, config)
    values = 1 - np.arange(count) / (count - 1)
    every = [np.array(z).reshape(grid, grid) for z in itertools.product(values, repeat=grid * grid)]
    printed = np.array([slow.text_energy((parts[0], parts[1]), phi, z, weights, lam, count) for z in every])
    prior = -weights[2] * np.array(slow.log_prior(count, lam))
    unary = (problem.show[0][..., None] * values + problem.hide[0][..., None] * (1 - values)) + prior
    flat = np.full((1, grid), beta), np.full((grid, 1), beta)
    ours = np.array([slow.energy(unary, *flat, np.rint((1 - z) * (count - 1)).astype(int)) for z in every])
    np.testing.assert_allclose(ours - ours[0], printed - printed[0], atol=1e-7)
    chosen = slow.text_energy((parts[0], parts[1]), phi, masks[0].astype(np.float64), weights, lam, count)
    assert chosen <= printed.min() + 1e-7


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 28, 28), (2, 30, 47), (4, 5, 64), (3, 299, 17), (1, 3, 1)]
)
@pytest.mark.parametrize("grid", [2, 4, 16])
def test_any_size_and_channel_count(channels: int, height: int, width: int, grid: int) -> None:
    images, targets, saliency = batch(5, channels, height, width)
    for block in (None, 4):
        config = PuzzleMixConfig(transport_cost=0.01, transport_block=block)
        result = puzzle_mix(images, targets, saliency, config, draws=fixed(5, grid))
        assert result.images.shape == images.shape
        assert not result.unmixed.any()
        assert (result.images >= 0).all()
        assert (result.images <= 1).all()
        ones = torch.ones_like(images)
        white = puzzle_mix(images, targets, saliency, config, draws=fixed(5, grid), shown=(ones, ones))
        torch.testing.assert_close(white.images, ones)
        assert result.plans is not None
        expected = torch.arange(result.plans.shape[-1]).expand_as(result.plans)
        assert torch.equal(result.plans.sort(-1).values, expected)
        torch.testing.assert_close(result.masks.sum(1), torch.ones_like(result.masks[:, 0]))


def test_permuting_the_batch_permutes_the_result() -> None:
    images, targets, saliency = batch(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    place = order.argsort()
    one = PuzzleDraws(partner=torch.arange(8).roll(3), grid=4, lam=0.4)
    two = PuzzleDraws(partner=place[one.partner[order]], grid=4, lam=0.4)
    a = puzzle_mix(images, targets, saliency, draws=one)
    b = puzzle_mix(images[order], targets[order], saliency[order], draws=two)
    torch.testing.assert_close(a.images[order], b.images)
    torch.testing.assert_close(a.targets[order], b.targets)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 3e38, -1.0])
def test_samples_without_usable_saliency_stay_as_they_are(bad: float) -> None:
    images, targets, saliency = batch(6)
    saliency[2] = bad
    result = puzzle_mix(images, targets, saliency, generator=generator(0))
    assert result.unmixed.tolist() == [False, False, True, False, False, False]
    assert torch.equal(result.images[2], images[2])
    assert torch.equal(result.targets[2], targets[2])
    assert result.sources[2].tolist() == [2, 2]
    assert not (result.sources[[0, 1, 3, 4, 5]] == 2).any(), "and nobody is mixed with them"
    for part in (result.images, result.targets, result.masks, result.ratios, result.energies, result.saliency):
        assert torch.isfinite(part).all()
    fixed_draws = puzzle_mix(images, targets, saliency, draws=fixed(6, 4))
    assert fixed_draws.unmixed.tolist() == [False, False, True, True, False, False]
    assert torch.equal(fixed_draws.images[3], images[3])


def test_nothing_to_mix_with() -> None:
    for size, usable in ((1, 1), (4, 0), (4, 1)):
        images, targets, saliency = batch(size)
        saliency[usable:] = 0
        result = puzzle_mix(images, targets, saliency, generator=generator(0))
        assert result.unmixed.all()
        assert torch.equal(result.images, images)
        assert torch.equal(result.targets, targets)


def test_pixels_that_are_not_numbers_leave_their_pairs_unmixed() -> None:
    images, targets, saliency = batch(6)
    images[2] = float("nan")
    result = puzzle_mix(images, targets, saliency, draws=fixed(6, 4))
    assert result.unmixed.tolist() == [False, False, True, True, False, False]
    assert torch.isfinite(result.images[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_without_data_smoothness_no_pixel_counts(name: str) -> None:
    images, _, saliency = batch(3, 3, 12, 10)
    config = PuzzleMixConfig(**{name: 0.0})
    problems = [mask_problem(x, saliency, fixed(3, 4), config) for x in (images, torch.full_like(images, torch.nan))]
    for one, two in zip(*(vars(problem).values() for problem in problems), strict=True):
        np.testing.assert_array_equal(one, two)
    assert np.isfinite(problems[1].show).all() and not problems[1].down.any() and not problems[1].right.any()


def test_a_very_salient_cell_is_shown() -> None:
    """What the reference's overflow hides: a cell 1000 times the mean, in every sample, at 16 x 16 cells."""
    images, targets, saliency = batch(6, 3, 32, 32)
    for b in range(6):
        saliency[b, 4 * b : 4 * b + 2, 2:4] = 1000 * saliency[b].mean()
    result = puzzle_mix(images, targets, saliency, PuzzleMixConfig(transport=False), draws=fixed(6, 16))
    for b in range(6):
        assert result.masks[b, 0, 2 * b, 1] == 1


@pytest.mark.parametrize("axis", ["height", "width"])
def test_transport_along_one_axis(axis: str) -> None:
    images, targets, saliency = batch(5, 1, 48, 12)
    config = PuzzleMixConfig(transport_axis=axis, transport_cost=0.01)
    result = puzzle_mix(images, targets, saliency, config, draws=fixed(5, 6))
    assert result.plans is not None
    row, column = result.plans // 6, result.plans % 6
    home = torch.arange(36)
    kept, free = (column, row) if axis == "height" else (row, column)
    assert torch.equal(kept, (home % 6 if axis == "height" else home // 6).expand_as(kept))
    assert (free != (home // 6 if axis == "height" else home % 6)).any()
    assert result.saliency is not None
    for b in range(5):
        for line in range(6):
            pick = np.s_[:, line] if axis == "height" else np.s_[line]
            seen = (result.masks[b, 0][pick] > 0).float().numpy()
            cost = np.float32(0.01) * slow.squared_distances(1, 6) - np.outer(result.saliency[b][pick].numpy(), seen)
            expected, _ = slow.algorithm_1(cost)
            np.testing.assert_array_equal(free[b, 0].reshape(6, 6)[pick].numpy(), expected)


def test_draws_depend_on_the_generator_alone() -> None:
    images, targets, saliency = batch(8)
    torch.manual_seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (puzzle_mix(images, targets, saliency, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    random, config, usable = generator(0), PuzzleMixConfig(alpha=2.0), torch.ones(16, dtype=torch.bool)
    drawn = [draw(usable, config, random) for _ in range(400)]
    assert {one.grid for one in drawn} == {2, 4, 8, 16}
    lams = np.array([one.lam for one in drawn])
    assert abs(lams.mean() - 0.5) < 0.05
    assert abs(lams.var() - 0.05) < 0.01, "Beta(2, 2)"
    assert all(sorted(one.partner.tolist()) == list(range(16)) for one in drawn)


def test_lam_sets_the_prior_share() -> None:
    images, targets, saliency = batch(8)
    config = PuzzleMixConfig(eta=5.0)
    shares = [
        float(puzzle_mix(images, targets, saliency, config, draws=fixed(8, 4, lam)).ratios[:, 0].mean())
        for lam in (1e-9, 0.2, 0.5, 0.8, 1.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert shares[-1] > 0.95


def test_dtypes_and_gradients() -> None:
    images, targets, saliency = batch(6)
    exact = puzzle_mix(images, targets, saliency, draws=fixed(6, 4))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        result = puzzle_mix(images.to(dtype), targets, saliency, draws=fixed(6, 4))
        assert result.images.dtype == dtype
        assert result.targets.dtype == torch.float32
        torch.testing.assert_close(result.images.float(), exact.images, atol=0.02, rtol=0)
    result = puzzle_mix(images.requires_grad_(), targets, saliency, draws=fixed(6, 4))
    assert not result.images.requires_grad


def test_pixels_out_of_range_keep_edges_convex() -> None:
    images, targets, saliency = batch(6)
    config = PuzzleMixConfig(gamma=1.0)
    problem = mask_problem(100 * images, saliency, fixed(6, 4), config)
    assert (problem.beta + problem.down >= 0).all()
    assert not puzzle_mix(100 * images, targets, saliency, config, draws=fixed(6, 4)).unmixed.any()


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_algorithm_2(probability: float) -> None:
    images, targets, saliency = batch(40)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    config = PuzzleMixConfig(image_mean=tuple(mean.tolist()), image_std=tuple(std.tolist()))
    config = config.adversarial(probability, eps=8 / 255)
    clean = (images - mean[:, None, None]) / std[:, None, None]
    attack = start_attack(clean, config, generator(0))
    either = attack.chosen.any(1)
    pixels = attack.images * std[:, None, None] + mean[:, None, None]
    assert (pixels - images).abs().max() <= 8 / 255 + 1e-6
    assert torch.equal(attack.images[~either], clean[~either])
    gradient = torch.randn(clean.shape, generator=generator(1))
    shown = finish_attack(clean, attack, gradient, config)
    for role, out in enumerate(shown):
        chosen, share = attack.chosen[:, role], attack.share[:, role, None, None, None]
        kappa = (attack.noise + 10 / 255 * gradient.sign()).clamp(-8 / 255, 8 / 255)
        expected = (images + share * kappa).clamp(0, 1)
        pixels = out * std[:, None, None] + mean[:, None, None]
        torch.testing.assert_close(pixels[chosen], expected[chosen], atol=1e-6, rtol=0)
        assert torch.equal(out[~chosen], clean[~chosen])
    assert abs(float(attack.chosen.float().mean()) - probability) < 0.2
    if 0 < probability < 1:
        assert (attack.chosen[:, 0] != attack.chosen[:, 1]).any()
        assert attack.share.unique().numel() == 80
    result = puzzle_mix(clean, targets, saliency, config, draws=fixed(40, 4), shown=shown)
    plain = puzzle_mix(clean, targets, saliency, config, draws=fixed(40, 4))
    assert torch.equal(result.masks, plain.masks)
    assert torch.equal(result.images, plain.images) == (probability == 0)


def test_samples_are_mixed_where_saliency_is_at_least_zero_somewhere_above() -> None:
    images, targets, saliency = batch(6)
    saliency[0, :3] = 0.0  # nothing wrong with zeros
    saliency[1, 4, 5] = -1e-3
    saliency[2] = 0.0
    result = puzzle_mix(images, targets, saliency, PuzzleMixConfig(), draws=fixed(6, 4))
    assert result.unmixed.tolist() == [False, True, True, True, False, False], "the third is the fourth's partner"
    one = puzzle_mix(images[:2], targets[:2], saliency[:2], PuzzleMixConfig(), draws=fixed(2, 4))
    assert one.unmixed.all() and torch.equal(one.images, images[:2]), "one sample has nobody to be mixed with"
    for partner in ([0, 1, 2, 3, 4, 6], [0, 1]):
        draws = PuzzleDraws(partner=torch.tensor(partner), grid=4, lam=0.5)
        with pytest.raises(ValueError, match="must hold 6 places in the batch"):
            puzzle_mix(images, targets, saliency, PuzzleMixConfig(), draws=draws)


def test_cells_of_unequal_size() -> None:
    axis = Axis(10, 4)
    assert axis.edges[0] == 0
    assert axis.edges[-1] == 10
    assert set(np.diff(axis.edges)) == {2, 3}
    maps = torch.arange(100.0).reshape(1, 10, 10)
    means = cell_means(maps, axis, Axis(10, 3))
    for i, j in itertools.product(range(4), range(3)):
        rows, columns = (slice(*ends) for ends in (axis.edges[i : i + 2], Axis(10, 3).edges[j : j + 2]))
        assert means[0, i, j] == pytest.approx(float(maps[0, rows, columns].mean()), rel=1e-6)
    assert torch.equal(
        cell_means(upsample(means, axis, Axis(10, 3)), axis, Axis(10, 3)).round(decimals=3), means.round(decimals=3)
    )
    before, after, strips = border_strips(torch.rand(2, 3, 14, 9), Axis(9, 2), Axis(14, 4), 3)
    assert before.shape == after.shape == (2, 3, 3, 2 * strips)


def test_config_round_trip_and_presets() -> None:
    for config in (
        PuzzleMixConfig.cifar100(),
        PuzzleMixConfig.tiny_imagenet().adversarial(0.15),
        PuzzleMixConfig.imagenet(image_mean=(0.5, 0.5, 0.5), image_std=(0.2, 0.2, 0.2), transport_rounds="grid"),
    ):
        assert PuzzleMixConfig.from_json_string(config.to_json_string()) == config
    assert PuzzleMixConfig.cifar100().transport_block == 4
    assert PuzzleMixConfig.imagenet().neighbourhood == 2
    with pytest.raises(ValueError, match="unknown Puzzle Mix settings"):
        PuzzleMixConfig.from_json_string('{"colour": 1}')


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_labels": 5}, ValueError, "n_labels must be at most 4"),
        ({"n_labels": True}, TypeError, "int"),
        ({"beta": -1.0}, ValueError, "beta must be in"),
        ({"alpha": "1"}, TypeError, "alpha must be a number"),
        ({"eta": float("nan")}, ValueError, "eta"),
        ({"grid_sizes": ()}, ValueError, "grid_sizes needs at least 1"),
        ({"grid_sizes": 4}, TypeError, "tuple"),
        ({"grid_sizes": (0,)}, ValueError, "at least 1"),
        ({"solver": "swap"}, ValueError, "solver must be one of"),
        ({"transport_rounds": 0}, ValueError, "transport_rounds"),
        ({"transport": 1}, TypeError, "bool"),
        ({"image_mean": (0.5,)}, ValueError, "go together"),
        ({"image_mean": (0.5,), "image_std": (0.5, 0.5)}, ValueError, "channels"),
        ({"image_mean": (0.5,), "image_std": (0.0,)}, ValueError, "image_std"),
    ],
)
def test_bad_settings(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PuzzleMixConfig(**changes)


def test_bad_batches() -> None:
    images, targets, saliency = batch(4)
    good = {"images": images, "targets": targets, "saliency": saliency, "draws": fixed(4, 4)}
    for changes, error, message in (
        ({"images": images[:, 0]}, ValueError, "channel axis"),
        ({"images": images[:0]}, ValueError, "none of them empty"),
        ({"images": (255 * images).to(torch.uint8)}, TypeError, "floating point"),
        ({"targets": torch.arange(4)}, TypeError, "one-hot"),
        ({"targets": targets[:3]}, ValueError, "one-hot"),
        ({"saliency": saliency[:, None]}, ValueError, "over channels"),
        ({"draws": None}, ValueError, "torch.Generator"),
        ({"targets": torch.ones(4, 3)}, ValueError, "sum to 1"),
        ({"draws": fixed(3, 4)}, ValueError, "partner"),
        ({"draws": PuzzleDraws(partner=torch.tensor([0, 1, 2, 4]), grid=4, lam=0.5)}, ValueError, "partner"),
        ({"shown": (images, images.double())}, ValueError, "must be like images"),
        ({"config": PuzzleMixConfig(image_mean=(0.5,), image_std=(0.5,))}, ValueError, "channels"),
    ):
        with pytest.raises(error, match=message):
            puzzle_mix(**{**good, **changes})
