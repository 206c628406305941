"""How many bytes of keys and values a block of code holds at most; for tests and benchmarks."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakOfPairs(TorchDispatchMode):
    """The most bytes of cached keys and values that were alive at once, told from other tensors by their shape.

    Args:
        width: of keys and values.
        heads: that are cached.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads, self.bytes = width, heads, 0
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.shape[-1:] == (self.width,) and self._cached(found):
            self._alive.append(weakref.ref(found))
            alive = [tensor for tensor in (one() for one in self._alive) if tensor is not None]
            self._alive = [weakref.ref(tensor) for tensor in alive]
            storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in alive}
            self.bytes = max(self.bytes, sum(storages.values()))
        return found

    def _cached(self, found: torch.Tensor) -> bool:
        return found.ndim == 2 or (found.ndim == 4 and found.shape[1] == self.heads)
