"""First values of the condensed images: real images, herded ones, mosaics of small ones or of patches, or noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .multi_formation import Formation, grid
from .patches import choose_patches

if TYPE_CHECKING:
    from .columns import LabelledImages
    from .config import IDCConfig
    from .teacher import Teacher


def herding(features: Tensor, count: int) -> Tensor:
    """Rows whose running mean stays closest to the mean of all rows, greedily.

    Args:
        features: (n, d) of one class; not normalised.
        count: rows to choose, at most n.

    Returns:
        (count,) int64 indices in the order of choice.

    Raises:
        ValueError: fewer rows than asked for.

    Source: section 6.5 "Herding coreset selection [208]"; the rule of the reference code.
    Cost: count passes over n x d.
    """
    if not 1 <= count <= len(features):
        raise ValueError(f"cannot choose {count} of {len(features)} rows; lower images_per_class or factor")
    features = features.double().flatten(1)
    mean, total = features.mean(0), torch.zeros_like(features[0])
    lengths = features.square().sum(1)
    chosen: list[int] = []
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    for step in range(1, count + 1):
        # |step * mean - total - row|^2 without what all rows share: one product instead of a copy of all rows
        gaps = lengths - 2 * (features @ (step * mean - total))
        best = int(torch.where(free, gaps, torch.inf).argmin())
        chosen.append(best)
        free[best] = False
        total = total + features[best]
    return torch.tensor(chosen)


def mosaic(
    images: Tensor, formation: Formation, *, size: tuple[int, int] | None = None, reference_cells: bool = False
) -> Tensor:
    """Shrink images and lay each set of cells into one stored image.

    Args:
        images: (cells * n, C, H, W); cell k of every stored image comes from images[k n : (k + 1) n].
        formation: factor and axis.
        size: height and width of the stored images; default those of `images`.
        reference_cells: the reference code's cells (as even as can be); they disagree with its own decoder where a side
            is no multiple of the factor. Default: the decoder's cells, so that `form(mosaic(x))` shows the images.

    Returns:
        (n, C, H, W).

    Raises:
        ValueError: the number of images is no multiple of the cells.

    Source: initialisation of multi-formation in the reference code ("mix"), nearest resizing.
    Differs: cells agree with the decoder unless asked otherwise.
    """
    count = formation.cells(formation.factor)
    if len(images) == 0 or len(images) % count:
        raise ValueError(f"need a multiple of {count} images for a mosaic, got {len(images)}")
    n, (height, width) = len(images) // count, size or (int(images.shape[2]), int(images.shape[3]))
    out = images.new_empty((n, images.shape[1], height, width))
    cut = _even_grid if reference_cells else grid
    for k, (rows, columns) in enumerate(cut(height, width, formation.factor, formation.axis)):
        size = (rows.stop - rows.start, columns.stop - columns.start)
        small = F.interpolate(images[k * n : (k + 1) * n], size=size)
        # the last decoder cells reach into the padding
        out[:, :, rows, columns] = small[:, :, : max(height - rows.start, 0), : max(width - columns.start, 0)]
    return out


def _even_grid(height: int, width: int, factor: int, axis: str = "image") -> list[tuple[slice, slice]]:
    def cuts(side: int, parts: int) -> list[slice]:
        ends = [0]
        for part in range(parts):
            ends.append(ends[-1] + side // parts + (part < side % parts))
        return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]

    return [(r, c) for r in cuts(height, 1 if axis == "time" else factor) for c in cuts(width, factor)]


def initial_images(
    data: LabelledImages,
    config: IDCConfig,
    formation: Formation,
    generator: torch.Generator,
    teacher: Teacher | None = None,
) -> Tensor:
    """First condensed images (classes * images_per_class, C, H, W) in stored values, class by class.

    Args:
        data: the training images.
        config: how many, and which way.
        formation: cells of a mosaic.
        generator: draws images or noise.
        teacher: whose features are herded (default: pixels), and who judges patches.

    Raises:
        ValueError: a class has too few images, or patches without a teacher.
    """
    count, how = config.images_per_class, config.initialisation
    cells = formation.cells(formation.factor) if how.startswith(("mix", "patches")) else 1
    needed = count * cells
    parts = []
    for label, rows in enumerate(data.rows_of_class):
        if how == "noise":
            noise = torch.randn((count, *data.images.shape[1:]), generator=generator)
            low, high = config.clamp_low, config.clamp_high
            parts.append((noise / 4 + 0.5).clamp(low if low is not None else 0, high if high is not None else 1))
            continue
        if len(rows) < needed:
            raise ValueError(
                f"class {data.class_names[label]!r} has {len(rows)} images, the initialisation needs {needed}; "
                "lower images_per_class or factor, or use initialisation='noise'"
            )
        if how == "patches":
            if teacher is None:
                raise ValueError("initialisation='patches' needs a teacher that judges them; give DatasetCondenser one")
            images = choose_patches(
                data, label, needed, formation, teacher, crops=config.patches_per_image, generator=generator
            )
        elif how.endswith("herding"):
            pixels = data.pixels(rows)
            seen = pixels.flatten(1) if teacher is None else teacher.features(pixels, data)
            images = pixels[herding(seen, needed)]
        else:
            images = data.pixels(rows[torch.randperm(len(rows), generator=generator)[:needed]])
        parts.append(mosaic(images, formation, size=data.size) if cells > 1 else images)
    return torch.cat(parts)
