"""What a pass over the relation graph holds on the device: the rows of two tiles and their products, in reused buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import distributed
from ..distributed import Room, Undo
from .config import RelationConfig
from .kernel import base_kernel, normalise, power_, sign_
from .rows import Rows

Index = NDArray[np.int64]
LARGEST_TILE = {"cpu": 512, "cuda": 8192, "mps": 2048}  # rows; larger leaves the cache of a core
SMALLEST_TILE = 32
HELD = 4  # row sides of tiles that are read once and meet one column side after the other


@dataclass
class Tile:
    """Rows of one tile on the compute device."""

    features: Tensor
    probs: Tensor | None
    labels: Tensor | None
    label_range: tuple[int, int] = (0, 0)


class Source(Protocol):
    """The rows of a graph, and how many of them make a tile."""

    features: Rows
    probs: Rows | None
    labels: Index | None
    centre: NDArray[np.float32] | None
    inverse_norm: NDArray[np.float32]
    config: RelationConfig
    device: torch.device
    dtype: torch.dtype
    tile_rows: int
    block_rows: int


class _Slot:
    """Buffers that hold one tile's rows: read as float32, scaled, converted, moved."""

    def __init__(self, source: Source, rows: int) -> None:
        self.source = source
        self.features = np.empty((rows, source.features.width), np.float32)
        self.probs = None if source.probs is None else np.empty((rows, source.probs.width), np.float32)

    def fill(self, rows: Index) -> Tile:
        source, count = self.source, len(rows)
        features = self.features[:count]
        source.features.take(rows, features)
        if source.centre is not None:
            features -= source.centre
        probs = None
        if source.probs is not None and self.probs is not None:
            source.probs.take(rows, self.probs[:count])
            probs = torch.from_numpy(self.probs[:count]).to(source.device, source.dtype)
        if source.dtype == torch.float16:
            moved = normalise(torch.from_numpy(features), source.dtype).to(source.device)
        else:
            features *= source.inverse_norm[rows, None]
            moved = torch.from_numpy(features).to(source.device, source.dtype)
        if source.labels is None:
            return Tile(moved, probs, None)
        labels = source.labels[rows]
        return Tile(moved, probs, torch.from_numpy(labels).to(source.device), (int(labels.min()), int(labels.max())))


