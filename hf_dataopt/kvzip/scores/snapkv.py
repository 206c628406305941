"""SnapKV: what the last tokens of the context look at, smoothed over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import avg_pool1d

from ...settings import settle
from ..score import Looks, Positions, Score, ScoredLayer
from ..weights import over_group, total


@dataclass(frozen=True)
class SnapKV(Score):
    """Mean attention of an observation window at the context's end, pooled over neighbouring keys; the window itself stays.

    Args:
        window (`int`, tokens, >= 1, default 64): queries that are looked at, and pairs that stay in any case.
        kernel (`int`, tokens, odd, default 5): width of the pooling.

    Returns:
        (KV heads, n) float32 in [0, 1]; 1 inside of the window.

    Source: SnapKV (arXiv:2404.14469), with the window at the end of the context instead of the question: the query-agnostic
        setting of section 8.4.1.
    Differs: averaged over the query heads of a group, since pairs are evicted before they are repeated; average pooling, as in
        NVIDIA/kvpress.
    Cost: a forward over the window alone (over the context, where layers have windows or states of their own).
    """

    looks_at: ClassVar[Looks] = "context"
    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        settle(self, counts={"window": 1, "kernel": 1})
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}; it is centred on a key")

    @property
    def last(self) -> int:
        """The window."""
        return self.window

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """Pooled means in front of the window, 1 in it."""
        outside = int((positions.keys < positions.queries[0]).sum())
        found = torch.ones(keys.shape[:2], device=keys.device)
        if outside:
            weights = total(layer, queries, keys, positions)[:, :outside] / queries.shape[1]
            pooled = avg_pool1d(weights[None], self.kernel, stride=1, padding=self.kernel // 2)[0]
            found[:, :outside] = over_group(pooled, keys.shape[0], "mean").clamp_(max=1)
        return found
