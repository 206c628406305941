"""What training runs share: how long and at which learning rate, and a base model in half precision."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch

WARM = 0.03  # share of the run with a rising rate


class Pace:
    """Warm-up and a cosine over a run: over its steps, or over seconds where those are over sooner.

    Args:
        steps: at most.
        seconds: of wall time at most; 0 for no such end.
        spent: seconds that an earlier part of the run took.
    """

    def __init__(self, steps: int, seconds: float = 0.0, spent: float = 0.0) -> None:
        self.steps, self.seconds, self._begun = steps, seconds, time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds since the run began, earlier parts of it included."""
        return time.monotonic() - self._begun

    def progress(self, step: int) -> float:
        """Share of the run that is over before step `step` (from 0); 1 and more is the end."""
        return max(step / self.steps, self.spent / self.seconds if self.seconds else 0.0)

    def scale(self, step: int) -> float:
        """Share of the highest learning rate at step `step`."""
        done = self.progress(step)
        return min((done + 1 / self.steps) / WARM, 0.5 * (1 + math.cos(math.pi * min(1.0, done))), 1.0)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A copy with weights of that dtype; buffers, rotary frequencies above all, stay in theirs."""
    copied = copy.deepcopy(model).to(dtype)
    for mine, theirs in zip(copied.modules(), model.modules(), strict=True):
        for name, buffer in theirs.named_buffers(recurse=False):
            setattr(mine, name, buffer.clone())
    return copied
