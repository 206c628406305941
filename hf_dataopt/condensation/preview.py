"""A PNG grid of condensed images: one row per class, several classes side by side where each has few images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST = 10  # of a class
_MOST_ROWS, _MOST_COLUMNS = 64, 16
_MOST_SIDE = 4096  # pixels of the sheet, either way


def preview(images: Tensor, per_class: int) -> Any:
    """A PIL image with the first elements of each class, 2 pixels apart, classes in reading order.

    At most 64 rows of images are drawn, the first classes, and made smaller where the sheet would pass 4,096 pixels a side.

    Args:
        images: (classes, images_per_class, C, H, W) or (n, C, H, W) class by class, stored values.
        per_class: elements of a class.

    Returns:
        The picture; values outside [0, 1] (spectrograms) are stretched to the grid's own range.
    """
    from PIL import Image

    if images.ndim == 4:
        images = images.unflatten(0, (-1, per_class))
    images = images[:, :_MOST].detach().float().cpu()
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        images = (images - low) / max(high - low, 1e-12)
    if images.shape[2] not in (1, 3):
        images = images.mean(2, keepdim=True)
    classes, count, channels, height, width = images.shape
    beside = max(1, min(math.isqrt(classes // count), _MOST_COLUMNS // count))  # classes in a row of the sheet
    images = images[: beside * _MOST_ROWS]
    rows, columns = -(-len(images) // beside), beside * count
    share = min(1.0, (_MOST_SIDE / rows - 2) / height, (_MOST_SIDE / columns - 2) / width)
    if share < 1:
        height, width = max(1, int(height * share)), max(1, int(width * share))
        flat = F.interpolate(images.flatten(0, 1), (height, width), mode="bilinear", antialias=True)
        images = flat.unflatten(0, (-1, count))
    sheet = torch.ones(channels, rows * (height + 2) - 2, columns * (width + 2) - 2)
    for place, image in enumerate(images.flatten(0, 1)):
        label, element = divmod(place, count)
        top, left = label // beside * (height + 2), (label % beside * count + element) * (width + 2)
        sheet[:, top : top + height, left : left + width] = image
    pixels = (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    zoom = max(1, 512 // max(picture.size))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def save_preview(images: Tensor, path: Path, per_class: int) -> Path:
    """Write `preview` as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    preview(images, per_class).save(path)
    return path
