"""Network updates: augmentation, CutMix and SGD; shared by the condensation loop and the scoring recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import augment_groups, cutmix, draw, draw_cutmix, without
from .devices import autocast, sent
from .matching import logits_of

_AHEAD = 2**22  # numbers of images that are prepared at once


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


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How a network is updated.

    Args:
        batch: images of an update.
        augmentation: operations, of numbers drawn for each image.
        mix: probability of CutMix in an update.
        dtype: of the network's arithmetic.
    """

    batch: int
    augmentation: str = "none"
    mix: float = 0.0
    dtype: torch.dtype = torch.float32

    def ahead(self, values: int) -> int:
        """Images of `values` numbers that are prepared at once: whole batches of some 16 MiB."""
        return self.batch * max(1, _AHEAD // (self.batch * values))


def train_on(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    shown: tuple[Tensor, Tensor],
    generator: torch.Generator,
    updates: Updates,
) -> Tensor:
    """Updates on images in their order, augmented and perhaps mixed; the last one may have fewer.

    All that is random is drawn and sent to the images' device before the first update, and nothing is read from there.

    Args:
        network, optimiser: what is trained.
        shown: normalised images (n, C, H, W) and labels (n,) or class shares (n, classes).
        generator: draws augmentation (one set of numbers per image) and CutMix (CPU).
        updates: batch and recipe.

    Returns:
        The last loss, on its device: reading it would wait for the step.

    Source: "Update theta" of Algorithm 5, `h(a_omega(T))`.
    """
    images, labels = shown
    size = (images.shape[2], images.shape[3])
    counts = [len(part) for part in labels.split(updates.batch)]
    draws, partners, boxes = [], [], []
    for count in counts:
        draws.append(draw(updates.augmentation, size, generator, count))
        partner, box = torch.arange(count), None
        if updates.mix > 0 and float(torch.rand((), generator=generator)) < updates.mix:
            partner, box = draw_cutmix(count, size, generator)
        partners.append(partner)
        boxes.append(box)
    with torch.no_grad():
        images = augment_groups(images, draws, counts)
    sent_partners = sent(torch.cat(partners), images.device).split(counts)
    for *batch, partner, box in zip(images.split(counts), labels.split(counts), sent_partners, boxes, strict=True):
        loss = _update(network, optimiser, (batch[0], batch[1]), (partner, box), updates.dtype)
    return loss


def _update(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    cut: tuple[Tensor, tuple[int, int, int, int] | None],
    dtype: torch.dtype,
) -> Tensor:
    (images, labels), (partner, box), share = batch, cut, 1.0
    if box is not None:
        images, share = cutmix(images, partner, box)
    with autocast(images.device, dtype):
        logits = logits_of(network, images)
    loss = F.cross_entropy(logits, labels)
    if box is not None:
        loss = share * loss + (1 - share) * F.cross_entropy(logits, labels[partner])
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.detach()


def network_augmentation(strategy: str, mix: float) -> str:
    """Augmentation of network updates: the match's, without cutout where CutMix cuts already (reference code)."""
    return without(strategy, "cutout") if mix > 0 else strategy


@torch.no_grad()
def accuracy(network: nn.Module, batches_of: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Share of right answers, in per cent."""
    network.eval()
    found = [logits_of(network, images).argmax(1) == labels for images, labels in batches_of]
    network.train()
    return 100 * int(torch.cat(found).sum()) / sum(map(len, found)) if found else 0.0
