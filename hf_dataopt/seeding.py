"""Random streams: every stochastic function takes a `torch.Generator`, made here from (seed, epoch, rank, worker)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .settings import check_device, check_int

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
        TypeError: one of them is no whole number.
    """
    import numpy as np
    import torch

    numbers = {"seed": seed, "epoch": epoch, "rank": rank, "worker": worker}
    found = [check_int(name, value, 0, 2**64 - 1) for name, value in numbers.items()]
    check_device("device", device)
    state = np.random.SeedSequence(found).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state) & (2**63 - 1))


@contextmanager
def layers_draw_from(generator: torch.Generator, device: torch.device | None = None) -> Iterator[None]:
    """Within the block, what draws from the global stream (new layers, dropout) depends on `generator` alone.

    Args:
        generator: gives the seed.
        device: whose stream is seeded beside the CPU's; restored afterwards like it.
    """
    import torch

    seed = int(torch.randint(2**62, (), generator=generator))
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(devices[0]):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def global_streams_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's global streams are after the block what they were before it.

    For code of others that seeds them or draws from them: `Trainer` seeds all three, and new layers draw from torch's.
    """
    import random

    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - read, never drawn from
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
