"""One decoder of images and sounds for every room: what a cell of a column holds, as numbers, or what is wrong with its row.

Images come upright (EXIF), on white or another colour where they are transparent, grey or RGB, with all of their bits: 16-bit
ones are scaled by 65,535, never clipped. Sounds come as one channel of floats.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import BadRowError
from .progress import told
from .settings import brief, check_callable, check_choice, check_int, optional

OnError = Literal["raise", "skip"]
T = TypeVar("T")

_LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue, as Pillow has it
MOST_PIXELS = 2**26  # of one picture; its header says how many, before anything is decoded
MOST_SAMPLES = 2**28  # of one sound, all channels together: 4.6 hours of one channel at 16 kHz
_PROGRAMS = ("EPS", "WMF")  # Pillow would start one on a stranger's file
_PLAIN = (np.ndarray, list, tuple)
# what decoders raise on foreign or torn files
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError,
    RuntimeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip


def check_on_error(value: str) -> None:
    """Refuse what is neither "raise" nor "skip"."""
    check_choice("on_error", value, ("raise", "skip"))


def read_rows(
    values: Iterable[Any],
    read: Callable[[Any], T],
    *,
    rows: Iterable[int] | None = None,
    on_error: OnError = "raise",
    what: str = "row",
) -> tuple[list[T], list[int], dict[int, str]]:
    """Decode the cells of a column one by one.

    Args:
        values: cells.
        read: one cell's decoder; a `ValueError` of it says what is wrong.
        rows: number of each cell's row, for messages; default 0, 1, ...
        on_error: "raise" names the row; "skip" leaves it out.
        what: what a number counts, for messages.

    Returns:
        What was read, the positions it was read from, and the reason for every row that was left out.

    Raises:
        BadRowError: a cell cannot be read, with `on_error="raise"`.
    """
    check_on_error(on_error)
    check_callable("read", read)
    if not isinstance(values, Iterable) or isinstance(values, str | bytes) or getattr(values, "shape", None) == ():
        raise TypeError(f"values must be the cells of a column, got {brief(values)}")
    found, kept, skipped = [], [], {}
    numbers = iter(rows) if rows is not None else iter(range(10**18))
    for position, (value, row) in enumerate(zip(values, numbers, strict=False)):
        try:
            found.append(read(value))
            kept.append(position)
        except BadRowError:
            raise
        except ValueError as error:
            if on_error == "raise":
                raise BadRowError(int(row), str(error), what) from error
            skipped[int(row)] = str(error)
    return found, kept, skipped


def column_values(batch: Any, column: str) -> Any:
    """A batch's cells; undecoded where one of them cannot be decoded, so that the others can.

    Args:
        batch: a mapping, or what `Dataset.map` gives a batched callable.
        column: which one.
    """
    try:
        return batch[column]
    except ImportError:
        raise
    except _UNREADABLE:
        table = getattr(batch, "pa_table", None)
        if table is None:
            raise
        return table[column].to_pylist()


def colour_of(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour that is given by its name or as `"#rrggbb"`.

    Raises:
        ValueError: no such colour.
    """
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise ValueError(f"{brief(name)} is no colour; give a name such as 'white', or '#rrggbb'") from error
    return red, green, blue


