"""The methods with their settings bound: what a step calls with images, targets, saliency and a generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .co_mixup import co_mixup
from .co_mixup_config import CoMixupConfig
from .config import PuzzleMixConfig
from .peers import TimmMixer
from .puzzle_mix import puzzle_mix
from .result import MixResult
from .schedule import MixupSchedule, Scheduled


@dataclass(frozen=True)
class PuzzleMixer:
    """`puzzle_mix` with its settings bound; for spectrograms (B, 1, time, mel) along time only."""

    config: PuzzleMixConfig
    moves_maps: ClassVar[bool] = True  # segmentation masks can follow

    @property
    def needs_pixels(self) -> bool:
        """Whether the settings reason about pixel values (data smoothness)."""
        return self.config.gamma > 0 and self.config.beta > 0

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        saliency: Tensor,
        generator: torch.Generator,
        shown: tuple[Tensor, Tensor] | None = None,
    ) -> MixResult:
        """See `puzzle_mix`."""
        return puzzle_mix(images, targets, saliency, self.config, generator, shown=shown)

    @property
    def spectrogram(self) -> PuzzleMixer:
        """The same for sounds: cells move along time, and values without a pixel range have no data smoothness."""
        axis = "height" if self.config.transport_axis == "both" else self.config.transport_axis
        gamma = self.config.gamma if self.config.image_std is not None else 0.0
        return PuzzleMixer(replace(self.config, transport_axis=axis, gamma=gamma))


@dataclass(frozen=True)
class CoMixer:
    """`co_mixup` with its settings bound."""

    config: CoMixupConfig

    def __call__(self, images: Tensor, targets: Tensor, saliency: Tensor, generator: torch.Generator) -> MixResult:
        """See `co_mixup`."""
        return co_mixup(images, targets, saliency, self.config, generator)


def scheduled(schedule: MixupSchedule) -> Scheduled:
    """A schedule with a mixer for each method in use."""
    puzzle, co = schedule.puzzle_mix or PuzzleMixConfig(), schedule.co_mixup or CoMixupConfig()
    made: dict[str, Callable[..., Any]] = {
        "puzzle_mix": PuzzleMixer(puzzle),
        "co_mixup": CoMixer(co),
        "cutmix": TimmMixer("cutmix", schedule.cutmix_alpha),
        "mixup": TimmMixer("mixup", schedule.mixup_alpha),
    }
    return Scheduled(schedule, {name: made[name] for name in schedule.shares})
