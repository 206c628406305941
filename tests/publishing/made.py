"""Sets that several tests save and push."""

from __future__ import annotations

import torch
from datasets import Dataset

from hf_dataopt.condensation.columns import to_dataset
from hf_dataopt.condensation.multi_formation import Formation, recipe_text


def condensed(count: int) -> Dataset:
    """Two classes of `count` small stored pictures each."""
    recipe = recipe_text(Formation(factor=2), "image", label_column="label")
    labels = torch.arange(2).repeat_interleave(count)
    return to_dataset(torch.rand(2 * count, 1, 8, 8), labels, ["a", "b"], "float32", ("image", "label"), recipe)
