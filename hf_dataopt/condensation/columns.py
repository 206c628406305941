"""From columns of a `datasets.Dataset` to tensors, and from condensed tensors back to a plain `Dataset`."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..decoding import OnError, read_image, read_rows
from ..errors import BadRowError
from .devices import sent
from .multi_formation import alike, is_image, read_element, to_images
from .recipe import RECIPE_COLUMN, SOFT_COLUMN, formation_from, marked, row_texts

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 1000
_NEAR = 1e-4  # past a bound by rounding


@dataclass(kw_only=True)
class LabelledImages:
    """Images and labels in memory: 8-bit images stay 8-bit until a batch is asked for.

    Args:
        images: (n, C, H, W), uint8 (pixels) or float32 (arrays).
        labels: (n,) int64 in [0, classes).
        class_names: one per class.
        mean, std: per channel, of the values in [0, 1] (images) or as they are (arrays).
        skipped: reason by row of the data set, of the rows that were left out.

    Attributes:
        rows_of_class: of each class, on the CPU.
        device: where batches are, see `on`.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    mean: Tensor
    std: Tensor
    skipped: dict[int, str] = field(default_factory=dict)
    rows_of_class: list[Tensor] = field(init=False)
    device: torch.device = field(init=False, default=torch.device("cpu"))

    def __post_init__(self) -> None:
        self.rows_of_class = [(self.labels == label).nonzero()[:, 0] for label in range(len(self.class_names))]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[2], self.images.shape[3]

    def on(self, device: torch.device) -> LabelledImages:
        """The same data with its batches on a device.

        All images live there where they take at most half of the free memory, else each batch is sent.
        """
        if device == self.device:
            return self
        found = copy(self)
        found.device, found.mean, found.std = device, self.mean.to(device), self.std.to(device)
        if device.type != "cuda" or self.images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2:
            found.images, found.labels = self.images.to(device), self.labels.to(device)
        return found

    def pixels(self, rows: Tensor) -> Tensor:
        """Rows (given on the CPU) as stored values: float32, images in [0, 1]."""
        batch = sent(self.images[sent(rows, self.images.device)], self.device)
        return batch.float() / 255 if batch.dtype == torch.uint8 else batch

    def normalised(self, images: Tensor) -> Tensor:
        """Stored values as the networks see them."""
        shape = (1, -1, 1, 1)
        return (images - self.mean.to(images).reshape(shape)) / self.std.to(images).reshape(shape)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images and labels of rows."""
        return self.normalised(self.pixels(rows)), sent(self.labels[sent(rows, self.labels.device)], self.device)


def read_images(
    dataset: Dataset,
    image_column: str = "image",
    label_column: str = "label",
    like: LabelledImages | None = None,
    class_names: list[str] | None = None,
    *,
    size: int | None = None,
    mode: str | None = None,
    background: str = "white",
    on_error: OnError = "raise",
) -> LabelledImages:
    """Read a data set into memory.

    Args:
        dataset: images (`Image` column) or arrays (C, H, W) / (H, W), and integer labels or strings.
        image_column, label_column: names.
        like: take classes and normalisation from this (a test set from its training set).
        class_names: order of the classes, instead of the label column's own.
        size: side of the square that images are brought to (shorter side resized, middle cut out); None: all have one
            size.
        mode: "L" or "RGB", what images are brought to; None: as they are, grey ones among colour become colour.
        background: colour under transparent pixels.
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
    read = _Reader(dataset, image_column, size, mode, background)
    images, unread = read(unlabelled, on_error)
    skipped = dict(sorted((unlabelled | unread).items()))
    labels = labels[np.setdiff1d(np.arange(len(dataset)), list(skipped))]
    if like is None:
        if len(names) < 2:
            raise ValueError(f"found one class only ({names}); gradients are matched by class, give at least two")
        empty = [names[label] for label in range(len(names)) if not bool((labels == label).any())]
        if empty:
            raise ValueError(f"no images of the classes {empty[:5]}; remove them from the label feature or add images")
        mean, std = statistics(images)
    else:
        mean, std = like.mean, like.std
        if images.shape[1] == 1 and like.images.shape[1] == 3:
            images = images.expand(-1, 3, -1, -1).contiguous()
        if images.shape[1] == 3 and like.images.shape[1] == 1 and images.dtype == torch.uint8 and read.mode is None:
            raise ValueError(
                "images have colour, the training images are grey; give IDCConfig(image_mode='RGB' or 'L')"
            )
        if images.shape[1:] != like.images.shape[1:]:
            raise ValueError(
                f"images have shape {tuple(images.shape[1:])}, the training images {tuple(like.images.shape[1:])}; give "
                "IDCConfig(image_size=...) or bring them to one size"
            )
    return LabelledImages(images=images, labels=labels, class_names=names, mean=mean, std=std, skipped=skipped)


