"""What a mixup method returns: the mixed batch, and everything one needs to see how it was made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch import bool as bool_

from ..settings import check_kind, check_tensor, optional


@dataclass(frozen=True, kw_only=True)
class MixResult:
    """A mixed batch of B outputs.

    Args:
        images: (B, C, H, W) mixed inputs, dtype and device of the inputs.
        targets: (B, classes) soft labels, float32, rows sum to 1 (several labels at once: each in [0, 1]; segmentation:
            (B, H, W) integer maps).
        sources: (B, M) int64: the inputs of each output, by their place in the batch; M = 2 for Puzzle Mix (itself and
            its partner), the batch size or less for Co-Mixup.
        masks: (B, M, h, w) float32 on the grid: share of input m at each cell; sums to 1 over M.
        ratios: (B, M) float32: weight of each input in the target; sums to 1 over M.
        plans: (B, M, h w) int64 or None: cell of the input that is seen at each cell (transport); None: none moved.
        energies: (B,) float64 or None: objective of each mask's problem.
        unmixed: (B,) bool: outputs that show one input only, whatever the reason: the best mask hides the other, the
            sample is its own partner, or its saliency is zero or not finite.
        saliency: (B, h, w) or None: saliency of the inputs on the grid.

    Example:
        >>> from hf_dataopt import PuzzleMixConfig, puzzle_mix
        >>> images, saliency = torch.rand(4, 3, 16, 16), torch.rand(4, 16, 16)
        >>> result = puzzle_mix(images, torch.eye(4), saliency, PuzzleMixConfig(), torch.Generator())
        >>> result.images.shape, result.ratios.sum(1).round().tolist()
        (torch.Size([4, 3, 16, 16]), [1.0, 1.0, 1.0, 1.0])
    """

    images: Tensor
    targets: Tensor
    sources: Tensor
    masks: Tensor
    ratios: Tensor
    unmixed: Tensor
    plans: Tensor | None = None
    energies: Tensor | None = None
    saliency: Tensor | None = None

    def __post_init__(self) -> None:
        """Shapes and dtypes; values are not looked at, so nothing waits for the device."""
        check_tensor("images", self.images, ("B", "C", "H", "W"), floating=None)
        size = len(self.images)
        if getattr(self.targets, "ndim", 2) == 3:
            check_tensor("targets", self.targets, (size, *self.images.shape[2:]), floating=False)
        else:
            check_tensor("targets", self.targets, (size, "classes"))
        check_tensor("sources", self.sources, (size, "M"), floating=False)
        inputs = self.sources.shape[1]
        check_tensor("masks", self.masks, (size, inputs, "h", "w"))
        check_tensor("ratios", self.ratios, (size, inputs))
        if check_kind("unmixed", self.unmixed, Tensor).dtype != bool_ or self.unmixed.shape != (size,):
            raise TypeError(f"unmixed must be bool of shape ({size},), got {self.unmixed.dtype} {self.unmixed.shape}")
        cells = self.masks.shape[2] * self.masks.shape[3]
        optional(check_tensor, "plans", self.plans, (size, inputs, cells), floating=False)
        optional(check_tensor, "energies", self.energies, (size,))
        optional(check_tensor, "saliency", self.saliency, ("inputs", *self.masks.shape[2:]))
