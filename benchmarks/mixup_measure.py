"""What is asked of a trained network in the mixup benchmarks: accuracy, calibration, attacks, corrupted borders."""

from __future__ import annotations

import torch
from mixup_rows import STD, Rows
from torch import Tensor, nn

from hf_dataopt import seeding

AT_ONCE = 500  # rows of a forward


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(n, classes), without gradients."""
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [model(pixel_values=part.to(device))["logits"].float().cpu() for part in images.split(AT_ONCE)]
    return torch.cat(parts)


def attacked(model: nn.Module, data: Rows, radius: Tensor, steps: int) -> Tensor:
    """Images moved `steps` times along the sign of the gradient, never further than `radius` (C, 1, 1).

    In one step by all of it (FGSM), in each of several by a quarter (PGD).
    """
    device = next(model.parameters()).device
    radius, moved = radius.to(device), []
    for start, labels in zip(data.images.to(device).split(AT_ONCE), data.labels.to(device).split(AT_ONCE), strict=True):
        now = start
        for _ in range(steps):
            leaf = now.clone().requires_grad_()
            (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(pixel_values=leaf)["logits"], labels), leaf)
            now = now + radius * (1 if steps == 1 else 0.25) * grad.sign()
            now = torch.minimum(torch.maximum(now, start - radius), start + radius)
        moved.append(now)
    return torch.cat(moved)


def borders(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images with another image's border, and with noise of a standard deviation of the pixels added to their own."""
    edge = images.shape[-1] // 8
    inner = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inner[edge:-edge, edge:-edge] = True
    generator = seeding.generator(0, epoch=3)
    other = images[torch.randperm(len(images), generator=generator)]
    noise = images + torch.randn(images.shape, generator=generator)
    return torch.where(inner, images, other), torch.where(inner, images, noise)


def measure(model: nn.Module, data: Rows, std: tuple[float, ...] = STD) -> dict[str, float]:
    """Accuracy, NLL, expected calibration error (15 bins), errors under FGSM and PGD (10 steps, first 1,000 rows) of 1/255, and
    with corrupted borders."""
    found, labels = logits_of(model, data.images), data.labels
    confidence, guess = found.softmax(1).max(1)
    right = (guess == labels).float()
    bins = (confidence * 15).long().clamp(max=14)
    ece = sum(float((confidence[bins == b] - right[bins == b]).sum().abs()) for b in range(15)) / len(labels)
    radius = 1 / 255 / torch.tensor(std)[:, None, None]
    few = data.first(1_000)
    other, noisy = borders(data.images)

    def error(images: Tensor) -> float:
        return float((logits_of(model, images).argmax(1) != labels[: len(images)]).float().mean())

    return {
        "accuracy": float(right.mean()),
        "nll": float(nn.functional.cross_entropy(found, labels)),
        "ece": ece,
        "fgsm_error": error(attacked(model, data, radius, 1)),
        "pgd_error": error(attacked(model, few, radius, 10)),
        "other_border_error": error(other),
        "noisy_border_error": error(noisy),
    }
