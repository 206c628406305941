"""ExpectedAttention: the attention that queries yet to come are expected to pay, from the statistics of those that came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..._compat import Turn, rotary_of
from ...errors import UnsupportedModelError
from ...settings import settle
from ..score import Looks, Positions, Score, ScoredLayer
from ..weights import over_group


@dataclass(frozen=True)
class ExpectedAttention(Score):
    """`softmax(mu k + k' Sigma k / 2) ||v||`, with queries taken for normal and turned to the positions ahead.

    `mu` and `Sigma` are mean and covariance of the context's queries before their rotation, turned by the mean rotation of the
    next `ahead` positions, each times the logit scale.

    Args:
        ahead (`int`, tokens, >= 1, default 512): positions behind the context that are averaged over.
        sinks (`int`, tokens, >= 0, default 4): at the start of the cache, left out of the statistics and kept.

    Returns:
        (KV heads, n) float32, >= 0.

    Source: ExpectedAttention of NVIDIA/kvpress (arXiv:2510.00636).
    Differs: queries are turned back by the model's own rotary embedding, so that norms before it (Qwen3, Gemma 3) are no
        obstacle; the softmax runs over the context alone, without the prompt before it.
    Cost: one more forward over the context, and O(H n d^2).
    """

    looks_at: ClassVar[Looks] = "context"
    modules: ClassVar[bool] = True
    ahead: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        settle(self, counts={"ahead": 1, "sinks": 0})

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """Expected attention times the value's length; the sinks get the most."""
        mean, covariance = self._statistics(layer, queries, positions)
        scale, heads = layer.rules.scale, queries.shape[0]
        repeated = keys.float().repeat_interleave(heads // keys.shape[0], dim=0)
        logits = (repeated @ mean[..., None])[..., 0] * scale
        logits += ((repeated @ covariance) * repeated).sum(dim=-1) * (scale**2 / 2)
        sinks = positions.keys < self.sinks
        weights = logits.masked_fill(sinks, float("-inf")).softmax(dim=-1).nan_to_num()
        found = over_group(weights, keys.shape[0], "mean") * values.float().norm(dim=-1)
        return torch.where(sinks, found.amax(), found)

    def _statistics(
        self, layer: ScoredLayer, queries: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (H, d) and covariance (H, d, d) of queries at the positions ahead."""
        turn = rotary_of(layer.decoder, layer.module, layer.index)
        if turn is None:
            raise UnsupportedModelError(
                f"the rotary embedding of layer {layer.index} cannot be seen, so its queries cannot be turned to other "
                "positions; use score='h2o' or 'kvzip'"
            )
        counted = positions.queries >= self.sinks
        counted = counted if bool(counted.any()) else torch.ones_like(counted)
        plain = turn(queries[:, counted].float(), positions.queries[counted], True)
        mean = plain.mean(dim=1)
        centred = plain - mean[:, None]
        covariance = centred.transpose(1, 2) @ centred / plain.shape[1]
        end = int(positions.keys[-1]) + 1
        after = torch.arange(end, end + self.ahead, device=queries.device)
        # the mean rotation, from what it makes of every axis
        axes = torch.eye(plain.shape[-1], device=queries.device)
        rotation = _mean_rotation(turn, axes, after)
        return mean @ rotation.T, rotation @ covariance @ rotation.T


def _mean_rotation(turn: Turn, axes: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """(d, d), the mean over positions of the matrix R with `turned = R plain`."""
    repeated = axes[:, None].expand(-1, len(after), -1)  # (d, positions, d): every axis at every position
    return turn(repeated, after, False).mean(dim=1).T
