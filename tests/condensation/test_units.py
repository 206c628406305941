"""The preview's size, the step of DM and DSA in its own units, digits that are not flipped."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_dataopt.condensation.baselines import method_config
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.loop import CondensationLoop, ImageState
from hf_dataopt.condensation.preview import preview

from .test_loop import SMALL, network


@pytest.mark.parametrize("classes, count, side", [(100, 10, 8), (1000, 2, 8), (324, 1, 300), (20, 10, 8), (3, 40, 8)])
def test_previews_stay_small(classes: int, count: int, side: int) -> None:
    sheet = preview(torch.rand(classes, 1, 1, 1, 1).expand(classes, count, 1, side, side), count)
    assert max(sheet.size) <= 4096
    assert sheet.width <= 16 * (side + 2) or sheet.width <= 512


def test_the_preview_of_many_classes_stays_a_picture() -> None:
    sheet = preview(torch.rand(70, 10, 1, 12, 8), 10)
    assert sheet.size == (10 * 10 - 2, 64 * 14 - 2)  # 64 classes, one below the other
    large = preview(torch.rand(20, 10, 1, 600, 700), 10)
    assert max(large.size) <= 4096 and min(large.size) > 2000


def test_a_step_in_normalised_space_is_std_squared_in_pixels(data: LabelledImages) -> None:
    moved = []
    start = torch.rand(3, 2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for space in ("stored", "normalised"):
        config = replace(SMALL, learning_rate_space=space, inner_iterations=1, momentum=0.0, learning_rate=1e-3)
        state, theta = ImageState.start(start.clone()), network()
        loop = CondensationLoop(data, config, range(3), torch.device("cpu"))
        loop.outer_iteration(state, theta, loop.optimiser(theta), 0)
        moved.append(state.images - start)
    torch.testing.assert_close(moved[1], moved[0] * data.std**2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("metric, scale", [("mse", 1.0), ("l1", 1.0), ("mse", 1e-3)])
def test_a_first_step_moves_as_far_whatever_the_metric(data: LabelledImages, metric: str, scale: float) -> None:
    start = torch.rand(3, 2, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.45
    config = replace(SMALL, learning_rate_space="first_step", learning_rate=0.03, metric=metric, momentum=0.0)
    config = replace(config, inner_iterations=1, augmentation="none", real_batch=30)  # the same numbers in both
    state, theta = ImageState.start(start.clone()), network()
    with torch.no_grad():
        theta.classifier.weight.mul_(scale)
    for mine in (range(3), [1]):  # one process, or its share
        loop = CondensationLoop(data, config, mine, torch.device("cpu"))
        loop.rate = loop.rate_for(start, theta)
        state = ImageState.start(start[list(mine)].clone())
        loop.outer_iteration(state, deepcopy(theta), loop.optimiser(theta), 0)
        moved = (state.images - start[list(mine)]).flatten(1).square().mean(1).sqrt() / data.std
        if len(moved) == 3:
            assert float(moved.mean()) == pytest.approx(0.03, rel=1e-3) and float(moved.std()) > 1e-4
            all_of_them = moved
        else:
            torch.testing.assert_close(moved, all_of_them[1:2])


def test_where_nothing_is_to_match_nothing_moves(data: LabelledImages) -> None:
    config = replace(SMALL, learning_rate_space="first_step", inner_iterations=1, learning_rate=0.03)
    start, theta = torch.full((3, 2, 1, 12, 12), 0.5), network()
    with torch.no_grad():
        theta.classifier.weight.zero_()
    loop, state = CondensationLoop(data, config, range(3), torch.device("cpu")), ImageState.start(start.clone())
    loop.rate = loop.rate_for(start, theta)
    loop.outer_iteration(state, theta, loop.optimiser(theta), 0)
    assert torch.equal(state.images, start)


def test_the_rate_of_a_first_step_is_the_runs(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    real = CondensationLoop.outer_iteration

    def noted(self: CondensationLoop, *args: Any) -> Any:
        rates.append(self.rate)
        return real(self, *args)

    monkeypatch.setattr(CondensationLoop, "outer_iteration", noted)
    for step in (0.01, 0.03):
        config = replace(SMALL, learning_rate_space="first_step", learning_rate=step, inner_iterations=1)
        DatasetCondenser(config).condense(train)
    assert len(set(rates)) == 2 and rates[3] == pytest.approx(3 * rates[0]) != pytest.approx(0.03)


@pytest.mark.parametrize("method", ["dm", "dsa"])
def test_baselines_flip_where_scoring_flips(method: str) -> None:
    flipped, digits = (
        method_config(method, replace(SMALL, evaluation_augmentation=augmentation)).augmentation
        for augmentation in ("color_crop_flip_scale_rotate", "color_crop_scale_rotate")
    )
    assert "flip" in flipped and "flip" not in digits and "rotate" in digits


def test_names_stand_above_the_images_of_their_class() -> None:
    images = torch.rand(10, 1, 1, 12, 12)
    plain, named = preview(images, 1), preview(images, 1, [f"a name that is rather long {k}" for k in range(10)])
    zoom = plain.width // (3 * 14 - 2)  # three classes in a row
    assert (named.width, named.height) == (plain.width, plain.height + 4 * 16)
    sheet, before = np.asarray(named), np.asarray(plain)
    tall = 14 * zoom
    for row in range(4):
        top = row * (tall + 16)
        kept = before[row * tall : (row + 1) * tall]
        assert np.array_equal(sheet[top + 16 : top + 16 + len(kept)], kept)
        band = sheet[top : top + 16]
        for place in range(3):
            cell = band[:, place * 14 * zoom : (place + 1) * 14 * zoom]
            assert (cell.min() < 128) == (3 * row + place < 10)  # letters, where there is a class
        gaps = [band[:, place * 14 * zoom - 2 : place * 14 * zoom] for place in (1, 2)]
        assert all((gap == 255).all() for gap in gaps)  # and cut before the next one
