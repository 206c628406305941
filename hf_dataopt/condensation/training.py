"""Network updates: augmentation, CutMix and SGD; shared by the condensation loop and the scoring recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import augment, cutmix, draw, draw_cutmix, without
from .matching import logits_of


def sgd(network: nn.Module, learning_rate: float, momentum: float = 0.9, weight_decay: float = 5e-4) -> torch.optim.SGD:
    """SGD with the reference code's momentum and weight decay."""
    return torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)


def compiled(network: nn.Module, how: bool | str) -> nn.Module:
    """The network under `torch.compile` (True: default backend, a string: that one), or as it is (False).

    Raises:
        ValueError: unknown backend.
    """
    if not how:
        return network
    backend = "inductor" if how is True else how
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"compile: unknown backend {backend!r}; use True or one of {', '.join(known)}")
    return cast(nn.Module, torch.compile(network, backend=backend))


def train_step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    generator: torch.Generator,
    *,
    augmentation: str,
    mix: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One update on augmented, perhaps mixed images.

    Args:
        network, optimiser: what is trained.
        batch: normalised images (n, C, H, W) and labels (n,).
        generator: draws augmentation (one set of numbers per image) and CutMix.
        augmentation: operations.
        mix: probability of CutMix.
        dtype: of the network's arithmetic.

    Returns:
        The loss, on its device: reading it would wait for the step.

    Source: "Update theta" of Algorithm 5, `h(a_omega(T))`.
    """
    images, labels = batch
    size = (images.shape[2], images.shape[3])
    with torch.no_grad():
        images = augment(images, draw(augmentation, size, generator, len(images)))
        share, partner = 1.0, None
        if mix > 0 and float(torch.rand((), generator=generator)) < mix:
            partner, box = draw_cutmix(len(images), size, generator)
            partner = partner.to(images.device)
            images, share = cutmix(images, partner, box)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = logits_of(network, images)
    loss = F.cross_entropy(logits, labels)
    if partner is not None:
        loss = share * loss + (1 - share) * F.cross_entropy(logits, labels[partner])
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.detach()


def network_augmentation(strategy: str, mix: float) -> str:
    """Augmentation of network updates: the match's, without cutout where CutMix cuts already (reference code)."""
    return without(strategy, "cutout") if mix > 0 else strategy


def batches(n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled rows, one pass; the last batch may be smaller."""
    yield from torch.randperm(n, generator=generator).split(batch)


@torch.no_grad()
def accuracy(network: nn.Module, batches_of: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Share of right answers, in per cent."""
    network.eval()
    right = total = 0
    for images, labels in batches_of:
        right += int((logits_of(network, images).argmax(1) == labels).sum())
        total += len(labels)
    network.train()
    return 100 * right / max(total, 1)
