"""DuoAttention: some heads keep the whole context, the others their sinks and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...settings import settle
from ..score import Looks, Positions, Score, ScoredLayer
from ..weights import total


@dataclass(frozen=True)
class DuoAttention(Score):
    """Heads that look far keep everything, head by head as the budget grows; sinks and recent window stay in all heads.

    A head looks far as much as its queries attend to pairs that are neither sinks nor within the window before the query.

    Args:
        sinks (`int`, tokens, >= 0, default 64): at the start of the cache; those of the prompt before the context count.
        recent (`int`, tokens, >= 0, default 256): at the context's end.

    Returns:
        (KV heads, n) float32 in [0, 1], one number a head, 1 for sinks and window; for `level="pair"`.

    Source: DuoAttention (arXiv:2410.10819), sizes of its deployment; the query-agnostic setting of section 8.4.1.
    Differs: its authors learn one number a head on made-up passkeys, for hours; here it is read off the context's own
        attention. `head_scores` makes KVzip's static scores of heads, and `level="head"` keeps sinks and window by them.
    Cost: one more forward over the context.
    """

    looks_at: ClassVar[Looks] = "context"
    sinks: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        settle(self, counts={"sinks": 0, "recent": 0})

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """One number a head, 1 for what always stays."""
        far = total(layer, queries, keys, positions, beyond=self.recent)
        far = far[:, positions.keys >= self.sinks].sum(dim=1) / queries.shape[1]
        found = far.reshape(keys.shape[0], -1).amax(dim=1).clamp_(max=1 - 1e-6)[:, None].repeat(1, keys.shape[1])
        stays = (positions.keys < self.sinks) | (positions.keys > positions.keys[-1] - self.recent)
        return found.masked_fill_(stays, 1.0)
