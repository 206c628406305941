"""From columns of a `datasets.Dataset` to tensors, and from condensed tensors back to a plain `Dataset`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .multi_formation import RECIPE_COLUMN, is_image, stack, to_images

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 1000


@dataclass(kw_only=True)
class LabelledImages:
    """Images and labels in memory: 8-bit images stay 8-bit until a batch is asked for.

    Args:
        images: (n, C, H, W), uint8 (pixels) or float32 (arrays).
        labels: (n,) int64 in [0, classes).
        class_names: one per class.
        mean, std: per channel, of the values in [0, 1] (images) or as they are (arrays).
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    mean: Tensor
    std: Tensor
    rows_of_class: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.rows_of_class = [(self.labels == label).nonzero()[:, 0] for label in range(len(self.class_names))]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[2], self.images.shape[3]

    def pixels(self, rows: Tensor) -> Tensor:
        """Rows as stored values: float32, images in [0, 1]."""
        batch = self.images[rows]
        return batch.float() / 255 if batch.dtype == torch.uint8 else batch

    def normalised(self, images: Tensor) -> Tensor:
        """Stored values as the networks see them."""
        shape = (1, -1, 1, 1)
        return (images - self.mean.to(images).reshape(shape)) / self.std.to(images).reshape(shape)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images and labels of rows."""
        return self.normalised(self.pixels(rows)), self.labels[rows]


def read_images(
    dataset: Dataset,
    image_column: str = "image",
    label_column: str = "label",
    like: LabelledImages | None = None,
    class_names: list[str] | None = None,
) -> LabelledImages:
    """Read a data set into memory.

    Args:
        dataset: images (`Image` column) or arrays (C, H, W) / (H, W), and integer labels or strings.
        image_column, label_column: names.
        like: take classes and normalisation from this (a test set from its training set).
        class_names: order of the classes, instead of the label column's own.

    Returns:
        The images.

    Raises:
        ValueError: a missing column, no rows, unequal sizes, NaN, a label out of range or a class without images.
    """
    for name in (image_column, label_column):
        if name not in dataset.column_names:
            raise ValueError(f"no column {name!r}; the data set has {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("the data set is empty; give at least one image per class")
    images = _read_column(dataset, image_column)
    names = like.class_names if like is not None else class_names
    labels, names = _read_labels(dataset, label_column, names)
    if like is None:
        if len(names) < 2:
            raise ValueError(f"found one class only ({names}); gradients are matched by class, give at least two")
        empty = [names[label] for label in range(len(names)) if not bool((labels == label).any())]
        if empty:
            raise ValueError(f"no images of the classes {empty[:5]}; remove them from the label feature or add images")
        mean, std = _statistics(images)
    else:
        mean, std = like.mean, like.std
        if images.shape[1:] != like.images.shape[1:]:
            raise ValueError(
                f"images have shape {tuple(images.shape[1:])}, the training images {tuple(like.images.shape[1:])}; resize"
            )
    return LabelledImages(images=images, labels=labels, class_names=names, mean=mean, std=std)


def _read_column(dataset: Dataset, column: str) -> Tensor:
    parts = []
    plain = dataset.with_format(None)
    for start in range(0, len(plain), _CHUNK):
        values = plain[start : start + _CHUNK][column]
        part = stack(values)
        parts.append((part * 255).round().to(torch.uint8) if is_image(values[0]) else part)
        if parts[-1].shape[1:] != parts[0].shape[1:] or parts[-1].dtype != parts[0].dtype:
            raise ValueError(
                f"images have different shapes, e.g. {tuple(parts[0].shape[1:])} and {tuple(part.shape[1:])}; resize them"
            )
    return torch.cat(parts)


def _read_labels(dataset: Dataset, column: str, names: list[str] | None) -> tuple[Tensor, list[str]]:
    values = dataset.with_format(None)[:][column]
    own = getattr(dataset.features[column], "names", None)
    if isinstance(values[0], str):
        names = names or sorted(set(values))
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"labels {unknown[:5]} are not among the classes {names[:5]} ...")
        return torch.tensor([names.index(value) for value in values]), names
    labels = np.asarray(values)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers or strings, got {labels.dtype} of shape {labels.shape}")
    names = names or own or [str(label) for label in range(int(labels.max()) + 1)]
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"labels must be in [0, {len(names)}), got {labels.min()} .. {labels.max()}; drop unlabelled rows"
        )
    return torch.from_numpy(labels.astype(np.int64)), list(names)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, in chunks so that no float copy of the data set is made."""
    scale = 255 if images.dtype == torch.uint8 else 1
    total = squares = torch.zeros(images.shape[1], dtype=torch.float64)
    for part in images.split(_CHUNK):
        values = part.double() / scale
        total, squares = total + values.sum((0, 2, 3)), squares + values.square().sum((0, 2, 3))
    count = images[:, 0].numel()
    mean = total / count
    return mean.float(), (squares / count - mean**2).clamp(min=1e-12).sqrt().float()


def to_dataset(
    images: Tensor, labels: Tensor, class_names: list[str], storage: str, columns: tuple[str, str], recipe: str
) -> Dataset:
    """Condensed images as a plain data set: image (or array), label, and the recipe in the features.

    The recipe is the one name of a `ClassLabel` column of zeros: features travel with `save_to_disk`, parquet files and
    the Hub, descriptions and other metadata do not.
    """
    from datasets import Array3D, ClassLabel, Dataset, Features, Image

    image_column, label_column = columns
    stored: Any
    values: Any
    if storage == "uint8":
        values, stored = to_images(images), Image()
    else:
        values = list(images.to(getattr(torch, storage)).numpy())
        stored = Array3D(shape=tuple(images.shape[1:]), dtype=storage)
    features = Features(
        {
            image_column: stored,
            label_column: ClassLabel(names=class_names),
            RECIPE_COLUMN: ClassLabel(names=[recipe]),
        }
    )
    rows = {image_column: values, label_column: labels.tolist(), RECIPE_COLUMN: [0] * len(labels)}
    dataset = Dataset.from_dict(rows, features=features)
    dataset.info.description = f"Condensed with hf_dataopt (IDC). Decode recipe: {recipe}"
    return dataset
