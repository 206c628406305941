"""What one layer keeps of a context: pairs of each KV head in tiles of a few tokens, and how the tiles are found.

Heads keep different numbers of pairs, and no head is padded to another's length: a head is a run of tiles of one size, of which
only its last may hold rows that are no pairs. All tiles of a layer then go through one batched product, whatever head they
belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from .kernels import takes_flat

# rows of a tile at most: as fast as whole heads in one product
_TILE = 64
# pairs that a head keeps on average for every row of a tile: half a tile a head is lost, 2.5 % of what is kept at most
_PAIRS_PER_ROW = 20
# a GPU's processors, twice over, and rows that one of them handles at once
_SPANS, _SPAN = 256, 128


class Tiles(Protocol):
    """Keys and values of one layer, tile by tile."""

    @property
    def size(self) -> int:
        """Rows of a tile."""

    @property
    def count(self) -> int:
        """Tiles."""

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of keys and of values."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values that these stand for."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def nbytes(self) -> int:
        """Bytes held, padding rows and scales included."""

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        """Products (tiles, R, size) of queries (tiles, R, d) with the tile's keys, in the queries' dtype."""

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums (tiles, R, v) of the tile's values under weights (tiles, R, size), in the weights' dtype."""

    def dense(self) -> DenseTiles:
        """The keys and values themselves."""

    def to(self, device: torch.device) -> Tiles:
        """On another device."""