def read_image(value: Any, mode: str | None = None, background: str = "white") -> NDArray[np.float32]:
    """A picture as numbers.

    Args:
        value: a PIL image, an `Image` cell that was not decoded ({"bytes", "path"}), bytes, or a path.
        mode: "L" or "RGB"; None: as the picture is.
        background: colour under transparent pixels.

    Returns:
        (C, H, W) float32 in [0, 1], C = 1 for grey ones and 3 for others.

    Raises:
        ValueError: no image, one that cannot be decoded, or float values outside [0, 255].

    Differs: 32-bit modes carry no range. Values up to 1 ("F" only) count as [0, 1], up to 255 as 8 bits, up to 65,535 as 16.
    """
    array = _values(_opened(value), background)
    if mode == "L" and array.ndim == 3:
        array = array @ np.asarray(_LUMA, np.float32)
    if mode == "RGB" and array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def read_picture(value: Any, mode: str | None = None) -> Any:
    """A picture as people and image processors take it: 8 bits, upright, "L" or "RGB".

    Args:
        value: as `read_image`.
        mode: "L" or "RGB"; None: as the picture is.

    Returns:
        A PIL image; more than 8 bits are rounded.

    Raises:
        ValueError: as `read_image`.
    """
    from PIL import Image

    image = _opened(value)
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        image = Image.fromarray((_values(image) * 255).round().astype(np.uint8))
    return image if mode is None or image.mode == mode else image.convert(mode)


def is_picture(value: Any) -> bool:
    """Whether a cell is what `read_image` takes, and no array."""
    return (
        hasattr(value, "getbands")
        or isinstance(value, bytes | str)
        or (isinstance(value, Mapping) and "bytes" in value)
    )


def picture_size(value: Any) -> tuple[int, int]:
    """Width and height of a picture, from its header alone.

    Raises:
        ValueError: as `read_image`.
    """
    width, height = _header(value).size
    return width, height


def picture_text(value: Any, key: str) -> Any:
    """A text that a picture's file carries beside its pixels (PNG); None where there is none.

    Raises:
        ValueError: as `read_image`.
    """
    return getattr(_header(value), "info", {}).get(key)


def _header(value: Any) -> Any:
    """A PIL image whose pixels may not be decoded yet."""
    from PIL import Image

    if value is None:
        raise ValueError("holds no image")
    try:
        if isinstance(value, Mapping):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes | str):
            value = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        if not hasattr(value, "getbands") or isinstance(value, type):
            raise ValueError(f"it is {brief(value)}")
        if getattr(value, "format", None) in _PROGRAMS:
            raise ValueError(f"{value.format} is decoded by another program")
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise _undecodable(error) from error
    return value


def _undecodable(error: Exception) -> ValueError:
    return ValueError(f"holds an image that cannot be decoded ({type(error).__name__}: {told(error, 120)})")


def _opened(value: Any) -> Any:
    """An upright PIL image that is loaded."""
    from PIL import ImageOps

    value = _header(value)
    if value.width * value.height > MOST_PIXELS:
        raise ValueError(
            f"holds an image of {value.width} x {value.height} pixels, at most {MOST_PIXELS:,} are read; shrink it"
        )
    try:
        value.load()
    except _UNREADABLE as error:
        raise _undecodable(error) from error
    if not all(value.size):
        raise ValueError(f"holds an image of {value.width} x {value.height} pixels")
    try:
        return ImageOps.exif_transpose(value)
    except _UNREADABLE:  # a broken tag says nothing about the picture
        return value


