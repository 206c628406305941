"""The gates themselves: one small network per layer, from what its attention is given to the logarithm of KVzip's scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class GateWeights:
    """Weights of all layers' gates, float32.

    Args:
        linear: (layers, width, KV heads), straight from the input.
        inner: (layers, width, hidden), inner_bias: (layers, 1, hidden), outer: (layers, hidden, KV heads): beside it.
        bias: (layers, 1, KV heads).
    """

    linear: Tensor
    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    bias: Tensor

    @classmethod
    def start(cls, layers: int, width: int, hidden: int, heads: int, generator: torch.Generator) -> GateWeights:
        """Weights to fit: outputs start at zero, whatever the input."""
        return cls(
            linear=torch.zeros(layers, width, heads),
            inner=torch.randn(layers, width, hidden, generator=generator) / math.sqrt(width),
            inner_bias=torch.zeros(layers, 1, hidden),
            outer=torch.zeros(layers, hidden, heads),
            bias=torch.zeros(layers, 1, heads),
        )

    @classmethod
    def whole(cls, tensors: dict[str, Tensor], hidden: int) -> GateWeights:
        """From tensors by name, as they come out of a file.

        Raises:
            ValueError: tensors that are missing, too many, or do not fit together.
        """
        names = {field.name for field in fields(cls)}
        if set(tensors) != names or any(tensor.ndim != 3 for tensor in tensors.values()):
            raise ValueError(f"gates have the tensors {sorted(names)}, each of 3 dimensions, got {sorted(tensors)}")
        layers, width, heads = tensors["linear"].shape
        expected = {
            "linear": (layers, width, heads),
            "inner": (layers, width, hidden),
            "inner_bias": (layers, 1, hidden),
            "outer": (layers, hidden, heads),
            "bias": (layers, 1, heads),
        }
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected or 0 in tensors["linear"].shape:
            raise ValueError(f"tensors have shapes {found}, needed are {expected}")
        return cls(**tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, for files and optimizers."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def layers(self) -> int:
        """Layers that have a gate."""
        return self.linear.shape[0]

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.linear.shape[1]

    @property
    def heads(self) -> int:
        """Cached heads of a layer."""
        return self.linear.shape[2]

    def of(self, layer: int, device: torch.device) -> GateWeights:
        """One layer's gate on a device, as weights of one layer."""
        return GateWeights(**{name: weight[layer : layer + 1].to(device) for name, weight in self.tensors.items()})

    def on_plain(self, mean: Tensor, spread: Tensor, level: float, scale: float) -> GateWeights:
        """Weights that give `scale * output + level` for plain inputs, where these take `(input - mean) / spread`.

        `mean` and `spread` are (layers, 1, width).
        All but the biases are rounded to the 16 bits that a file holds, before the mean is taken out of them.
        """
        linear, inner = _rounded(scale * self.linear / spread.mT), _rounded(self.inner / spread.mT)
        return GateWeights(
            linear=linear,
            inner=inner,
            inner_bias=self.inner_bias - mean @ inner,
            outer=_rounded(scale * self.outer),
            bias=scale * self.bias + level - mean @ linear,
        )

    @property
    def stored(self) -> dict[str, Tensor]:
        """By name, for a file: 16 bits a weight, 32 a bias."""
        return {
            name: one.contiguous() if "bias" in name else one.to(torch.float16).contiguous()
            for name, one in self.tensors.items()
        }


def _rounded(weight: Tensor) -> Tensor:
    most = torch.finfo(torch.float16).max
    return weight.clamp(-most, most).to(torch.float16).float()


def gate_scores(weights: GateWeights, given: Tensor) -> Tensor:
    """Logarithms of scores (layers, n, KV heads), from inputs (layers, n, width) float32."""
    hidden = F.gelu(torch.baddbmm(weights.inner_bias, given, weights.inner))
    return torch.baddbmm(weights.bias, given, weights.linear) + hidden @ weights.outer
