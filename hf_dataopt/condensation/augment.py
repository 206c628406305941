"""Differentiable siamese augmentation (DSA) and CutMix, split into what is drawn and what is done with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import check_each, check_generator, check_int, check_kind, check_tensor, check_text, optional
from .devices import sent

COLOUR = ("brightness", "saturation", "contrast")
PICKED = ("crop", "scale", "rotate")
OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")

CROP_SHARE = 0.125
CUTOUT_SHARE = 0.5
SCALE_RATIO = 1.2
ROTATE_DEGREES = 15.0


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one augmentation; each is a scalar tensor (shared by the batch) or has one entry per image.

    Args:
        flip: uniform [0, 1): below 0.5 mirrors.
        brightness, saturation, contrast: uniform [0, 1).
        picked (`str`): which one of crop, scale and rotate is done.
        first, second: its two numbers: row and column shift in pixels, or uniform [0, 1); rotate reads `first` only.
        cutout_row, cutout_column: centre of the hole in pixels.
    """

    flip: Tensor | None = None
    brightness: Tensor | None = None
    saturation: Tensor | None = None
    contrast: Tensor | None = None
    picked: str | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    cutout_row: Tensor | None = None
    cutout_column: Tensor | None = None

    @classmethod
    def joined(cls, draws: Sequence[Draws], counts: Sequence[int]) -> Draws:
        """Numbers of groups of images that share the operation picked: one entry for each of all their images."""
        if len(draws) == 1:
            return draws[0]
        values: dict[str, Any] = dict(vars(draws[0]))
        for name in [name for name, value in values.items() if isinstance(value, Tensor)]:
            own = zip(draws, counts, strict=True)
            values[name] = torch.cat([getattr(one, name).reshape(-1).expand(count) for one, count in own])
        return cls(**values)

    def beside(self, images: Tensor) -> Draws:
        """The numbers on the images' device, in one transfer.

        What all images are shifted by stays on the host, which cuts there.
        """
        shared = ("first", "second") if self.shift is not None else ()
        moved = {name: v for name, v in vars(self).items() if isinstance(v, Tensor) and name not in shared}
        if not moved:
            return self
        n = max(value.numel() for value in moved.values())
        rows = sent(torch.stack([value.reshape(-1).expand(n) for value in moved.values()]), images.device)
        return replace(self, **{k: row.to(v.dtype) for (k, v), row in zip(moved.items(), rows, strict=True)})

    @property
    def shift(self) -> tuple[int, int] | None:
        """Rows and columns that a crop shifts all images by; None: each its own, or no crop."""
        if self.picked != "crop" or self.first is None or self.second is None or self.first.numel() > 1:
            return None
        return int(self.first), int(self.second)


def operations(strategy: str) -> list[str]:
    """The operations named by `"color_crop_cutout"` and the like; `"none"` or an empty string names none.

    Raises:
        ValueError: an unknown operation.
    """
    check_text("strategy", strategy)
    names = [name for name in strategy.split("_") if name and name != "none"]
    unknown = sorted(set(names) - set(OPERATIONS))
    if unknown:
        raise ValueError(f"unknown augmentation {unknown} in {strategy!r}; known: {', '.join(OPERATIONS)}")
    return names


def without(strategy: str, name: str) -> str:
    """The strategy without one operation."""
    return "_".join(one for one in operations(strategy) if one != name) or "none"


