"""H2O: half of the budget for heavy hitters, half for what came last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..score import Looks, Positions, Score, ScoredLayer
from ..weights import over_group, total


@dataclass(frozen=True)
class H2O(Score):
    """Pairs with the most accumulated attention, and the most recent ones, turn by turn.

    Each head ranks its pairs twice, by the attention that the context's own queries paid to them, summed, and by position; the
    better of the two ranks counts. Whatever the budget, half of it goes to either kind, and every head keeps as much.

    Returns:
        (KV heads, n) float32, whole numbers <= 0: minus the better rank.

    Source: H2O (arXiv:2306.14048), in the query-agnostic setting of section 8.4.1.
    Differs: the sum is taken once over the whole context, not greedily while it is read, and averaged over the query heads of
        a group, since pairs are evicted before they are repeated. As in its paper every head keeps as much; the text gives
        all methods one budget over all heads.
    Cost: one more forward over the context.
    """

    looks_at: ClassVar[Looks] = "context"

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """Minus the better of two ranks."""
        heavy = over_group(total(layer, queries, keys, positions), keys.shape[0], "mean")
        recent = positions.keys.to(heavy).expand_as(heavy)
        return -torch.minimum(ranks(heavy), ranks(recent)).float()


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Place of each entry in its row (rows, n), 0 for the highest; earlier entries first among equals."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
