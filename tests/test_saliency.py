"""Saliency equals finite differences, stands alone per sample, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn

from hf_dataopt.saliency import SaliencyExtractor, input_gradient, input_saliency, saliency_map, unwrapped

from .mixup.models import FAMILIES, batch, make


def split(data: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    return {name: value for name, value in data.items() if name != "labels"}, data["labels"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradient_is_the_slope_of_each_samples_loss(family: str) -> None:
    model = make(family).double().eval()
    inputs, labels = split(batch(family, 3))
    ((name, values),) = inputs.items()
    # not the digits: their black patches are where a LayerNorm over channels has its kink
    values = torch.rand(values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = input_gradient(model, {name: values}, labels)
    direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6

    def losses(shift: float) -> torch.Tensor:
        with torch.no_grad():
            logits = model(**{name: values + shift * direction}).logits
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    slope = (losses(step) - losses(-step)) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_model_and_random_numbers_are_left_alone(family: str) -> None:
    model = make(family).train()
    list(model.children())[-1].eval()  # a frozen part keeps its own mode
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, labels = split(batch(family, 4))
    random = torch.get_rng_state()
    with torch.no_grad():
        first = input_saliency(model, inputs, labels)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not first.requires_grad and bool((first >= 0).all()) and float(first.sum()) > 0
    alone = input_saliency(model, {name: value[:1] for name, value in inputs.items()}, labels[:1])
    torch.testing.assert_close(first[:1], alone, rtol=1e-4, atol=1e-7)


class Raising(nn.Module):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        raise RuntimeError("broken")


def test_everything_is_restored_when_the_model_raises() -> None:
    model = Raising().train()
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        input_gradient(model, {"pixel_values": torch.ones(1, 1, 2, 2)}, torch.tensor([0]))
    assert model.training and torch.equal(random, torch.get_rng_state())


def test_soft_labels_are_the_mean_of_hard_ones() -> None:
    model = make("vit")
    inputs, labels = split(batch("vit", 2))
    other = (labels + 3) % 10
    eye = torch.eye(10)
    mean = (input_gradient(model, inputs, labels) + input_gradient(model, inputs, other)) / 2
    soft = input_gradient(model, inputs, (eye[labels] + eye[other]) / 2)
    torch.testing.assert_close(soft, mean, rtol=1e-4, atol=1e-7)


def test_map_is_the_size_over_channels() -> None:
    gradient = torch.tensor([3.0, -4.0]).reshape(1, 2, 1, 1)
    assert saliency_map(gradient).item() == pytest.approx(np.sqrt(12.5))
    assert saliency_map(gradient[0]).tolist() == [[[3.0]], [[4.0]]]
    with pytest.raises(ValueError, match="shape"):
        saliency_map(gradient[None])


def test_wrappers_are_looked_through_and_data_parallel_refused() -> None:
    model = make("vit")
    assert unwrapped(torch.compile(model, backend="eager")) is model
    with pytest.raises(ValueError, match="torchrun"):
        unwrapped(nn.DataParallel(model))
    with pytest.raises(TypeError, match="dict"):
        unwrapped({})  # type: ignore[arg-type]


def test_bad_inputs_are_named() -> None:
    model = make("vit")
    with pytest.raises(ValueError, match="floating-point"):
        input_gradient(model, {"pixel_values": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}, torch.tensor([0]))
    with pytest.raises(ValueError, match="logits"):
        input_gradient(nn.Identity(), {"input": torch.ones(2, 1, 2, 2)}, torch.tensor([0, 1]))


def test_column_of_maps_by_dataset_map() -> None:
    model = make("vit")
    data = batch("vit", 6)
    table = datasets.Dataset.from_dict({"image": data["pixel_values"].numpy(), "label": data["labels"].numpy()})
    mapped = table.map(SaliencyExtractor(model, column="image", label_column="label"), batched=True, batch_size=4)
    expected = input_saliency(model, {"pixel_values": data["pixel_values"]}, data["labels"])
    np.testing.assert_allclose(np.array(mapped["saliency"][:]), expected.numpy(), rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="label_column"):
        SaliencyExtractor(model, column="image")({"image": []})
