"""Schedules: how often each method mixes, when, with timm's methods as timm does them; maps that follow; cheaper saliency."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from hf_dataopt.mixup.cells import Axis, upsample
from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.collators import DataCollatorForCoMixup, DataCollatorForMixup, DataCollatorForPuzzleMix
from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.mixers import scheduled
from hf_dataopt.mixup.peers import TimmMixer
from hf_dataopt.mixup.puzzle_mix import PuzzleDraws, puzzle_mix
from hf_dataopt.mixup.schedule import MixupSchedule
from hf_dataopt.mixup.segmentation import mixed_maps
from hf_dataopt.mixup.statistics import Tally, transported_inputs
from hf_dataopt.saliency import input_saliency

from .models import batch, make

PUZZLE = PuzzleMixConfig(grid_sizes=(2,), neighbourhood=1)


def test_each_method_gets_its_share_and_the_rest_stays_unmixed() -> None:
    mixers = scheduled(MixupSchedule(probabilities={"puzzle_mix": 0.2, "co_mixup": 0.1, "cutmix": 0.3, "mixup": 0.1}))
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(
        getattr(mixer, "method", type(mixer).__name__) for mixer in (mixers.drawn(generator, 0.0) for _ in range(4000))
    )
    for name, share in {"PuzzleMixer": 0.2, "CoMixer": 0.1, "cutmix": 0.3, "mixup": 0.1, "NoneType": 0.3}.items():
        assert drawn[name] / 4000 == pytest.approx(share, abs=0.03)


def test_warm_up_and_end() -> None:
    schedule = MixupSchedule(probabilities={"cutmix": 1.0}, warmup_epochs=4, off_epoch=10)
    assert [schedule.strength(epochs) for epochs in (0, 1, 4, 9.9, 10, 20)] == [0, 0.25, 1, 1, 0, 0]
    model = make("vit").train()
    collator = DataCollatorForMixup(model, schedule)
    data, seen = batch("vit", 4), []
    with collator.mixing():
        for epoch in (0, 5, 10):
            collator.set_epoch(epoch)
            model(**data)
            seen.append(collator.seen)
    assert seen == [0, 4, 4]


@pytest.mark.parametrize("method", ["cutmix", "mixup"])
@pytest.mark.parametrize("size", [1, 6, 7])
def test_timms_methods_are_timms(method: Any, size: int) -> None:
    from timm.data.mixup import Mixup

    images, targets = torch.rand(size, 3, 8, 8), torch.eye(10)[torch.arange(size) % 10]
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    result = TimmMixer(method, 0.7)(images, targets, None, torch.Generator().manual_seed(3))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    even = size // 2 * 2
    if even:
        np.random.seed(int(torch.randint(2**32, (), generator=torch.Generator().manual_seed(3))))  # noqa: NPY002
        alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, f"{method}_alpha": 0.7}
        mixed, soft = Mixup(**alphas, label_smoothing=0.0, num_classes=10)(
            images[:even].clone(), targets[:even].argmax(1)
        )
        torch.testing.assert_close(result.images[:even], mixed)
        torch.testing.assert_close(result.targets[:even], soft)
    assert torch.equal(result.images[even:], images[even:]) and bool(result.unmixed[even:].all())
    torch.testing.assert_close((result.ratios[:, :, None] * targets[result.sources]).sum(1), result.targets)


def test_methods_without_saliency_cost_no_pass_and_take_the_clean_loss() -> None:
    model = make("vit").train()
    calls = []
    inner = model.vit.register_forward_hook(lambda *_: calls.append(1))
    data = batch("vit", 4)
    for weight, passes in ((0.0, 1), (1.0, 2)):
        calls.clear()
        collator = DataCollatorForMixup(model, MixupSchedule(probabilities={"cutmix": 1.0}, clean_weight=weight))
        with collator.mixing():
            output = model(**data)
        assert len(calls) == passes
        assert ("clean_loss" in output) == bool(weight)
    inner.remove()


def test_a_schedule_goes_to_json_and_back_and_has_one_clean_weight() -> None:
    schedule = MixupSchedule(
        probabilities={"puzzle_mix": 0.5, "co_mixup": 0.25}, puzzle_mix=PuzzleMixConfig.tiny_imagenet(), off_epoch=5
    )
    assert schedule.clean_weight == 1.0 and schedule.co_mixup == CoMixupConfig()
    assert MixupSchedule.from_json_string(schedule.to_json_string()) == schedule
    assert MixupSchedule(probabilities={"co_mixup": 1.0}).co_mixup == CoMixupConfig(clean_weight=0.0)
    for bad, message in (
        ({"clean_weight": 0.0, "puzzle_mix": PuzzleMixConfig.tiny_imagenet()}, "clean weights"),
        ({"probabilities": {"cutmix": 0.6, "mixup": 0.6}}, "sum to 1.2"),
        ({"probabilities": {"manifold": 1.0}}, "manifold"),
        ({"puzzle_mix": PuzzleMixConfig(probability=0.5)}, "of its own"),
        ({"puzzle_mix": PuzzleMixConfig().adversarial()}, "of its own"),
        ({"puzzle_mix": {"colour": 1}}, "colour"),
        ({"off_epoch": -1.0}, "off_epoch"),
    ):
        with pytest.raises(ValueError, match=message):
            MixupSchedule(**bad)
    with pytest.raises(TypeError, match="give the model"):
        DataCollatorForMixup(None, schedule)


def test_presets_are_whole_recipes() -> None:
    for preset in (CoMixupConfig.cifar100, CoMixupConfig.tiny_imagenet):
        assert (preset().clean_weight, preset().alpha) == (1.0, 2.0)
        assert preset(clean_weight=0.0).alpha == 0.5 and preset(clean_weight=0.0, alpha=1.5).alpha == 1.5
    imagenet = CoMixupConfig.imagenet
    assert (imagenet().clean_weight, imagenet().alpha, imagenet(clean_weight=0.0).alpha) == (1.0, 1.0, 0.5)
    model = make("vit")
    with pytest.warns(DeprecationWarning, match="clean_weight"):
        collator = DataCollatorForCoMixup(model, clean_weight=0.0, mean=(0.5,), std=(0.5,))
    assert collator.config == CoMixupConfig(clean_weight=0.0, image_mean=(0.5,), image_std=(0.5,))
    assert collator.options.clean_weight == 0.0 and collator.options.mean == (0.5,)


def test_maps_follow_the_image() -> None:
    """On images that are their own class maps, the map of the mix is the mix, where one input shows at a pixel."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 5, (6, 13, 16), generator=generator)
    images = maps[:, None].float()
    saliency = (1.5 * torch.randn(6, 13, 16, generator=generator)).exp()
    draws = PuzzleDraws(partner=torch.arange(6).roll(1), grid=4, lam=0.5)
    moved = 0
    for config in (PuzzleMixConfig(transport_cost=1e-3), PuzzleMixConfig(transport=False, eta=0.8)):
        result = puzzle_mix(images / 4, torch.eye(6), saliency, config, draws=draws)
        found = mixed_maps(result, maps)
        rows, columns = (Axis(size, count) for size, count in zip((13, 16), result.masks.shape[2:], strict=True))
        share = upsample(result.masks[:, 0], rows, columns)
        clear = share != 0.5
        assert found.dtype == maps.dtype and bool(clear.any())
        torch.testing.assert_close(found[clear].float(), (4 * result.images[:, 0])[clear])
        own = transported_inputs(images, result)[:, 0, 0]
        assert torch.equal(found[~clear].float(), own[~clear])
        moved += int((own != images[:, 0]).sum())
    assert moved > 0
    with pytest.raises(ValueError, match="shape"):
        mixed_maps(result, maps[:, 1:])


