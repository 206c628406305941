"""A short hash over samples of weights: tells models and adapters apart without reading them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

_SAMPLES = 64


@torch.no_grad()
def weight_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of names, shapes and up to 64 values of each weight, spread evenly; the same for the same values.

    Args:
        weights: names and tensors, of any shape and dtype, in an order that does not change; offloaded ones (meta) are
            left out.

    Returns:
        16 hex digits.

    Cost: 64 values of each weight, gathered where the first one lies.
    """
    digest = hashlib.sha256()
    samples: list[torch.Tensor] = []
    for name, weight in weights:
        if weight.device.type == "meta":
            continue
        flat = weight.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        found = flat[index.to(flat.device)].float()
        samples.append(found.to(samples[0].device) if samples else found)
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
