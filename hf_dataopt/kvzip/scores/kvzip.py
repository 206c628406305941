"""KVzip: the most attention that a pair receives while the model repeats the context (Eq. 8.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..score import Positions, Score, ScoredLayer
from ..weights import over_group, strongest


@dataclass(frozen=True)
class KVzip(Score):
    """Maximum over the query heads of a group and over all queries of the repeat input.

    Returns:
        (KV heads, n) float32 in [0, 1].

    Source: Eq. 8.2, section 8.3.2.
    Differs: in float32 whatever the model's dtype, with the model's own logit scale, soft cap and sinks.
    Cost: one product of queries and keys beside the attention itself.
    """

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """Eq. 8.2 for one chunk; rounding may lift a weight of 1 a little above it."""
        return over_group(strongest(layer, queries, keys), keys.shape[0]).clamp_(max=1)
