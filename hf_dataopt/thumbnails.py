"""Small pictures of pictures: what is left of one when it is encoded or scaled again, so that copies can be told by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import decoding
from .decoding import OnError
from .settings import check_kind, check_text

COLUMN = "thumbnail"
SIDE = 8
WIDTH = SIDE * SIDE * 3


def thumbnail(value: Any) -> NDArray[np.uint8]:
    """8 x 8 averages of a picture's red, green and blue.

    Args:
        value: as `decoding.read_picture`, or an array.

    Returns:
        (192,) uint8, row by row; weights of neighbouring places overlap, so that another size of the picture changes little.
        Black, which is no copy of anything, for arrays other than bytes (h, w), (h, w, 1) and (h, w, 3).

    Raises:
        ValueError: no picture, or one that cannot be decoded.
    """
    from PIL import Image

    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (1, 3))):
            return np.zeros(WIDTH, np.uint8)
        value = Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else value)
    small = decoding.read_picture(value, "RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small).reshape(-1)


class Thumbnails:
    """Adds the column "thumbnail", by which `RelationCleaner` finds pictures that were encoded or scaled again.

    `FeatureExtractor` adds it too; this is for features that come from elsewhere.

    Args:
        column: column of images.
        on_error: "raise" ends at the first picture that cannot be read and names its row; "skip" makes its thumbnail black,
            which is no copy of anything.

    Raises:
        ValueError: no column name, or another `on_error`.

    Differs: not in the dissertation.
    Cost: decoding a picture.

    Example:
        >>> dataset.map(Thumbnails("image"), batched=True, with_indices=True)  # doctest: +SKIP
    """

    def __init__(self, column: str = "image", *, on_error: OnError = "raise") -> None:
        check_text("column", column, empty=False)
        decoding.check_on_error(on_error)
        self.column, self.on_error = column, on_error

    def __call__(self, batch: Mapping[str, Any], *where: Any) -> dict[str, NDArray[np.uint8]]:
        """Thumbnails (n, 192), uint8, of one batch.

        Args:
            batch: holds the column.
            where: what `map` adds: row numbers (`with_indices=True`), for messages.

        Raises:
            ValueError: no such column.
            BadRowError: a picture cannot be read.
        """
        check_kind("batch", batch, Mapping, "use dataset.map(..., batched=True)")
        if self.column not in batch:
            raise ValueError(f"the batch has columns {list(batch)}, not {self.column!r}; set column=")
        rows = next((one for one in where if np.ndim(one) == 1), None)
        values = decoding.column_values(batch, self.column)
        name = "row" if rows is not None else "row of the batch"
        found, places, _ = decoding.read_rows(values, thumbnail, rows=rows, on_error=self.on_error, what=name)
        small = np.zeros((len(values), WIDTH), np.uint8)
        small[places] = np.stack(found) if found else small[:0]
        return {COLUMN: small}
