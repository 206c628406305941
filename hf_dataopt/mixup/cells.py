"""Cutting an image of any size into a grid of cells: bounds, means, border strips, copies of cells."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One side of an image cut into `count` runs of pixels whose lengths differ by at most one.

    Args:
        pixels: length of the side, >= 1.
        count: runs, 1 to `pixels`.
    """

    pixels: int
    count: int

    @property
    def edges(self) -> list[int]:
        """First pixel of every run, and the end."""
        return [(i * self.pixels + self.count // 2) // self.count for i in range(self.count + 1)]

    @property
    def uniform(self) -> bool:
        """Every run has the same length."""
        return self.pixels % self.count == 0

    def run_of_pixel(self) -> Tensor:
        """(pixels,) int64: which run each pixel lies in."""
        edges = self.edges
        lengths = torch.tensor([b - a for a, b in zip(edges, edges[1:], strict=False)])
        return torch.repeat_interleave(torch.arange(self.count), lengths)

    def finer(self, block: int | None) -> Axis:
        """Every run cut into equal parts of about `block` pixels, where runs are longer than that."""
        parts = 1 if block is None else round(self.pixels / self.count / block)
        return Axis(self.pixels, self.count * max(1, min(parts, self.pixels // self.count)))


@lru_cache(maxsize=64)
def _means(axis: Axis) -> Tensor:
    """(count, pixels) float32: row i averages run i."""
    member = torch.zeros(axis.count, axis.pixels)
    for i, (a, b) in enumerate(zip(axis.edges, axis.edges[1:], strict=False)):
        member[i, a:b] = 1.0 / (b - a)
    return member


def cell_means(maps: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Mean of (..., H, W) over every cell: (..., rows.count, columns.count)."""
    if rows.uniform and columns.uniform:
        shape = (rows.count, rows.pixels // rows.count, columns.count, columns.pixels // columns.count)
        return maps.unflatten(-2, shape[:2]).unflatten(-1, shape[2:]).mean((-3, -1))
    across = maps @ _means(columns).to(maps.device, maps.dtype).T
    return _means(rows).to(maps.device, maps.dtype) @ across


def upsample(maps: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """(..., h, w) cell values to (..., H, W) pixels, each pixel its cell's value."""
    down, across = rows.run_of_pixel().to(maps.device), columns.run_of_pixel().to(maps.device)
    return maps.index_select(-1, across).index_select(-2, down)


def border_strips(images: Tensor, along: Axis, cut: Axis, depth: int) -> tuple[Tensor, Tensor, int]:
    """Means of the pixels on both sides of every border between cells stacked along the second-to-last axis.

    Args:
        images: (B, C, H, W); H is cut by `cut`, W by `along`.
        along: cells along a border.
        cut: cells on the two sides of borders.
        depth: pixels, depth and length of a strip.

    Returns:
        Two (B, C, cut.count - 1, along.count * strips) tensors, before and after each border, and `strips` per cell.
    """
    inner = torch.tensor(cut.edges[1:-1])
    depth = max(1, min(depth, cut.pixels // cut.count))
    strips = max(1, along.pixels // along.count // depth)
    sides = []
    for first in (inner - depth, inner):
        lines = images.index_select(-2, first.to(images.device)).float()
        for step in range(1, depth):
            lines = lines + images.index_select(-2, (first + step).to(images.device))
        sides.append(_strip_means(lines / depth, Axis(along.pixels, along.count * strips)))
    return sides[0], sides[1], strips


def _strip_means(lines: Tensor, axis: Axis) -> Tensor:
    if not axis.uniform:
        return lines @ _means(axis).to(lines.device).T
    length = axis.pixels // axis.count
    if length > 8:
        return lines.unflatten(-1, (axis.count, length)).mean(-1)
    total = lines[..., ::length]  # reductions over a few neighbours are slow in torch, sums of slices are not
    for step in range(1, length):
        total = total + lines[..., step::length]
    return total / length


def cell_pixels(cells: Tensor, of: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Flat pixel numbers of `cells`, laid out like the pixels of the cells `of` (for cells of unequal size, clamped).

    Args:
        cells: (M,) int64 cells to read.
        of: (M,) int64 cells to write; the same for the pixels of the written cells themselves.
        rows: vertical cuts.
        columns: horizontal cuts.

    Returns:
        (M, largest height * largest width) int64.
    """
    parts = []
    for axis, here, there in (
        (rows, cells // columns.count, of // columns.count),
        (columns, cells % columns.count, of % columns.count),
    ):
        edges = torch.tensor(axis.edges, device=cells.device)
        start, size = edges[:-1], edges.diff()
        step = torch.arange(int(size.max()), device=cells.device)
        step = torch.minimum(step, size[there][:, None] - 1)
        parts.append(start[here][:, None] + torch.minimum(step, size[here][:, None] - 1))
    return (parts[0][:, :, None] * columns.pixels + parts[1][:, None, :]).flatten(1)
