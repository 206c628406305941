"""KVzip+: KVzip's attention, times what the pair's value adds, over what the query's layer was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..score import Positions, Score, ScoredLayer
from ..weights import output_norms, over_group, strongest


@dataclass(frozen=True)
class KVzipPlus(Score):
    """`max A ||W_O v|| / ||h||` over the query heads of a group and all queries of the repeat input.

    `h` is what the attention module is given for the query, `W_O v` what the value adds through its query head.

    Returns:
        (KV heads, n) float32, >= 0.

    Source: KVzip+ as NVIDIA/kvpress names it (`KVzipPress(kvzip_plus_normalization=True)`; arXiv:2601.07891, section 3).
    Differs: the whole prompt before the context counts as its sinks, as in KVzip; softmax in float32.
    Cost: KVzip's, and one output projection of as many rows as it has inputs.
    """

    modules: ClassVar[bool] = True

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """The same maximum, weighted by rows and by columns."""
        assert layer.given is not None  # noqa: S101 - `modules` asks for it
        rows = -layer.given.float().norm(dim=-1).log()
        found = strongest(layer, queries, keys, rows) * output_norms(layer, values, queries.shape[0])
        return over_group(found, keys.shape[0])
