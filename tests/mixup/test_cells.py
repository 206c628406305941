"""Cells of any size, pixel by pixel."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_dataopt.mixup.cells import Axis, border_strips, cell_means, cell_pixels, upsample

AXES = [Axis(10, 4), Axis(9, 3), Axis(7, 7), Axis(5, 1), Axis(24, 2), Axis(23, 2)]


def runs(axis: Axis) -> list[range]:
    """Pixels of each run: pixel p is in run r if the rounded multiples of pixels / count say so."""
    bounds = [(2 * i * axis.pixels + axis.count) // (2 * axis.count) for i in range(axis.count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("axis", AXES)
def test_runs_cover_the_side(axis: Axis) -> None:
    if axis.count % 2 == 0:  # edges are rounded halves, which for odd counts round the other way
        assert axis.edges == [run.start for run in runs(axis)] + [axis.pixels]
    lengths = [b - a for a, b in itertools.pairwise(axis.edges)]
    assert axis.edges[0] == 0 and axis.edges[-1] == axis.pixels and len(lengths) == axis.count
    assert max(lengths) - min(lengths) == (0 if axis.uniform else 1)
    assert axis.run_of_pixel().tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]


def test_edges_and_finer_cuts_in_numbers() -> None:
    assert Axis(10, 4).edges == [0, 3, 5, 8, 10] and Axis(10, 3).edges == [0, 3, 7, 10]
    assert Axis(32, 4).finer(4) == Axis(32, 8) and Axis(32, 4).finer(None) == Axis(32, 4)
    assert Axis(32, 4).finer(8) == Axis(32, 4) and Axis(32, 4).finer(100) == Axis(32, 4)
    assert Axis(10, 4).finer(1) == Axis(10, 8), "runs of 2 pixels have no thirds"
    assert Axis(7, 4).finer(1) == Axis(7, 4), "a run of 1 pixel has no halves, though runs have 1.75 pixels on the mean"
    assert Axis(12, 2).finer(5) == Axis(12, 2) and Axis(14, 2).finer(4) == Axis(14, 4)


@pytest.mark.parametrize(
    ("rows", "columns"), [(AXES[0], AXES[1]), (AXES[1], AXES[2]), (AXES[4], AXES[5]), (AXES[3], AXES[0])]
)
def test_means_and_copies(rows: Axis, columns: Axis) -> None:
    maps = torch.rand(2, 3, rows.pixels, columns.pixels, generator=torch.Generator().manual_seed(0))
    means = cell_means(maps, rows, columns)
    large = upsample(means, rows, columns)
    assert means.shape == (2, 3, rows.count, columns.count)
    for i, (top, bottom) in enumerate(itertools.pairwise(rows.edges)):
        for j, (left, right) in enumerate(itertools.pairwise(columns.edges)):
            torch.testing.assert_close(means[..., i, j], maps[..., top:bottom, left:right].mean((-2, -1)))
            cell = means[..., i : i + 1, j : j + 1]
            assert torch.equal(large[..., top:bottom, left:right], cell.expand(-1, -1, bottom - top, right - left))


@pytest.mark.parametrize(
    ("cut", "along", "depth", "strips"),
    [
        (Axis(14, 4), Axis(9, 2), 3, 1),
        (Axis(12, 3), Axis(16, 2), 2, 4),
        (Axis(12, 3), Axis(18, 3), 1, 6),
        (Axis(12, 3), Axis(40, 2), 2, 10),
        (Axis(24, 2), Axis(24, 2), 12, 1),
        (Axis(24, 2), Axis(40, 4), 99, 1),
        (Axis(30, 2), Axis(36, 2), 9, 2),
        (Axis(30, 2), Axis(16, 2), 8, 1),
        (Axis(6, 2), Axis(6, 2), 0, 3),
    ],
)
def test_border_strips_pixel_by_pixel(cut: Axis, along: Axis, depth: int, strips: int) -> None:
    images = torch.rand(2, 3, cut.pixels, along.pixels, generator=torch.Generator().manual_seed(1))
    before, after, found = border_strips(images, along, cut, depth)
    deep = max(1, min(depth, cut.pixels // cut.count))
    assert found == strips
    parts = Axis(along.pixels, along.count * strips).edges
    assert before.shape == after.shape == (2, 3, cut.count - 1, along.count * strips)
    for i, border in enumerate(cut.edges[1:-1]):
        for k, (left, right) in enumerate(itertools.pairwise(parts)):
            above, below = images[:, :, border - deep : border], images[:, :, border : border + deep]
            torch.testing.assert_close(before[:, :, i, k], above[..., left:right].mean((-2, -1)))
            torch.testing.assert_close(after[:, :, i, k], below[..., left:right].mean((-2, -1)))


@pytest.mark.parametrize(
    ("rows", "columns"), [(Axis(10, 4), Axis(7, 3)), (Axis(8, 4), Axis(6, 3)), (Axis(5, 1), Axis(4, 2))]
)
def test_pixels_of_one_cell_laid_out_like_another(rows: Axis, columns: Axis) -> None:
    """For each pixel of the written cell the pixel of the read cell at the same place, or its last one; repeats at the end."""
    n = rows.count * columns.count
    cells, of = (part.flatten() for part in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    found = cell_pixels(cells, of, rows, columns)
    height, width = (max(b - a for a, b in itertools.pairwise(axis.edges)) for axis in (rows, columns))
    assert found.shape == (n * n, height * width)

    def places(axis: Axis, here: int, there: int, length: int) -> list[int]:
        start, last = axis.edges[here], axis.edges[here + 1] - 1
        size = axis.edges[there + 1] - axis.edges[there]
        return [min(start + min(step, size - 1), last) for step in range(length)]

    for row, (cell, other) in enumerate(zip(cells.tolist(), of.tolist(), strict=True)):
        down = places(rows, cell // columns.count, other // columns.count, height)
        across = places(columns, cell % columns.count, other % columns.count, width)
        assert found[row].tolist() == [y * columns.pixels + x for y in down for x in across]
