"""Multi-formation (section 6.3.2): one stored image holds factor^2 training images, each upsampled from its cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding import is_picture, picture_size, read_array, read_image, read_rows
from ..publishing.safe_files import MAX_VALUE, parse_json
from ..settings import (
    LARGEST,
    brief,
    check_choice,
    check_dataset,
    check_int,
    check_kind,
    check_tensor,
    check_text,
    settle,
)

if TYPE_CHECKING:
    from datasets import Dataset

RECIPE_COLUMN = "formation"
# a recipe may come from a stranger: cells a side, and how much larger than what is stored a batch may become
_MOST_CELLS = 256
_MOST_RATIO, _LEAST_BYTES = 32, 2**30
_MOST_PIXELS = 2**24
# what the files of a batch's pictures may unpack to, and be formed into, for each of their bytes
_PIXELS_PER_BYTE, _MOST_ENCODED, _LEAST_PIXELS = 256, 1024, 2**26
_LEAST_STD = 1e-12
Kind = Literal["single", "multi", "bound"]
Axis = Literal["image", "time"]


@dataclass(frozen=True, kw_only=True)
class Formation:
    """How stored elements are cut and resized: the deterministic function `f` of section 6.3.2.

    Args:
        factor (`int`, >= 1, default 2): cells along one axis; an image becomes `factor^2` images, a spectrogram `factor`.
            1 is IDC-I: nothing is cut.
        kind (`str`, default `"single"`): `"multi"` forms every factor 1 .. `factor`; `"bound"` forms `factor` for as many
            elements as stay within `bound` formed ones, smaller factors for the rest.
        axis (`str`, default `"image"`): `"image"` cuts height and width, `"time"` the last axis only.
        pad_value (`float`, default 0.5): fills the right and bottom edge where a size is not a multiple of the factor
            (0.5 for images in [0, 1], 0 for spectrograms).
        bound (`int`, >= 1, default 128): most formed elements of `"bound"`.

    Raises:
        ValueError: a field is out of its range.

    Source: section 6.3.2, Figure 6.3; padding, `"multi"` and `"bound"` from the reference code.

    Example:
        >>> Formation(factor=3).count(2)
        18
    """

    factor: int = 2
    kind: Kind = "single"
    axis: Axis = "image"
    pad_value: float = 0.5
    bound: int = 128

    def __post_init__(self) -> None:
        settle(
            self,
            choices={"kind": ("single", "multi", "bound"), "axis": ("image", "time")},
            numbers={"pad_value": (-LARGEST, LARGEST)},
            counts={"factor": 1, "bound": 1},
        )

    def cells(self, factor: int) -> int:
        """Formed elements of one stored element at `factor`."""
        factor = check_int("factor", factor, 1)
        return factor if self.axis == "time" else factor**2

    def count(self, n: int) -> int:
        """Formed elements of `n` stored ones."""
        return sum(self.cells(factor) * (stop - start) for factor, start, stop in self.plan(n))

    def plan(self, n: int) -> list[tuple[int, int, int]]:
        """(factor, first element, end) of each group, in the order of the output."""
        n = check_int("n", n, 0)
        if self.kind == "single":
            return [(self.factor, 0, n)]
        if self.kind == "multi":
            return [(factor, 0, n) for factor in range(1, self.factor + 1)]
        groups, start, formed = [], 0, 0
        for factor in range(self.factor, 0, -1):
            left = n - start
            room = self.bound - formed - left
            take = left if factor == 1 else max(0, min(room // self.cells(factor), left))
            if take:
                groups.append((factor, start, start + take))
                start, formed = start + take, formed + take * self.cells(factor)
        return groups


def form(images: Tensor, formation: Formation) -> Tensor:
    """Cut every element into cells and upsample each to the stored size, differentiably.

    Args:
        images: (n, C, H, W), any float dtype.
        formation: what to do.

    Returns:
        (`formation.count(n)`, C, H, W), cell-major: all n elements of cell (0, 0), then of (0, 1), ...

    Raises:
        ValueError: not of rank 4, or a side is shorter than the factor.

    Source: section 6.3.2, `f(S)`.
    Cost: one bilinear resize of the output.

    Example:
        >>> form(torch.rand(2, 3, 8, 8), Formation(factor=2)).shape
        torch.Size([8, 3, 8, 8])
    """
    check_tensor("images", images, ("n", "C", "H", "W"))
    check_kind("formation", formation, Formation)
    return torch.cat(
        [_form(images[start:stop], factor, formation) for factor, start, stop in formation.plan(len(images))]
    )


def form_labels(labels: Tensor, formation: Formation) -> Tensor:
    """Labels (n,) repeated in the order of `form`'s output."""
    check_tensor("labels", labels, ("n",), floating=False)
    plan = check_kind("formation", formation, Formation).plan(len(labels))
    return torch.cat([labels[start:stop].repeat(formation.cells(factor)) for factor, start, stop in plan])


