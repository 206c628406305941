"""Keys and values of what comes after a context: appended in place, in memory that grows by blocks.

transformers' own layer copies all of it for every token. Here copies of a cache share the memory for as long as one of them
alone goes on; who comes second, or goes back and on again, takes memory of its own.
"""

from __future__ import annotations

import threading

import torch

from .decode_cpu import append_token

# tokens by which memory grows
_BLOCK = 64
_CLAIM = threading.Lock()


class Tail:
    """Room for the keys and values of one layer's tail.

    Args:
        keys: (B, KV heads, room, d), values: (B, KV heads, room, v).
        used: tokens that somebody has written, from the start on.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, used: int) -> None:
        self.keys, self.values, self.used = keys, values, used

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, more: int) -> Tail:
        """The tokens that there are, and room for `more` in whole blocks."""
        held = keys.shape[2]
        room = -(-(held + more) // _BLOCK) * _BLOCK
        made = [one.new_empty(*one.shape[:2], room, one.shape[3]) for one in (keys, values)]
        for new, old in zip(made, (keys, values), strict=True):
            new[:, :, :held] = old
        return cls(made[0], made[1], held)

    def claim(self, held: int, keys: torch.Tensor) -> bool:
        """Take the room behind `held` tokens for `keys` (B, KV heads, q, d): False where another has it or none is left."""
        end = held + keys.shape[2]
        if end > self.keys.shape[2] or keys.shape[0] != self.keys.shape[0]:
            return False
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        with _CLAIM:
            if self.used != held:
                return False
            self.used = end
        return True

    def write(self, held: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what was claimed, and return views of all tokens."""
        new = keys.shape[2]
        if not append_token((self.keys, self.values), held, keys, values):
            self.keys.narrow(2, held, new).copy_(keys)
            self.values.narrow(2, held, new).copy_(values)
        return self.keys.narrow(2, 0, held + new), self.values.narrow(2, 0, held + new)
