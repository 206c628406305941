"""Segmentation masks follow the image: the class map of a mixed image, cell by cell, from the inputs that it shows."""

from __future__ import annotations

from torch import Tensor

from ..settings import check_kind, check_tensor
from .cells import Axis, upsample
from .result import MixResult
from .statistics import moved_pixels


def mixed_maps(result: MixResult, maps: Tensor) -> Tensor:
    """Class maps of a batch that Puzzle Mix has mixed.

    Every pixel has the class of the input that shows most there, read where that input's pixel came from (transport
    included). Where both show half, it is the sample's own.

    Args:
        result: of `puzzle_mix`.
        maps: (B, H, W) integer classes of the inputs, H and W of the images; ignored pixels keep their number.

    Returns:
        (B, H, W), dtype of `maps`.

    Raises:
        ValueError: another shape than the images'.

    Source: chapter 3, Eq. 3.2 with one-hot maps, rounded.
    Cost: copies of the maps.

    Example:
        >>> from hf_dataopt import puzzle_mix
        >>> images, saliency, maps = torch.rand(4, 3, 8, 8), torch.rand(4, 8, 8), torch.zeros(4, 8, 8, dtype=torch.int64)
        >>> mixed_maps(puzzle_mix(images, torch.eye(4), saliency, generator=torch.Generator()), maps).shape
        torch.Size([4, 8, 8])
    """
    check_kind("result", result, MixResult, "give what puzzle_mix returned")
    height, width = result.images.shape[2:]
    check_tensor("maps", maps, ("inputs", height, width), floating=False)
    if int(result.sources.max()) >= len(maps):
        raise ValueError(
            f"the result mixes {int(result.sources.max()) + 1} inputs, got {len(maps)} maps: another batch?"
        )
    shown = moved_pixels(maps[:, None], result)[:, :, 0]
    rows, columns = (Axis(size, count) for size, count in zip((height, width), result.masks.shape[2:], strict=True))
    most = upsample(result.masks.argmax(1), rows, columns)  # the first of equals
    return shown.gather(1, most[:, None].to(shown.device))[:, 0].to(maps.dtype)