class _Reader:
    """Reads a column's elements, images as 8 bits."""

    def __init__(self, dataset: Dataset, column: str, size: int | None, mode: str | None, background: str) -> None:
        from datasets import Image

        plain = dataset.select_columns([column]).with_format(None)
        _refuse_text(plain, column)
        own = getattr(plain.features[column], "mode", None)
        self.pictures = isinstance(plain.features[column], Image)
        self.whole = _leaf(plain.features[column]) == "uint8"  # arrays of pixels
        self.mode = mode or (own if own in ("L", "RGB") else None)
        # decoded here, row by row
        self.rows = plain.cast_column(column, Image(decode=False)) if self.pictures else plain
        self.column, self.size, self.background = column, size, background

    def element(self, value: Any) -> NDArray[Any]:
        """One cell (C, H, W)."""
        picture = self.pictures or is_image(value)
        element = read_image(value, self.mode, self.background) if picture else read_element(value)
        if self.whole and not picture:
            picture, element = True, element / 255
        if self.size is not None:
            element = resized(element, self.size)
        return (element * 255).round().astype(np.uint8) if picture else element

    def __call__(self, known: dict[int, str], on_error: OnError) -> tuple[Tensor, dict[int, str]]:
        """Images of the rows that are not known to be unfit, and which others hold none."""
        found: list[NDArray[Any]] = []
        skipped: dict[int, str] = {}
        for start in range(0, len(self.rows), _CHUNK):
            rows = [row for row in range(start, min(start + _CHUNK, len(self.rows))) if row not in known]
            values = self.rows[start : start + _CHUNK][self.column]
            part, _, unread = read_rows(
                [values[row - start] for row in rows], self.element, rows=rows, on_error=on_error
            )
            found, skipped = found + part, skipped | unread
        if not found:
            first = next(iter((known | skipped).values()))
            raise ValueError(f"no row of {self.column!r} can be read, the first: {first}")
        if len({one.dtype for one in found}) > 1:
            raise ValueError(f"{self.column!r} holds images and arrays; give one kind")
        return torch.from_numpy(alike(found)), skipped


def _refuse_text(rows: Dataset, column: str) -> None:
    """Strings are paths of images, or a text data set, of which no images can be made."""
    from PIL.Image import registered_extensions

    if _leaf(rows.features[column]) not in ("string", "large_string"):
        return
    first = next((value for value in rows[:_CHUNK][column] if value), None)
    if isinstance(first, str) and Path(first).suffix.lower() not in registered_extensions() and not _is_file(first):
        raise ValueError(
            f"{column!r} holds text ({first!r:.40}), not images or their paths: a text data set cannot be condensed, since "
            "there are no texts between texts; choose rows of it instead, e.g. by RelationCleaner's scores"
        )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # longer than a name may be
        return False


