"""Group quantisation written out a number at a time, without packing."""

from __future__ import annotations

import torch

GROUP = 64


def stepped(numbers: list[float], levels: int) -> list[float]:
    """Numbers on the grid between the smallest and the largest of them; step and start have 16 bits."""
    start = torch.tensor(min(numbers)).half().float()
    step = ((torch.tensor(max(numbers)) - start) / (levels - 1)).half().float()
    if step <= 0:
        return [float(start)] * len(numbers)
    codes = [min(max(round(float((torch.tensor(x) - start) / step)), 0), levels - 1) for x in numbers]
    return [float(start + step * code) for code in codes]


def around_zero(numbers: list[float], levels: int) -> list[float]:
    """Numbers on a grid from as far below 0 as above it; the step has 16 bits."""
    step = (torch.tensor(max(map(abs, numbers))) / ((levels - 1) / 2)).half().float()
    if step == 0:
        return [0.0] * len(numbers)
    middle = (levels - 1) / 2
    codes = [min(max(round(float(torch.tensor(x) / step + middle)), 0), levels - 1) for x in numbers]
    return [float(step * (code - middle)) for code in codes]


def values_as_stored(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, v): every token by itself, in groups of 64 channels."""
    found = torch.zeros(rows.shape)
    for place, row in enumerate(rows.tolist()):
        found[place] = torch.tensor(
            [y for start in range(0, len(row), GROUP) for y in around_zero(row[start : start + GROUP], 2**bits)]
        )
    return found


def keys_as_stored(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, d) of one head: every channel by itself, in groups of 64 tokens.

    With 4 bits, a quarter of the channels (an even number of them) has 6, those of the widest groups, and a quarter 2.
    """
    n, width = rows.shape
    pieces = [rows[start : start + GROUP] for start in range(0, n, GROUP)]
    spread = [
        sum(len(piece) * float(piece[:, c].max() - piece[:, c].min()) ** 2 for piece in pieces) for c in range(width)
    ]
    ranked = sorted(range(width), key=lambda c: -spread[c])
    quarter = 2 * (width // 8) if bits == 4 else 0
    found = torch.zeros(n, width)
    for place, c in enumerate(ranked):
        mine = bits + 2 * (place < quarter) - 2 * (place >= width - quarter)
        column = [y for piece in pieces for y in stepped(piece[:, c].tolist(), 2**mine)]
        found[:, c] = torch.tensor(column)
    return found
