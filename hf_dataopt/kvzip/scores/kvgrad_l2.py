"""KVgrad with a length where it has a maximum; see `kvzip_l2`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..score import Positions, ScoredLayer
from ..weights import length, output_norms, over_group
from .kvgrad import KVgrad


@dataclass(frozen=True)
class KVgradL2(KVgrad):
    """Root of the sum of squares of `A ||W_O v|| ||dPhi/da||` over the query heads of a group and all queries.

    Returns:
        (KV heads, n) float32, >= 0; at least KVgrad's score.

    Source: ours, from KVgrad; `benchmarks/README.md` has them side by side.
    Cost: KVgrad's.
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
        assert layer.gradient is not None  # noqa: S101 - `gradients` asks for it
        found = length(layer, queries, keys, layer.gradient.log()) * output_norms(layer, values, queries.shape[0])
        return over_group(found, keys.shape[0], "length")
