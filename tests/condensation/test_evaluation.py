"""The scoring recipe in exact numbers: what is averaged, when the learning rate falls, what is shown and what is counted."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_dataopt.condensation import evaluation
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.evaluation import Score, score
from hf_dataopt.condensation.training import Updates

CLASSES = 3


def image_set(n: int, size: tuple[int, int] = (6, 5), channels: int = 2) -> LabelledImages:
    """Seeded images whose mean and std are not 0 and 1."""
    own = torch.Generator().manual_seed(n)
    return LabelledImages(
        images=torch.rand(n, channels, *size, generator=own),
        labels=torch.arange(n) % CLASSES,
        class_names=["a", "b", "c"],
        mean=torch.full((channels,), 0.25),
        std=torch.full((channels,), 0.5),
    )


class Linear(nn.Module):
    """Logits of the first pixels; remembers every batch it was shown outside of training."""

    def __init__(self, channels: int, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.asked_for, self.seen = (channels, classes, size), []
        self.layer = nn.Linear(channels * size[0] * size[1], classes)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            self.seen.append(images)
        return self.layer(images.flatten(1))


def run(made: list[Linear], images: int = 7, tests: int = 11, seeds: int = 2, **changes: Any) -> list[Score]:
    def factory(channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
        made.append(Linear(channels, classes, size))
        return made[-1]

    train = image_set(images)
    config = IDCConfig(**{"evaluation_epochs": 2, "evaluation_augmentation": "flip", **changes})
    return score(train.images, train.labels, image_set(tests), config, {"linear": factory}, seeds=seeds)


def test_mean_and_spread() -> None:
    several = Score(accuracies=(40.0, 50.0, 66.0), network="n", epochs=1, images=1)
    assert several.mean == 52.0
    assert several.spread == pytest.approx(statistics.stdev(several.accuracies))
    two = Score(accuracies=(10.0, 20.0), network="n", epochs=1, images=1)
    assert (two.mean, two.spread) == (15.0, pytest.approx(statistics.stdev((10.0, 20.0))))
    assert Score(accuracies=(30.0,), network="n", epochs=1, images=1).spread == 0.0


def test_networks_are_made_for_the_images_one_per_seed() -> None:
    made: list[Linear] = []
    (found,) = run(made, seeds=3)
    assert [one.asked_for for one in made] == [(2, CLASSES, (6, 5))] * 3
    assert len({one.layer.weight.detach().sum().item() for one in made}) == 3, "each seed has its own weights"
    assert (len(found.accuracies), found.images, found.epochs, found.network) == (3, 7, 2, "linear")


def test_one_seed_and_one_image_are_enough_and_less_is_refused() -> None:
    (found,) = run([], images=1, seeds=1)
    assert (len(found.accuracies), found.images) == (1, 1)
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        run([], seeds=0)
    train, tests = image_set(4), image_set(4)
    for images, labels in ((train.images[:0], train.labels[:0]), (train.images, train.labels[:3])):
        with pytest.raises(ValueError, match="one label per image"):
            score(images, labels, tests, IDCConfig(), {})


def test_every_test_image_is_counted_once_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_TEST_BATCH", 4)
    made: list[Linear] = []
    (found,) = run(made, tests=11, seeds=1)
    assert [len(batch) for batch in made[0].seen] == [4, 4, 3]
    tests = image_set(11)
    shown = torch.cat(made[0].seen)
    torch.testing.assert_close(shown, (tests.images - 0.25) / 0.5)
    with torch.no_grad():
        right = int((made[0].layer(shown.flatten(1)).argmax(1) == tests.labels).sum())
    assert found.accuracies[0] == pytest.approx(100 * right / 11)


def test_the_learning_rate_falls_to_a_fifth_after_two_thirds_and_five_sixths(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, rows, means = [], [], []

    def remember(network: nn.Module, optimiser: torch.optim.Optimizer, shown: Any, own: Any, updates: Updates) -> None:
        for images in shown[0].split(updates.batch):
            rates.append(optimiser.param_groups[0]["lr"])
            rows.append(len(images))
            means.append(images.sum())
            optimiser.step()

    monkeypatch.setattr(evaluation, "train_on", remember)
    run([], seeds=1, evaluation_epochs=13, evaluation_learning_rate=0.5, evaluation_batch=4)
    assert rows == [4, 3] * 13
    assert rates[::2] == pytest.approx([0.5] * 8 + [0.1] * 2 + [0.02] * 3)
    assert rates[::2] == rates[1::2]
    whole = ((image_set(7).images - 0.25) / 0.5).sum()
    for first, second in zip(means[::2], means[1::2], strict=True):
        torch.testing.assert_close(first + second, whole)  # every image once an epoch
