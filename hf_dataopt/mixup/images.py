"""The inputs of a step as the mixers see them: four axes, augmented, in a known range."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .options import LiveOptions

logger = logging.getLogger(__name__)


def as_images(inputs: Tensor, name: str) -> Tensor:
    """Inputs as (B, C, H, W); a spectrogram (B, time, mel) has one channel."""
    if inputs.ndim not in (3, 4):
        raise ValueError(
            f"{name} has shape {tuple(inputs.shape)}; mixing needs images (B, C, H, W) or spectrograms (B, time, mel)"
        )
    if len(inputs) == 0:
        raise ValueError(f"the batch is empty: {name} has shape {tuple(inputs.shape)}; give at least one sample")
    return inputs.detach() if inputs.ndim == 4 else inputs.detach()[:, None]


def augmented(images: Tensor, options: LiveOptions) -> Tensor:
    """Every image through the user's augmentation, in [0, 1] where mean and std are known."""
    augmentation: Callable[[Tensor], Tensor] | None = options.augmentation
    if augmentation is None:
        return images
    mean, std = (
        torch.as_tensor(value, device=images.device, dtype=images.dtype).reshape(1, -1, 1, 1)
        if value is not None
        else default
        for value, default in ((options.mean, 0.0), (options.std, 1.0))
    )
    pixels = images * std + mean
    if options.mean is not None:
        pixels = pixels.clamp(0, 1)
    changed = torch.stack([augmentation(image) for image in pixels])
    if changed.shape != images.shape:
        raise ValueError(f"augmentation turned {tuple(images.shape)} into {tuple(changed.shape)}; the shape must stay")
    return (changed - mean) / std


def check_range(images: Tensor, options: LiveOptions, mixer: Any) -> None:
    """Pixels outside [0, 1] need mean and std where the method reasons about pixels."""
    low, high = (float(value) for value in images.aminmax())
    if low >= -0.01 and high <= 1.01:
        return
    if options.attack is not None:
        raise ValueError(
            f"inputs run from {low:.3g} to {high:.3g}; the attack needs pixels in [0, 1]: set image_mean and image_std "
            "of the config to those of the image processor"
        )
    if images.shape[1] == 3 and getattr(mixer, "needs_pixels", False):
        logger.warning(
            "inputs run from %.3g to %.3g: set image_mean and image_std of the config to those of the image processor, "
            "so that the smoothness of the mix is measured on pixels in [0, 1]",
            low,
            high,
        )
