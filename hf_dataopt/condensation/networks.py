"""ConvNet and ResNetAP: the networks whose gradients are matched. Layers act on each image alone, no batch statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..seeding import layers_draw_from
from .pooled_norm import pooled_norm

if TYPE_CHECKING:
    from .config import IDCConfig


# devices on which a ConvNet uses the derivatives that are written out (benchmarks/condensation_derivatives.py)
WRITTEN_OUT = {"cpu"}


class ConvNet(nn.Module):
    """`depth` blocks of [3x3 convolution, instance norm, ReLU, 2x2 average pool] and a linear head.

    Args:
        channels: of the input.
        classes: outputs.
        size: height and width of the input in pixels.
        width: channels of every block; 128 in the dissertation.
        depth: blocks; 3 for images, 4 for spectrograms.
        first_padding: of the first convolution; default 3 for one channel, else 1 (reference code).

    Raises:
        ValueError: the input is too small for the depth.

    Source: section 6.5 "3-layer convolutional networks (ConvNet-3)"; details from the reference code.
    Differs: the head fits every input size (the reference's fits one channel at 28 pixels only).

    Example:
        >>> ConvNet(3, 10, size=(32, 32), width=8)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        size: tuple[int, int],
        width: int = 128,
        depth: int = 3,
        first_padding: int | None = None,
    ) -> None:
        super().__init__()
        first = (3 if channels == 1 else 1) if first_padding is None else first_padding
        sides = [(side + 2 * (first - 1)) // 2**depth for side in size]
        if min(sides) < 1:
            raise ValueError(f"{size[0]} x {size[1]} pixels are too few for depth {depth}; use a smaller depth")
        convolutions = [
            nn.Conv2d(width if block else channels, width, 3, padding=1 if block else first) for block in range(depth)
        ]
        norms = [nn.GroupNorm(width, width) for _ in range(depth)]
        self.layers = nn.ModuleDict({"conv": nn.ModuleList(convolutions), "norm": nn.ModuleList(norms)})
        self.depth = depth
        self.classifier = nn.Linear(width * sides[0] * sides[1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes)."""
        return self.classifier(self.features(images).flatten(1))

    def features(self, images: Tensor, block: int | None = None) -> Tensor:
        """Output (n, width, h, w) of one block, default the last."""
        convolutions, norms = self.layers["conv"], self.layers["norm"]
        for convolution, norm in list(zip(convolutions, norms, strict=True))[: None if block is None else block + 1]:  # type: ignore[call-overload]
            images = _norm_and_pool(convolution(images), norm)
        return images


def _norm_and_pool(images: Tensor, norm: nn.GroupNorm) -> Tensor:
    kinds = {images.dtype, norm.weight.dtype}
    if images.device.type not in WRITTEN_OUT or kinds != {torch.float32} or torch.compiler.is_compiling():
        return F.avg_pool2d(F.relu(norm(images)), 2)
    return pooled_norm(images, norm.weight, norm.bias, norm.eps)


class _Stem(nn.Module):
    def __init__(self, channels: int, width: int, size: int) -> None:
        super().__init__()
        kernel = 3 if size <= 128 else 7
        self.conv1 = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
        self.bn1 = nn.GroupNorm(width, width)
        self.pool = 1 if size <= 64 else 2 if size <= 128 else 4

    def forward(self, images: Tensor) -> Tensor:
        images = F.relu(self.bn1(self.conv1(images)))
        return F.avg_pool2d(images, self.pool) if self.pool > 1 else images


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; strides are average pools."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.bn1 = nn.GroupNorm(width, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.GroupNorm(width, width)
        self.stride = stride
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, width, 1, bias=False), nn.AvgPool2d(stride), nn.GroupNorm(width, width)
            )

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        if self.stride > 1:
            out = F.avg_pool2d(out, self.stride)
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(images))


class ResNetAP(nn.Module):
    """ResNet of basic blocks with instance norm and average pools for strides; ResNetAP-10 by default.

    Args:
        channels: of the input.
        classes: outputs.
        size: longer side of the input in pixels; picks the stem (3x3, 3x3 + pool, 7x7 + pool 4).
        width: factor on the widths 64, 128, 256, 512.
        blocks: basic blocks of the four stages.

    Source: section 6.5 "ResNetAP-10, a modified ResNet-10 by replacing strided convolution as average pooling"; details
        from the reference code.

    Example:
        >>> ResNetAP(3, 10, size=32, width=0.125)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        size: int,
        width: float = 1.0,
        blocks: tuple[int, int, int, int] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        widths = [int(base * width) for base in (64, 128, 256, 512)]
        self.layer0 = _Stem(channels, widths[0], size)
        before = widths[0]
        for stage, (out, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            layers = []
            for index in range(count):
                layers.append(_Block(before, out, 2 if stage > 1 and index == 0 else 1))
                before = out
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / (module.kernel_size[0] ** 2 * module.out_channels)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes)."""
        return self.fc(self.features(images).flatten(1))

    def features(self, images: Tensor, block: int | None = None) -> Tensor:
        """Output of one stage (0 is the first after the stem); default: the last, averaged over its cells."""
        images = self.layer0(images)
        for stage in range(1, 5 if block is None else block + 2):
            images = getattr(self, f"layer{stage}")(images)
        return F.adaptive_avg_pool2d(images, 1) if block is None else images


NetworkFactory = Callable[[int, int, tuple[int, int]], nn.Module]


def factory_of(config: IDCConfig) -> NetworkFactory:
    """The configured network as a function of (channels, classes, (height, width))."""
    if config.network == "resnet_ap":
        return lambda channels, classes, size: ResNetAP(channels, classes, size=max(size), width=config.width)
    return lambda channels, classes, size: ConvNet(
        channels, classes, size=size, width=int(config.width), depth=config.depth
    )


def build(factory: NetworkFactory, shape: tuple[int, int, int], classes: int, generator: torch.Generator) -> nn.Module:
    """A new network whose initial weights depend on `generator` alone.

    Modules initialise themselves from the global stream and take no generator: see `seeding.layers_draw_from`.

    Args:
        factory: makes the network.
        shape: channels, height and width of its input.
        classes: its outputs.
        generator: where the weights come from.
    """
    with layers_draw_from(generator):
        return factory(shape[0], classes, shape[1:])
