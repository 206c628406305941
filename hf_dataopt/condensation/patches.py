"""Patches that a trained network is surest of, laid into mosaics (RDED)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .formation import Formation
from .teacher import Teacher

if TYPE_CHECKING:
    from .columns import LabelledImages

_CANDIDATES = 300  # images of a class that are looked at, as in RDED's code
_SHARES = (0.08, 1.0)  # of an image's area (of its length along time), torchvision's RandomResizedCrop


def choose_patches(
    data: LabelledImages,
    label: int,
    count: int,
    formation: Formation,
    teacher: Teacher,
    *,
    crops: int,
    generator: torch.Generator,
) -> Tensor:
    """The crops of a class's images that a teacher gives the smallest loss, at most one of an image while they last.

    Args:
        data: training images.
        label: the class.
        count: crops to choose.
        formation: a crop is brought to the size of its cells, and judged as a cell is formed.
        teacher: judges.
        crops: of every image.
        generator: draws images and crops.

    Returns:
        (count, C, h, w) of the formation's cell size, best first; they repeat where a class has not as many.

    Source: Sun, Shi, Yu and Lin 2024 (RDED), section 3 "information extraction"; constants of its code.
    Differs: a second crop of an image is taken only where a class has too few images.
    Cost: 300 images times `crops` forward passes of the teacher a class.
    """
    rows = data.rows_of_class[label]
    rows = rows[torch.randperm(len(rows), generator=generator)[: max(count, _CANDIDATES)]]
    height, width = data.size
    high = height if formation.axis == "time" else -(-height // formation.factor)
    cell = (high, -(-width // formation.factor))
    found, losses = [], []
    for part in rows.split(128):
        images = data.pixels(part)
        cut = torch.cat([_crop(image[None], cell, formation, generator) for image in images for _ in range(crops)])
        shown = F.interpolate(cut, size=(height, width), mode="bilinear", align_corners=False)
        target = torch.full((len(cut),), label)
        found.append(cut)
        losses.append(F.cross_entropy(teacher.logits(shown, data), target, reduction="none"))
    patches, loss = torch.cat(found), torch.cat(losses).reshape(-1, crops)
    # rank of a crop among those of its image, then its loss: the best crop of every image comes before second ones
    order = loss.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    ranked = sorted(range(loss.numel()), key=lambda k: (int(order.flatten()[k]), float(loss.flatten()[k])))
    return patches[torch.tensor(ranked).repeat(-(-count // len(ranked)))[:count]]


def _crop(image: Tensor, size: tuple[int, int], formation: Formation, generator: torch.Generator) -> Tensor:
    """A random square part of an image (1, C, H, W), or part of its time, at `size`."""
    height, width = image.shape[2:]
    share, down, right = torch.rand(3, generator=generator).tolist()
    share = _SHARES[0] + share * (_SHARES[1] - _SHARES[0])
    if formation.axis == "time":
        high, wide = height, max(1, round(width * share))
    else:
        side = (share * height * width) ** 0.5
        high, wide = max(1, min(height, round(side))), max(1, min(width, round(side)))
    top, left = int(down * (height - high + 1)), int(right * (width - wide + 1))
    part = image[:, :, top : top + high, left : left + wide]
    return F.interpolate(part, size=size, mode="bilinear", align_corners=False, antialias=True)
