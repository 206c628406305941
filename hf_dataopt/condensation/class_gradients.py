"""Gradients of several classes from one pass: each class's weight gradient from the layers' inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .matching import gradients, logits_of


class ClassGradients:
    """Per-class gradients of the mean cross-entropy for the matched weights of one network.

    Where images do not meet inside the network (no batch statistics) and all matched weights are plain convolutions, the
    classes go through it together and only the last step, input times output gradient, is done class by class.

    Args:
        network: the classifier.
        names: matched parameters.

    Source: the class loop of Algorithm 5.
    Cost: one forward and one backward pass for all classes; plain autograd, class by class, for other networks.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.network, self.names = network, list(names)
        modules = [network.get_submodule(name.rpartition(".")[0]) for name in self.names]
        self.together = all(
            isinstance(module, nn.Conv2d)
            and module.groups == 1
            and module.padding_mode == "zeros"
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
        if not self.together or classes == 1:
            pairs = zip(images.chunk(classes), labels.chunk(classes), strict=True)
            found = [gradients(self.network, x, y, self.names, differentiable=differentiable) for x, y in pairs]
            return [torch.stack(values) for values in zip(*found, strict=True)]
        inputs, outputs = self._forward(images, labels)
        loss, results = outputs.pop(), []
        slopes = torch.autograd.grad(loss * classes, outputs, create_graph=differentiable)
        for layer, value, slope in zip(self.layers, inputs, slopes, strict=True):
            value = value if differentiable else value.detach()
            parts = zip(value.chunk(classes), slope.chunk(classes), strict=True)
            results.append(torch.stack([_weight_gradient(layer, x, dy) for x, dy in parts]))
        return results

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of the layers; their outputs and, last, the loss."""
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if id(module) in inputs:
                raise ValueError("a convolution is used twice in one pass; match such a network class by class")
            inputs[id(module)], outputs[id(module)] = args[0], output

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            loss = F.cross_entropy(logits_of(self.network, images), labels)
        finally:
            for handle in handles:
                handle.remove()
        order = [id(layer) for layer in self.layers]
        return [inputs[key] for key in order], [*(outputs[key] for key in order), loss]


def _weight_gradient(layer: nn.Conv2d, value: Tensor, slope: Tensor) -> Tensor:
    """Gradient of one convolution's weight, differentiable by both arguments."""
    found = torch.ops.aten.convolution_backward(
        slope,
        value.to(slope.dtype),  # under autocast the output is narrower than the input
        layer.weight.to(slope.dtype),
        None,
        layer.stride,
        layer.padding if not isinstance(layer.padding, str) else [k // 2 for k in layer.kernel_size],
        layer.dilation,
        False,
        [0, 0],
        1,
        [False, True, False],
    )
    return found[1]
