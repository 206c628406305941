"""Multi-formation (section 6.3.2): the deterministic function that forms factor^2 training images out of a stored one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import LARGEST, check_int, check_kind, check_tensor, settle

Kind = Literal["single", "multi", "bound"]
Axis = Literal["image", "time"]


@dataclass(frozen=True, kw_only=True)
class Formation:
    """How stored elements are cut and resized: the deterministic function `f` of section 6.3.2.

    Args:
        factor (`int`, >= 1, default 2): cells along one axis; an image becomes `factor^2` images, a spectrogram `factor`.
            1 is IDC-I: nothing is cut.
        kind (`str`, default `"single"`): `"multi"` forms every factor 1 .. `factor`; `"bound"` forms `factor` for as many
            elements of a class as stay within `bound` formed ones, smaller factors for the rest.
        axis (`str`, default `"image"`): `"image"` cuts height and width, `"time"` the last axis only.
        pad_value (`float`, default 0.5): fills the right and bottom edge where a size is not a multiple of the factor
            (0.5 for images in [0, 1], 0 for spectrograms).
        bound (`int`, >= 1, default 128): most formed elements of a class of `"bound"`.

    Raises:
        ValueError: a field is out of its range.

    Source: section 6.3.2, Figure 6.3; padding, `"multi"` and `"bound"` from the reference code.

    Example:
        >>> Formation(factor=3).count(2)
        18
    """

    factor: int = 2
    kind: Kind = "single"
    axis: Axis = "image"
    pad_value: float = 0.5
    bound: int = 128

    def __post_init__(self) -> None:
        settle(
            self,
            choices={"kind": ("single", "multi", "bound"), "axis": ("image", "time")},
            numbers={"pad_value": (-LARGEST, LARGEST)},
            counts={"factor": 1, "bound": 1},
        )

    def cells(self, factor: int) -> int:
        """Formed elements of one stored element at `factor`."""
        factor = check_int("factor", factor, 1)
        return factor if self.axis == "time" else factor**2

    def count(self, n: int) -> int:
        """Formed elements of `n` stored ones."""
        return sum(self.cells(factor) * (stop - start) for factor, start, stop in self.plan(n))

    def plan(self, n: int) -> list[tuple[int, int, int]]:
        """(factor, first element, end) of each group, in the order of the output."""
        n = check_int("n", n, 0)
        if self.kind == "single":
            return [(self.factor, 0, n)]
        if self.kind == "multi":
            return [(factor, 0, n) for factor in range(1, self.factor + 1)]
        groups, start, formed = [], 0, 0
        for factor in range(self.factor, 0, -1):
            left = n - start
            room = self.bound - formed - left
            take = left if factor == 1 else max(0, min(room // self.cells(factor), left))
            if take:
                groups.append((factor, start, start + take))
                start, formed = start + take, formed + take * self.cells(factor)
        return groups

    def ways(self, n: int) -> list[Way]:
        """How each of a class's `n` stored elements is formed."""
        found: list[list[int]] = [[] for _ in range(n)]
        for factor, start, stop in self.plan(n):
            for row in range(start, stop):
                found[row].append(factor)
        return [(self, tuple(factors)) for factors in found]


# how one stored element is formed: by which formation, and into which factors
Way = tuple[Formation, tuple[int, ...]]


def form(images: Tensor, formation: Formation) -> Tensor:
    """Cut every element into cells and upsample each to the stored size, differentiably.

    Args:
        images: (n, C, H, W), any float dtype; `"bound"` counts elements of one class, so give one class at a time.
        formation: what to do.

    Returns:
        (`formation.count(n)`, C, H, W), cell-major: all n elements of cell (0, 0), then of (0, 1), ...

    Raises:
        ValueError: not of rank 4, or a side is shorter than the factor.

    Source: section 6.3.2, `f(S)`.
    Cost: one bilinear resize of the output.

    Example:
        >>> form(torch.rand(2, 3, 8, 8), Formation(factor=2)).shape
        torch.Size([8, 3, 8, 8])
    """
    check_tensor("images", images, ("n", "C", "H", "W"))
    check_kind("formation", formation, Formation)
    return form_groups(images[None], formation)[0]


def form_groups(images: Tensor, formation: Formation) -> Tensor:
    """`form` of groups of as many elements each, e.g. classes: (groups, n, C, H, W) to (groups, formed, C, H, W)."""
    parts = []
    for factor, start, stop in formation.plan(images.shape[1]):
        formed = _form(images[:, start:stop].flatten(0, 1), factor, formation)
        parts.append(formed.unflatten(0, (-1, len(images), stop - start)).transpose(0, 1).flatten(1, 2))
    return torch.cat(parts, dim=1)


def form_labels(labels: Tensor, formation: Formation) -> Tensor:
    """Labels (n,) repeated in the order of `form`'s output."""
    check_tensor("labels", labels, ("n",), floating=False)
    plan = check_kind("formation", formation, Formation).plan(len(labels))
    return torch.cat([labels[start:stop].repeat(formation.cells(factor)) for factor, start, stop in plan])


def cells(
    height: int, width: int, factor: int, axis: Axis = "image", *, even: bool = False
) -> list[tuple[slice, slice]]:
    """Rows and columns of each cell, in the order of `form`.

    Args:
        height, width: of a stored element.
        factor, axis: of the formation.
        even: the cells of the reference code's initialisation, as even as can be; its decoder, like `form`, cuts at
            multiples of the rounded-up side, so that its last cells may reach past the edge (padding).
    """

    def cuts(side: int, parts: int) -> list[slice]:
        longer = side % parts if even and side % parts else parts  # how many cells have the rounded-up side
        short, long = side // parts, -(-side // parts)
        ends = [min(part, longer) * long + max(part - longer, 0) * short for part in range(parts + 1)]
        return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]

    return [(r, c) for r in cuts(height, 1 if axis == "time" else factor) for c in cuts(width, factor)]


def form_rows(images: Tensor, ways: Sequence[Way]) -> tuple[Tensor, list[int], list[int]]:
    """Form elements each in its own way, as the rows of a condensed set say it.

    Args:
        images: (n, C, H, W).
        ways: of every element, see `Formation.ways`.

    Returns:
        The formed elements in the order of `form`, and of each the element and the cell (counted over the element's
        factors) that it comes from.
    """
    groups: dict[tuple[Formation, int, int], list[int]] = {}
    for row, (formation, factors) in enumerate(ways):
        before = 0
        for factor in factors:
            groups.setdefault((formation, factor, before), []).append(row)
            before += formation.cells(factor)
    parts, rows, places = [], [], []
    for (formation, factor, before), members in groups.items():
        parts.append(_form(images[members], factor, formation))
        for cell in range(formation.cells(factor)):
            rows += members
            places += [before + cell] * len(members)
    return torch.cat(parts), rows, places


def _form(images: Tensor, factor: int, formation: Formation) -> Tensor:
    if factor == 1:
        return images
    n, channels, height, width = images.shape
    rows = 1 if formation.axis == "time" else factor
    if height < rows or width < factor:
        raise ValueError(f"cannot cut {height} x {width} into {factor} cells a side; use a smaller factor")
    padding = (0, -width % factor, 0, -height % rows)
    if any(padding):
        images = F.pad(images, padding, value=formation.pad_value)
    cell_height, cell_width = images.shape[2] // rows, images.shape[3] // factor
    cells = images.reshape(n, channels, rows, cell_height, factor, cell_width).permute(2, 4, 0, 1, 3, 5)
    return F.interpolate(
        cells.reshape(-1, channels, cell_height, cell_width), size=(height, width), mode="bilinear", align_corners=False
    )
