"""Keys and values in 8 or 4 bits: every group of up to 64 numbers has a scale of its own, in 16 bits.

Keys are grouped over tokens, channel by channel, and values over channels, token by token (the axes of KIVI, Liu et al. 2024):
channels of keys differ in size and place by far more than those of values. So groups of keys have a zero too, in 16 bits, and
those of values, which lie around 0, none. transformers' quantised caches (HQQ, quanto) take whole tensors, in which groups
would run over from one head's pairs into the next one's; here no group leaves its head.

Of a key's error, most comes from its few largest channels. With 4 bits a number, the quarter of a head's channels with the
widest ranges has 6, and the quarter with the narrowest has 2 (bit allocation of transform coding): answers are twice as close
to those of the cache before, in the same bytes (`benchmarks/README.md`).
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
_LARGEST = 65_000.0  # of 16 bits, with room for what rounding adds


@dataclass(frozen=True)
class QuantisedRows:
    """Rows of several heads, one head after the other: number = zero + scale * code, of values scale * (code - most / 2).

    Args:
        codes: (n, bytes of a row) uint8, see `_packed`.
        scales: float16; of keys (groups, width), a group being up to 64 rows of one head, in order; of values (n, groups), up
            to 64 columns.
        zeros: of keys as scales, of values (n, 0).
        order: (heads, width) int16, of keys in 4 bits: the channels by their range, the widest first, in which codes, scales
            and zeros have them. Of others (heads, 0): as they are.
        width: numbers in a row.
        bits: 8 or 4, in the mean.
        per_channel: True for keys, False for values.
        dtype: of the numbers.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    order: torch.Tensor
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
            The codes. A number comes back within half a step, a step being the range of its group over its levels less one,
            and what 16 bits leave of scale and zero.

        Raises:
            ValueError: numbers that 16 bits do not hold.

        Source: asymmetric round to nearest; the axes are KIVI's.
        Differs: bits by channel, as above.
        Cost: a few passes over the rows, once.
        """
        width, largest = rows.shape[1], float(rows.abs().max()) if rows.numel() else 0.0
        if not largest <= _LARGEST:
            raise ValueError(
                f"keys or values of up to {largest:.3g} do not fit the 16-bit scales of storage='int{bits}'; keep them as the "
                "model makes them, storage='model'"
            )
        uneven = uneven_of(width, bits, per_channel)
        order, ordered = rows.new_empty(len(lengths), width if uneven else 0, dtype=torch.int16), rows
        if uneven:
            parts = list(rows.split(list(lengths)))
            for head, part in enumerate(parts):
                order[head] = _spread(part).argsort(descending=True, stable=True)
                parts[head] = part.index_select(1, order[head].int())
            ordered = torch.cat(parts)
        shape = _scales_shape(lengths, width, per_channel)
        scales, zeros = rows.new_zeros(shape, dtype=_SCALES), rows.new_zeros(shape, dtype=torch.float32)
        codes = rows.new_zeros(rows.shape, dtype=torch.uint8)
        most = _levels(width, bits, uneven).to(rows.device)
        for (block, code), (scale, zero) in _groups(lengths, per_channel, (ordered, codes), (scales, zeros)):
            low, high = (one.float() for one in block.aminmax(dim=1, keepdim=True))
            if per_channel:
                zero.copy_(low.to(_SCALES))
                scale.copy_(((high - zero) / most).clamp_(min=0))
            else:
                scale.copy_(torch.maximum(high, -low) * 2 / most)
                zero.copy_(_middle(scale, most))
            step = scale.float().masked_fill(scale == 0, 1)
            code.copy_(torch.minimum(((block.float() - zero) / step).round_().clamp_(min=0), most))
        held = zeros.to(_SCALES) if per_channel else zeros.new_empty(len(rows), 0, dtype=_SCALES)
        return cls(_packed(codes, bits, uneven), scales, held, order, width, bits, per_channel, rows.dtype)

    @classmethod
    def read(
        cls,
        tensors: dict[str, torch.Tensor],
        lengths: Sequence[int],
        width: int,
        bits: int,
        *,
        per_channel: bool,
        dtype: torch.dtype,
    ) -> QuantisedRows:
        """What `tensors` gave, after a look at it.

        Args:
            tensors: codes, scales, and zeros and order where there are any; finite.
            lengths, width, bits, per_channel, dtype: of the rows that they must be.

        Raises:
            KeyError, ValueError: tensors that no rows of these sizes make, or numbers that attention cannot take.
        """
        uneven, n = uneven_of(width, bits, per_channel), sum(lengths)
        shape = _scales_shape(lengths, width, per_channel)
        order = tensors["order"] if uneven else torch.empty(len(lengths), 0, dtype=torch.int16)
        zeros = tensors["zeros"] if per_channel else torch.empty(n, 0, dtype=_SCALES)
        found = cls(tensors["codes"], tensors["scales"], zeros, order, width, bits, per_channel, dtype)
        needed = {
            "codes": (torch.uint8, (n, _row_bytes(width, bits, uneven))),
            "scales": (_SCALES, shape),
            "zeros": (_SCALES, shape if per_channel else (n, 0)),
            "order": (torch.int16, (len(lengths), width if uneven else 0)),
        }
        for name, one in found.tensors.items():
            if (one.dtype, tuple(one.shape)) != needed[name]:
                raise ValueError(f"{name} are {one.dtype} {tuple(one.shape)}, needed are {needed[name]!r}")
        if uneven and not bool((order.sort(dim=1).values == torch.arange(width)).all()):
            raise ValueError("an order of channels that leaves some out")
        scales, most = found.scales.float(), _levels(width, bits, uneven)
        largest = found.zeros.float().abs() + scales * most if per_channel else -_middle(scales, most)
        if bool((scales < 0).any() | (largest > torch.finfo(_SCALES).max).any()):
            raise ValueError("scales below 0, or numbers that are too large")
        return found

    def opened(self, lengths: Sequence[int]) -> torch.Tensor:
        """The numbers again, (n, width) in their dtype; `lengths` as in `of`."""
        rows = self._unpacked()
        scales = self.scales.float()
        zeros = self.zeros.float() if self.per_channel else _middle(scales, 2.0**self.bits - 1)
        for (block,), (scale, zero) in _groups(lengths, self.per_channel, (rows,), (scales, zeros)):
            torch.addcmul(zero, block, scale, out=block)
        rows = rows.to(self.dtype)
        if not self.order.shape[1]:
            return rows
        back = self.order.argsort(dim=1)
        parts = zip(rows.split(list(lengths)), back, strict=True)
        return torch.cat([part.index_select(1, columns) for part, columns in parts])

    def heads(self, lengths: Sequence[int]) -> Iterator[QuantisedRows]:
        """Each head's rows, as views."""
        counts = list(lengths)
        per_scale = groups_of(counts) if self.per_channel else counts
        for codes, scales, zeros, order in zip(
            self.codes.split(counts),
            self.scales.split(per_scale),
            self.zeros.split(per_scale),
            self.order.split(1),
            strict=True,
        ):
            yield replace(self, codes=codes, scales=scales, zeros=zeros, order=order)

    def to(self, device: torch.device) -> QuantisedRows:
        """On another device."""
        codes, scales, zeros, order = (one.to(device) for one in self.tensors.values())
        return replace(self, codes=codes, scales=scales, zeros=zeros, order=order)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is held, by name."""
        return {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "order": self.order}

    def _unpacked(self) -> torch.Tensor:
        """Codes (n, width) as float32."""
        rows = torch.empty(len(self.codes), self.width, device=self.codes.device)
        if self.bits == 8:
            return rows.copy_(self.codes)
        uneven = uneven_of(self.width, self.bits, self.per_channel)
        narrow = self.width - uneven  # where the channels of 2 bits begin
        half = -(-narrow // 2)
        rows[:, :narrow] = _unpacked(self.codes[:, :half], 2)[:, :narrow]
        if uneven:
            twos = _unpacked(self.codes[:, half:], 4)
            rows[:, :uneven].add_(twos[:, :uneven], alpha=16)
            rows[:, narrow:] = twos[:, uneven:]
        return rows


def groups_of(lengths: Sequence[int]) -> list[int]:
    """Groups that so many rows (or columns) make."""
    return [-(-length // GROUP) for length in lengths]


def uneven_of(width: int, bits: int, per_channel: bool) -> int:
    """Channels that have 6 bits, and as many that have 2, where 4 is the mean: a quarter, in twos."""
    return 2 * (width // 8) if bits == 4 and per_channel else 0


def _row_bytes(width: int, bits: int, uneven: int) -> int:
    """Bytes of the codes of a row."""
    return width if bits == 8 else -(-(width - uneven) // 2) + uneven // 2


def _scales_shape(lengths: Sequence[int], width: int, per_channel: bool) -> tuple[int, int]:
    """Of scales, and of zeros."""
    return (sum(groups_of(lengths)), width) if per_channel else (sum(lengths), groups_of([width])[0])


def _levels(width: int, bits: int, uneven: int) -> torch.Tensor:
    """The largest code of every column, (width,) float32; one for all where they are alike."""
    if not uneven:
        return torch.tensor(2.0**bits - 1)
    return torch.tensor([63.0] * uneven + [15.0] * (width - 2 * uneven) + [3.0] * uneven)


def _middle(scales: torch.Tensor, most: torch.Tensor | float) -> torch.Tensor:
    """Where code 0 stands, if the middle of the codes stands for 0."""
    return scales.float() * most / -2


def _spread(rows: torch.Tensor) -> torch.Tensor:
    """How far each channel's groups range, (width,) float32: the root of the mean square, rows counted alike."""
    found = torch.zeros(rows.shape[1], device=rows.device)
    for (block,), _ in _groups([len(rows)], True, (rows,), ()):
        low, high = (one.float() for one in block.aminmax(dim=1))
        found += (high - low).square().sum(0) * block.shape[1]
    return found


