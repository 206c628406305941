"""Plain transcription of Algorithm 5 as the reference code runs it: one class at a time, whole networks, one optimiser.

Slow and obvious; random numbers come in the order in which the package draws them, so that both give the same images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dataopt.condensation.augment import augment, draw
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.loop import RealBatches
from hf_dataopt.condensation.networks import ConvNet
from hf_dataopt.condensation.training import Updates, network_augmentation, train_on
from hf_dataopt.seeding import generator as seeded


class PlainConvNet(ConvNet):
    """The network as the reference code writes it, with PyTorch's own pooling."""

    def features(self, images: Tensor, block: int | None = None) -> Tensor:
        for convolution, norm in zip(self.layers["conv"], self.layers["norm"], strict=True):
            images = F.avg_pool2d(F.relu(norm(convolution(images))), 2)
        return images


def decode(images: Tensor, factor: int, pad: float = 0.5) -> Tensor:
    """Cells in row-major order, each upsampled to the whole size."""
    height, width = images.shape[2:]
    images = F.pad(images, (0, -width % factor, 0, -height % factor), value=pad)
    rows, columns = images.shape[2] // factor, images.shape[3] // factor
    cells = []
    for i in range(factor):
        for j in range(factor):
            cell = images[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            cells.append(F.interpolate(cell, size=(height, width), mode="bilinear"))
    return torch.cat(cells)


def layer_distance(real: Tensor, synthetic: Tensor, metric: str) -> Tensor:
    """One of the reference's distances, written out."""
    if metric == "mse":
        return torch.sum((real - synthetic) ** 2)
    if metric == "l1":
        return torch.sum(torch.abs(real - synthetic))
    if real.ndim > 1:
        real, synthetic = real.reshape(len(real), -1), synthetic.reshape(len(synthetic), -1)
    else:
        real, synthetic = real.reshape(1, -1), synthetic.reshape(1, -1)
    if metric == "l1_mean":
        return torch.sum(torch.mean(torch.abs(real - synthetic), dim=-1))
    norms = torch.norm(real, dim=-1) * torch.norm(synthetic, dim=-1)
    return torch.sum(1 - torch.sum(real * synthetic, dim=-1) / (norms + 1e-6))


def match_loss(network: nn.Module, real: tuple[Tensor, Tensor], syn: tuple[Tensor, Tensor], metric: str) -> Tensor:
    """Gradients of every parameter, compared where they are of rank 4."""
    wanted = torch.autograd.grad(F.cross_entropy(network(real[0]), real[1]), list(network.parameters()))
    got = torch.autograd.grad(F.cross_entropy(network(syn[0]), syn[1]), list(network.parameters()), create_graph=True)
    total = torch.zeros(())
    for a, b in zip(wanted, got, strict=True):
        if a.ndim == 4:
            total = total + layer_distance(a.detach(), b, metric)
    return total


def outer_iteration(
    images: Tensor,
    optimiser: torch.optim.Optimizer,
    network: nn.Module,
    data: LabelledImages,
    config: IDCConfig,
    outer: int,
) -> list[float]:
    """One outer iteration on `images` (classes * images_per_class, C, H, W), a leaf that `optimiser` updates."""
    classes, per_class = len(data.class_names), config.images_per_class
    streams = [seeded(config.seed, epoch=outer, worker=1 + c) for c in range(classes)]
    loaders = [RealBatches(data.rows_of_class[c], config.real_batch, streams[c]) for c in range(classes)]
    own = seeded(config.seed, epoch=outer)
    theta = torch.optim.SGD(
        network.parameters(),
        lr=config.network_learning_rate,
        momentum=config.network_momentum,
        weight_decay=config.network_weight_decay,
    )
    with torch.no_grad():
        images.clamp_(0, 1)
    losses = []
    for _ in range(config.inner_iterations):
        total = 0.0
        for c in range(classes):
            rows = loaders[c].next()
            real = data.normalised(data.pixels(rows))
            syn = data.normalised(decode(images[c * per_class : (c + 1) * per_class], config.factor))
            if len(syn) > config.formed_batch:
                syn = syn[torch.randperm(len(syn), generator=streams[c])[: config.formed_batch]]
            draws = draw(config.augmentation, data.size, streams[c])
            both = augment(torch.cat([real, syn]), draws)
            targets = torch.full((len(both),), c)
            n = len(real)
            loss = match_loss(network, (both[:n], targets[:n]), (both[n:], targets[n:]), config.metric)
            optimiser.zero_grad(set_to_none=False)
            (images.grad,) = torch.autograd.grad(loss, images)
            optimiser.step()
            total += float(loss.detach())
        losses.append(total / classes)
        whole = -(-config.network_images // config.network_batch) * config.network_batch
        for part in torch.randperm(len(data.labels), generator=own)[:whole].split(config.network_batch):
            strategy = network_augmentation(config.augmentation, config.cutmix)
            updates = Updates(batch=len(part), augmentation=strategy, mix=config.cutmix)
            train_on(network, theta, data.batch(part), own, updates)
    return losses
