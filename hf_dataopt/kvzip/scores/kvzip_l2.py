"""KVzip with a length where Eq. 8.2 has a maximum: pairs that are looked at again and again count for more."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..score import Positions, Score, ScoredLayer
from ..weights import length, over_group


@dataclass(frozen=True)
class KVzipL2(Score):
    """Root of the sum of squared attentions over the query heads of a group and all queries of the repeat input.

    A maximum forgets whether one token of the repeat input needed the pair or many; with small budgets it matters.

    Returns:
        (KV heads, n) float32, >= 0; at least KVzip's score.

    Source: ours, from Eq. 8.2; `benchmarks/README.md` has it beside KVzip and KVgrad.
    Cost: KVzip's.
    """

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """The length over queries, then over the group."""
        return over_group(length(layer, queries, keys), keys.shape[0], "length")