def draw(
    strategy: str, size: tuple[int, int], generator: torch.Generator, n: int | None = None, *, pick: int | None = None
) -> Draws:
    """Draw the random numbers of an augmentation.

    Args:
        strategy: operations joined by `_`.
        size: height and width in pixels.
        generator: where the numbers come from (CPU).
        n: one number per image; None: one number for the batch (siamese).
        pick: which of crop, scale and rotate (in the strategy's order) is done; None draws it.

    Returns:
        The draws; operations that the strategy lacks are None.

    Source: section 6.4 "siamese augmentation strategy by DSA"; ranges and the rule "one of crop, scale, rotate" from the
        reference code.
    """
    height, width = check_each("size", size, check_int, 1, least=2)[:2]
    size = (height, width)
    check_generator("generator", generator)
    pick = optional(check_int, "pick", pick, 0)
    names, shape = operations(strategy), (optional(check_int, "n", n, 1) or 1,)
    uniform = {}
    if "flip" in names:
        uniform["flip"] = torch.rand(shape, generator=generator)
    if "color" in names:
        uniform |= {name: torch.rand(shape, generator=generator) for name in COLOUR}
    choices = [name for name in names if name in PICKED]
    picked, first, second = None, None, None
    if choices:
        if pick is None:
            pick = int(torch.randint(len(choices), (), generator=generator))
        pick = check_int("pick", pick, 0, len(choices) - 1)
        picked = choices[pick]
        if picked == "crop":
            reach = [int(side * CROP_SHARE + 0.5) for side in size]
            first, second = (torch.randint(-r, r + 1, shape, generator=generator) for r in reach)
        else:
            first, second = (torch.rand(shape, generator=generator) for _ in range(2))
    rows = columns = None
    if "cutout" in names:
        hole = cutout_size(size)
        rows, columns = (
            torch.randint(0, side + (1 - h % 2), shape, generator=generator) for side, h in zip(size, hole, strict=True)
        )
    return Draws(picked=picked, first=first, second=second, cutout_row=rows, cutout_column=columns, **uniform)


def cutout_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the hole in pixels."""
    return int(size[0] * CUTOUT_SHARE + 0.5), int(size[1] * CUTOUT_SHARE + 0.5)


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Apply drawn augmentations, differentiably: flip, colour, one of crop / scale / rotate, cutout.

    Args:
        images: (n, C, H, W).
        draws: scalars or one entry per image.

    Returns:
        (n, C, H, W).

    Source: `a_omega` of Algorithm 5; order and ranges from the reference code.
    Cost: a few passes over the images.

    Example:
        >>> images = torch.rand(4, 3, 16, 16)
        >>> augment(images, draw("color_crop_cutout", (16, 16), torch.Generator())).shape
        torch.Size([4, 3, 16, 16])
    """
    check_tensor("images", images, ("n", "C", "H", "W"))
    check_kind("draws", draws, Draws, "give what draw returned")
    draws = draws.beside(images)
    if draws.flip is not None:
        images = torch.where(_column(draws.flip, images) < 0.5, images.flip(3), images)
    if draws.brightness is not None:
        images = _colour(images, draws)
    if draws.picked is not None:
        images = _PICKED[draws.picked](images, draws)
    if draws.cutout_row is not None:
        images = _cutout(images, draws)
    return images


def augment_groups(images: Tensor, draws: Sequence[Draws], counts: Sequence[int]) -> Tensor:
    """`augment` of groups of images, `counts[i]` with `draws[i]`, together where they share the operation picked."""
    kinds: dict[str | None, list[int]] = {}
    for index, one in enumerate(draws):
        kinds.setdefault(one.picked, []).append(index)
    if len(kinds) == 1:
        return augment(images, Draws.joined(draws, counts))
    parts = list(images.split(list(counts)))
    for members in kinds.values():
        sizes = [counts[index] for index in members]
        together = Draws.joined([draws[index] for index in members], sizes)
        found = augment(torch.cat([parts[index] for index in members]), together).split(sizes)
        for index, part in zip(members, found, strict=True):
            parts[index] = part
    return torch.cat(parts)


def _column(value: Tensor | None, images: Tensor) -> Tensor:
    """A draw as (1 or n, 1, 1, 1) beside the images."""
    if value is None:
        raise ValueError("a number of this augmentation was not drawn; use `draw` with the same strategy")
    value = value.reshape(-1, 1, 1, 1).to(images.device)
    return value.to(images.dtype) if value.is_floating_point() else value


