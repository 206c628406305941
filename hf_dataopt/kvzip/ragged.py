"""What one layer keeps of a context: the pairs of each KV head, of which heads keep different numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

# a GPU's processors, twice over, and rows that one of them handles at once
_SPANS, _SPAN = 256, 128


@dataclass(frozen=True)
class Pieces:
    """Runs of keys that a kernel attends to apart.

    Args:
        heads: (N,) int64, KV head of every piece.
        member: (KV heads, N) float32, 0 where a piece is the head's own, else -inf.
        empty: (KV heads, 1) bool, heads without a piece.
        bounds: (N + 1,) int32, rows at which pieces begin and end.
        longest: rows of the longest piece.
    """

    heads: torch.Tensor
    member: torch.Tensor
    empty: torch.Tensor
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
        bounds = rows.cumsum(0).int()
        heads, member, empty, bounds = (one.to(device) for one in (heads, member, empty, bounds))
        return cls(heads, member, empty, bounds, longest)


@dataclass(frozen=True)
class RaggedContext:
    """The kept pairs as the model made them; never changed, so every fork of a cache shares them.

    Args:
        keys: (sum of lengths, d), values: (sum of lengths, v): one KV head after the other, each in order of position, keys
            after RoPE.
        lengths: kept pairs of each KV head, prefix included.
        n_tokens: tokens the context had (its logical length).
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

    @cached_property
    def key_heads(self) -> list[torch.Tensor]:
        """Views of `keys` per KV head, (1, 1, length, d)."""
        return [part[None, None] for part in self.keys.split(self.lengths)]

    @cached_property
    def value_heads(self) -> list[torch.Tensor]:
        """Views of `values` per KV head, (1, 1, length, v)."""
        return [part[None, None] for part in self.values.split(self.lengths)]

    @cached_property
    def spans(self) -> Pieces:
        """Long pieces, enough of them to keep every processor of a GPU busy with one token."""
        size = max(-(-sum(self.lengths) // _SPANS), _SPAN)
        return Pieces.of(self.lengths, -(-size // _SPAN) * _SPAN, self.keys.device)

    @cached_property
    def whole_heads(self) -> Pieces:
        """Heads as pieces."""
        return Pieces.of(self.lengths, max(*self.lengths, 1), self.keys.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept keys and values."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedContext:
        return self