class Workspace:
    """The buffers of one pass of rows against columns; where the device has no room for a tile, tiles halve.

    Args:
        rows: whose rows are asked about.
        columns: whose rows they are related to; its `block_rows` bounds the sides of a tile: what fitted last.

    Source: section 5.3.2, complexity analysis: blocks of any size give the same sums, up to the rounding of a block's own.
    """

    def __init__(self, rows: Source, columns: Source) -> None:
        self.rows, self.columns = rows, columns
        self._slots: dict[int, _Slot] = {}
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def blocks(self, rows: Index) -> list[Index]:
        """A stripe's rows in parts that fit; the stripe itself, as long as the device has room."""
        size = self.columns.block_rows
        return [rows] if len(rows) <= size else [rows[start : start + size] for start in range(0, len(rows), size)]

    def held(self, stripes: Iterable[tuple[int, Index]]) -> Iterator[list[tuple[int, Index, Tile]]]:
        """Numbers, rows and row sides of the tiles of some stripes, `HELD` at a time, valid until the next are asked for."""
        blocks = [(number, block) for number, stripe in stripes for block in self.blocks(stripe)]
        for start in range(0, len(blocks), HELD):
            some = enumerate(blocks[start : start + HELD])
            yield [(number, block, self.left(block, place)) for place, (number, block) in some]

    def left(self, rows: Index, place: int = 0) -> Tile:
        """Row side of a tile, valid until the next call with that place."""
        return self._slot(place, self.rows).fill(rows)

    def right(self, rows: Index) -> Tile:
        """Column side of a tile, valid until the next call."""
        return self._slot(HELD, self.columns).fill(rows)

    def cosine(self, left: Tile, right: Tile) -> Tensor:
        """`f f'^T` of a tile in the dtype of the products, in a reused buffer."""
        return torch.mm(left.features, right.features.T, out=self._room(left, right)[0])

    def kernel(self, left: Tile, right: Tile, look: Callable[[Tensor], None] | None = None) -> Tensor:
        """`s c` of a tile in float32, after the cut-off, in a reused buffer; `look` is shown `f f'^T` first."""
        out, scratch, wide = self._room(left, right)
        config = self.columns.config
        kernel = base_kernel(left.features, right.features, left.probs, right.probs, config, (out, scratch), look)
        return kernel if kernel.dtype == torch.float32 else wide.copy_(kernel)

    def _room(self, left: Tile, right: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Two buffers of a tile in the dtype of the products, and one in float32; the first again where that is the dtype."""
        if self._buffers is None:
            dtype, device = self.columns.dtype, self.columns.device
            length = self._side(self.rows) * self._side(self.columns)
            out, scratch = (torch.empty(length, dtype=dtype, device=device) for _ in range(2))
            wide = out if dtype == torch.float32 else torch.empty(length, dtype=torch.float32, device=device)
            self._buffers = (out, scratch, wide)
        shape = (len(left.features), len(right.features))
        out, scratch, wide = (buffer[: shape[0] * shape[1]].view(shape) for buffer in self._buffers)
        return out, scratch, wide

    def attempt(self, work: Callable[[], None], *state: Tensor) -> None:
        """Do a stripe; where memory ends, put `state` back as it was and do the stripe again in smaller tiles.

        Args:
            work: asks for its tiles by `blocks`.
            state: what `work` adds to.

        Raises:
            torch.OutOfMemoryError: tiles of 32 rows do not fit.
        """
        room, side = Room("tiles of {} rows", least=SMALLEST_TILE), max(self._side(self.rows), self._side(self.columns))

        def mark() -> Undo:
            kept = [one.clone() for one in state]

            def undo() -> None:
                self._slots, self._buffers = {}, None
                for one, before in zip(state, kept, strict=True):
                    one.copy_(before)

            return undo

        def within(size: int) -> None:
            if size < side:
                self.columns.block_rows = size
            work()

        room.attempt(within, side, self.columns.device, mark)

    def _side(self, source: Source) -> int:
        return min(self.columns.block_rows, source.tile_rows)

    def _slot(self, place: int, source: Source) -> _Slot:
        if place not in self._slots:
            self._slots[place] = _Slot(source, self._side(source))
        return self._slots[place]


class ExactSums:
    """Sums of float32 numbers in float64 that have the same bits in whatever order, and by however many processes, they came.

    A number is split into a multiple of 2^-20 and a rest, rounded to a multiple of 2^-58; sums of each are exact in float64.

    Args:
        count: how many sums.

    Attributes:
        parts: (count,) float64 twice, to be kept, or added over processes, one by one.

    Differs: up to 2^33 in all and 2^16 numbers a sum; 2^-59 is lost of each.
    """

    def __init__(self, count: int) -> None:
        self.parts = (torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64))

    def add(self, rows: Index, values: NDArray[np.float32]) -> None:
        """Add one number to each of some sums, no row twice."""
        wide = values.astype(np.float64)
        coarse = np.rint(wide * 2.0**20) * 2.0**-20
        wide -= coarse
        self.parts[0].numpy()[rows] += coarse
        self.parts[1].numpy()[rows] += np.rint(wide * 2.0**58) * 2.0**-58

    def total(self, device: torch.device) -> NDArray[np.float64]:
        """(count,) the sums, over all processes; `device` of this process's other work."""
        coarse, fine = (distributed.sum_over_processes(part, device) for part in self.parts)
        return (coarse + fine).numpy()


class ReferenceSums:
    """Sums of the bare kernel over a set S of rows, for every row, from the tiles of one symmetric pass (section 5.3.3).

    Args:
        count: n.
        reference: row numbers of S.
        temperature: of the kernel.
    """

    def __init__(self, count: int, reference: Index, temperature: float) -> None:
        self.temperature, self.sums = temperature, ExactSums(count)
        self.mask = np.zeros(count, np.float32)
        self.mask[reference] = 1

    def look(self, kernel: Tensor, here: Index, there: Index, *, want_columns: bool) -> None:
        """Take the share of one tile: (a, b) of `here` against `there` before the power; read only."""
        left, right = self.mask[here], self.mask[there]
        if self.temperature != 1:
            kernel = power_(kernel.clone(), self.temperature)
        if right.any():
            self.sums.add(here, (kernel @ torch.from_numpy(right).to(kernel.device)).cpu().numpy())
        if want_columns and left.any():
            self.sums.add(there, (kernel.T @ torch.from_numpy(left).to(kernel.device)).cpu().numpy())


def signed_sums(
    kernel: Tensor, left: Tile, right: Tile, *, want_columns: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Row and column sums of the relation; the labels are compared only in tiles that mix agreement and not."""
    sign = np.float32(1)
    if left.labels is not None and right.labels is not None:
        (low_i, high_i), (low_j, high_j) = left.label_range, right.label_range
        if min(low_i, low_j) < 0:  # unlabelled rows
            kernel = sign_(kernel, left.labels, right.labels)
        elif high_i < low_j or high_j < low_i:
            sign = np.float32(-1)
        elif not low_i == high_i == low_j == high_j:
            kernel = sign_(kernel, left.labels, right.labels)
    return sign * sums_of(kernel, 1), sign * sums_of(kernel, 0) if want_columns else None


def sums_of(kernel: Tensor, dim: int) -> NDArray[np.float32]:
    """Sums of a tile along one side."""
    return kernel.sum(dim=dim).cpu().numpy()
