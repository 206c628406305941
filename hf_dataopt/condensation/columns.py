"""From columns of a `datasets.Dataset` to tensors, and from condensed tensors back to a plain `Dataset`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..decoding import OnError, read_picture, read_rows
from ..errors import BadRowError
from .multi_formation import RECIPE_COLUMN, alike, is_image, read_element, to_images

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
        skipped: reason by row of the data set, of the rows that were left out.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    mean: Tensor
    std: Tensor
    skipped: dict[int, str] = field(default_factory=dict)
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
    *,
    size: int | None = None,
    on_error: OnError = "raise",
) -> LabelledImages:
    """Read a data set into memory.

    Args:
        dataset: images (`Image` column) or arrays (C, H, W) / (H, W), and integer labels or strings.
        image_column, label_column: names.
        like: take classes and normalisation from this (a test set from its training set).
        class_names: order of the classes, instead of the label column's own.
        size: side of the square that images are brought to (shorter side resized, middle cut out); None: all have one
            size. Grey ones among colour become colour.
        on_error: "skip" leaves rows out that hold no image or no label of a class.

    Returns:
        The images; `skipped` says which rows were left out.

    Raises:
        ValueError: a missing column, no rows, unequal sizes, NaN, a label out of range or a class without images.
        BadRowError: a row cannot be read.
    """
    for name in (image_column, label_column):
        if name not in dataset.column_names:
            raise ValueError(f"no column {name!r}; the data set has {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("the data set is empty; give at least one image per class")
    names = like.class_names if like is not None else class_names
    labels, names, unlabelled = _read_labels(dataset, label_column, names, on_error)
    images, unread = _read_column(dataset, image_column, unlabelled, size, on_error)
    skipped = dict(sorted((unlabelled | unread).items()))
    labels = labels[np.setdiff1d(np.arange(len(dataset)), list(skipped))]
    if like is None:
        if len(names) < 2:
            raise ValueError(f"found one class only ({names}); gradients are matched by class, give at least two")
        empty = [names[label] for label in range(len(names)) if not bool((labels == label).any())]
        if empty:
            raise ValueError(f"no images of the classes {empty[:5]}; remove them from the label feature or add images")
        mean, std = _statistics(images)
    else:
        mean, std = like.mean, like.std
        if images.shape[1] == 1 and like.images.shape[1] == 3:
            images = images.expand(-1, 3, -1, -1).contiguous()
        if images.shape[1:] != like.images.shape[1:]:
            raise ValueError(
                f"images have shape {tuple(images.shape[1:])}, the training images {tuple(like.images.shape[1:])}; resize"
            )
    return LabelledImages(images=images, labels=labels, class_names=names, mean=mean, std=std, skipped=skipped)


def _read_column(
    dataset: Dataset, column: str, known: dict[int, str], size: int | None, on_error: OnError
) -> tuple[Tensor, dict[int, str]]:
    """Images of the rows that are not known to be unfit, and which others hold none."""
    from datasets import Image

    plain = dataset.select_columns([column]).with_format(None)
    pictures = isinstance(plain.features[column], Image)
    mode = getattr(plain.features[column], "mode", None)
    if pictures:  # decoded here, row by row
        plain = plain.cast_column(column, Image(decode=False))
    found: list[NDArray[Any]] = []
    skipped: dict[int, str] = {}

    def read(value: Any) -> NDArray[Any]:
        element = read_element(read_picture(value, mode) if pictures and mode in ("L", "RGB") else value)
        if size is not None:
            element = resized(element, size)
        # 8-bit images stay 8-bit
        return (element * 255).round().astype(np.uint8) if pictures or is_image(value) else element

    for start in range(0, len(plain), _CHUNK):
        rows = [row for row in range(start, min(start + _CHUNK, len(plain))) if row not in known]
        values = plain[start : start + _CHUNK][column]
        part, _, unread = read_rows([values[row - start] for row in rows], read, rows=rows, on_error=on_error)
        found, skipped = found + part, skipped | unread
    if not found:
        raise ValueError(f"no row of {column!r} can be read, the first: {next(iter((known | skipped).values()))}")
    if len({one.dtype for one in found}) > 1:
        raise ValueError(f"{column!r} holds images and arrays; give one kind")
    return torch.from_numpy(alike(found)), skipped


def resized(element: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """The middle square of an image (C, H, W) after its shorter side was brought to `size`: antialiased, bilinear."""
    import torch.nn.functional as F

    height, width = element.shape[1:]
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    image = torch.from_numpy(element)[None]
    if target != (height, width):
        image = F.interpolate(image, size=target, mode="bilinear", align_corners=False, antialias=True)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return image[0, :, top : top + size, left : left + size].numpy()


def _read_labels(
    dataset: Dataset, column: str, names: list[str] | None, on_error: OnError
) -> tuple[Tensor, list[str], dict[int, str]]:
    """Class numbers (-1 where there is none), class names, and which rows have no class."""
    values = dataset.select_columns([column]).with_format(None)[:][column]
    given = [value for value in values if value is not None]
    own = getattr(dataset.features[column], "names", None)
    if given and all(isinstance(value, str) for value in given):
        names = names or sorted(set(given))
        place = {name: label for label, name in enumerate(names)}
        labels = np.array([place.get(value, -1) for value in values])
        wrong = f"labels {sorted(set(given) - set(names))[:5]} are not among the classes {names[:5]} ..."
    else:
        numbers = np.asarray(given)
        if not given or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise ValueError(f"labels must be integers or strings, got {numbers.dtype} of shape {numbers.shape}")
        names = names or own or [str(label) for label in sorted(set(given)) if label >= 0]
        places = {label: label for label in range(len(names))}
        if own is None and all(name.isdecimal() for name in names):  # a plain column's numbers are the classes' names
            places = {int(name): label for label, name in enumerate(names)}
        labels = np.array([places.get(value, -1) for value in values])
        wrong = f"labels must be among {sorted(places)[:5]} ..., got {numbers.min()} .. {numbers.max()}; drop unlabelled rows"
    unfit = {
        int(row): "has no label" if values[row] is None else f"has label {values[row]!r}, which is no class"
        for row in np.flatnonzero(labels < 0)
    }
    if unfit and on_error == "raise":
        row, why = next(iter(unfit.items()))
        raise BadRowError(row, why if values[row] is None else f"{why}: {wrong}")
    return torch.from_numpy(labels.astype(np.int64)), list(names), unfit


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
