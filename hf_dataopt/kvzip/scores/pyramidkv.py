"""PyramidKV: SnapKV's order of pairs under budgets that shrink from the first layer to the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...settings import settle
from ..score import Positions, ScoredLayer
from .h2o import ranks
from .snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Budgets fall linearly from layer to layer, the heads of one layer share alike, and SnapKV says which pairs they keep.

    The first layer's share of the mean budget is 2 - 1 / beta, the last one's 1 / beta. A pair's rank in its head over its
    layer's share is the budget from which on it is kept; with `level="pair"` the cut over all layers keeps that many.

    Args:
        window, kernel: see `SnapKV`; the window stays in every layer, on top of the pyramid.
        beta (`int`, >= 1, default 20): steepness.

    Returns:
        (KV heads, n) float32 <= 0, 0 inside of the window.

    Source: PyramidKV (arXiv:2406.02069), section 4; beta as in NVIDIA/kvpress.
    Differs: where the first layers' budgets exceed the context, what is over goes to all other layers by their shares; the
        reference draws a new line. Use `level="pair"`: `"pair-uniform"` would give every layer as much, which is SnapKV.
    Cost: SnapKV's.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, counts={"beta": 1})

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """Minus rank over share."""
        found = super().__call__(layer, queries, keys, values, positions)
        outside = int((positions.keys < positions.queries[0]).sum())
        least = 1 / self.beta
        steps = layer.place / max(layer.count - 1, 1)
        share = 2 - least - steps * (2 - 2 * least) if layer.count > 1 else 1.0
        result = torch.zeros_like(found)
        result[:, :outside] = -(ranks(found[:, :outside]).float() + 1) / share
        return result