def grid(height: int, width: int, factor: int, axis: Axis = "image") -> list[tuple[slice, slice]]:
    """Rows and columns of each cell, in the order of `form`; the last ones may reach past the edge (padding)."""
    cell_width = -(-width // factor)
    if axis == "time":
        return [(slice(0, height), slice(j * cell_width, (j + 1) * cell_width)) for j in range(factor)]
    cell_height = -(-height // factor)
    return [
        (slice(i * cell_height, (i + 1) * cell_height), slice(j * cell_width, (j + 1) * cell_width))
        for i in range(factor)
        for j in range(factor)
    ]


def _form(images: Tensor, factor: int, formation: Formation) -> Tensor:
    if factor == 1:
        return images
    n, channels, height, width = images.shape
    rows = 1 if formation.axis == "time" else factor
    if height < rows or width < factor:
        raise ValueError(f"cannot cut {height} x {width} into {factor} cells a side; use a smaller factor")
    padding = (0, -width % factor, 0, -height % rows)
    if any(padding):
        images = F.pad(images, padding, value=formation.pad_value)
    cell_height, cell_width = images.shape[2] // rows, images.shape[3] // factor
    cells = images.reshape(n, channels, rows, cell_height, factor, cell_width).permute(2, 4, 0, 1, 3, 5)
    return F.interpolate(
        cells.reshape(-1, channels, cell_height, cell_width), size=(height, width), mode="bilinear", align_corners=False
    )


class MultiFormation:
    """Turns stored rows into training rows: a callable for `Dataset.map(batched=True)` and `set_transform`.

    Args:
        formation: how elements were stored.
        column: column of images (or float arrays).
        output (`str`, default `"stored"`): `"stored"` keeps the column's type, i.e. images become 8-bit images again;
            `"tensor"` gives float32 (C, H, W), images in [0, 1], for `set_transform` or a column of another name.

    Source: section 6.3.2 (evaluation stage, `f(S*)`).
    Differs: row order within a `map` batch is cell-major, as the reference's; other columns are repeated along.
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

    @classmethod
    def from_dataset(cls, dataset: Dataset, *, output: Literal["stored", "tensor"] = "stored") -> MultiFormation:
        """The formation a condensed data set was made for, read from its own metadata.

        Raises:
            ValueError: the data set carries no recipe (or was formed already).
        """
        recipe = read_recipe(dataset)
        known = {field.name for field in fields(Formation)}
        try:
            formation = Formation(**{name: value for name, value in recipe["formation"].items() if name in known})
        except TypeError as error:
            raise ValueError(f"the recipe of this data set is damaged: {error}; get it again") from error
        if formation.factor > _MOST_CELLS:
            raise ValueError(f"the recipe cuts into {formation.factor} cells a side, at most {_MOST_CELLS} are formed")
        if abs(formation.pad_value) > MAX_VALUE:
            raise ValueError(f"the recipe pads with {formation.pad_value:g}; at most {MAX_VALUE:g} is used")
        return cls(formation, column=recipe["column"], output=output)

    def _check_size(self, stored: Tensor, encoded: int | None) -> None:
        """Refuse, before anything is formed, what a small recipe would blow up."""
        made = self.formation.count(len(stored)) * stored[0].numel() * 4
        most = _MOST_RATIO * stored.numel() * 4
        if encoded is not None:
            most = min(most, _MOST_ENCODED * encoded)
        if made > max(_LEAST_BYTES, most):
            raise ValueError(
                f"{len(stored)} stored elements would be formed into {made:,} bytes; if you trust the recipe, form fewer at a "
                "time: map(..., batch_size=1)"
            )

    def __call__(self, batch: MutableMapping[str, Any]) -> dict[str, Any]:
        """Form one batch of rows; the recipe column is dropped."""
        check_kind("batch", batch, Mapping, "use dataset.map(..., batched=True)")
        if self.column not in batch:
            raise ValueError(f"no column {self.column!r} among {sorted(batch)}; name the column of stored elements")
        encoded = _check_pixels(_undecoded(batch, self.column))
        values = list(batch[self.column])
        stored = stack(values)
        self._check_size(stored, encoded)
        formed = form(stored, self.formation)
        order = form_labels(torch.arange(len(values)), self.formation).tolist()
        # deleting in place is how a map callable drops a column
        if RECIPE_COLUMN in batch:
            del batch[RECIPE_COLUMN]
        rows: dict[str, Any] = {name: _repeat(batch[name], order) for name in batch if name != self.column}
        if self.output == "tensor":
            rows[self.column] = list(formed)
        elif is_image(values[0]):
            rows[self.column] = to_images(formed)
        else:
            rows[self.column] = list(formed.numpy().astype(np.asarray(values[0]).dtype, copy=False))
        return rows


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
            "command line --size, or resize them first"
        )
    return np.stack(arrays)


def to_images(images: Tensor) -> list[Any]:
    """Float images (n, C, H, W) in [0, 1] as 8-bit PIL images: grey for one channel, RGB for three."""
    from PIL import Image

    if images.shape[1] not in (1, 3):
        raise ValueError(f"only 1 or 3 channels can be stored as images, got {images.shape[1]}; use storage='float32'")
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row) for row in pixels]


def recipe_text(formation: Formation, column: str, **about: Any) -> str:
    """The recipe as the one JSON line that is kept in the data set's features."""
    return json.dumps({"formation": asdict(formation), "column": column, **about}, sort_keys=True)


def read_recipe(dataset: Any) -> Mapping[str, Any]:
    """The decode recipe of a condensed data set.

    Args:
        dataset: a `datasets.Dataset`, freshly condensed or loaded from disk, parquet or the Hub.

    Returns:
        The recipe: formation, column, and what the condenser recorded.

    Raises:
        ValueError: there is none.
    """
    feature = check_dataset("dataset", dataset).features.get(RECIPE_COLUMN)
    names = getattr(feature, "names", None)
    if not names:
        raise ValueError(
            f"this data set has no column {RECIPE_COLUMN!r} with a recipe: it was not condensed by hf_dataopt, was formed "
            "already, or lost the column; load it again, or build MultiFormation(Formation(factor=...)) by hand"
        )
    recipe: Any = parse_json(names[0], "the recipe of this data set")
    texts = ("column", "label_column")
    if not isinstance(recipe.get("formation"), dict) or any(
        recipe.get(key) not in dataset.features for key in texts if key in recipe or key == "column"
    ):
        raise ValueError(f"the recipe of this data set names no formation or other columns: {names[0]!r:.200}")
    for name in ("mean", "std"):
        values = recipe.get(name, [0.0])
        numbers = isinstance(values, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= MAX_VALUE for v in values
        )
        if not numbers or (name == "std" and not all(value >= _LEAST_STD for value in recipe.get(name, [1.0]))):
            raise ValueError(f"the recipe of this data set has a {name} of {values!r:.80}; condense again")
    found: Mapping[str, Any] = recipe
    return found
