"""Which device a process works on, how tensors get there, and what every process did of the classes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


def sent(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a GPU copies it out of pinned memory while the host goes on."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Arithmetic of networks in `dtype`, bfloat16 or float32, where the device knows both."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


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
