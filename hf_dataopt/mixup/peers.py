"""Input mixup and CutMix out of timm, in the form of the methods of this house: to switch between, and to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingExtraError
from .result import MixResult


@dataclass(frozen=True)
class TimmMixer:
    """timm's `Mixup` on a batch: each sample with the one at the mirrored place, one weight for all.

    Args:
        method: `"cutmix"` (a box of the partner) or `"mixup"` (a blend with it).
        alpha: lam ~ Beta(alpha, alpha).

    Raises:
        MissingExtraError: timm is not installed.

    Source: the baselines of chapters 3 and 4; timm's own code draws and mixes.
    Differs: the last sample of an odd batch, which timm refuses, stays as it is. `masks` have one cell, the share: a box
        has no place on a grid.

    Example:
        >>> TimmMixer("cutmix", 1.0)(images, targets, None, generator).targets.shape  # doctest: +SKIP
        torch.Size([100, 10])
    """

    method: Literal["cutmix", "mixup"]
    alpha: float = 1.0
    needs_saliency: ClassVar[bool] = False

    def __call__(
        self, images: Tensor, targets: Tensor, saliency: Tensor | None, generator: torch.Generator
    ) -> MixResult:
        """Mix a batch; saliency is not looked at."""
        try:
            from timm.data.mixup import Mixup
        except ImportError as error:
            raise MissingExtraError("timm", "timm", "CutMix and input mixup") from error
        size, even = len(images), len(images) // 2 * 2
        weights = torch.eye(size, device=images.device)
        mixed = images.clone()
        if even:
            alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, f"{self.method}_alpha": self.alpha}
            mixup = Mixup(**alphas, label_smoothing=0.0, num_classes=even)
            with _numpy_stream(generator):
                # "classes" that are the samples' own places give back the weights of the mix
                mixed[:even], weights[:even, :even] = mixup(mixed[:even], torch.arange(even, device=images.device))
        own = torch.arange(size, device=images.device)
        partner = torch.where(own < even, even - 1 - own, own)
        ratios = torch.stack([weights[own, own], torch.where(own < even, weights[own, partner], 0.0)], 1)
        return MixResult(
            images=mixed,
            targets=weights @ targets.float(),
            sources=torch.stack([own, partner], 1),
            masks=ratios[:, :, None, None],
            ratios=ratios,
            unmixed=(ratios == 1).any(1),
        )


@contextmanager
def _numpy_stream(generator: torch.Generator) -> Iterator[None]:
    """timm draws from NumPy's global stream and takes no other: it is lent, seeded from ours, and given back as it was."""
    before = np.random.get_state()  # noqa: NPY002 - lent to timm
    np.random.seed(int(torch.randint(2**32, (), generator=generator)))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
