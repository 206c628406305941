"""The figures' statistics: worked examples, bounds, and agreement with the mixed images themselves."""

from __future__ import annotations

import pytest
import torch

from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.puzzle_mix import PuzzleDraws, puzzle_mix
from hf_dataopt.mixup.result import MixResult
from hf_dataopt.mixup.statistics import (
    diversity,
    inputs_per_output,
    mixed_saliency,
    source_shares,
    total_variation,
    transported_inputs,
)


def mixed(grid: int = 4, **settings: object) -> tuple[torch.Tensor, MixResult]:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 12, generator=random)
    saliency = (1.5 * torch.randn(6, 16, 12, generator=random)).exp()
    draws = PuzzleDraws(partner=torch.arange(6).roll(1), grid=grid, lam=0.5)
    return images, puzzle_mix(images, torch.eye(6), saliency, PuzzleMixConfig(**settings), draws=draws)


def by_hand(shares: list[list[float]]) -> MixResult:
    ratios = torch.tensor(shares)
    outputs, inputs = ratios.shape
    return MixResult(
        images=torch.zeros(outputs, 1, 2, 2),
        targets=ratios,
        sources=torch.arange(inputs).expand(outputs, inputs),
        masks=ratios[:, :, None, None],
        ratios=ratios,
        unmixed=torch.zeros(outputs, dtype=torch.bool),
        saliency=torch.ones(inputs, 1, 1),
    )


def test_mixed_saliency_is_what_mask_and_transport_show() -> None:
    images, result = mixed(transport_cost=0.05)
    assert result.saliency is not None
    plain = mixed(transport=False)[1]
    found = mixed_saliency(result)
    assert (found >= mixed_saliency(plain) - 1e-6).all(), "Proposition 4: transport never loses visible saliency"
    assert (found > mixed_saliency(plain) + 1e-4).any()
    assert (found <= 2).all()
    for b in range(6):
        total = 0.0
        for which in (0, 1):
            shown = result.saliency[result.sources[b, which]].flatten()[result.plans[b, which]]
            total += float((result.masks[b, which].flatten() * shown).sum())
        assert found[b] == pytest.approx(total, rel=1e-5)


def test_optimal_masks_show_more_than_input_mixup() -> None:
    """Input mixup always shows exactly 1."""
    _, result = mixed(eta=0.0, beta=0.0, transport=False)
    assert (mixed_saliency(result) > 1.0).all()


def test_transported_inputs_add_up_to_the_output() -> None:
    for settings in ({"transport_cost": 0.01}, {"transport": False}, {"transport_cost": 0.01, "transport_block": 1}):
        images, result = mixed(**settings)
        moved = transported_inputs(images, result)
        masks = result.masks.repeat_interleave(16 // result.masks.shape[2], 2)
        masks = masks.repeat_interleave(12 // result.masks.shape[3], 3)
        torch.testing.assert_close((masks[:, :, None] * moved).sum(1), result.images)


def test_total_variation() -> None:
    ramp = torch.arange(5.0).expand(2, 3, 4, 5)
    assert total_variation(ramp).tolist() == [1.0, 1.0]
    assert total_variation(ramp.mT).tolist() == [1.0, 1.0]
    assert total_variation(torch.ones(1, 1, 1, 1)).tolist() == [0.0]
    images, result = mixed()
    assert (total_variation(result.images) > 0).all()
    with pytest.raises(ValueError, match="channels, height, width"):
        total_variation(torch.ones(3, 3))


def test_diversity_and_counts_of_worked_batches() -> None:
    apart = by_hand([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert diversity(apart) == pytest.approx(1.0)
    assert inputs_per_output(apart).tolist() == [1, 1, 1]
    alike = by_hand([[1.0, 0.0, 0.0]] * 3)
    assert diversity(alike) == pytest.approx(1 - 6 / 3)
    halves = by_hand([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.25, 0.25]])
    assert diversity(halves) == pytest.approx(1 - 2 * (0.25 + 0.375 + 0.25) / 3)
    assert inputs_per_output(halves).tolist() == [2, 2, 3]
    _, result = mixed()
    shares = source_shares(result)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    assert shares.shape == (6, 6)


def test_a_result_without_saliency_is_refused() -> None:
    result = by_hand([[1.0]])
    bare = MixResult(**{**vars(result), "saliency": None})
    assert source_shares(bare).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="no saliency"):
        mixed_saliency(bare)


def test_the_picture() -> None:
    pytest.importorskip("matplotlib")
    from hf_dataopt.mixup.plot import plot_mixup

    images, result = mixed(transport_cost=0.05)
    figure = plot_mixup(result, images, rows=3)
    assert len(figure.axes) == 3 * 9
    shown = figure.axes[8].images[0].get_array()
    assert abs(shown - result.images[0].permute(1, 2, 0).numpy()).max() < 1e-6
    gray = plot_mixup(
        MixResult(**{**vars(result), "images": result.images[:, :1]}), images[:, :1] * 9, rows=20, inputs=1
    )
    assert len(gray.axes) == 6 * 5
    with pytest.raises(ValueError, match="another batch"):
        plot_mixup(result, images[:, :1])


def test_the_picture_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from hf_dataopt.errors import MissingExtraError
    from hf_dataopt.mixup.plot import plot_mixup

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    images, result = mixed()
    with pytest.raises(MissingExtraError, match=r"hf-dataopt\[plots\]"):
        plot_mixup(result, images)
