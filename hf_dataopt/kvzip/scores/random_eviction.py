"""Random eviction: what any score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...seeding import generator
from ...settings import MOST_SEED, settle
from ..score import Looks, Positions, Score, ScoredLayer


@dataclass(frozen=True)
class RandomEviction(Score):
    """Uniform random scores, each layer and head on its own.

    Args:
        seed (`int`, >= 0, default 0): of the stream; every layer draws from one of its own.

    Returns:
        (KV heads, n) float32 in [0, 1).

    Source: none; the least that a table of scores is read against.
    Cost: none.
    """

    looks_at: ClassVar[Looks] = "nothing"
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, counts={"seed": (0, MOST_SEED)})

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """Numbers of the layer's own stream."""
        return torch.rand(keys.shape[:2], generator=generator(self.seed, worker=layer.index))
