"""What the layers of a compressed cache hold, counted."""

from __future__ import annotations

from typing import Any

import torch

from .._compat import layer_tensors
from .layers import KVzipLayer
from .ragged import Ragged


class Sizes:
    """Counts of a cache with `layers`."""

    layers: list[Any]

    @property
    def device(self) -> torch.device:
        """Where the kept pairs are."""
        return self._contexts()[0].device

    @property
    def scored_layers(self) -> list[int]:
        """Indices of the layers that were scored and evicted."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, KVzipLayer)]

    @property
    def stored_lengths(self) -> list[list[int]]:
        """Kept pairs of the context per scored layer and KV head, prefix included; of several contexts, one after the other."""
        return [list(context.lengths) for context in self._contexts()]

    @property
    def context_nbytes(self) -> int:
        """Bytes of the compressed context in the scored layers, prefix, scales and zeros included."""
        return sum(context.nbytes for context in self._contexts())

    @property
    def full_context_nbytes(self) -> int:
        """Bytes the same layers held before eviction, in the model's dtype (several contexts: padded to the longest)."""
        return sum(context.full_nbytes for context in self._contexts())

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held: compressed context, sliding windows, and this fork's own tail."""
        dense = [tensor for layer in self.layers for tensor in layer_tensors(layer)]
        return self.context_nbytes + sum(tensor.untyped_storage().nbytes() for tensor in dense)

    @property
    def full_nbytes(self) -> int:
        """`nbytes` had nothing been evicted."""
        return self.nbytes - self.context_nbytes + self.full_context_nbytes

    def _contexts(self) -> list[Ragged]:
        return [layer.context for layer in self.layers if isinstance(layer, KVzipLayer)]
