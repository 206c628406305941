"""The two networks of the mixup benchmarks: ResNet-8, and the PreActResNet18 of both papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_dataopt.mixup.loss import soft_targets


def resnet8(width: int, seed: int) -> nn.Module:
    """HF ResNet with a 3 x 3 stem of stride 1 and three stages of one basic block."""
    torch.manual_seed(seed)
    sizes = [width, 2 * width, 4 * width]
    config = ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[1, 1, 1], layer_type="basic")
    config.num_labels = 10
    model = ResNetForImageClassification(config)
    stem = model.resnet.embedder
    stem.embedder.convolution = nn.Conv2d(3, width, 3, padding=1, bias=False)
    stem.pooler = nn.Identity()
    return model.to(memory_format=torch.channels_last)  # a third faster on a CPU


class PreActBlock(nn.Module):
    """Two 3 x 3 convolutions, each after its normalisation, and a way around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
        self.one = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        changed = stride > 1 or inner != outer
        self.around = nn.Conv2d(inner, outer, 1, stride, bias=False) if changed else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, H, W) to (B, outer, H / stride, W / stride)."""
        ready = self.first(x).relu()
        beside = x if self.around is None else self.around(ready)
        return self.two(self.second(self.one(ready)).relu()) + beside


class PreActResNet18(nn.Module):
    """The network of both papers' CIFAR tables (theirs is 64 wide), with the calls of a Hugging Face classifier.

    `loss` takes logits and soft targets.
    """

    main_input_name = "pixel_values"

    def __init__(self, width: int, classes: int, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_labels, self.loss = classes, loss
        sizes = [width, *(width * 2**i for i in range(4) for _ in range(2))]
        blocks = [PreActBlock(sizes[i], sizes[i + 1], 2 if i in (2, 4, 6) else 1) for i in range(8)]
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), *blocks)
        self.last, self.head = nn.BatchNorm2d(sizes[-1]), nn.Linear(sizes[-1], classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and the loss where labels are given."""
        logits = self.head(self.last(self.body(pixel_values)).relu().mean((2, 3)))
        if labels is None:
            return {"logits": logits}
        return {"loss": self.loss(logits, soft_targets(labels, self.num_labels)), "logits": logits}
