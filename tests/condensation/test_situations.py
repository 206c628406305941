"""Ordinary data, one situation a line: it is read right, or a one-line error names the row or the option.

Every situation gives a data set of two classes whose images are half dark, half bright, so that what was read can be told.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import (
    Array3D,
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    concatenate_datasets,
    load_dataset,
)
from PIL import Image as Pictures

from hf_dataopt import DatasetCondenser, IDCConfig
from hf_dataopt.condensation.columns import read_images
from hf_dataopt.condensation.multi_formation import stack
from hf_dataopt.condensation.recipe import read_recipe

DARK, BRIGHT = 51, 204  # 0.2 and 0.8
LABELS = [0, 1] * 3


def halves(height: int = 12, width: int = 12) -> np.ndarray:
    """(H, W) uint8: the upper half dark, the lower bright."""
    values = np.full((height, width), DARK, np.uint8)
    values[height // 2 :] = BRIGHT
    return values


def picture(mode: str = "L", height: int = 12, width: int = 12) -> Any:
    return Pictures.fromarray(halves(height, width)).convert(mode)


def cell(value: Any, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    """A file as an undecoded image cell."""
    file = io.BytesIO()
    value.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def rows(images: Any = None, labels: Any = None, image: Any = None, label: Any = None) -> Dataset:
    """Six rows; given kinds of columns, or images and classes."""
    values = images if images is not None else [picture() for _ in range(6)]
    features = Features(image=image or Image(), label=label or ClassLabel(names=["a", "b"]))
    return Dataset.from_dict({"image": values, "label": LABELS if labels is None else labels}, features=features)


def six(make: Callable[[], Any]) -> Dataset:
    return rows([make() for _ in range(6)])


def clear(mode: str) -> Any:
    """Upper half transparent."""
    values = np.zeros((12, 12, 4), np.uint8)
    values[6:] = (BRIGHT, BRIGHT, BRIGHT, 255)
    found = Pictures.fromarray(values)
    return found.convert("LA") if mode == "LA" else found


def palette() -> Any:
    found = Pictures.fromarray((halves() > DARK).astype(np.uint8))
    found.putpalette([DARK] * 3 + [BRIGHT] * 3)
    return found


def turned() -> dict[str, Any]:
    """Stored on its side, with the tag that says so."""
    exif = Pictures.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    return cell(Pictures.fromarray(np.rot90(halves(12, 8)).copy()), "JPEG", exif=exif, quality=95)


def with_row(row: int, value: Any) -> Dataset:
    cells: list[Any] = [cell(picture()) for _ in range(6)]
    cells[row] = value
    return rows(cells)


def folder(where: Path, kind: str = "png") -> Dataset:
    for place, name in enumerate(("b", "a") * 3):
        (where / "train" / name).mkdir(parents=True, exist_ok=True)
        picture("RGB").save(where / "train" / name / f"{place}.{kind}")
    return load_dataset("imagefolder", data_dir=str(where), split="train", cache_dir=str(where / "cache"))


def parquet(where: Path) -> Dataset:
    rows().to_parquet(where / "rows.parquet")
    return Dataset.from_parquet(str(where / "rows.parquet"), cache_dir=str(where))


def arrays(dtype: str, scale: float = 1.0, shape: tuple[int, ...] = (1, 12, 12)) -> Dataset:
    values = np.broadcast_to(halves() / 255 * scale, shape).astype(dtype)
    return rows([values] * 6, image=Array3D(shape, dtype))


def torn() -> dict[str, Any]:
    return {"bytes": cell(picture("L", 40, 40), "JPEG")["bytes"][:200], "path": None}


def frames() -> dict[str, Any]:
    return cell(picture(), "GIF", save_all=True, append_images=[Pictures.new("L", (12, 12), 255)])


def deep() -> Any:
    return Pictures.fromarray(halves().astype(np.uint16) * 257)


def floats(scale: float = 1.0, shift: float = 0.0) -> Any:
    return Pictures.fromarray((halves() / 255 * scale + shift).astype(np.float32))


GREY, COLOUR = (1, 12, 12), (3, 12, 12)
# name: the data, settings, shape of what is read, classes, dark and bright (0.2 and 0.8 where not said)
RIGHT: dict[str, tuple[Callable[[Path], Dataset], dict[str, Any], tuple[int, ...], list[str], tuple[float, float]]] = {}
# name: the data, settings, words of the error
REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {}


def right(
    name: str,
    make: Callable[[Path], Dataset],
    shape: tuple[int, ...] = GREY,
    classes: list[str] | None = None,
    tones: tuple[float, float] = (0.2, 0.8),
    **changes: Any,
) -> None:
    RIGHT[name] = (make, changes, shape, classes or ["a", "b"], tones)


def refused(name: str, make: Callable[[Path], Any], words: str, **changes: Any) -> None:
    REFUSED[name] = (make, changes, words)


# modes
right("grey", lambda _: six(picture))
right("colour", lambda _: six(lambda: picture("RGB")), COLOUR)
right("grey among colour", lambda _: rows([picture("RGB")] * 3 + [picture()] * 3), COLOUR)
right("colour asked to be grey", lambda _: six(lambda: picture("RGB")), image_mode="L")
right("grey asked to be colour", lambda _: six(picture), COLOUR, image_mode="RGB")
right("opaque alpha", lambda _: six(lambda: picture("RGBA")), COLOUR)
right("transparent on white", lambda _: six(lambda: clear("RGBA")), COLOUR, tones=(1.0, 0.8))
right("transparent on black", lambda _: six(lambda: clear("RGBA")), COLOUR, tones=(0.0, 0.8), background="black")
right("transparent grey on a tone", lambda _: six(lambda: clear("LA")), tones=(0.2, 0.8), background="#333333")
right("one bit", lambda _: six(lambda: Pictures.fromarray(halves() > DARK)), tones=(0.0, 1.0))
right("palette", lambda _: six(palette), COLOUR)
right("four inks", lambda _: six(lambda: picture("RGB").convert("CMYK")), COLOUR)
right("16 bits", lambda _: six(deep))
right("16-bit TIFF", lambda _: rows([cell(deep(), "TIFF")] * 6))
right("floats in [0, 1]", lambda _: six(floats))
right("floats in [0, 255]", lambda _: six(lambda: floats(255)))
right("32-bit whole numbers", lambda _: six(lambda: Pictures.fromarray(halves().astype(np.int32))))
# sizes
right("sizes of all kinds", lambda _: rows([picture("L", 12 + k, 20) for k in range(6)]), (1, 8, 8), image_size=8)
right("too small for the size", lambda _: rows([picture("L", 4, 6)] * 6), (1, 8, 8), image_size=8, tones=(0.2, 0.8))
right("no square", lambda _: rows([picture("L", 12, 20)] * 6), (1, 12, 20))
right("no multiple of the factor", lambda _: rows([picture("L", 13, 11)] * 6), (1, 13, 11), factor=3)
right("turned by its EXIF tag", lambda _: rows([turned()] * 6), (1, 12, 8), image_mode="L")
# labels
right("strings", lambda _: rows(labels=["b", "a"] * 3, label=Value("string")))
right("bools", lambda _: rows(labels=[True, False] * 3, label=Value("bool")), classes=["False", "True"])
right("numbers from 7", lambda _: rows(labels=[10, 7] * 3, label=Value("int64")), classes=["7", "10"])
right("8-bit labels", lambda _: rows(label=Value("uint8")), classes=["0", "1"])
right("few of a class", lambda _: rows(labels=[0, 0, 0, 0, 0, 1]))
# formats and containers
right("JPEG", lambda _: rows([cell(picture(), "JPEG", quality=95)] * 6))
right("WebP", lambda _: rows([cell(picture("RGB"), "WEBP", lossless=True)] * 6), COLOUR)
right("first frame of a GIF", lambda _: rows([frames()] * 6), COLOUR, image_mode="RGB")
right("undecoded", lambda _: rows().cast_column("image", Image(decode=False)))
right("bytes", lambda _: rows([cell(picture())["bytes"]] * 6, image=Value("binary")))
right("a folder", folder, COLOUR)
right("a folder of JPEG", lambda where: folder(where, "jpg"), COLOUR)
right("a parquet file", parquet)
right("shuffled and selected", lambda _: rows().shuffle(seed=1).select(range(1, 6)))
right("put together", lambda _: concatenate_datasets([rows(), rows()]))
right("numpy format", lambda _: rows().with_format("numpy"))
right("torch format", lambda _: arrays("float32").with_format("torch"))
right("arrays of 8 bits", lambda _: arrays("uint8", 255, COLOUR), COLOUR)
right("arrays of 64-bit floats", lambda _: arrays("float64"))
right("nested lists", lambda _: Dataset.from_dict({"image": [(halves() / 255).tolist()] * 6, "label": list("ab") * 3}))
right(
    "arrays of any range",
    lambda _: arrays("float32", 10),
    tones=(2.0, 8.0),
    storage="float32",
    clamp_low=None,
    clamp_high=None,
)
right("one broken, skipped", lambda _: with_row(2, {"bytes": b"x", "path": None}))

refused("sizes of all kinds, no size", lambda _: rows([picture("L", 12 + k, 20) for k in range(6)]), "image_size")
refused("one pixel", lambda _: rows([picture("L", 1, 1)] * 6), "use a smaller factor or larger images")
refused("broken", lambda _: with_row(2, {"bytes": b"x", "path": None}), "^row 2 holds an image that cannot be decoded")
refused(
    "cut off",
    lambda _: with_row(4, torn()),
    "^row 4 holds an image",
)
refused("missing image", lambda _: with_row(3, None), "^row 3 holds no image")
refused(
    "negative floats", lambda _: six(lambda: floats(1, -1)), "^row 0 holds an image of values -0.8 to -0.2; scale it"
)
refused("NaN", lambda _: arrays("float32", float("nan")), "^row 0 holds NaN")
refused(
    "channels last",
    lambda _: rows([halves()[..., None]] * 6, image=Array3D((12, 12, 1), "uint8")),
    "looks like (H, W, C)",
)
refused("arrays of 0 to 255", lambda _: arrays("float32", 255), "clamp_low=0.0 to clamp_high=1.0 is kept: scale them")
refused(
    "no such column", lambda _: rows().rename_column("image", "img"), "no column 'image'; the data set has img, label"
)
refused("no label", lambda _: rows(labels=[0, 1, None, 1, 0, 1]), "^row 2 has no label")
refused(
    "label of no class",
    lambda _: rows(labels=[0, 1, -1, 1, 0, 1], label=Value("int64")),
    "^row 2 has label -1, which is no class",
)
refused(
    "fractions",
    lambda _: rows(labels=[0.5, 1.5] * 3, label=Value("float32")),
    "must be integers, strings or bools, got float",
)
refused("one class", lambda _: rows(labels=["a"] * 6, label=Value("string")), "found one class only")
refused("an unused class", lambda _: rows(label=ClassLabel(names=["a", "b", "c"])), "no images of the classes ['c']")
refused("all splits", lambda _: DatasetDict(train=rows()), "got DatasetDict; pick one split")
refused("a stream", lambda _: rows().to_iterable_dataset(), "load without streaming")
refused("no rows", lambda _: rows().select([]), "the data set is empty")
refused("other colour", lambda _: rows(), "is no colour", background="colourless")


def config(**changes: Any) -> IDCConfig:
    return IDCConfig(**{"images_per_class": 1, "factor": 2, "width": 4, "depth": 1, "evaluation_epochs": 1, **changes})


def test_there_are_forty_and_more() -> None:
    assert len(RIGHT) >= 40 and len(RIGHT) + len(REFUSED) >= 60


@pytest.mark.parametrize("name", RIGHT)
def test_ordinary_data_is_condensed_right(name: str, tmp_path: Path) -> None:
    make, changes, shape, classes, (dark, bright) = RIGHT[name]
    data, skips = make(tmp_path), "skipped" in name
    by_hand, mosaics = (
        DatasetCondenser(config(**changes), method=method, on_error="skip" if skips else "raise")
        for method in ("herding", "mosaic")
    )
    condensed = by_hand.condense(data)
    images = stack(condensed["image"][:])
    assert tuple(images.shape[1:]) == shape and condensed.features["label"].names == classes
    assert condensed["label"][:] == [0, 1] and bool(by_hand.skipped) == skips
    edge = max(1, shape[1] // 4)
    near = 0.02 if "JPEG" in name or "EXIF" in name else 0.006
    assert torch.allclose(images[:, :, :edge], torch.tensor(dark), atol=near)
    assert torch.allclose(images[:, :, -edge:], torch.tensor(bright), atol=near)
    scores = mosaics.evaluate(mosaics.condense(data), data, seeds=1)
    assert scores["condensed"][0].images == 2 * changes.get("factor", 2) ** 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_condensed_says_what_to_do_in_a_line(name: str, tmp_path: Path) -> None:
    make, changes, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError)) as found:
        DatasetCondenser(config(**changes), method="mosaic").condense(make(tmp_path))
    message = str(found.value)
    assert "\n" not in message and (message.startswith(words[1:]) if words.startswith("^") else words in message), (
        message
    )


def test_labels_are_matched_by_name() -> None:
    train = rows(labels=[0, 1] * 3)
    condenser = DatasetCondenser(config(), method="herding")
    condensed = condenser.condense(train)
    known = read_images(train)
    turned_round = rows(labels=[0, 1] * 3, label=ClassLabel(names=["b", "a"]))
    assert read_images(turned_round, like=known).labels.tolist() == [1, 0] * 3
    strings = rows(labels=["b", "a"] * 3, label=Value("string"))
    assert read_images(strings, like=known).labels.tolist() == [1, 0] * 3
    more = rows(labels=[2, 0] * 3, label=ClassLabel(names=["b", "c", "a"]))
    assert read_images(more, like=known).labels.tolist() == [0, 1] * 3
    places = rows(labels=[1, 0] * 3, label=Value("int64"))
    assert read_images(places, like=known).labels.tolist() == [1, 0] * 3
    for other in (ClassLabel(names=["a", "x"]), ClassLabel(names=["x", "y"])):
        with pytest.raises(
            ValueError, match=r"^row \d has label \d \('x'\), which is no class: labels must be among a, b"
        ):
            condenser.evaluate(condensed, rows(label=other), seeds=1)
    numbered = read_images(rows(labels=[7, 10] * 3, label=Value("int64")))
    names = ClassLabel(names=["10", "7"])
    assert read_images(rows(labels=[0, 1] * 3, label=names), like=numbered).labels.tolist() == [1, 0] * 3


def test_recipes_tell_how_images_were_read() -> None:
    condensed = DatasetCondenser(config(image_size=8, image_mode="RGB"), method="mosaic").condense(rows())
    assert read_recipe(condensed)["image_size"] == 8
    fresh = DatasetCondenser(config(image_mode="RGB"))
    assert fresh.evaluate(condensed, rows([picture("L", 9, 20)] * 6), seeds=1)["condensed"][0].images == 8
