"""Co-Mixup: a batch is mixed jointly, each output from as many inputs as pays off (chapter 4).

Every output shows salient cells of several inputs, smoothly arranged (Eq. 4.1, saliency and smoothness), and outputs are
kept from using the same inputs (compatibility). The masks are found by Algorithm 3, output after output
(`co_mixup_sweeps.py`), each one a many-label problem on a small grid (`co_mixup_solver.py`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..settings import check_array, check_generator, check_kind, check_shares, check_tensor, check_together
from .co_mixup_config import CoMixupConfig
from .co_mixup_solver import Floats, Ints
from .co_mixup_sweeps import FORBIDDEN, Parts, objective, sweep
from .result import MixResult

_RANDOM_GRIDS = (2, 4, 8, 16)
_LOG_FLOOR = 1e-8  # the reference code's
_HALVES = 2  # L: a cell is divided into at most two halves


def co_mixup(
    images: Tensor, targets: Tensor, saliency: Tensor, config: CoMixupConfig, generator: torch.Generator
) -> MixResult:
    """Mix a batch so that outputs are salient, smooth and different from each other.

    Args:
        images: (B, C, H, W) floating point, any C, H, W.
        targets: (B, classes) floating point soft labels, rows sum to 1.
        saliency: (B, H, W) floating point, >= 0. A sample with a non-finite value or with zeros only is left unmixed.
        config: weights and conventions.
        generator: draws the prior's mixing ratios and the initial masks; on the CPU.

    Returns:
        `MixResult` with B outputs, or with `outputs_per_part` of every part. Output j of a part starts from no particular
        input. `energies` sum to the value of Eq. 4.1 over a part. Samples with unusable saliency, or alone in their part, pass
        through as they are; `unmixed` marks them and every other output of one input. No transport plans.

    Raises:
        ValueError: empty batch, wrong shapes, targets that are not finite, negative saliency, grid finer than
            the image, generator not on the CPU.
        TypeError: not floating point.

    Source: chapter 4: Eqs. 4.1 and 4.2, Algorithm 3.
    Differs: see `CoMixupConfig.strict` for text against reference code. Unlike the code, a random grid is drawn once for
        the batch, a part of one sample passes through, equal salient places (A_c = 0) leave A = (1 - omega) I, and cells of
        unequal size count by their pixels.
    Cost: sweeps x outputs steps on the CPU, all parts at once, whatever the device of the images; only (B, h, w) saliency
        and labels travel. About 0.5 ms a step at 4x4 cells with numba (first call: some 10 s to compile, kept on disk),
        4 ms without; at 8x8 1.5 and 30 ms.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images, targets = torch.rand(6, 3, 8, 8), torch.eye(6)
        >>> co_mixup(images, targets, torch.rand(6, 8, 8), CoMixupConfig(), generator).images.shape
        torch.Size([6, 3, 8, 8])
    """
    check_kind("config", config, CoMixupConfig)
    _check(images, targets, saliency)
    check_generator("generator", generator)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    grid = _grid_of(config, images, rng)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        cells = cell_saliency(saliency.detach(), grid)
        usable = (torch.isfinite(cells).all((1, 2)) & (cells.sum((1, 2)) > 0)).cpu().numpy()
        places = salient_places(torch.nan_to_num(saliency.detach().float()), config).cpu().numpy()
        on_cpu = cells.cpu().numpy().astype(np.float64)
        layout = _Layout(usable, config)
        parts = _parts_of(on_cpu, places, layout, grid, config, rng)
        if layout.members:
            sweep(parts, config)
        return _mix(images, targets, cells, layout, parts, config)


def cell_saliency(saliency: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each sample's saliency in each cell.

    Args:
        saliency: (B, H, W).
        grid: rows and columns.

    Returns:
        (B, h, w) float32; rows of samples without saliency are NaN or 0. Pixel y belongs to row floor(y h / H).

    Source: section 4.4.1, c = -saliency; normalised to sum 1 as in the reference code.
    """
    rows, columns = (_members(size, n, saliency.device) for size, n in zip(saliency.shape[1:], grid, strict=True))
    mass = rows @ saliency.float() @ columns.T
    total = mass.sum((1, 2), keepdim=True)
    return mass / torch.where(total > 0, total, torch.ones_like(total))


