"""Multi-formation (section 6.3.2) as a `map` callable: one stored image holds factor^2 training images."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..decoding import is_picture, picture_size, read_array, read_image, read_rows
from ..settings import brief, check_choice, check_kind, check_text
from .formation import Formation as Formation
from .formation import Way, form_rows
from .formation import form as form
from .formation import form_labels as form_labels
from .recipe import MARK, RECIPE_COLUMN, SOFT_COLUMN, formation_from, mark_of, recipe_column, ways_of_texts
from .recipe import read_recipe as read_recipe
from .recipe import recipe_text as recipe_text

if TYPE_CHECKING:
    from datasets import Dataset

# how much larger than what is stored a batch may become
_MOST_RATIO, _LEAST_BYTES = 32, 2**30
_MOST_PIXELS = 2**24
# what the files of a batch's pictures may unpack to, and be formed into, for each of their bytes
_PIXELS_PER_BYTE, _MOST_ENCODED, _LEAST_PIXELS = 256, 1024, 2**26


class MultiFormation:
    """Turns stored rows into training rows: a callable for `Dataset.map(batched=True)` and `set_transform`.

    Args:
        formation: how elements were stored, where the rows do not say it themselves.
        column: column of images (or float arrays).
        output (`str`, default `"stored"`): `"stored"` keeps the column's type, i.e. images become 8-bit images again;
            `"tensor"` gives float32 (C, H, W), images in [0, 1], for `set_transform` or a column of another name.

    Every row is formed as its own recipe says, so that batches may be of any size, shuffled and put together of several
    sets. A column `soft_label` of one distribution per cell gives each training row its own; other columns are repeated.

    Source: section 6.3.2 (evaluation stage, `f(S*)`).
    Differs: row order within a `map` batch is cell-major, as the reference's.
    Cost: one bilinear resize a row.

    Example:
        >>> train = condensed.map(MultiFormation.from_dataset(condensed), batched=True)  # doctest: +SKIP
        >>> condensed.set_transform(MultiFormation.from_dataset(condensed, output="tensor"))  # doctest: +SKIP
    """

    def __init__(
        self, formation: Formation, *, column: str = "image", output: Literal["stored", "tensor"] = "stored"
    ) -> None:
        self.output = check_choice("output", output, ("stored", "tensor"))
        self.formation = check_kind("formation", formation, Formation, "give Formation(factor=...)")
        self.column = check_text("column", column, empty=False)
        self._recipes: str | None = None  # where the rows say how they are formed; None: made by hand

    @classmethod
    def from_dataset(cls, dataset: Dataset, *, output: Literal["stored", "tensor"] = "stored") -> MultiFormation:
        """For the rows of a condensed data set, by its own recipes.

        Raises:
            ValueError: the data set carries no recipe (or was formed already).
        """
        recipe = read_recipe(dataset)
        made = cls(formation_from(recipe), column=recipe["column"], output=output)
        made._recipes = recipe_column(dataset) or MARK
        return made

    def __call__(self, batch: MutableMapping[str, Any]) -> dict[str, Any]:
        """Form one batch of rows; the recipe column is dropped.

        Raises:
            ValueError: rows that were formed already.
        """
        check_kind("batch", batch, Mapping, "use dataset.map(..., batched=True)")
        if self.column not in batch:
            raise ValueError(f"no column {self.column!r} among {sorted(batch)}; name the column of stored elements")
        cells = _undecoded(batch, self.column)
        encoded = _check_pixels(cells)
        values = list(batch[self.column])
        ways = self._ways(batch, cells)
        stored = stack(values)
        _check_size(stored, ways, encoded)
        formed, order, places = form_rows(stored, ways)
        # deleting in place is how a map callable drops a column
        for name in {RECIPE_COLUMN, self._recipes or RECIPE_COLUMN} & set(batch):
            del batch[name]
        rows: dict[str, Any] = {
            name: _repeat(batch[name], order) for name in batch if name not in (self.column, SOFT_COLUMN)
        }
        if SOFT_COLUMN in batch:
            rows[SOFT_COLUMN] = _soft_labels(batch[SOFT_COLUMN], ways, order, places)
        if self.output == "tensor":
            rows[self.column] = list(formed)
        elif is_image(values[0]):
            rows[self.column] = to_images(formed)
        else:
            rows[self.column] = list(formed.numpy().astype(np.asarray(values[0]).dtype, copy=False))
        return rows

    def _ways(self, batch: Mapping[str, Any], cells: list[Any]) -> list[Way]:
        """How each row is formed: by its recipe, by the mark in its file, or, by hand, by what was given."""
        texts = batch.get(self._recipes or RECIPE_COLUMN)
        if texts is not None:
            return ways_of_texts(list(texts))
        marks = [mark_of(cell) for cell in cells]
        if any(mark is not None for mark in marks):
            return ways_of_texts(marks)
        if self._recipes is not None:
            raise ValueError(
                f"these rows have no column {self._recipes!r} and no mark in their files: they were formed already, which "
                "is done once, or the column was dropped; use the condensed set as it was loaded"
            )
        if self.formation.kind == "bound":
            raise ValueError(
                "a 'bound' formation counts the elements of a class, which a batch does not show; form rows that carry "
                "their recipe, or each class with form()"
            )
        return self.formation.ways(1) * len(cells)


def _check_size(stored: Tensor, ways: Sequence[Way], encoded: int | None) -> None:
    """Refuse, before anything is formed, what a small recipe would blow up."""
    count = sum(formation.cells(factor) for formation, factors in ways for factor in factors)
    made = count * stored[0].numel() * 4
    most = _MOST_RATIO * stored.numel() * 4
    if encoded is not None:
        most = min(most, _MOST_ENCODED * encoded)
    if made > max(_LEAST_BYTES, most):
        raise ValueError(
            f"{len(stored)} stored elements would be formed into {made:,} bytes; if you trust the recipe, form fewer at a "
            "time: map(..., batch_size=1)"
        )


def _soft_labels(given: Any, ways: Sequence[Way], order: list[int], places: list[int]) -> list[Any]:
    """The distribution of each formed row's own cell; a row with a single one gives it to all."""
    values = [np.asarray(value, np.float16) for value in given]
    for row, (value, (formation, factors)) in enumerate(zip(values, ways, strict=True)):
        count = sum(map(formation.cells, factors))
        if value.ndim not in (1, 2) or (value.ndim == 2 and len(value) != count):
            raise ValueError(
                f"row {row} of the batch has soft labels of shape {value.shape} for {count} cells; give one row of class "
                "shares per cell"
            )
    return [
        values[row] if values[row].ndim == 1 else values[row][place] for row, place in zip(order, places, strict=True)
    ]