@dataclass(frozen=True)
class DenseTiles:
    """Keys and values as the model made them.

    Args:
        keys: (tiles, size, d), after RoPE. values: (tiles, size, v). Padding rows are zero.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def empty(cls, lengths: Sequence[int], size: int, keys: torch.Tensor, values: torch.Tensor) -> DenseTiles:
        """Room for pairs of these lengths, of the widths and dtypes of `keys` and `values` (..., d); only padding is set."""
        return cls(empty_tiles(lengths, size, keys), empty_tiles(lengths, size, values))

    @property
    def size(self) -> int:
        return self.keys.shape[1]

    @property
    def count(self) -> int:
        return self.keys.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        return self.keys.shape[2], self.values.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def nbytes(self) -> int:
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        return row_products(query, self.keys.to(query.dtype))

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights, self.values.to(weights.dtype))

    def dense(self) -> DenseTiles:
        return self

    def to(self, device: torch.device) -> DenseTiles:
        return self if device == self.device else DenseTiles(self.keys.to(device), self.values.to(device))


@dataclass(frozen=True)
class Pieces:
    """Runs of keys that are attended to apart: tiles, or spans of rows.

    Args:
        heads: (N,) int64, KV head of every piece.
        member: (KV heads, N + KV heads) float32, 0 where a piece is the head's own, else -inf; the last columns stand for
            one more set of keys a head, the dense tail.
        last: (P,) int64, pieces with rows that are no pairs.
        hidden: (P, 1, size) float32, -inf at these rows.
        bounds: (N + 1,) int32, rows at which pieces begin and end.
        longest: rows of the longest piece.
    """

    heads: torch.Tensor
    member: torch.Tensor
    last: torch.Tensor
    hidden: torch.Tensor
    bounds: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], size: int, device: torch.device) -> Pieces:
        """Heads of these lengths, cut into pieces of `size` rows."""
        counts = [tiles_of(length, size) for length in lengths]
        heads = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(counts))
        owner = torch.cat([heads, torch.arange(len(lengths))])
        member = torch.zeros(len(lengths), len(owner)).masked_fill(
            owner != torch.arange(len(lengths))[:, None], float("-inf")
        )
        ends = torch.tensor(counts).cumsum(0)
        rests = torch.tensor(lengths) % size
        partial = rests > 0
        hidden = torch.zeros(int(partial.sum()), 1, size)
        hidden.masked_fill_(torch.arange(size) >= rests[partial][:, None, None], float("-inf"))
        rows = torch.full((len(heads),), size)
        rows[ends[partial] - 1] = rests[partial]
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)]).int()
        last = ends[partial] - 1
        heads, member, last, hidden, bounds = (one.to(device) for one in (heads, member, last, hidden, bounds))
        return cls(heads, member, last, hidden, bounds, min(size, max(lengths, default=0)))


@dataclass(frozen=True)
class RaggedContext:
    """What one layer keeps of a context; never changed, so every fork of a cache shares it.

    Args:
        tiles: the pairs: one KV head after the other, each in order of position, beginning with a tile of its own.
        lengths: kept pairs of each KV head, prefix included.
        n_tokens: tokens the context had (its logical length).
    """

    tiles: Tiles
    lengths: list[int]
    n_tokens: int

    @classmethod
    def evict(cls, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor) -> RaggedContext:
        """Copy the pairs that stay out of a full layer.

        Args:
            keys: (1, KV heads, n, d), values: (1, KV heads, n, v).
            keep: (KV heads, n) bool.

        Returns:
            A context that holds memory for the kept pairs only, and for half a tile a head.
        """
        kept = keep.to(keys.device)
        lengths = kept.sum(dim=1).tolist()
        tiles = DenseTiles.empty(lengths, tile_size(lengths, keys, values), keys, values)
        for whole, made in ((keys, tiles.keys), (values, tiles.values)):
            for target, head, stays in zip(head_rows(made, lengths), whole[0], kept, strict=True):
                target.copy_(head[stays])
        return cls(tiles, lengths, keep.shape[1])

    @cached_property
    def pieces(self) -> Pieces:
        """The tiles as pieces."""
        return Pieces.of(self.lengths, self.tiles.size, self.tiles.device)

    @cached_property
    def spans(self) -> Pieces:
        """Long spans of rows as pieces, enough of them to keep every processor of a GPU busy with one token."""
        size = max(-(-sum(self.lengths) // _SPANS), _SPAN)
        return Pieces.of(self.lengths, -(-size // _SPAN) * _SPAN, self.tiles.device)

    @cached_property
    def heads(self) -> Pieces:
        """Whole heads as pieces."""
        return Pieces.of(self.lengths, max(*self.lengths, 1), self.tiles.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept keys and values."""
        return self.tiles.nbytes

    @property
    def full_nbytes(self) -> int:
        """Bytes that all pairs of the context would take, in the model's dtype."""
        return self.n_tokens * len(self.lengths) * sum(self.tiles.widths) * self.tiles.dtype.itemsize

    def rows(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys (length, d) and values (length, v) of each KV head; views where they are stored as they are."""
        dense = self.tiles.dense()
        return head_rows(dense.keys, self.lengths), head_rows(dense.values, self.lengths)

    def to(self, device: torch.device) -> RaggedContext:
        """The same pairs on another device; itself where they are there already."""
        if device == self.tiles.device:
            return self
        return RaggedContext(self.tiles.to(device), self.lengths, self.n_tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedContext:
        return self


def tiles_of(length: int, size: int) -> int:
    """Tiles that a head of `length` pairs takes."""
    return -(-length // size)


def tile_size(lengths: Sequence[int], keys: torch.Tensor, values: torch.Tensor, least: int = 1) -> int:
    """Rows of a tile for heads of these lengths: as many as lose next to nothing.

    Args:
        lengths: pairs a head.
        keys, values: say where and in which dtype attention will read them: GPU kernels want rows without padding.
        least: rows at least.

    Returns:
        A power of two up to 64, or 1 for such kernels.
    """
    if takes_flat(keys, values):
        return 1
    size, mean = _TILE, sum(lengths) / max(len(lengths), 1)
    while size > least and size * _PAIRS_PER_ROW > mean:
        size //= 2
    return size


def empty_tiles(lengths: Sequence[int], size: int, like: torch.Tensor) -> torch.Tensor:
    """Room (tiles, size, width) for pairs of these lengths, of the width and dtype of `like` (..., width); padding is zero."""
    counts = [tiles_of(length, size) for length in lengths]
    made = like.new_empty(sum(counts), size, like.shape[-1])
    end = 0
    for length, count in zip(lengths, counts, strict=True):
        end += count
        if count * size > length:
            made[end - 1, length - count * size :] = 0
    return made


def head_rows(tiles: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Views (length, width) of each head's pairs in tiles (tiles, size, width)."""
    size, start, found = tiles.shape[1], 0, []
    rows = tiles.view(-1, tiles.shape[2])
    for length in lengths:
        found.append(rows[start * size : start * size + length])
        start += tiles_of(length, size)
    return found


def row_products(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products (tiles, R, size) of queries (tiles, R, d) with keys (tiles, size, d)."""
    if query.shape[1] < 4:
        return torch.bmm(query, keys.transpose(1, 2))
    # keys first: up to twice as fast with four rows, never slower with more
    return torch.bmm(keys, query.transpose(1, 2)).transpose(1, 2)