def _leaf(feature: Any) -> str:
    """Type of the numbers in a column of arrays."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return str(getattr(feature, "dtype", ""))


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
    """Class numbers (-1 where there is none), class names, and which rows have no class.

    Classes are matched by name: those of a label feature, strings, and the digits of plain whole numbers. Only numbers
    without names, against classes whose names are no numbers, go by place.
    """
    values = dataset.select_columns([column]).with_format(None)[:][column]
    own = getattr(dataset.features[column], "names", None)
    given = [value for value in values if value is not None]
    flags = given and all(isinstance(value, bool) for value in given)
    whole = given and all(isinstance(value, int) and not isinstance(value, bool) for value in given)
    if not given or not (flags or whole or all(isinstance(value, str) for value in given)):
        kind = sorted({type(value).__name__ for value in given})
        raise ValueError(f"labels of {column!r} must be integers, strings or bools, got {', '.join(kind) or 'none'}")
    if own is not None:
        words: dict[Any, str] = dict(enumerate(own))
    else:
        words = {value: str(value) for value in given if not whole or value >= 0}
        if whole and names is not None and not all(name.isdecimal() for name in names):
            words = dict(enumerate(names))  # by place
    names = names or list(own or sorted(set(words.values()), key=lambda name: (int(name), name) if whole else name))
    place = {name: label for label, name in enumerate(names)}
    labels = np.array([place.get(words.get(value, ""), -1) for value in values])
    unfit = {}
    for row in np.flatnonzero(labels < 0).tolist():
        told = f"{values[row]!r}" + (f" ({words[values[row]]!r:.40})" if own and values[row] in words else "")
        unfit[row] = "has no label" if values[row] is None else f"has label {told}, which is no class"
    if unfit and on_error == "raise":
        row, why = next(iter(unfit.items()))
        known = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        todo = f": labels must be among {known}; drop such rows, or on_error='skip'"
        raise BadRowError(row, why if values[row] is None else why + todo)
    return torch.from_numpy(labels.astype(np.int64)), names, unfit


def check_range(images: Tensor, low: float | None, high: float | None) -> None:
    """Refuse arrays that would be cut off where they are stored.

    Raises:
        ValueError: values below `low` or above `high` (None: no bound).
    """
    if not images.is_floating_point():
        return
    least, most = (float(value) for value in images.aminmax())
    if (low is not None and least < low - _NEAR) or (high is not None and most > high + _NEAR):
        raise ValueError(
            f"arrays hold values from {least:g} to {most:g}, of which clamp_low={low} to clamp_high={high} is kept: scale "
            "them, cast the column to Image(), or give storage='float32' with clamp_low=None and clamp_high=None"
        )


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
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
    images: Tensor,
    labels: Tensor,
    class_names: list[str],
    storage: str,
    columns: tuple[str, str],
    recipe: str,
    soft_labels: list[Tensor] | None = None,
) -> Dataset:
    """Condensed images as a plain data set: image (or array), label, the recipe of every row, and soft labels if given.

    Features, descriptions and other metadata get lost when sets are renamed, put together and exported; rows do not. Stored
    images carry a mark in their files besides.

    Args:
        images: (n, C, H, W) stored values.
        labels: (n,).
        class_names: of the labels.
        storage: `"uint8"`, `"float16"` or `"float32"`.
        columns: names of images and labels.
        recipe: `recipe_text` of all rows.
        soft_labels: of every row (cells, classes), see `soft_labels_of`.
    """
    from datasets import Array3D, ClassLabel, Dataset, Features, Image, List, Value

    image_column, label_column = columns
    formation = formation_from(json.loads(recipe))
    ways: list[Any] = [None] * len(labels)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0].tolist()
        for row, way in zip(rows, formation.ways(len(rows)), strict=True):
            ways[row] = way
    stored: Any
    values: Any
    if storage == "uint8":
        values, stored = [marked(*pair) for pair in zip(to_images(images), ways, strict=True)], Image()
    else:
        values = list(images.to(getattr(torch, storage)).numpy())
        stored = Array3D(shape=tuple(images.shape[1:]), dtype=storage)
    kinds = {image_column: stored, label_column: ClassLabel(names=class_names), RECIPE_COLUMN: Value("string")}
    found = {image_column: values, label_column: labels.tolist(), RECIPE_COLUMN: row_texts(recipe, ways)}
    if soft_labels is not None:
        kinds[SOFT_COLUMN] = List(List(Value("float16"), length=len(class_names)))
        found[SOFT_COLUMN] = [shares.to(torch.float16).numpy() for shares in soft_labels]
    return Dataset.from_dict(found, features=Features(kinds))
