"""How work is split: over processes, and into halves where a device runs out of memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")
Undo = Callable[[], None]


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


def sum_over_processes(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum of tensors of one shape over the processes of `accelerate launch` or `torchrun`, on the CPU.

    Args:
        values: of this process; float64 or int64.
        device: of this process's other work.
    """
    if world_size() == 1:
        return values
    import torch.distributed
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    moved = values.to(state.device)
    torch.distributed.all_reduce(moved)
    return moved.cpu()


def rows_of(
    inputs: Mapping[str, torch.Tensor], start: int, stop: int, total: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Rows of a model's inputs on its device, floating ones in its dtype; inputs that are not of `total` rows go whole."""
    part = {name: value[start:stop] if value.ndim and len(value) == total else value for name, value in inputs.items()}
    return {name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in part.items()}


class Room:
    """How much of some work a device takes at a time: all that is asked for, until it runs out of memory; then halves.

    What fitted is remembered from call to call, but not in a copy or a pickle: another device may have other room.

    Args:
        in_words: for the log, with a place for the number, as in "parts of {} rows".
        least: where this size does not fit, the error is raised.
        most: to begin with; None: all.

    Attributes:
        fits: the size that is tried at most; None: any.
    """

    def __init__(self, in_words: str, *, least: int = 1, most: int | None = None) -> None:
        self.in_words, self.least, self.most, self.fits = in_words, least, most, most

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "fits": self.most}

    def attempt(
        self, work: Callable[[int], T], size: int, device: torch.device, mark: Callable[[], Undo] | None = None
    ) -> tuple[T, int]:
        """Do some work of at most this size.

        Args:
            work: is given a size, and starts again from the same state with half of it if memory ends.
            size: of all there is to do.
            device: whose memory it is.
            mark: called once before the work; gives what puts back whatever a failed try has changed.

        Returns:
            What `work` returned, and the size that it was given.

        Raises:
            torch.OutOfMemoryError: the least size does not fit either.
        """
        import torch

        undo, size = None if mark is None else mark(), min(size, self.fits or size)
        while True:
            try:
                return work(size), size
            except torch.OutOfMemoryError:
                if size <= self.least:
                    raise
            # here, where the failed try's frames, and what they hold, are gone
            if undo is not None:
                undo()
            self.fits = size = max(self.least, size // 2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning("%s is out of memory; going on in %s", device, self.in_words.format(size))

    def parts(
        self, total: int, work: Callable[[int, int], None], device: torch.device, mark: Callable[[], Undo] | None = None
    ) -> None:
        """`work(start, stop)` over all of `total`, in as few parts as fit; arguments as `attempt`."""
        start = 0
        while start < total:

            def part(size: int, start: int = start) -> None:
                work(start, start + size)

            start += self.attempt(part, total - start, device, mark)[1]
