"""Which device a process works on, and what every process did of the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import distributed


def own_device() -> torch.device:
    """The process's own: CUDA if there is one, else CPU."""
    if torch.cuda.is_available() and distributed.world_size() > 1:
        from accelerate import PartialState

        return PartialState().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gather(images: Tensor, classes: list[int], total: int) -> Tensor:
    """All classes' images on every process, in the order of the classes."""
    if distributed.world_size() == 1:
        return images.clone()
    import torch.distributed as group

    if not group.is_initialized():
        group.init_process_group("gloo")
    parts: list[Any] = [None] * distributed.world_size()
    group.all_gather_object(parts, list(zip(classes, images.cpu(), strict=True)))
    whole = {label: value for part in parts for label, value in part}
    return torch.stack([whole[label] for label in range(total)])
