"""Networks that are not ours: transformers and timm models in the match and in the scoring runs, dropout, compiled code.

Invariants: any classifier factory condenses and scores; runs repeat although layers draw from the global stream, which is
left as it was; compiled updates give the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.networks import ConvNet, ResNetAP

from .test_loop import SMALL

Factory = Callable[[int, int, tuple[int, int]], nn.Module]
SHORT = replace(SMALL, outer_iterations=1, evaluation_epochs=2, learning_rate=0.005)


def hf_resnet(channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(num_channels=channels, num_labels=classes, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    )


def timm_model(name: str) -> Factory:
    timm = pytest.importorskip("timm")

    def make(channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
        extra = {"img_size": size, "patch_size": 4} if "vit" in name else {}
        model: nn.Module = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes, **extra)
        return model

    return make


def with_dropout(channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(ConvNet(channels, 8, size=size, width=4, depth=2), nn.Dropout(0.5), nn.Linear(8, classes))


def pixels(dataset: Dataset) -> Tensor:
    return torch.tensor(dataset.with_format("numpy")["image"][:])


@pytest.mark.parametrize(
    "factory", [hf_resnet, timm_model("test_resnet"), timm_model("test_vit")], ids=["hf", "timm", "timm-vit"]
)
def test_any_classifier_condenses_and_scores(train: Dataset, test_split: Dataset, factory: Factory) -> None:
    condenser = DatasetCondenser(SHORT, network=factory)
    condensed = condenser.condense(train)
    moved = (pixels(condensed) - pixels(condenser.initial(train))).abs()
    assert 1e-5 < float(moved.mean()) < 0.5
    scores = condenser.evaluate(condensed, test_split, seeds=2)
    assert all(0 <= value <= 100 for one in scores["condensed"] for value in one.accuracies)


def test_several_test_networks_and_spread_over_seeds(train: Dataset, test_split: Dataset) -> None:
    condenser = DatasetCondenser(replace(SHORT, evaluation_epochs=12))
    condensed = condenser.condense(train)
    networks: dict[str, Factory] = {
        "ConvNet": lambda channels, classes, size: ConvNet(channels, classes, size=size, width=8, depth=2),
        "ResNetAP-10": lambda channels, classes, size: ResNetAP(channels, classes, size=max(size), width=0.125),
        "hf": hf_resnet,
    }
    scores = condenser.evaluate(condensed, test_split, networks=networks, seeds=3)
    for found in scores.values():
        assert [one.network for one in found] == list(networks)
        for one in found:
            values = torch.tensor(one.accuracies)
            assert len(values) == 3
            assert one.mean == pytest.approx(float(values.mean())) and one.spread == pytest.approx(float(values.std()))
    assert scores["condensed"][0].spread > 0 and scores["condensed"][0].images == 4 * scores["random"][0].images


def test_runs_repeat_although_layers_draw_from_the_global_stream(train: Dataset, test_split: Dataset) -> None:
    before = torch.random.get_rng_state()
    first = DatasetCondenser(SHORT, network=with_dropout)
    images = first.condense(train)
    scores = first.evaluate(images, test_split, seeds=1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3, generator=torch.default_generator)  # elsewhere the stream moves on
    second = DatasetCondenser(SHORT, network=with_dropout)
    assert torch.equal(pixels(second.condense(train)), pixels(images))
    assert second.evaluate(images, test_split, train=train, seeds=1) == scores


def test_compiled_updates_give_the_same_images_and_scores(train: Dataset, test_split: Dataset) -> None:
    config = replace(SHORT, early_epochs=1)
    plain = DatasetCondenser(config)
    expected = plain.condense(train)
    compiled = DatasetCondenser(replace(config, compile="eager"))
    found = compiled.condense(train)
    torch.testing.assert_close(pixels(found), pixels(expected), rtol=0, atol=1e-4)
    (score,), (again,) = (one.evaluate(expected, test_split, seeds=1)["condensed"] for one in (plain, compiled))
    assert again.mean == pytest.approx(score.mean, abs=5)
