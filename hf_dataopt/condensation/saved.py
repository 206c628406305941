"""Condensed sets as artifacts: parquet, preview and a card that says how to decode them, in one folder or one commit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch

from ..publishing.artifacts import fetch, push_saved
from ..publishing.cards import size_category
from ..publishing.dataset_files import read_parquet, write_parquet
from ..publishing.writer import finish, replacing
from ..settings import check_each, check_kind, check_text, optional
from .baselines import METHODS
from .config import IDCConfig
from .evaluation import FIGURES, Score, scores_as_rows
from .multi_formation import is_image, stack
from .preview import save_preview
from .recipe import RECIPE_COLUMN, SOFT_COLUMN, read_recipe
from .stranger import without_package

if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import CommitInfo

    from ..publishing.hub import PushOptions


# what the card shows
_SCORE = ("trained on", "network", "images", "epochs", "accuracy", "spread", "seeds")


def save_condensed(
    condensed: Dataset,
    folder: str | Path,
    *,
    config: IDCConfig | None = None,
    scores: Mapping[str, list[Score]] | Sequence[Mapping[str, Any]] = (),
    source: str | None = None,
    license: str | None = None,
    name: str | None = None,
) -> Path:
    """Write a condensed set as a folder that can be pushed.

    Args:
        condensed: from `DatasetCondenser.condense`; without its recipe it is refused.
        folder: made if missing; an earlier save in it is replaced as a whole.
        config: settings, for the card.
        scores: what `DatasetCondenser.evaluate` found (or its rows, `scores_as_rows`), for the card; none is fine.
        source: Hub name of the data set it was made from; a push takes over its licence.
        license: of the source, where it is not on the Hub.
        name: title of the card.

    Returns:
        The folder: `data/`, `preview.png`, `hf_dataopt.json` and a card.

    Raises:
        ValueError: no recipe, no rows, or rows that `load_condensed` would refuse.
    """
    optional(check_kind, "config", config, IDCConfig)
    if isinstance(scores, Mapping):
        for on, found_on in scores.items():
            check_each(f"scores[{on!r:.40}]", found_on, check_kind, Score, least=0)
        scores = scores_as_rows(scores)
    lacking = [row for row in check_each("scores", scores, check_kind, Mapping, least=0) if set(_SCORE) - set(row)]
    if lacking:
        raise ValueError(f"every score needs {', '.join(_SCORE)}; got {sorted(map(str, lacking[0]))!s:.200}")
    source, license, name = (
        optional(check_text, title, text, empty=False)
        for title, text in (("source", source), ("license", license), ("name", name))
    )
    recipe = read_recipe(condensed)
    if "label_column" not in recipe:
        raise ValueError("the recipe names no label column; condense with DatasetCondenser")
    plain = condensed.with_format(None)[:]
    labels = torch.tensor(plain[recipe["label_column"]])
    names = condensed.features[recipe["label_column"]].names
    rows_of = {name: (labels == label).nonzero()[:, 0] for label, name in enumerate(names)}
    found = {name: rows for name, rows in rows_of.items() if len(rows)}
    per_class = min(map(len, found.values()), default=0)
    soft_bytes = sum(np.asarray(one, np.float16).nbytes for one in plain.get(SOFT_COLUMN, ()))
    settings = config.to_json_string() if config is not None else "{}"
    with replacing(folder, "condensed_dataset") as draft:
        metadata = write_parquet(condensed, draft)
        _check_rows(read_parquet(draft), recipe)
        shown = torch.cat([rows[:per_class] for rows in found.values()])
        save_preview(stack(plain[recipe["column"]])[shown], draft / "preview.png", per_class, list(found))
        finish(
            draft,
            "condensed_dataset",
            about={
                "rows": len(condensed),
                "classes": len(names),
                "recipe": dict(recipe),
                "soft_label_bytes": soft_bytes,
                "config": json.loads(settings),
                "scores": [dict(row) for row in scores],
            },
            metadata={
                "license": license,
                "tags": ["dataset-condensation", "idc", "synthetic"],
                "source_datasets": [source] if source else None,
                "task_categories": ["image-classification" if recipe.get("axis") != "time" else "audio-classification"],
                "size_categories": [size_category(len(condensed))],
                **metadata,
            },
            origin=("dataset", source) if source else None,
            name=name or "Condensed data set",
            rows=f"{len(condensed):,}",
            classes=f"{len(names):,}",
            source=source,
            method=METHODS.get(str(recipe.get("method")), METHODS["idc"]),
            teacher=str(recipe["teacher"])[:200] if "teacher" in recipe else None,
            start=recipe.get("start"),
            real=recipe.get("outer_iterations") == 0,
            correlation=recipe.get("start_correlation"),
            soft_bytes=f"{soft_bytes:,}" if soft_bytes else None,
            plain_code=without_package(
                recipe, pictures=is_image(plain[recipe["column"]][0]), soft_labels=soft_bytes > 0
            ),
            recipe=json.dumps(recipe, indent=1),
            scores=[{**dict.fromkeys(FIGURES), **row} for row in scores],
            seed=recipe.get("seed", "not recorded"),
            settings=settings,
        )
    return Path(folder)


def load_condensed(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Dataset:
    """A condensed set from a folder of `save_condensed` or from the Hub; `datasets.load_dataset` reads the latter too.

    Raises:
        ValueError: no condensed set there.
    """
    folder, _ = fetch(source, "condensed_dataset", revision=revision, token=token)
    condensed = read_parquet(folder)
    recipe = read_recipe(condensed)
    if "label_column" not in recipe:
        raise ValueError("the recipe of this condensed set names no label column; get it again")
    _check_rows(condensed, recipe)
    return condensed


def _check_rows(condensed: Dataset, recipe: Mapping[str, Any]) -> None:
    """Labels are classes, and stored arrays are finite; pictures are looked at where they are decoded."""
    plain = condensed.with_format("numpy")
    column = recipe["label_column"]
    names = getattr(condensed.features[column], "names", None) or ()
    rows = condensed.with_format("arrow")
    for name in (column, recipe["column"], RECIPE_COLUMN):
        if any(rows[start : start + 1_000][name].null_count for start in range(0, len(rows), 1_000)):
            raise ValueError(f"this condensed set has rows without a {name!r:.40}; get it again")
    labels = np.asarray(plain.select_columns([column])[:][column])
    if not len(labels) or labels.dtype.kind != "i" or not 0 <= labels.min() <= labels.max() < len(names):
        raise ValueError(f"the labels of this condensed set are none of its {len(names)} classes; get it again")
    if SOFT_COLUMN in condensed.features:
        for row, value in enumerate(condensed.with_format(None)[:][SOFT_COLUMN]):
            shares = np.asarray(value, np.float32) if value else np.zeros((1, 1))
            if shares.ndim != 2 or shares.shape[1] != len(names) or not np.allclose(shares.sum(1), 1, atol=2e-2):
                raise ValueError(f"row {row} of this condensed set has soft labels that are no shares of its classes")
    if type(condensed.features[recipe["column"]]).__name__ != "Image":
        for start in range(0, len(condensed), 100):
            if not np.isfinite(np.asarray(plain[start : start + 100][recipe["column"]], np.float32)).all():
                raise ValueError("this condensed set holds NaN or infinite values; get it again")


def push_condensed(
    condensed: Dataset, repo_id: str, *, about: Mapping[str, Any] | None = None, **options: Unpack[PushOptions]
) -> CommitInfo:
    """Upload data, preview and card in one commit.

    Args:
        condensed: from `DatasetCondenser.condense`.
        repo_id: Hub name.
        about: keyword arguments of `save_condensed`.
        options: of `publishing.artifacts.push_folder`.

    Returns:
        The commit, as every upload of the Hub's client; as text its URL.
    """
    values = {"name": repo_id, **(optional(check_kind, "about", about, Mapping) or {})}
    return push_saved(lambda folder: save_condensed(condensed, folder, **values), repo_id, **options)
