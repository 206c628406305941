"""KVgrad: how much each pair moves the last hidden states while the model repeats the context, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..score import Positions, Score, ScoredLayer
from ..weights import output_norms, over_group, strongest


@dataclass(frozen=True)
class KVgrad(Score):
    """`max A ||W_O v|| ||dPhi/da||` over the query heads of a group and all queries of the repeat input.

    `a` is what the layer's attention writes into the residual stream for the query, and `Phi` the sum of squared lengths of
    the hidden states behind the last layer: one backward pass for each chunk gives all gradients.

    Returns:
        (KV heads, n) float32, >= 0.

    Source: KVgrad (openreview.net/forum?id=cg1wTCJjjk), as NVIDIA/kvpress has it in `KVgradPress`.
    Differs: the whole prompt before the context counts as its sinks; `replay` and `chunk_size` are the config's (its authors
        repeat chunks of 512 with the whole cache in sight); softmax in float32. Not for weights that accelerate keeps on disk.
    Cost: KVzip's pass with a backward pass through the model's activations, and the activations of one repeat input in memory.
    """

    modules: ClassVar[bool] = True
    gradients: ClassVar[bool] = True

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """KVzip's maximum, weighted by the gradient of each query and the length of each value."""
        assert layer.gradient is not None  # noqa: S101 - `gradients` asks for it
        found = strongest(layer, queries, keys, layer.gradient.log()) * output_norms(layer, values, queries.shape[0])
        return over_group(found, keys.shape[0])
