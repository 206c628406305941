"""What the authors show of a photo while they score on ImageNet: a resized crop, a flip, jittered colours and light."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import check_generator, check_tensor

PHOTO = "photo"  # its name among the augmentations
AREA, ASPECT, TRIES = (0.5, 1.0), (3 / 4, 4 / 3), 10
JITTER, LIGHT = 0.4, 0.1
_GREY = (0.299, 0.587, 0.114)
# principal components of ImageNet's colours (Krizhevsky et al. 2012): deviations, and directions in columns
_DEVIATIONS = (0.2175, 0.0188, 0.0045)
_DIRECTIONS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def photo_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop, flip, jitter and light every image by numbers of its own.

    Args:
        images: (n, C, H, W) stored values, colours in [0, 1], not normalised.
        generator: where the numbers come from (CPU).

    Returns:
        (n, C, H, W); values may leave [0, 1], as in the reference code.

    Source: scoring on ImageNet in the reference code; the crop is that of torchvision's RandomResizedCrop.
    Differs: images of another number of channels than 3 get no light, and their grey is their mean.
    Cost: some twenty small operations an image.

    Example:
        >>> photo_augment(torch.rand(4, 3, 32, 32), torch.Generator()).shape
        torch.Size([4, 3, 32, 32])
    """
    check_tensor("images", images, ("n", "C", "H", "W"))
    check_generator("generator", generator)
    return torch.cat([_one(image[None], generator) for image in images])


def _one(image: Tensor, generator: torch.Generator) -> Tensor:
    height, width = image.shape[2:]
    top, left, high, wide = crop_box((height, width), generator)
    part = image[:, :, top : top + high, left : left + wide]
    image = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)
    if float(torch.rand((), generator=generator)) < 0.5:
        image = image.flip(3)
    shares = ((torch.rand(3, generator=generator) * 2 - 1) * JITTER).tolist()
    for which in torch.randperm(3, generator=generator).tolist():
        image = image.lerp(_towards(image, which), shares[which])
    if image.shape[1] == 3:
        drawn = torch.randn(3, generator=generator) * LIGHT * torch.tensor(_DEVIATIONS)
        image = image + (torch.tensor(_DIRECTIONS) @ drawn).to(image).reshape(1, 3, 1, 1)
    return image


def _towards(image: Tensor, which: int) -> Tensor:
    """What an image is drawn to (or away from): black for brightness, its mean grey for contrast, its greys for saturation."""
    if which == 0:
        return torch.zeros_like(image)
    weights = image.new_tensor(_GREY) if image.shape[1] == 3 else image.new_full((image.shape[1],), 1 / image.shape[1])
    grey = (image * weights.reshape(1, -1, 1, 1)).sum(1, keepdim=True).expand_as(image)
    return grey.mean().expand_as(image) if which == 1 else grey


def crop_box(size: tuple[int, int], generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part of an image, in pixels.

    Where ten draws do not fit: all of it, or its middle if it is longer than 4 : 3.
    """
    height, width = size
    for _ in range(TRIES):
        share, shape, down, right = torch.rand(4, generator=generator).tolist()
        area = height * width * (AREA[0] + share * (AREA[1] - AREA[0]))
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** shape  # uniform in its logarithm
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return int(down * (height - high + 1)), int(right * (width - wide + 1)), high, wide
    high, wide = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
    return (height - high) // 2, (width - wide) // 2, high, wide
