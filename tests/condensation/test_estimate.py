"""An estimate counts the work of the run: with a clock that counts images through networks it says the run's own number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset
from torch import Tensor

from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.estimate import Estimate
from hf_dataopt.condensation.networks import ConvNet

from .test_loop import SMALL


class Counted(ConvNet):
    """Counts the images that went through any of its kind."""

    seen = 0

    def features(self, images: Tensor, block: int | None = None) -> Tensor:
        Counted.seen += len(images)
        return super().features(images, block)


def _counted(channels: int, classes: int, size: tuple[int, int]) -> Counted:
    return Counted(channels, classes, size=size, width=4, depth=2)


@pytest.mark.parametrize(
    "method, changes",
    [
        ("idc", {}),
        ("idc", {"images_per_class": 9}),
        ("idc", {"early_epochs": 2}),
        ("idc", {"early_epochs": 2, "reinitialise_every": 2}),
        ("idc", {"early_epochs": 2, "pretrained_networks": 2, "outer_iterations": 8}),
        ("dm", {}),
        ("dsa", {}),
        ("rded", {"teacher_images": 200}),
        ("idc", {"initialisation": "patches", "teacher_images": 200}),
        ("mosaic", {"soft_labels": True, "teacher_images": 200}),
        ("mosaic", {}),
    ],
)
def test_an_estimate_is_the_work_of_the_run(
    train: Dataset, method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    condenser = DatasetCondenser(replace(SMALL, **changes), method=method, network=_counted)
    cost = condenser.estimate(train, clock=lambda: float(Counted.seen))
    real, own = condenser._estimate, []

    def counted(data: LabelledImages, classes: int) -> Estimate:
        before = Counted.seen
        found = real(data, classes)
        own.append(Counted.seen - before)
        return found

    monkeypatch.setattr(condenser, "_estimate", counted)
    before = Counted.seen
    condenser.condense(train)
    assert cost.total_seconds == pytest.approx(Counted.seen - before - sum(own), rel=0.05)
    assert (cost.early_seconds > 0) == bool(changes.get("early_epochs") or changes.get("teacher_images"))


def test_features_of_a_given_teacher_are_in_the_estimate(train: Dataset) -> None:
    condenser = DatasetCondenser(SMALL, method="mosaic", teacher=_counted(1, 3, (12, 12)))
    assert condenser.estimate(train, clock=lambda: float(Counted.seen)).start_seconds == len(train)


def test_the_largest_class_tells_the_time_of_all(train: Dataset) -> None:
    uneven = train.select([row for row, label in enumerate(train["label"]) if label == 1 or row < 30])
    teacher = _counted(1, 3, (12, 12))
    for method, whole in (("mosaic", len(uneven)), ("rded", 3 * 30 * SMALL.patches_per_image)):
        cost = DatasetCondenser(SMALL, method=method, teacher=teacher).estimate(
            uneven, clock=lambda: float(Counted.seen)
        )
        assert cost.total_seconds == cost.start_seconds == whole


def test_short_steps_are_timed_again_after_a_first_call(train: Dataset) -> None:
    """A first call that took a second longer does not count."""
    calls: list[float] = []

    def clock() -> float:
        calls.append(1e-3 + (1.0 if len(calls) == 1 else 0.0))
        return sum(calls)

    cost = DatasetCondenser(SMALL, method="mosaic").estimate(train, clock=clock)
    assert cost.total_seconds == pytest.approx(3e-3) and len(calls) == 8  # a class of three; once, and three times more


def test_a_clock_is_a_function(train: Dataset) -> None:
    with pytest.raises(TypeError, match="clock"):
        DatasetCondenser(SMALL).estimate(train, clock=3)  # type: ignore[arg-type]
