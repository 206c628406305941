"""What one layer keeps of a context: the pairs of each KV head, of which heads keep different numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .quantised import BITS, QuantisedRows, Storage

# a GPU's processors, twice over, and rows that one of them handles at once
_SPANS, _SPAN = 256, 128


@dataclass(frozen=True)
class Pieces:
    """Runs of keys that a kernel attends to apart.

    Args:
        heads: (N,) int64, KV head of every piece.
        member: (KV heads, N) float32, 0 where a piece is the head's own, else -inf.
        empty: (KV heads, 1) bool, heads without a piece.
        firsts: (KV heads + 1,) int32, pieces at which heads begin and end.
        bounds: (N + 1,) int32, rows at which pieces begin and end.
        longest: rows of the longest piece.
    """

    heads: torch.Tensor
    member: torch.Tensor
    empty: torch.Tensor
    firsts: torch.Tensor
    bounds: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], size: int, device: torch.device) -> Pieces:
        """Heads of these lengths, cut into pieces of `size` rows; what is left of a head is a shorter one."""
        found = [(head, min(size, length - at)) for head, length in enumerate(lengths) for at in range(0, length, size)]
        heads = torch.tensor([head for head, _ in found], dtype=torch.int64)
        rows = torch.tensor([0, *(rows for _, rows in found)])
        member = torch.zeros(len(lengths), len(heads))
        member.masked_fill_(heads != torch.arange(len(lengths))[:, None], float("-inf"))
        longest = max((rows for _, rows in found), default=0)
        empty = (torch.tensor(lengths) == 0)[:, None]
        bounds, firsts = rows.cumsum(0).int(), torch.searchsorted(heads, torch.arange(len(lengths) + 1)).int()
        heads, member, empty, firsts, bounds = (one.to(device) for one in (heads, member, empty, firsts, bounds))
        return cls(heads, member, empty, firsts, bounds, longest)


class Ragged(ABC):
    """The kept pairs of one layer, however they are stored; never changed, so every fork of a cache shares them.

    Args:
        lengths: kept pairs of each KV head, prefix included.
        n_tokens: tokens the context had (its logical length).
    """

    lengths: list[int]
    n_tokens: int

    @abstractmethod
    def opened(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (sum of lengths, d) and values (sum of lengths, v) in the model's dtype."""

    @abstractmethod
    def heads(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Keys (1, 1, length, d) and values (1, 1, length, v) of one KV head after the other."""

    @abstractmethod
    def to(self, device: torch.device) -> Ragged:
        """The same pairs on another device."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is held, by name."""

    @property
    def loop_lengths(self) -> np.ndarray | None:
        """Lengths, int64, where the compiled loop of a decoded token can read the pairs by address."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(one.untyped_storage().nbytes() for one in self.tensors.values())

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @property
    @abstractmethod
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of keys and values, as the model made them."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """Numbers in a key and in a value."""

    @property
    def full_nbytes(self) -> int:
        """Bytes of the whole context, with nothing evicted, in the model's dtype."""
        sizes = (width * dtype.itemsize for width, dtype in zip(self.widths, self.dtypes, strict=True))
        return self.n_tokens * len(self.lengths) * sum(sizes)

    @cached_property
    def spans(self) -> Pieces:
        """Long pieces, enough of them to keep every processor of a GPU busy with one token."""
        size = max(-(-sum(self.lengths) // _SPANS), _SPAN)
        return Pieces.of(self.lengths, -(-size // _SPAN) * _SPAN, self.device)

    @cached_property
    def whole_heads(self) -> Pieces:
        """Heads as pieces."""
        return Pieces.of(self.lengths, max(*self.lengths, 1), self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ragged:
        return self


@dataclass(frozen=True)
class RaggedContext(Ragged):
    """The kept pairs as the model made them.

    Args:
        keys: (sum of lengths, d), values: (sum of lengths, v): one KV head after the other, each in order of position, keys
            after RoPE.
        lengths, n_tokens: see `Ragged`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: list[int]
    n_tokens: int

    @classmethod
    def evict(cls, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor) -> RaggedContext:
        """Copy the pairs that stay out of a full layer.

        Args:
            keys: (1, KV heads, n, d), values: (1, KV heads, n, v).
            keep: (KV heads, n) bool.

        Returns:
            A context that holds memory for the kept pairs only.
        """
        kept = keep.to(keys.device)
        return cls(keys[0][kept], values[0][kept], kept.sum(dim=1).tolist(), keep.shape[1])

    def stored(self, storage: Storage) -> Ragged:
        """As `KVzipConfig.storage` says: as it is, or a quantised copy."""
        if storage == "model":
            return self
        keys, values = (
            QuantisedRows.of(part, self.lengths, BITS[storage], per_channel=part is self.keys)
            for part in (self.keys, self.values)
        )
        return QuantisedContext(keys, values, self.lengths, self.n_tokens)

    def opened(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Ragged.opened`: what is held, no copy."""
        return self.keys, self.values

    def heads(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """As `Ragged.heads`, views."""
        return self._heads

    @cached_property
    def _heads(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts = zip(self.keys.split(self.lengths), self.values.split(self.lengths), strict=True)
        return [(keys[None, None], values[None, None]) for keys, values in parts]

    @cached_property
    def loop_lengths(self) -> np.ndarray | None:
        """As `Ragged.loop_lengths`: float32 of a CPU, side by side, and as many as the lengths say."""
        plain = all(
            one.is_cpu and one.dtype == torch.float32 and one.is_contiguous() for one in (self.keys, self.values)
        )
        rows = {len(self.keys), len(self.values), sum(self.lengths)}
        return np.array(self.lengths, dtype=np.int64) if plain and len(rows) == 1 else None

    def to(self, device: torch.device) -> RaggedContext:
        """As `Ragged.to`."""
        return RaggedContext(self.keys.to(device), self.values.to(device), self.lengths, self.n_tokens)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Keys and values."""
        return {"keys": self.keys, "values": self.values}

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.keys.device

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of keys and values."""
        return self.keys.dtype, self.values.dtype

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in a key and in a value."""
        return self.keys.shape[1], self.values.shape[1]


@dataclass(frozen=True)
class QuantisedContext(Ragged):
    """The kept pairs in 8 or 4 bits, opened a head (on a CPU) or a layer (on a GPU) at a time, whenever a token looks at them.

    Args:
        keys, values: of all heads.
        lengths, n_tokens: see `Ragged`.
    """

    keys: QuantisedRows
    values: QuantisedRows
    lengths: list[int]
    n_tokens: int

    def opened(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Ragged.opened`: a copy, for as long as the caller holds it."""
        return self.keys.opened(self.lengths), self.values.opened(self.lengths)

    def heads(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """As `Ragged.heads`: one head exists at a time."""
        parts = zip(self.lengths, self.keys.heads(self.lengths), self.values.heads(self.lengths), strict=True)
        for length, keys, values in parts:
            yield keys.opened([length])[None, None], values.opened([length])[None, None]

    def to(self, device: torch.device) -> QuantisedContext:
        """As `Ragged.to`."""
        return QuantisedContext(self.keys.to(device), self.values.to(device), self.lengths, self.n_tokens)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What keys and values are made of."""
        parts = {"keys": self.keys, "values": self.values}
        return {f"{part}.{name}": one for part, rows in parts.items() for name, one in rows.tensors.items()}

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.keys.codes.device

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of keys and values, once opened."""
        return self.keys.dtype, self.values.dtype

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in a key and in a value."""
        return self.keys.width, self.values.width
