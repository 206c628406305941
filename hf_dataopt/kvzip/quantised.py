"""Keys and values in 8 or 4 bits: each group of 64 has a scale and a zero of its own, in 16 bits.

Keys are grouped over tokens, channel by channel, and values over channels, token by token: channels of keys differ in size by
orders of magnitude, those of values do not. transformers' quantised caches (HQQ, quanto) take whole tensors, in which groups
would run over from one head's pairs into the next one's; here no group leaves its head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Storage = Literal["model", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}
GROUP = 64
_SCALES = torch.float16


@dataclass(frozen=True)
class QuantisedRows:
    """Rows of several heads, one head after the other: value = zero + scale * code.

    Args:
        codes: (n, width) uint8; with 4 bits (n, width / 2 rounded up), the first half of the columns in the low bits and the
            second in the high ones.
        scales, zeros: float16, (groups, width) for keys, a group being up to 64 rows of one head, in order; for values
            (n, groups), up to 64 columns.
        width: numbers in a row.
        bits: 8 or 4.
        per_channel: True for keys, False for values.
        dtype: of the numbers.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    width: int
    bits: int
    per_channel: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, rows: torch.Tensor, lengths: Sequence[int], bits: int, *, per_channel: bool) -> QuantisedRows:
        """Quantise rows, each group between its smallest and its largest number.

        Args:
            rows: (sum of lengths, width) float.
            lengths: rows of each head.
            bits: 8 or 4.
            per_channel: see above.

        Returns:
            The codes; a number comes back within half a step, a step being the range of its group over 2^bits - 1, and what
            16 bits leave of scale and zero.

        Raises:
            ValueError: numbers that 16 bits do not hold.

        Source: asymmetric round-to-nearest, the axes of KIVI (Liu et al., 2024); of section 8.4's comparison with
            quantised caches.
        """
        n, width = rows.shape
        shape = (sum(groups_of(lengths)), width) if per_channel else (n, *groups_of([width]))
        scales, zeros = (rows.new_zeros(shape, dtype=_SCALES) for _ in range(2))
        codes = rows.new_zeros(n, width, dtype=torch.uint8)
        for block, scale, zero, code in _groups(lengths, per_channel, rows, scales, zeros, codes):
            low, high = (one.float() for one in block.aminmax(dim=1, keepdim=True))
            zero.copy_(low)
            scale.copy_(((high - zero.float()) / (2**bits - 1)).clamp_(min=0))
            step = scale.float().masked_fill(scale == 0, 1)
            code.copy_(((block.float() - zero.float()) / step).round_().clamp_(0, 2**bits - 1))
        if not bool(torch.isfinite(scales).all() & torch.isfinite(zeros).all()):
            raise ValueError(
                f"keys and values of up to {float(rows.abs().max()):.3g} do not fit the 16-bit scales of storage='int{bits}'; "
                "keep them as the model makes them, storage='model'"
            )
        return cls(_packed(codes) if bits == 4 else codes, scales, zeros, width, bits, per_channel, rows.dtype)

    def opened(self, lengths: Sequence[int]) -> torch.Tensor:
        """The numbers again, (n, width) in their dtype; `lengths` as in `of`."""
        rows = torch.empty(len(self.codes), self.width, device=self.codes.device)
        if self.bits == 4:
            half = self.codes.shape[1]
            rows[:, :half] = self.codes & 15
            rows[:, half:] = (self.codes >> 4)[:, : self.width - half]
        else:
            rows.copy_(self.codes)
        for block, scale, zero in _groups(lengths, self.per_channel, rows, self.scales.float(), self.zeros.float()):
            torch.addcmul(zero, block, scale, out=block)
        return rows.to(self.dtype)

    def heads(self, lengths: Sequence[int]) -> Iterator[QuantisedRows]:
        """Each head's rows, as views."""
        parts = [self.codes.split(list(lengths))]
        for one in (self.scales, self.zeros):
            parts.append(one.split(groups_of(lengths) if self.per_channel else list(lengths)))
        for codes, scales, zeros in zip(*parts, strict=True):
            yield replace(self, codes=codes, scales=scales, zeros=zeros)

    def to(self, device: torch.device) -> QuantisedRows:
        """On another device."""
        codes, scales, zeros = (one.to(device) for one in (self.codes, self.scales, self.zeros))
        return replace(self, codes=codes, scales=scales, zeros=zeros)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(one.untyped_storage().nbytes() for one in (self.codes, self.scales, self.zeros))


def groups_of(lengths: Sequence[int]) -> list[int]:
    """Groups that so many rows (or columns) make."""
    return [-(-length // GROUP) for length in lengths]


def _groups(
    lengths: Sequence[int], per_channel: bool, rows: torch.Tensor, *others: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of what belongs together: numbers (groups, up to 64, across), and scales, zeros (groups, 1, across).

    Of `others` the first two have an entry a group, further ones an entry a number, as `rows`.
    """
    spans = list(lengths) if per_channel else [rows.shape[1]]
    flat = [one if per_channel else one.t() for one in (rows, *others)]
    cuts = [groups_of(spans) if place in (1, 2) else spans for place in range(len(flat))]
    for parts in zip(*(one.split(cut) for one, cut in zip(flat, cuts, strict=True)), strict=True):
        whole = len(parts[0]) // GROUP
        first, rest = [], []
        for place, part in enumerate(parts):
            if place in (1, 2):
                first.append(part[:whole, None])
                rest.append(part[whole:, None])
            else:
                first.append(part[: whole * GROUP].unflatten(0, (whole, GROUP)))
                rest.append(part[whole * GROUP :][None])
        if whole:
            yield tuple(first)
        if rest[0].shape[1]:
            yield tuple(rest)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes of 4 bits in a byte: (n, width) to (n, width / 2 rounded up)."""
    half = -(-codes.shape[1] // 2)
    packed = codes[:, :half].clone()
    packed[:, : codes.shape[1] - half] |= codes[:, half:] << 4
    return packed
