"""Gradients of several classes from one pass: each class's weight gradient from the layers' inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .matching import gradients, logits_from


class ClassGradients:
    """Per-class gradients of the mean cross-entropy for the matched weights of one network.

    Where images do not meet inside the network (no batch statistics) and all matched weights are plain convolutions, the
    classes go through it together and only the last step, input times output gradient, is done class by class.

    Args:
        network: the classifier.
        names: matched parameters.

    Source: the class loop of Algorithm 5.
    Cost: one forward and one backward pass for all classes; plain autograd, class by class, for other networks. On a CPU
        `torch.func.vmap` over classes takes 2 to 4 times a loop's time (benchmarks/condensation_classes.py): not used.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.network, self.names = network, list(names)
        modules = [network.get_submodule(name.rpartition(".")[0]) for name in self.names]
        self.together = all(
            isinstance(module, nn.Conv2d)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and name.endswith("weight")
            for module, name in zip(modules, self.names, strict=True)
        ) and not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        self.layers: list[Any] = modules

    def __call__(self, images: Tensor, labels: Tensor, classes: int, *, differentiable: bool = False) -> list[Tensor]:
        """Gradients per parameter.

        Args:
            images: (classes * m, C, H, W), class by class.
            labels: (classes * m,).
            classes: number of groups.
            differentiable: keep the graph back to the images.

        Returns:
            One (classes, *shape) tensor per name.
        """
        if not self.together:
            pairs = zip(images.chunk(classes), labels.chunk(classes), strict=True)
            found = [gradients(self.network, x, y, self.names, differentiable=differentiable) for x, y in pairs]
            return [torch.stack(values) for values in zip(*found, strict=True)]
        inputs, outputs, loss = self._forward(images, labels)
        # each class's mean, whatever other classes are here: the same bits, however classes are dealt to processes
        slopes = torch.autograd.grad(loss / (len(images) // classes), outputs, create_graph=differentiable)
        results = []
        for layer, value, slope in zip(self.layers, inputs, slopes, strict=True):
            value = value if differentiable else value.detach()
            results.append(_WeightGradient.apply(slope, value, layer, classes))
        return results

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Inputs of the layers, their outputs, and the summed loss; no graph leads to the parameters."""
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if id(module) in inputs:
                raise ValueError("a convolution is used twice in one pass; match such a network class by class")
            if not output.requires_grad:  # real images: the graph starts at the first convolution
                output.requires_grad_()
            inputs[id(module)], outputs[id(module)] = args[0], output

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        frozen = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        try:
            logits = logits_from(functional_call(self.network, frozen, (images,)))
            loss = F.cross_entropy(logits, labels, reduction="sum")
        finally:
            for handle in handles:
                handle.remove()
        order = [id(layer) for layer in self.layers]
        return [inputs[key] for key in order], [outputs[key] for key in order], loss


class _WeightGradient(torch.autograd.Function):
    """Weight gradient of one convolution per class, (classes, *weight shape), from its inputs and output slopes.

    Its derivatives are a convolution and a transposed one with the incoming gradient as the weight; PyTorch's own second
    derivative turns images and filters around, which is slow for small filters.
    """

    @staticmethod
    def forward(ctx: Any, slope: Tensor, value: Tensor, layer: nn.Conv2d, classes: int) -> Tensor:
        ctx.save_for_backward(slope, value)
        ctx.layer, ctx.classes = layer, classes
        weight = layer.weight.detach().to(slope.dtype)  # a network may compute in a narrower dtype
        parts = zip(slope.chunk(classes), value.to(slope.dtype).chunk(classes), strict=True)
        return torch.stack([_convolution_backward(dy, x, weight, layer, 1) for dy, x in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, seen: Tensor) -> tuple[Tensor | None, ...]:
        (slope, value), layer = ctx.saved_tensors, ctx.layer
        by_slope, by_value = [], []
        parts = (slope.chunk(ctx.classes), value.to(slope.dtype).chunk(ctx.classes), seen.to(slope.dtype))
        for dy, x, weight in zip(*parts, strict=True):
            by_slope.append(F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation))
            if ctx.needs_input_grad[1]:
                by_value.append(_convolution_backward(dy, x, weight, layer, 0))
        return torch.cat(by_slope), torch.cat(by_value).to(value.dtype) if by_value else None, None, None


def _convolution_backward(slope: Tensor, value: Tensor, weight: Tensor, layer: nn.Conv2d, which: int) -> Tensor:
    """Gradient by the input (0) or the weight (1)."""
    mask = [which == 0, which == 1, False]
    found = torch.ops.aten.convolution_backward(
        slope, value, weight, None, layer.stride, layer.padding, layer.dilation, False, [0, 0], 1, mask
    )
    return found[which]
