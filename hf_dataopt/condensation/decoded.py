"""A condensed set as tensors: every row formed by its own recipe, with what is needed to read real images beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .columns import LabelledImages, statistics
from .multi_formation import MultiFormation
from .recipe import SOFT_COLUMN, read_recipe

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A condensed set in memory.

    Args:
        formed: the training images (n, C, H, W) in stored values, their labels, class names and normalisation.
        soft_labels: (n, classes) float32; None where the set has none.
        stored: rows of every class before forming.
        recipe: of the set.
    """

    formed: LabelledImages
    soft_labels: Tensor | None
    stored: list[int]
    recipe: Mapping[str, Any]

    @property
    def columns(self) -> tuple[str, str]:
        """Names of images and labels."""
        return self.recipe["column"], self.recipe["label_column"]


def decode(condensed: Dataset) -> Decoded:
    """Form all rows of a condensed set.

    Raises:
        ValueError: no recipe, no label column, or rows that were formed already.
    """
    recipe = read_recipe(condensed)
    if "label_column" not in recipe:
        raise ValueError("the recipe names no label column; condense with DatasetCondenser")
    image_column, label_column = recipe["column"], recipe["label_column"]
    names = list(condensed.features[label_column].names)
    formation = MultiFormation.from_dataset(condensed, output="tensor")
    rows = condensed.with_format(None)
    images: list[Tensor] = []
    labels: list[int] = []
    soft: list[Any] = []
    for start in range(0, len(rows), _ROWS):
        formed = formation(dict(rows[start : start + _ROWS]))
        images, labels = images + formed[image_column], labels + formed[label_column]
        soft += formed.get(SOFT_COLUMN, [])
    values, targets = torch.stack(images), torch.tensor(labels)
    mean, std = statistics(values)
    if "mean" in recipe and "std" in recipe:  # a folder of exported images knows neither
        mean, std = torch.tensor(recipe["mean"]), torch.tensor(recipe["std"])
    stored = torch.bincount(torch.tensor(rows[:][label_column]), minlength=len(names)).tolist()
    return Decoded(
        formed=LabelledImages(images=values, labels=targets, class_names=names, mean=mean, std=std),
        soft_labels=torch.from_numpy(np.stack(soft)).float() if soft else None,
        stored=stored,
        recipe=recipe,
    )