def _groups(
    lengths: Sequence[int], per_channel: bool, numbers: Sequence[torch.Tensor], per_group: Sequence[torch.Tensor]
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Views of what belongs together: numbers (groups, up to 64, across), and scales and the like (groups, 1, across).

    Args:
        lengths, per_channel: as in `QuantisedRows.of`.
        numbers: tensors (n, width).
        per_group: tensors as `QuantisedRows.scales`.
    """
    if not per_channel:
        numbers, per_group = [one.t() for one in numbers], [one.t() for one in per_group]
        lengths = [len(numbers[0])]
    start = group = 0
    for length in lengths:
        whole, end = length // GROUP, start + length
        first, rest = slice(group, group + whole), slice(group + whole, group + groups_of([length])[0])
        if whole:
            full = [one[start : start + whole * GROUP].unflatten(0, (whole, GROUP)) for one in numbers]
            yield full, [one[first, None] for one in per_group]
        if length % GROUP:
            yield [one[start + whole * GROUP : end][None] for one in numbers], [one[rest, None] for one in per_group]
        start, group = end, rest.stop


def _unpacked(codes: torch.Tensor, places: int) -> torch.Tensor:
    """Bytes (n, m) as (n, places * m): what all of them have in the lowest bits, then in the next ones, and so on."""
    bits = 8 // places
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return ((codes[:, None] >> shifts[:, None]) & (2**bits - 1)).flatten(1)


def _packed(codes: torch.Tensor, bits: int, uneven: int) -> torch.Tensor:
    """Codes (n, width) in bytes.

    With 8 bits as they are. With 4, columns up to those of 2 bits have their low four bits in nibbles, the first half of them
    in the low ones; then, four to a byte, a quarter of these bytes' worth of columns a place: what columns of 6 bits have
    beyond, in two places, and columns of 2 bits, in two more.
    """
    if bits == 8:
        return codes
    narrow = codes.shape[1] - uneven
    half = -(-narrow // 2)
    low = codes[:, :half] & 15
    low[:, : narrow - half] |= codes[:, half:narrow] << 4
    if not uneven:
        return low
    twos = torch.cat([codes[:, :uneven] >> 4, codes[:, narrow:]], dim=1).chunk(4, dim=1)
    return torch.cat([low, twos[0] | twos[1] << 2 | twos[2] << 4 | twos[3] << 6], dim=1)
