"""Random streams: every stochastic function takes a `torch.Generator`, made here from (seed, epoch, rank, worker)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def generator(
    seed: int, *, epoch: int = 0, rank: int = 0, worker: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A generator whose stream depends on all four numbers and on nothing global.

    Args:
        seed: the user's seed, >= 0.
        epoch: pass over the data.
        rank: process of a distributed job.
        worker: loader worker.
        device: where the random numbers are drawn.

    Returns:
        A seeded `torch.Generator`.

    Raises:
        ValueError: one of the numbers is negative.
    """
    import numpy as np
    import torch

    if min(seed, epoch, rank, worker) < 0:
        raise ValueError(
            f"seed, epoch, rank and worker must be >= 0, got {(seed, epoch, rank, worker)}; use a non-negative seed"
        )
    state = np.random.SeedSequence([seed, epoch, rank, worker]).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state) & (2**63 - 1))