def _colour(images: Tensor, draws: Draws) -> Tensor:
    images = images + (_column(draws.brightness, images) - 0.5)
    if images.shape[1] > 1:  # one channel is its own grey
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (_column(draws.saturation, images) * 2) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (_column(draws.contrast, images) + 0.5) + mean


def _crop(images: Tensor, draws: Draws) -> Tensor:
    """Shift by whole pixels, zeros come in."""
    n, _, height, width = images.shape
    if draws.shift is not None:
        reach = [int(side * CROP_SHARE + 0.5) for side in (height, width)]
        padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
        top, left = reach[0] + draws.shift[0], reach[1] + draws.shift[1]
        return padded[:, :, top : top + height, left : left + width]
    down, right = (_column(value, images).reshape(-1, 1) for value in (draws.first, draws.second))
    rows = torch.arange(height, device=images.device) + down
    columns = torch.arange(width, device=images.device) + right
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    flat = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    index = flat.reshape(n, 1, -1).expand(-1, images.shape[1], -1)
    moved = images.flatten(2).gather(2, index).reshape_as(images)
    return moved * inside.to(images.dtype)


def _cutout(images: Tensor, draws: Draws) -> Tensor:
    height, width = images.shape[2:]
    hole = cutout_size((height, width))
    masks = []
    for side, length, centre in (
        (height, hole[0], draws.cutout_row),
        (width, hole[1], draws.cutout_column),
    ):
        start = _column(centre, images).reshape(-1, 1) - length // 2
        # clamped ends keep one row or column even where the hole lies outside
        first, last = start.clamp(0, side - 1), (start + length - 1).clamp(0, side - 1)
        place = torch.arange(side, device=images.device)
        masks.append((place >= first) & (place <= last))
    inside = masks[0][:, None, :, None] & masks[1][:, None, None, :]
    return images * (~inside).to(images.dtype)


def _warp(images: Tensor, matrix: list[list[Tensor]]) -> Tensor:
    theta = torch.stack([torch.stack(row, dim=-1) for row in matrix], dim=-2)
    theta = theta.to(images).expand(len(images), -1, -1)
    places = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, align_corners=False)


def _scale(images: Tensor, draws: Draws) -> Tensor:
    low = 1 / SCALE_RATIO
    across, along = (
        _column(value, images).flatten() * (SCALE_RATIO - low) + low for value in (draws.first, draws.second)
    )
    zero = torch.zeros_like(across)
    return _warp(images, [[across, zero, zero], [zero, along, zero]])


def _rotate(images: Tensor, draws: Draws) -> Tensor:
    angle = (_column(draws.first, images).flatten() - 0.5) * 2 * ROTATE_DEGREES / 180 * math.pi
    zero = torch.zeros_like(angle)
    return _warp(images, [[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]])


_PICKED: dict[str, Callable[[Tensor, Draws], Tensor]] = {"crop": _crop, "scale": _scale, "rotate": _rotate}


def cutmix(images: Tensor, partner: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, float]:
    """Paste a box of each image's partner.

    Args:
        images: (n, C, H, W).
        partner: (n,) index of the image to paste from.
        box: first row, end row, first column, end column; an empty box pastes nothing.

    Returns:
        The mixed images and the share of the image's own label.

    Source: `h` of Algorithm 5; "CutMix" of the reference code, ratio corrected by the area.
    """
    top, bottom, left, right = box
    height, width = images.shape[2:]
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def draw_cutmix(n: int, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Partners (n,) and box for `cutmix`: the pasted area is uniform (Beta(1, 1)), its centre too, the edge cuts it off."""
    share = math.sqrt(float(torch.rand((), generator=generator, dtype=torch.float64)))
    partner = torch.randperm(n, generator=generator)
    box = []
    for side in size:
        length, centre = int(side * share), int(torch.randint(side, (), generator=generator))
        box += [max(centre - length // 2, 0), min(centre + length // 2, side)]
    return partner, (box[0], box[1], box[2], box[3])