def _members(size: int, n: int, device: torch.device) -> Tensor:
    cell = torch.arange(size, device=device) * n // size
    return (cell == torch.arange(n, device=device)[:, None]).float()


def salient_places(saliency: Tensor, config: CoMixupConfig) -> Tensor:
    """Row and column of each sample's most salient window.

    Args:
        saliency: (B, H, W) float, finite.
        config: window and stride; `strict` takes the most salient pixel.

    Returns:
        (B, 2) int64, in strides.

    Source: section 4.4.1, argmax_k s_i[k]. The reference code averages windows of 8 pixels.
    """
    if config.strict:
        pooled = saliency
    else:
        window = tuple(min(config.distance_window, size) for size in saliency.shape[1:])
        pooled = torch.nn.functional.avg_pool2d(saliency[:, None], window, config.distance_stride)[:, 0]
    best = pooled.flatten(1).argmax(1)
    return torch.stack([best // pooled.shape[2], best % pooled.shape[2]], 1)


def place_distances(places: np.ndarray) -> Floats:
    """(B, B) L1 distances between (B, 2) places."""
    return np.abs(places[:, None].astype(np.float64) - places[None]).sum(2)


def compatibility(distances: np.ndarray, config: CoMixupConfig) -> Floats:
    """A = (1 - omega) I + omega A_c.

    Args:
        distances: (m, m) distances between the salient places of a part's inputs.
        config: omega; `strict` takes the distances as they are, the reference code divides by their mean row sum.

    Returns:
        (m, m) float64. All-zero distances give (1 - omega) I.

    Source: section 4.4.1.
    """
    distances = check_array("distances", distances, 2).astype(np.float64)
    if distances.shape[0] != distances.shape[1] or (distances < 0).any():
        raise ValueError(
            f"distances must be (m, m) and >= 0, got {distances.shape} with a least of {distances.min():g}"
        )
    check_kind("config", config, CoMixupConfig)
    total = distances.sum()
    if not config.strict and total > 0:
        distances = distances / total * len(distances)
    return (1 - config.omega) * np.eye(len(distances)) + config.omega * distances


def prior_cost(mixing: np.ndarray, n_cells: int, config: CoMixupConfig) -> Floats:
    """-eta log p of a cell that shows one input.

    Args:
        mixing: (..., m) Dirichlet draw.
        n_cells: eta is per cell.
        config: eta; `strict` has L draws per cell (both from that input), the reference code one.

    Returns:
        (..., m) float64.

    Source: section 4.4.1, z ~ Multi(L, lambda) / L. A cell that shows two inputs costs their mean, in the text less
        eta log 2 (`Parts.half_cost`).
    """
    if config.strict:
        return -config.eta / n_cells * _HALVES * np.log(np.maximum(mixing, np.finfo(np.float64).tiny))
    return -config.eta / n_cells * np.log(np.asarray(mixing, np.float64) + _LOG_FLOOR)


class _Layout:
    """Which samples are mixed with which, and where outputs go.

    members: per part that is mixed, its usable samples (at least 2) and its number of outputs. `slots`: for every output of
    the batch, (part, output of the part), or (-1, sample) where the sample passes through.
    """

    def __init__(self, usable: np.ndarray, config: CoMixupConfig) -> None:
        self.members: list[tuple[Ints, int]] = []
        self.slots: list[tuple[int, int]] = []
        for start in range(0, len(usable), config.part_size):
            part = np.arange(start, min(start + config.part_size, len(usable)))
            good = part[usable[part]]
            if len(good) < 2:
                good = good[:0]
            if config.outputs_per_part is None:
                self._one_each(part, good)
            else:
                n = max(1, round(config.outputs_per_part * len(part) / config.part_size))
                self._some(np.setdiff1d(part, good), good, n)

    def _one_each(self, part: Ints, good: Ints) -> None:
        place = {int(sample): j for j, sample in enumerate(good)}
        index = len(self.members)
        self.slots += [(index, place[i]) if i in place else (-1, i) for i in map(int, part)]
        if len(good):
            self.members.append((good, len(good)))

    def _some(self, bad: Ints, good: Ints, n: int) -> None:
        """Samples that pass through take an output each, after the mixed ones."""
        passing = [int(i) for i in bad][: n if not len(good) else n - 1]
        mixed = n - len(passing) if len(good) else 0
        self.slots += [(len(self.members), j) for j in range(mixed)] + [(-1, i) for i in passing]
        if mixed:
            self.members.append((good, mixed))


def _parts_of(
    cells: Floats,
    places: np.ndarray,
    layout: _Layout,
    grid: tuple[int, int],
    config: CoMixupConfig,
    rng: np.random.Generator,
) -> Parts:
    """The parts' problems and their random start, padded to the largest."""
    n_parts = len(layout.members)
    m = max((len(good) for good, _ in layout.members), default=0)
    most = max((n for _, n in layout.members), default=0)
    n_cells = grid[0] * grid[1]
    cost = np.full((n_parts, most if config.strict else 1, m, *grid), FORBIDDEN)
    a = np.zeros((n_parts, m, m))
    first = np.zeros((n_parts, most, *grid), np.intp)
    for p, (good, n) in enumerate(layout.members):
        k = len(good)
        a[p, :k, :k] = compatibility(place_distances(places[good]), config)
        mixing = rng.dirichlet([cast(float, config.alpha)] * k, n if config.strict else 1)
        cost[p, : len(mixing), :k] = -cells[good] + prior_cost(mixing, n_cells, config)[..., None, None]
        first[p, :n] = rng.integers(k, size=(n, *grid))
    return Parts(
        cost=cost,
        compatibility=a,
        inputs=np.array([len(good) for good, _ in layout.members], np.intp),
        outputs=np.array([n for _, n in layout.members], np.intp),
        first=first,
        second=first.copy(),
        half_cost=-config.eta / n_cells * math.log(2) if config.strict else 0.0,
    )


def _mix(
    images: Tensor, targets: Tensor, cells: Tensor, layout: _Layout, parts: Parts, config: CoMixupConfig
) -> MixResult:
    """The batch's labels in the order of its slots, applied."""
    grid, n_outputs = parts.first.shape[2:], len(layout.slots)
    first = np.empty((n_outputs, *grid), np.intp)
    second = np.empty_like(first)
    energies = np.zeros(n_outputs)
    values = objective(parts, config) if layout.members else energies
    for slot, (p, j) in enumerate(layout.slots):
        if p < 0:
            first[slot] = second[slot] = j
        else:
            good = layout.members[p][0]
            first[slot], second[slot], energies[slot] = good[parts.first[p, j]], good[parts.second[p, j]], values[p, j]
    mixed = apply_labels(images, targets, first, second)
    return replace(
        mixed,
        energies=torch.from_numpy(energies).to(images.device),
        saliency=torch.nan_to_num(cells, nan=0.0, posinf=0.0, neginf=0.0),
    )


def apply_labels(images: Tensor, targets: Tensor, first: Ints, second: Ints) -> MixResult:
    """Mix images and targets by given labels.

    Args:
        images: (B, C, H, W) floating point.
        targets: (B, classes).
        first, second: (B', h, w) int: the two inputs of each cell, half and half; equal: one input.

    Returns:
        `MixResult` of B' outputs; the target is the mean of the cells' targets, each weighted by its pixels.

    Source: section 4.3, h(x_B) and y_B' o_j / n.
    Cost: copies of one output batch.
    """
    device = images.device
    sources, masks = (torch.from_numpy(array).to(device) for array in _compact(first, second))
    sides = zip(images.shape[2:], first.shape[1:], strict=True)
    area = torch.outer(*(_members(size, n, device).sum(1) / size for size, n in sides))
    ratios = (masks * area).sum((2, 3))
    weights = torch.zeros(len(first), len(images), device=device).scatter_add_(1, sources, ratios)
    return MixResult(
        images=_mix_images(images, torch.from_numpy(first), torch.from_numpy(second)),
        targets=weights @ targets.float(),
        sources=sources,
        masks=masks,
        ratios=ratios,
        unmixed=(weights > 0).sum(1) == 1,
    )


def _compact(first: Ints, second: Ints) -> tuple[Ints, np.ndarray]:
    """(B, M) inputs in use, in rising order, M the most of any output, and their shares (B, M, h, w).

    Outputs with fewer repeat their first input with share 0.
    """
    used = [np.unique(np.concatenate([a, b], axis=None)) for a, b in zip(first, second, strict=True)]
    most = max(map(len, used))
    sources = np.stack([np.concatenate([u, np.full(most - len(u), u[0])]) for u in used])
    masks = 0.5 * (
        (first[:, None] == sources[..., None, None]).astype(np.float32) + (second[:, None] == sources[..., None, None])
    )
    masks[np.array([np.arange(most) >= len(u) for u in used])] = 0
    return sources, masks.astype(np.float32)


def _mix_images(images: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Cell by cell: a copy for every output, then the second half of the cells that have one."""
    height, width = images.shape[2:]
    rows, columns = (_edges(size, n) for size, n in zip((height, width), first.shape[1:], strict=True))
    mixed = images.new_empty((len(first), *images.shape[1:]))
    halved = first != second
    some = halved.any(0).tolist()
    first, second, halved = (labels.to(images.device) for labels in (first, second, halved))
    for r, (top, bottom) in enumerate(rows):
        for c, (left, right) in enumerate(columns):
            patch = images[:, :, top:bottom, left:right]
            shown = patch[first[:, r, c]]
            if some[r][c]:
                where = halved[:, r, c].nonzero()[:, 0]
                shown[where] = (shown[where] + patch[second[where, r, c]]) * 0.5
            mixed[:, :, top:bottom, left:right] = shown
    return mixed


def _edges(size: int, n: int) -> list[tuple[int, int]]:
    """First and last-plus-one pixel of each cell: pixel y is in cell floor(y n / size)."""
    edges = [-(-size * i // n) for i in range(n + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _grid_of(config: CoMixupConfig, images: Tensor, rng: np.random.Generator) -> tuple[int, int]:
    if config.grid is None:
        fits = [n for n in _RANDOM_GRIDS if n <= min(images.shape[2:])]
        if not fits:
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels have no grid; use images of at least 2x2")
        side = int(rng.choice(fits))
        return side, side
    grid = config.grid if isinstance(config.grid, tuple) else (config.grid, config.grid)
    if any(n > size for n, size in zip(grid, images.shape[2:], strict=True)):
        raise ValueError(
            f"grid {grid} is finer than images of {tuple(images.shape[2:])} pixels; use fewer rows or columns"
        )
    return grid


def _check(images: Tensor, targets: Tensor, saliency: Tensor) -> None:
    check_tensor("images", images, ("B", "C", "H", "W"))
    check_shares("targets", targets, (len(images), "classes"))
    check_tensor("saliency", saliency, ("B", "H", "W"), least=0)
    check_together(images=images, targets=targets, saliency=saliency)
    if saliency.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"saliency must be {(len(images), *images.shape[2:])} for images {tuple(images.shape)}, "
            f"got {tuple(saliency.shape)}; average or take the norm over channels"
        )
