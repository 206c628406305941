"""The recipe of a condensed set: how each stored row is formed, kept where the row goes.

A text column of JSON, one text a row, which survives renaming, concatenation, shuffling, parquet and the Hub, and a short
mark in every stored PNG, which survives an export of the files. Once formed, rows have neither: forming twice is refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from ..publishing.safe_files import MAX_VALUE, parse_json
from ..settings import check_dataset
from .formation import Formation, Way

if TYPE_CHECKING:
    from datasets import Dataset

RECIPE_COLUMN = "formation"
SOFT_COLUMN = "soft_label"
MARK = "hf_dataopt"  # key of the text in a stored PNG
# a recipe may come from a stranger
_MOST_CELLS = 256
_MOST_RECIPES = 1024  # different ones in one batch
_LEAST_STD = 1e-12
_ARRAYS = ("Array2D", "Array3D", "Array4D", "Array5D", "List", "LargeList")


def recipe_text(formation: Formation, column: str, **about: Any) -> str:
    """The recipe as one line of JSON.

    Args:
        formation: how the rows are formed.
        column: of images.
        about: what else to tell: `label_column`, `mean` and `std` are read again.
    """
    return json.dumps({"formation": asdict(formation), "column": column, **about}, sort_keys=True)


def row_texts(recipe: str, ways: Sequence[Way]) -> list[str]:
    """The recipe of every row: of `"bound"`, each says its own factors, since it may come to stand anywhere."""
    if all(formation.kind != "bound" for formation, _ in ways):
        return [recipe] * len(ways)
    known = json.loads(recipe)
    return [json.dumps({**known, "factors": list(factors)}, sort_keys=True) for _, factors in ways]


def read_recipe(dataset: Any) -> Mapping[str, Any]:
    """The recipe of a condensed data set: its first row's, where it was put together from several.

    Args:
        dataset: a `datasets.Dataset`, freshly condensed or loaded from disk, parquet, an image folder or the Hub.

    Returns:
        The recipe: formation, column, and what the condenser recorded; `column` and `label_column` as they are named now.

    Raises:
        ValueError: there is none.
    """
    check_dataset("dataset", dataset)
    name = recipe_column(dataset)
    if name is None:
        return _read_mark(dataset)
    texts = dataset.select_columns([name]).with_format(None)[:][name]
    text = next((one for one in texts if one is not None), "")
    recipe: dict[str, Any] = dict(parse_json(text, "the recipe of this data set"))
    if not isinstance(recipe.get("formation"), dict) or not isinstance(recipe.get("column"), str):
        raise ValueError(f"the recipe of this data set names no formation or no column: {text!r:.200}")
    recipe["column"] = _now(dataset, recipe["column"], ("Image", *_ARRAYS), name)
    if "label_column" in recipe:
        recipe["label_column"] = _now(dataset, recipe["label_column"], ("ClassLabel",), name)
    for key in ("mean", "std"):
        values = recipe.get(key, [0.0])
        numbers = isinstance(values, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= MAX_VALUE for v in values
        )
        if not numbers or (key == "std" and not all(value >= _LEAST_STD for value in recipe.get(key, [1.0]))):
            raise ValueError(f"the recipe of this data set has a {key} of {values!r:.80}; condense again")
    return recipe


def recipe_column(dataset: Dataset) -> str | None:
    """Name of the column that holds the recipes, whatever it is called now; None if there is none."""
    texts = [name for name, one in dataset.features.items() if getattr(one, "dtype", "") in ("string", "large_string")]
    texts.sort(key=lambda name: name != RECIPE_COLUMN)
    for name in texts if len(dataset) else ():
        first = dataset.select_columns([name]).with_format(None)[0][name]
        if name == RECIPE_COLUMN or _looks_like_one(first):
            return name
    return None


def _looks_like_one(text: Any) -> bool:
    """Whether a cell of a column of some other name is a recipe."""
    return isinstance(text, str) and text.startswith("{") and '"formation": {' in text


def _now(dataset: Dataset, given: Any, kinds: Sequence[str], recipes: str) -> str:
    """A column's name, or what it was renamed to: the one column of its kind, where the recipe's own name is gone."""
    if isinstance(given, str) and given in dataset.features:
        return given
    found = [
        name
        for name, feature in dataset.features.items()
        if type(feature).__name__ in kinds and name not in (recipes, SOFT_COLUMN)
    ]
    if len(found) != 1:
        raise ValueError(
            f"the recipe of this data set speaks of a column {given!r:.40}, which is not there; columns that could be it: "
            f"{', '.join(found) or 'none'}; give it its name back"
        )
    return found[0]


def formation_from(recipe: Mapping[str, Any]) -> Formation:
    """The formation of a recipe.

    Raises:
        ValueError: it is damaged, or forms more than is formed of a stranger's data.
    """
    known = {field.name for field in fields(Formation)}
    values = recipe.get("formation")
    if not isinstance(values, dict):
        raise ValueError("the recipe of this data set names no formation; get it again")
    try:
        formation = Formation(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise ValueError(f"the recipe of this data set is damaged: {error}; get it again") from error
    if formation.factor > _MOST_CELLS:
        raise ValueError(f"the recipe cuts into {formation.factor} cells a side, at most {_MOST_CELLS} are formed")
    if abs(formation.pad_value) > MAX_VALUE:
        raise ValueError(f"the recipe pads with {formation.pad_value:g}; at most {MAX_VALUE:g} is used")
    return formation


def way_from(recipe: Mapping[str, Any]) -> Way:
    """How the row of a recipe is formed.

    Raises:
        ValueError: as `formation_from`; or a bound, which counts over a class, of a row that does not tell its factors.
    """
    formation = formation_from(recipe)
    if formation.kind != "bound":
        return formation.ways(1)[0]
    factors = recipe.get("factors")
    if not isinstance(factors, list) or any(
        isinstance(one, bool) or not isinstance(one, int) or not 1 <= one <= formation.factor for one in factors
    ):
        raise ValueError(
            "a 'bound' formation counts over a class, and a row alone does not tell its factors; condense again, or load "
            "the set anew"
        )
    return formation, tuple(factors[: formation.factor])


def ways_of(dataset: Dataset) -> list[Way]:
    """How each row of a condensed set is formed.

    Raises:
        ValueError: no recipe, or one that is damaged.
    """
    recipe, name = read_recipe(dataset), recipe_column(dataset)
    if name is None or getattr(dataset.features[name], "names", None):
        return [way_from(recipe)] * len(dataset)
    return ways_of_texts(dataset.select_columns([name]).with_format(None)[:][name])


def ways_of_texts(texts: Sequence[Any]) -> list[Way]:
    """How rows with these recipes are formed.

    Raises:
        ValueError: one of them is no recipe; a row without any was formed already, or never condensed.
    """
    for row, text in enumerate(texts):
        if text is None:
            raise ValueError(
                f"row {row} of the batch carries no recipe: it was formed already, or is no condensed row; take it out first"
            )
    different = set(map(str, texts))
    if len(different) > _MOST_RECIPES:
        raise ValueError(f"the rows have {len(different):,} different recipes, at most {_MOST_RECIPES:,} are read")
    known = {text: way_from(parse_json(text, "the recipe of a row")) for text in different}
    return [known[str(text)] for text in texts]


# -- the mark in a stored PNG


def marked(image: Any, way: Way) -> dict[str, Any]:
    """A picture as an `Image` cell: PNG bytes that say how it is formed.

    Args:
        image: a PIL image.
        way: how it is formed.
    """
    from PIL.PngImagePlugin import PngInfo

    formation, factors = way
    own, plain = asdict(formation), asdict(Formation())
    short: dict[str, Any] = {"formation": {k: v for k, v in own.items() if v != plain[k] or k == "factor"}}
    if formation.kind == "bound":
        short["factors"] = list(factors)
    note, file = PngInfo(), io.BytesIO()
    note.add_text(MARK, json.dumps(short))
    image.save(file, "PNG", pnginfo=note)
    return {"bytes": file.getvalue(), "path": None}


def mark_of(value: Any) -> str | None:
    """The mark of an image cell; None where there is none."""
    from ..decoding import is_picture, picture_text

    found = picture_text(value, MARK) if is_picture(value) else None
    return found if isinstance(found, str) else None


def _read_mark(dataset: Dataset) -> Mapping[str, Any]:
    """What the first image's mark tells, for a set that lost its recipes, such as a folder of its PNG files."""
    from datasets import Image

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    for name in columns if len(dataset) else ():
        cell = dataset.select_columns([name]).cast_column(name, Image(decode=False)).with_format(None)[0][name]
        if (text := mark_of(cell)) is not None:
            recipe = dict(parse_json(text, "the mark of the first image"))
            labels = [key for key, feature in dataset.features.items() if type(feature).__name__ == "ClassLabel"]
            return {**recipe, "column": name, **({"label_column": labels[0]} if len(labels) == 1 else {})}
    raise ValueError(
        f"this data set has no column {RECIPE_COLUMN!r} with a recipe, and its images carry no mark: it was not condensed by "
        "hf_dataopt, was formed already, or lost both; load it again, or build MultiFormation(Formation(factor=...)) by hand"
    )
