"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...settings import settle
from ..score import Looks, Positions, Score, ScoredLayer


@dataclass(frozen=True)
class StreamingLLM(Score):
    """The first tokens of the cache stay, then the last ones of the context.

    Args:
        sinks (`int`, tokens, >= 0, default 4): at the start of the cache; those of the prompt before the context count.

    Returns:
        (KV heads, n) float32 in (0, 1], every head alike.

    Source: StreamingLLM (arXiv:2309.17453); the prompt before the context stays whole, as everywhere in KVzip.
    Differs: keys keep the positions they were rotated to; nothing is rolled on while answering.
    Cost: none.
    """

    looks_at: ClassVar[Looks] = "nothing"
    sinks: int = 4

    def __post_init__(self) -> None:
        settle(self, counts={"sinks": 0})

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """Position over length, 1 for the sinks."""
        n = int(positions.keys[-1]) + 2
        return ((positions.keys + 1) / n).masked_fill(positions.keys < self.sinks, 1.0).expand(keys.shape[:2])