def _undecoded(batch: Any, column: str) -> list[Any]:
    """The cells of a batch of `Dataset.map` before `datasets` decodes them, which takes as much memory as it takes."""
    table = getattr(batch, "pa_table", None)
    if table is None or column not in table.column_names or "bytes" not in getattr(table[column].type, "names", ()):
        return list(batch[column])
    return list(table[column].to_pylist())


def _check_pixels(values: list[Any]) -> int | None:
    """Refuse pictures that would fill the memory, by their headers.

    Returns:
        Bytes of the pictures' files; None where they are decoded already, or arrays.
    """
    pictures = [value for value in values if is_image(value)]
    total, encoded = 0, sum(_file_bytes(value) for value in pictures)
    for width, height in read_rows(pictures, picture_size)[0]:
        total += width * height
        if width * height > _MOST_PIXELS:
            raise ValueError(f"a stored image has {width} x {height} pixels, at most {_MOST_PIXELS:,} are read")
    if encoded and total > max(_LEAST_PIXELS, _PIXELS_PER_BYTE * encoded):
        raise ValueError(
            f"{len(pictures)} stored images of {encoded:,} bytes hold {total:,} pixels; if you trust them, form fewer at a "
            "time: map(..., batch_size=1)"
        )
    return encoded or None


def _file_bytes(value: Any) -> int:
    content = value.get("bytes") if isinstance(value, Mapping) else value
    return len(content) if isinstance(content, bytes) else 0


def _repeat(values: Any, order: list[int]) -> Any:
    return values[order] if isinstance(values, Tensor | np.ndarray) else [values[i] for i in order]


def is_image(value: Any) -> bool:
    """Whether a cell of the column is a picture, and no array."""
    return is_picture(value)


def stack(values: list[Any]) -> Tensor:
    """Images (as [0, 1]) or arrays of one size as float32 (n, C, H, W); grey among colour gets three equal channels.

    Raises:
        ValueError: no values, unequal sizes, NaN, or a rank that is no image.
    """
    if not isinstance(values, list) or not values:
        raise ValueError(f"need a list of images or arrays, at least one row, got {brief(values)}")
    return torch.from_numpy(alike(read_rows(values, read_element)[0]))


def read_element(value: Any) -> np.ndarray:
    """One image (as [0, 1]) or array as float32 (C, H, W)."""
    if is_image(value):
        return read_image(value)
    array = read_array(value)
    if array.ndim not in (2, 3):
        raise ValueError(f"holds an array of shape {array.shape}; an element must have shape (C, H, W) or (H, W)")
    if array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in (1, 3):
        raise ValueError(
            f"holds an array of shape {array.shape}, which looks like (H, W, C); give (C, H, W), or cast the column to Image()"
        )
    return array[None] if array.ndim == 2 else array


def alike(arrays: list[np.ndarray]) -> np.ndarray:
    """Elements of one size as one array (n, C, H, W), grey ones with as many channels as the others.

    Raises:
        ValueError: unequal sizes or other numbers of channels.
    """
    channels = {array.shape[0] for array in arrays}
    if channels == {1, 3}:
        arrays = [np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array for array in arrays]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(
            f"images have {len(shapes)} different sizes, e.g. {sorted(shapes)[:3]}; give IDCConfig(image_size=...), on the "
            "command line --image-size, or resize them first"
        )
    return np.stack(arrays)


def to_images(images: Tensor) -> list[Any]:
    """Float images (n, C, H, W) in [0, 1] as 8-bit PIL images: grey for one channel, RGB for three."""
    from PIL import Image

    if images.shape[1] not in (1, 3):
        raise ValueError(f"only 1 or 3 channels can be stored as images, got {images.shape[1]}; use storage='float32'")
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row) for row in pixels]
