"""How work is split over processes: one place that asks which process this is."""

import os


def world_size() -> int:
    """Number of processes started by `accelerate launch` or `torchrun`; 1 outside of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Index of this process among `world_size()`."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process shows progress, logs and writes the results."""
    return rank() == 0


def shard(n_items: int, index: int | None = None, count: int | None = None) -> range:
    """The items of one process, dealt round robin so that uneven items spread.

    Args:
        n_items: number of items over all processes.
        index: process, default `rank()`.
        count: processes, default `world_size()`.

    Returns:
        Indices `index, index + count, ...` below `n_items`.
    """
    return range(rank() if index is None else index, n_items, world_size() if count is None else count)