def test_ratio_is_the_area_that_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    images, saliency = torch.rand(8, 1, 11, 7, generator=generator), torch.rand(8, 11, 7, generator=generator)
    draws = PuzzleDraws(partner=torch.arange(8).roll(1), grid=4, lam=0.4)
    result = puzzle_mix(images, torch.eye(8), saliency, PuzzleMixConfig(neighbourhood=1, transport=False), draws=draws)
    seen = upsample(result.masks[:, 0], Axis(11, 4), Axis(7, 4)).mean((1, 2))
    torch.testing.assert_close(result.ratios[:, 0], seen)
    assert float((seen - result.masks[:, 0].mean((1, 2))).abs().max()) > 1e-3  # the cells are not of one size


def test_a_segmentation_model_trains_on_mixed_maps() -> None:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=4,
    )
    model = transformers.SegformerForSemanticSegmentation(config).train()
    images, maps = torch.rand(4, 3, 32, 32), torch.randint(0, 4, (4, 32, 32))
    collator = DataCollatorForPuzzleMix(model, PUZZLE)
    collator.keep_result = True
    with collator.mixing():
        output = model(pixel_values=images, labels=maps)
        result = collator.last_result
    assert result is not None and torch.equal(output.labels, mixed_maps(result, maps))
    larger = nn.functional.interpolate(output.logits, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(larger, output.labels))
    with DataCollatorForCoMixup(model).mixing(model), pytest.raises(ValueError, match="Puzzle Mix alone"):
        model(pixel_values=images, labels=maps)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_a_smaller_saliency_pass(family: str) -> None:
    """The saliency is that of the half-size images, each pixel of it spread over the pixels it stands for."""
    model, data = make(family).train(), batch(family, 4)
    collator = DataCollatorForPuzzleMix(model, PUZZLE, saliency_scale=0.5)
    maps: list[torch.Tensor] = []
    collator.live.mixer = lambda images, targets, saliency, generator: (
        maps.append(saliency),
        puzzle_mix(images, targets, saliency, PUZZLE, generator),
    )[1]
    more = {"interpolate_pos_encoding": True} if family == "vit" else {}
    small = nn.functional.interpolate(data["pixel_values"], size=(4, 4), mode="area")
    expected = input_saliency(model, {"pixel_values": small, **more}, data["labels"])
    with collator.mixing():
        model(**data)
    torch.testing.assert_close(maps[0], expected.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_statistics_by_hand() -> None:
    images = torch.rand(2, 1, 4, 4)
    result = puzzle_mix(
        images, torch.eye(2), torch.rand(2, 4, 4), draws=PuzzleDraws(partner=torch.tensor([1, 0]), grid=2, lam=0.5)
    )
    ratios = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    result = replace(result, ratios=ratios, targets=ratios, unmixed=torch.tensor([False, True]))
    for tally in (Tally(), Tally.shared(2)):
        tally.add(result, 2)
        found = tally.statistics(since_last=True)
        assert found is not None and (found.outputs, found.inputs_per_output) == (2, 1.5)
        assert (found.largest_share, found.single_input) == (0.875, 0.5)
        entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / 2
        assert found.label_entropy == pytest.approx(entropy, abs=1e-6)
        assert tally.statistics(since_last=True) is None
        tally.add(result, 2)
        assert tally.statistics().outputs == 4 and tally.unmixed == 2
