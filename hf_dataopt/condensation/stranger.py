"""The card's code for people without this package: stored pictures cut into training images by Pillow alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..publishing.kinds import PLACEHOLDER
from .recipe import SOFT_COLUMN, formation_from

_CODE = """from datasets import load_dataset
from PIL.Image import Resampling
{imports}

def cut(batch, n={factor}):
    rows = {{"image": [], "label": []}}
    for at, (picture, label) in enumerate(zip(batch[{column}], batch[{label_column}])):
        wide, high = -(-picture.width // n), -(-picture.height // n)
        for cell in range(n * n):
            top, left = cell // n * high, cell % n * wide
            part = picture.crop((left, top, min(left + wide, picture.width), min(top + high, picture.height)))
            rows["image"].append(part.resize(picture.size, Resampling.BILINEAR))
            rows["label"].append({label})
    return rows


stored = load_dataset("{repo}", split="train")
train = stored.map(cut, batched=True, remove_columns=stored.column_names)
{loss}"""
_LOSS = """

def loss(outputs, labels, num_items_in_batch=None):  # Trainer(..., compute_loss_func=loss)
    return cross_entropy(outputs["logits"], labels)
"""


def without_package(recipe: Mapping[str, Any], *, pictures: bool, soft_labels: bool) -> str | None:
    """Python code that forms a condensed set for a stock `Trainer`; None where its rows are no grid of pictures.

    Args:
        recipe: of the set, see `read_recipe`.
        pictures: whether rows hold pictures.
        soft_labels: the labels are the teacher's shares of each cell, and the loss takes them.
    """
    formation = formation_from(recipe)
    if not pictures or formation.kind != "single" or formation.axis != "image":
        return None
    return _CODE.format(
        imports="from torch.nn.functional import cross_entropy\n" if soft_labels else "",
        factor=formation.factor,
        column=json.dumps(recipe["column"]),
        label_column=json.dumps(recipe["label_column"]),
        label=f'batch["{SOFT_COLUMN}"][at][cell]' if soft_labels else "label",
        repo=PLACEHOLDER,
        loss=_LOSS if soft_labels else "",
    )
