"""Tiny random classifiers of the supported families, digits and synthetic sounds as data, and a stand-in mixer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor

from hf_dataopt.mixup.result import MixResult

_E: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
CLASSES = 10


def vit(**changes: Any) -> transformers.PreTrainedModel:
    config = transformers.ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=CLASSES, **{**_E, **changes})
    return transformers.ViTForImageClassification(config)


def resnet(**changes: Any) -> transformers.PreTrainedModel:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", **changes}
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(num_channels=1, num_labels=CLASSES, **sizes)
    )


def convnext() -> transformers.PreTrainedModel:
    config = transformers.ConvNextConfig(
        num_channels=1, patch_size=2, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=CLASSES
    )
    return transformers.ConvNextForImageClassification(config)


def timm_wrapper() -> transformers.PreTrainedModel:
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        num_labels=CLASSES,
        model_args={"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2},
    )
    return transformers.TimmWrapperForImageClassification(config)


def ast() -> transformers.PreTrainedModel:
    config = transformers.ASTConfig(
        max_length=32,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        num_labels=CLASSES,
        **_E,
    )
    return transformers.ASTForAudioClassification(config)


FAMILIES = {"vit": vit, "resnet": resnet, "convnext": convnext, "timm": timm_wrapper, "ast": ast}


def make(family: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of one family, the same for the same seed; global random numbers are left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES[family](**changes)


def rows(family: str, n: int, start: int = 0) -> list[dict[str, Any]]:
    """Digits (1, 8, 8) in [0, 1]; for spectrogram models (32, 16) noise with a bump at a time set by the class."""
    digits = load_digits()
    labels = digits.target[start : start + n]
    if family != "ast":
        images = (digits.images[start : start + n] / 16).astype(np.float32)
        return [
            {"pixel_values": torch.from_numpy(image)[None], "labels": int(label)}
            for image, label in zip(images, labels, strict=True)
        ]
    sounds = np.random.default_rng(start).normal(0, 0.3, (n, 32, 16)).astype(np.float32)
    for sound, label in zip(sounds, labels, strict=True):
        sound[3 * label : 3 * label + 3] += 1
    return [
        {"input_values": torch.from_numpy(sound), "labels": int(label)}
        for sound, label in zip(sounds, labels, strict=True)
    ]


def batch(family: str, n: int, start: int = 0) -> dict[str, Tensor]:
    """`rows` as one batch."""
    return transformers.default_data_collator(rows(family, n, start))


def halves(images: Tensor, targets: Tensor, saliency: Tensor, generator: torch.Generator) -> MixResult:
    """Stand-in mixer: the top half of each image over the bottom half of its partner, weighted by exposed saliency.

    It depends on the saliency, so that stale saliency shows in the targets.
    """
    n = len(images)
    partner = torch.randperm(n, generator=generator).to(images.device)
    half = images.shape[2] // 2
    top, bottom = saliency[:, :half].sum((1, 2)), saliency[partner, half:].sum((1, 2))
    share = top / (top + bottom).clamp_min(1e-12)
    ratios = torch.stack([share, 1 - share], 1)
    mask = torch.zeros(n, 2, 2, 1, device=images.device)
    mask[:, 0, 0] = mask[:, 1, 1] = 1
    return MixResult(
        images=torch.cat([images[:, :, :half], images[partner, :, half:]], 2),
        targets=ratios[:, :1] * targets + ratios[:, 1:] * targets[partner],
        sources=torch.stack([torch.arange(n, device=images.device), partner], 1),
        masks=mask,
        ratios=ratios,
        unmixed=saliency.sum((1, 2)) == 0,
    )
