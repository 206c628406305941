"""Scoring on photos: torchvision's crop, the reference code's colours, each by the numbers that were drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_dataopt.condensation import evaluation, photo
from hf_dataopt.condensation.baselines import method_config
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.photo import crop_box, photo_augment
from hf_dataopt.condensation.training import Updates

from .test_evaluation import image_set, run


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(32, 32), (30, 36), (60, 10)])
def test_crops_are_half_to_all_of_an_image_of_three_to_four_at_most(size: tuple[int, int]) -> None:
    own, boxes = generator(), []
    for _ in range(2000):
        top, left, high, wide = crop_box(size, own)
        assert 0 <= top <= top + high <= size[0] and 0 <= left <= left + wide <= size[1]
        boxes.append((top, left, high, wide))
    if size == (60, 10):  # no part of 4 : 3 holds half of it
        assert set(boxes) == {(23, 0, 13, 10)}
        return
    shares = [high * wide / (size[0] * size[1]) for _, _, high, wide in boxes]
    shapes = [wide / high for _, _, high, wide in boxes]
    assert 0.47 < min(shares) < 0.53 and max(shares) > 0.93
    assert 0.7 < min(shapes) < 0.8 and 1.25 < max(shapes) < 1.4
    assert (
        {box[0] + box[2] == size[0] for box in boxes} == {box[1] + box[3] == size[1] for box in boxes} == {True, False}
    )
    if size == (32, 32):
        assert abs(sum(top for top, *_ in boxes) - sum(size[0] - top - high for top, _, high, _ in boxes)) < 500
        reference = pytest.importorskip("torchvision.transforms").RandomResizedCrop
        torch.manual_seed(0)
        drawn = [reference.get_params(torch.zeros(3, *size), (0.5, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)]
        theirs = sum(high * wide for _, _, high, wide in drawn) / 2000
        assert sum(shares) / 2000 * 32 * 32 == pytest.approx(theirs, rel=0.02)


def _slow(
    image: Tensor, box: tuple[int, int, int, int], flip: bool, steps: list[tuple[str, float]], light: Tensor
) -> Tensor:
    """The reference code, an image (3, H, W) at a time."""
    top, left, high, wide = box
    crop = image[:, top : top + high, left : left + wide][None]
    image = torch.nn.functional.interpolate(crop, image.shape[1:], mode="bilinear")[0]
    image = image.flip(2) if flip else image
    for name, alpha in steps:
        grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        goal = {"brightness": 0 * image, "contrast": 0 * image + grey.mean(), "saturation": grey.expand(3, -1, -1)}[
            name
        ]
        image = (1 - alpha) * image + alpha * goal
    vectors = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    values = torch.tensor([0.2175, 0.0188, 0.0045])
    return image + (vectors * (light * values)).sum(1)[:, None, None]


def test_an_image_equals_the_reference_code_with_the_same_numbers() -> None:
    images = torch.rand(12, 3, 10, 14, generator=generator(1))
    found, own, flips, orders = photo_augment(images, generator(2)), generator(2), set(), set()
    for image, got in zip(images, found, strict=True):
        box = crop_box((10, 14), own)
        flip = float(torch.rand((), generator=own)) < 0.5
        alphas = (torch.rand(3, generator=own) * 0.8 - 0.4).tolist()
        order = torch.randperm(3, generator=own).tolist()
        light = torch.randn(3, generator=own) * 0.1
        names = ("brightness", "contrast", "saturation")
        torch.testing.assert_close(got, _slow(image, box, flip, [(names[k], alphas[k]) for k in order], light))
        flips.add(flip), orders.add(tuple(order))
    assert flips == {True, False} and len(orders) > 3


def test_grey_images_get_no_light() -> None:
    flat = torch.full((5, 1, 8, 8), 0.5)
    found = photo_augment(flat, generator())
    assert float(found.flatten(1).std(1).max()) < 1e-6  # nothing but brightness
    assert 0.3 - 1e-6 <= float(found.min()) < float(found.max()) <= 0.7 + 1e-6


def test_photos_are_augmented_before_they_are_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Tensor, str]] = []

    def remember(network: Any, optimiser: Any, batch: Any, own: Any, updates: Updates) -> None:
        shown.append((batch[0], updates.augmentation))
        optimiser.step()

    monkeypatch.setattr(evaluation, "train_on", remember)
    monkeypatch.setattr(evaluation, "photo_augment", lambda images, own: images * 0 + 1)
    run([], seeds=1, evaluation_augmentation="photo")
    assert {augmentation for _, augmentation in shown} == {"none"}
    for batch, _ in shown:
        torch.testing.assert_close(batch, torch.full_like(batch, (1 - 0.25) / 0.5))
    assert len(image_set(7).images) == len(shown[0][0])


def test_the_imagenet_presets_score_photos_and_nothing_is_matched_on_them() -> None:
    for classes in (10, 100):
        config = IDCConfig.imagenet_subset(classes)
        assert config.evaluation_augmentation == photo.PHOTO and config.augmentation == "color_crop_cutout"
        assert "flip" in method_config("dm", config).augmentation
    with pytest.raises(ValueError, match="unknown augmentation"):
        IDCConfig(augmentation="photo")
    with pytest.raises(ValueError, match="unknown augmentation"):
        IDCConfig(evaluation_augmentation="photos")
