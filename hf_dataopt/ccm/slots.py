"""Slots of a memory's layers: bytes, averages, clearing, and a budget of slots that the oldest contexts share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..settings import check_int, optional

if TYPE_CHECKING:
    from .config import CCMConfig

_MOST = 2**16
Layers = list[tuple[torch.Tensor, torch.Tensor]]


def check_max_slots(config: CCMConfig, max_slots: Any) -> int | None:
    """A budget that memories of this adapter can have, or None.

    Raises:
        ValueError: out of range, no multiple of a context's slots, or a memory that does not grow.
        TypeError: no whole number.
    """
    most, tokens = optional(check_int, "max_slots", max_slots, 1, _MOST), config.num_comp_tokens
    if most is not None and not config.memory.startswith("concat"):
        raise ValueError(
            f"max_slots bounds a memory that grows; this adapter's, {config.memory!r}, has {tokens} slots always; leave it out"
        )
    if most is not None and most % tokens:
        raise ValueError(f"max_slots must be a multiple of the {tokens} slots of a context, got {most}")
    return most


def nbytes_of(layers: Layers) -> int:
    """Bytes of keys and values."""
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def average(old: torch.Tensor, new: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(1 - weight) * old + weight * new, computed in float32."""
    return (old.float() * (1 - weight) + new.float() * weight).to(old.dtype)


def cleared(states: torch.Tensor, users: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Some slots of states (B, KV heads, M, d), those of the users (B,) bool zeroed."""
    return states[:, :, slots.to(states.device)].masked_fill(users.to(states.device)[:, None, None, None], 0)


def oldest_merged(held: torch.Tensor, steps: torch.Tensor, tokens: int, most: int | None) -> OldestMerged | None:
    """What brings slots back within a budget of `most`, or None where they are."""
    return None if most is None or held.shape[1] <= most else OldestMerged(held, steps, tokens, most // tokens)


class OldestMerged:
    """Slots within a budget: a user's two oldest groups become one where a new group is one too many.

    The merged group is the mean of the contexts that it stands for, h(1) to h(n): Eq. 7.2 with a_n = 1/n over the oldest
    contexts, and the concatenation of the later ones behind it. Users that have room keep all; slots that nobody holds go.

    Args:
        held: (B, M) bool, oldest slots first, the new group last; at most one group more than `groups`.
        steps: (B,) int64, contexts that each user's slots stand for.
        tokens: slots of a group.
        groups: of a user at most.

    Attributes:
        held: (B, kept) bool.
    """

    def __init__(self, held: torch.Tensor, steps: torch.Tensor, tokens: int, groups: int) -> None:
        found = held.sum(1) // tokens
        self._full, self._tokens = found > groups, tokens
        first = torch.argsort((~held).long(), dim=1, stable=True)
        kept = torch.arange(int(found.clamp(max=groups).max()) * tokens, device=held.device)
        self._oldest = first[:, :tokens]
        self._taken = first.gather(1, kept + (self._full.long() * tokens)[:, None])
        # the newest `found - 1` groups are a context each; with the second-oldest, one more is in the oldest
        self._weight = 1 / (steps - found + 2).clamp(min=1)
        self.held = held.gather(1, self._taken)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values (B, KV heads, M, d) to (B, KV heads, kept, d)."""
        kept = _gathered(states, self._taken)
        oldest, second = _gathered(states, self._oldest), kept[:, :, : self._tokens]
        weight, full = (part.to(states.device)[:, None, None, None] for part in (self._weight, self._full))
        merged = torch.where(full, average(oldest, second, weight), second)
        return torch.cat([merged, kept[:, :, self._tokens :]], 2)


def _gathered(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    index = slots.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)
