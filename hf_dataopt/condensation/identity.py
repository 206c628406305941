"""What a checkpoint of a condensation run depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import torch
from torch import Tensor, nn

from .. import distributed
from .columns import LabelledImages
from .config import IDCConfig

# settings that change neither the images nor their random numbers: a run may be continued with others
_FREE = {"outer_iterations", "storage", "checkpoint_every", "soft_labels", "soft_temperature"}


def checkpoint_key(
    config: IDCConfig, data: LabelledImages, network: nn.Module, device: torch.device, start: Tensor | None = None
) -> dict[str, str]:
    """Settings, data, network, split over processes, and torch's arithmetic on this device, as digests.

    Args:
        config: of the run.
        data: training images.
        network: one as the run makes them.
        device: where it runs.
        start: images that the run starts from, where they hang on more than these.
    """
    settings = {
        name: value
        for name, value in asdict(config).items()
        if name not in _FREE and not name.startswith("evaluation_")
    }
    digest = hashlib.blake2b(json.dumps([list(data.images.shape), data.class_names]).encode(), digest_size=16)
    for part in (data.images, data.labels, data.mean, data.std, *(() if start is None else (start,))):
        digest.update(part.contiguous().numpy().data)
    parts = [(name, type(module).__name__) for name, module in network.named_modules()]
    shapes = [(name, list(value.shape)) for name, value in network.state_dict().items()]
    return {
        "data": digest.hexdigest(),
        "network": hashlib.blake2b(json.dumps([parts, shapes]).encode(), digest_size=16).hexdigest(),
        "settings": json.dumps(settings, sort_keys=True),
        "process": f"{distributed.rank()}-of-{distributed.world_size()}",
        "device": device.type,
    }
