"""First values of the condensed images: real images, herded ones, mosaics of small ones or of patches, or noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .formation import Formation, cells
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
    laid = cells(height, width, formation.factor, formation.axis, even=reference_cells)
    for k, (rows, columns) in enumerate(laid):
        cell = (rows.stop - rows.start, columns.stop - columns.start)
        small = F.interpolate(images[k * n : (k + 1) * n], size=cell)
        # the last decoder cells reach into the padding
        out[:, :, rows, columns] = small[:, :, : max(height - rows.start, 0), : max(width - columns.start, 0)]
    return out


def stored_counts(data: LabelledImages, config: IDCConfig) -> list[int]:
    """Elements stored of every class: `images_per_class`, or fewer where a class has not enough images to fill them."""
    if config.initialisation == "noise":
        return [config.images_per_class] * len(data.class_names)
    cells = _cells_of(config)
    return [min(config.images_per_class, -(-len(rows) // cells)) for rows in data.rows_of_class]


def resemblance(images: Tensor, start: Tensor) -> float:
    """Mean correlation of images (n, C, H, W) with those they started from; 1 where both are flat."""
    a, b = ((part - part.mean(1, keepdim=True)) for part in (images.float().flatten(1), start.float().flatten(1)))
    norms = a.norm(dim=1) * b.norm(dim=1)
    return float(torch.where(norms > 0, (a * b).sum(1) / norms.clamp(min=1e-30), 1.0).mean())


def kept_rows(images: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Of (classes * n, ...) images class by class, the first `counts[k]` of class k, and their labels."""
    most = len(images) // len(counts)
    kept = torch.cat([label * most + torch.arange(count) for label, count in enumerate(counts)])
    return images[kept], torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _cells_of(config: IDCConfig) -> int:
    """Real images that a stored element starts from."""
    mixed = config.initialisation.startswith(("mix", "patches"))
    return config.factor ** (1 if config.axis == "time" else 2) if mixed else 1


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

    Returns:
        The images. A class with too few of its own gives all of them: its last mosaic is filled by repeating them, and its
        elements past `stored_counts` are zeros.

    Raises:
        ValueError: patches without a teacher, or a class without training images.
    """
    counts = stored_counts(data, config)
    if config.initialisation == "patches" and teacher is None:
        raise ValueError("initialisation='patches' needs a teacher that judges them; give DatasetCondenser one")
    absent = [name for name, rows in zip(data.class_names, data.rows_of_class, strict=True) if not len(rows)]
    if absent and config.initialisation != "noise":
        raise ValueError(
            f"class {absent[0]!r:.80} has no training images ({len(absent)} such classes); give some of each"
        )
    found = torch.zeros((len(counts), config.images_per_class, *data.images.shape[1:]))
    for label, count in enumerate(counts):
        found[label, :count] = initial_of_class(data, label, count, config, formation, generator, teacher)
    return found.flatten(0, 1)


def initial_of_class(
    data: LabelledImages,
    label: int,
    count: int,
    config: IDCConfig,
    formation: Formation,
    generator: torch.Generator,
    teacher: Teacher | None = None,
) -> Tensor:
    """First condensed images (count, C, H, W) of one class, `count` of `stored_counts`; see `initial_images`."""
    how, rows, each = config.initialisation, data.rows_of_class[label], _cells_of(config)
    if how == "noise":
        noise = torch.randn((count, *data.images.shape[1:]), generator=generator)
        low, high = config.clamp_low, config.clamp_high
        return (noise / 4 + 0.5).clamp(low if low is not None else 0, high if high is not None else 1)
    needed = count * each
    most = min(needed, len(rows))
    if how == "patches" and teacher is not None:
        images = choose_patches(
            data, label, needed, formation, teacher, crops=config.patches_per_image, generator=generator
        )
    elif how.endswith("herding"):
        pixels = data.pixels(rows)
        seen = pixels.flatten(1) if teacher is None else teacher.features(pixels, data)
        images = pixels[herding(seen, most)]
    else:
        images = data.pixels(rows[torch.randperm(len(rows), generator=generator)[:most]])
    images = images.repeat(-(-needed // len(images)), 1, 1, 1)[:needed]
    return mosaic(images, formation, size=data.size) if each > 1 else images
