"""A PNG grid of condensed images: one row per class, several classes side by side where each has few images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST = 10  # of a class
_MOST_ROWS, _MOST_COLUMNS = 64, 16
_MOST_SIDE = 4096  # pixels of the sheet, either way, without the names
_BAND, _LETTERS, _APART = 16, 12, 4  # pixels of the band above a row of images, of the names in it, and between these


def preview(images: Tensor, per_class: int, names: Sequence[str] | None = None) -> Any:
    """A PIL image with the first elements of each class, 2 pixels apart, classes in reading order.

    At most 64 rows of images are drawn, the first classes, and made smaller where the sheet would pass 4,096 pixels a side.

    Args:
        images: (classes, images_per_class, C, H, W) or (n, C, H, W) class by class, stored values.
        per_class: elements of a class.
        names: of the classes, written above their images and cut to their width; None: nothing is.

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
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    if names is None:
        return picture
    return _named(picture, list(names)[: len(images)], beside, (height + 2) * zoom, count * (width + 2) * zoom)


def _named(picture: Any, names: list[str], beside: int, tall: int, wide: int) -> Any:
    """The picture with a band above each row of images, and in it the names of its classes, which are `wide` pixels each."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_LETTERS)
    rows = -(-len(names) // beside)
    sheet = Image.new(picture.mode, (picture.width, picture.height + rows * _BAND), "white")
    pen = ImageDraw.Draw(sheet)
    for row in range(rows):
        top = row * (tall + _BAND)
        sheet.paste(
            picture.crop((0, row * tall, picture.width, min((row + 1) * tall, picture.height))), (0, top + _BAND)
        )
        for place, name in enumerate(names[row * beside : (row + 1) * beside]):
            room = min(wide - _APART, picture.width - place * wide)
            pen.text((place * wide, top + 1), _cut(name, room, font), fill="black", font=font)
    return sheet


def _cut(name: str, room: int, font: Any) -> str:
    """A name in one line, without the letters that have no room."""
    name = " ".join(name.split())
    if font.getlength(name) <= room:
        return name
    kept = len(name)
    while kept and font.getlength(name[:kept] + "\u2026") > room:
        kept -= 1
    return name[:kept] + "\u2026" if kept else ""


def save_preview(images: Tensor, path: Path, per_class: int, names: Sequence[str] | None = None) -> Path:
    """Write `preview` as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    preview(images, per_class, names).save(path)
    return path