def _values(image: Any, background: str = "white") -> NDArray[np.float32]:
    """(H, W) or (H, W, 3) float32 in [0, 1]."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.float32) / np.float32(65535)
    if image.mode in ("I", "F"):
        return _unit(np.asarray(image).astype(np.float32), floats=image.mode == "F")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        under = Image.new("RGBA", image.size, (*colour_of(background), 255))
        image = Image.alpha_composite(under, image)
    pixels = np.asarray(image.convert("L" if grey else "RGB"), np.float32)
    return pixels / np.float32(255)


def _unit(values: NDArray[np.float32], *, floats: bool) -> NDArray[np.float32]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):  # NaN too
        raise ValueError(f"holds an image of values {low:g} to {high:g}; scale it to [0, 1] (float) or 16 bits first")
    scale = 1.0 if floats and high <= 1 else 255.0 if high <= 255 else 65535.0
    return values / np.float32(scale)


def read_array(value: Any) -> NDArray[np.float32]:
    """A cell of numbers as float32, whatever its shape.

    Raises:
        ValueError: missing, ragged, empty, no numbers, NaN or infinite.
    """
    if value is None:
        raise ValueError("holds no values")
    try:
        array = _array(value)
        array = array.astype(np.float32) if array.dtype.kind in "fiub" else np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"holds no array of numbers ({told(error, 80)})") from error
    if not array.size:
        raise ValueError("holds no values")
    if not np.isfinite(array).all():
        raise ValueError("holds NaN or infinite values")
    return array


def _array(value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"holds no array of numbers ({error!s:.80})") from error


def stacked(arrays: list[NDArray[Any]], rows: list[int]) -> NDArray[Any]:
    """Arrays of one shape as one.

    Raises:
        ValueError: of different shapes; names the first row that has another one.
    """
    for array, row in zip(arrays, rows, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"row {row} has shape {array.shape}, row {rows[0]} {arrays[0].shape}; they must be alike: give a processor "
                "that brings them to one size, or change the column"
            )
    return np.stack(arrays)


def read_sound(value: Any, rate: int | None) -> NDArray[np.float32]:
    """A sound as samples.

    Args:
        value: what an `Audio` column decodes to, such a cell that was not decoded, or bare samples of rate `rate`.
        rate: samples a second that are needed; None: any.

    Returns:
        (n,) float32, mean of the channels; integers scaled to [-1, 1].

    Raises:
        ValueError: missing, empty, NaN, undecodable, of another rate, or longer than is read by what its header says.
        ImportError: a sound file, and nothing that decodes it is installed.
    """
    rate = optional(check_int, "rate", rate, 1)
    if value is None:
        raise ValueError("holds no sound")
    if isinstance(value, Mapping) and "array" not in value:
        value = _decoded_sound(value)
    if not isinstance(value, _PLAIN) and not hasattr(value, "detach"):
        _check_length(value)
        try:
            found, value = int(value["sampling_rate"]), value["array"]
        except _UNREADABLE as error:
            raise ValueError(f"holds a sound that cannot be decoded ({told(error, 120)})") from error
        if rate is not None and found != rate:
            raise ValueError(
                f"has audio of sampling rate {found}, the model needs {rate}; cast the column: "
                f"dataset.cast_column(column, Audio({rate}))"
            )
    whole = _array(value)
    if not whole.size:
        raise ValueError("holds a sound of no samples")
    samples = read_array(value)
    if whole.dtype.kind in "iu" and whole.dtype.itemsize < 8:  # Python's own integers say nothing about their range
        half = np.float32(2.0 ** (8 * whole.dtype.itemsize - 1))
        samples = samples / half - (whole.dtype.kind == "u")
    if samples.ndim == 2 and min(samples.shape) <= 8:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1:
        raise ValueError(f"holds an array of shape {samples.shape}, no samples of one sound")
    return np.ascontiguousarray(samples, np.float32)


def _check_length(sound: Any) -> None:
    """Refuse a decoder of more samples than are read, before it decodes any; one whose header says no length passes."""
    about = getattr(sound, "metadata", None)
    names = ("duration_seconds_from_header", "sample_rate", "num_channels")
    said = [getattr(about, name, None) for name in names]
    if not all(isinstance(one, int | float) for one in said):
        return
    seconds, rate, channels = (float(one) for one in said if one is not None)
    samples = seconds * rate * channels
    if not samples <= MOST_SAMPLES:  # NaN too
        raise ValueError(
            f"holds a sound of {seconds:g} s, {channels:g} channels at {rate:g} Hz, at most {MOST_SAMPLES:,} samples are read; "
            "cut it into shorter ones"
        )


def _decoded_sound(cell: Mapping[str, Any]) -> Any:
    from datasets import Audio

    if cell.get("bytes") is None and cell.get("path") is None:
        raise ValueError("holds no sound")
    try:
        return Audio().decode_example(dict(cell))
    except _UNREADABLE as error:
        raise ValueError(f"holds a sound that cannot be decoded ({told(error, 120)})") from error
