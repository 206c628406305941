"""Written-out derivatives equal autograd's: the pooled norm up to its second derivative, weight gradients of convolutions.

Invariants: value, gradient and gradient of the gradient = those of PyTorch's own layers, by every input, for even and odd
sizes; matching through them = matching without them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dataopt.condensation import pooled_norm as module
from hf_dataopt.condensation.class_gradients import ClassGradients
from hf_dataopt.condensation.pooled_norm import pooled_norm


def plain(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(F.group_norm(images, images.shape[1], weight, bias)), 2)


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (4, 9), (2, 2)])
@pytest.mark.parametrize("trained", ["", "weight", "bias", "weight bias"])
@pytest.mark.parametrize("compiled", [False, True])
def test_pooled_norm_equals_pytorchs_layers_twice_differentiated(
    size: tuple[int, int], trained: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(module, "loops", None)
    own = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=own, dtype=torch.float64)

    images = numbers(3, 4, *size).requires_grad_()
    weight, bias = (numbers(4).requires_grad_(name in trained) for name in ("weight", "bias"))
    inputs = [one for one in (images, weight, bias) if one.requires_grad]
    seen, weights = numbers(3, 4, size[0] // 2, size[1] // 2), [numbers(*value.shape) for value in inputs]
    found = []
    for way in (plain, pooled_norm):
        out = way(images, weight, bias)
        simple = torch.autograd.grad((out * seen).sum(), inputs, retain_graph=True)
        slopes = torch.autograd.grad((out * seen).square().sum(), inputs, create_graph=True)
        twice = torch.autograd.grad(sum((s * w).sum() for s, w in zip(slopes, weights, strict=True)), inputs)
        found.append([out, *simple, *slopes, *twice])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_pooled_norm_shows_nan(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(module, "loops", None)
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 0, 0] = torch.nan
    out = pooled_norm(images, torch.ones(1), torch.ones(1))
    assert bool(out[1].isnan().any()) and bool((out[0] == 1).all())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(2, 3, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(2, 3, 3, padding="same"),
        nn.Conv2d(2, 3, (1, 3), padding=(0, 1)),
        nn.Conv2d(2, 3, 2, padding="valid"),
    ],
    ids=["stride", "dilation", "same", "oblong", "valid"],
)
def test_weight_gradients_of_any_plain_convolution(layer: nn.Conv2d) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    images, labels = torch.randn(4, 2, 7, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 1, 1])
    compute = ClassGradients(net, ["0.weight"])
    assert compute.together == (not isinstance(layer.padding, str))
    (found,) = compute(images, labels, 2, differentiable=True)
    weights = torch.randn_like(found)
    (slope,) = torch.autograd.grad((found * weights).sum(), images)
    for label in range(2):
        part = images.detach()[2 * label : 2 * label + 2].requires_grad_()
        loss = F.cross_entropy(net(part), labels[2 * label : 2 * label + 2])
        (expected,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
        torch.testing.assert_close(found[label], expected)
        (through,) = torch.autograd.grad((expected * weights[label]).sum(), part)
        torch.testing.assert_close(slope[2 * label : 2 * label + 2], through)
    (without,) = compute(images.detach(), labels, 2)
    torch.testing.assert_close(without, found.detach())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
