"""Images for the mixup benchmarks: CIFAR-10's, class-balanced, normalised, and with saliency maps kept beside them."""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from data import cifar10
from torch import nn
from transformers import TrainerCallback

from hf_dataopt import seeding
from hf_dataopt.saliency import input_saliency

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Rows(torch.utils.data.Dataset):
    """Normalised images and integer labels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, side: int, scale: Any = (MEAN, STD)) -> None:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        images = nn.functional.interpolate(images, size=(side, side), mode="area")
        mean, std = (torch.tensor(value)[:, None, None] for value in scale)
        self.images = (images - mean) / std
        self.labels = torch.from_numpy(labels)

    def first(self, rows: int) -> Rows:
        """The first rows."""
        few = copy(self)
        few.images, few.labels = self.images[:rows], self.labels[:rows]
        return few

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.images[row], "labels": int(self.labels[row])}


@cache
def rows(images: int, side: int) -> Rows:
    """A class-balanced training set out of rows 0 to 9,999 (and, for more than those hold, 20,000 to 20,999)."""
    pixels, labels = cifar10(0, 10_000)
    if images > 9_000:
        more, their = cifar10(20_000, 21_000)
        pixels, labels = np.concatenate([pixels, more]), np.concatenate([labels, their])
    keep = np.concatenate([np.flatnonzero(labels == k)[: images // 10] for k in range(10)])
    return Rows(pixels[keep], labels[keep], side)


@cache
def unseen(start: int, stop: int, side: int) -> Rows:
    """Rows for choosing and testing."""
    return Rows(*cifar10(start, stop), side)


class MappedRows(Rows):
    """Training rows with a saliency map each, `"saliency"`; half of the images are mirrored, each with its map."""

    def __init__(self, data: Rows, seed: int) -> None:
        self.images, self.labels = data.images, data.labels
        self.maps = torch.ones(len(data), *data.images.shape[2:])
        self.draws = seeding.generator(seed, epoch=7)

    def __getitem__(self, row: int) -> dict[str, Any]:
        found = {**super().__getitem__(row), "saliency": self.maps[row]}
        if float(torch.rand((), generator=self.draws)) < 0.5:
            found |= {name: found[name].flip(-1) for name in ("pixel_values", "saliency")}
        return {**found, "saliency": found["saliency"].numpy()}


class Refresh(TrainerCallback):
    """Takes the maps of all rows anew at the beginning of every `every`-th epoch: 1 / `every` of the saliency passes."""

    def __init__(self, data: MappedRows, every: int) -> None:
        self.data, self.every = data, every

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Under the weights of now."""
        if round(state.epoch or 0) % self.every:
            return
        model, device = kwargs["model"], next(kwargs["model"].parameters()).device
        parts = zip(self.data.images.split(500), self.data.labels.split(500), strict=True)
        maps = [input_saliency(model, {"pixel_values": x.to(device)}, y.to(device)).cpu() for x, y in parts]
        self.data.maps = torch.cat(maps)
