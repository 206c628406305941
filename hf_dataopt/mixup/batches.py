"""Rows of a data set as a batch, their saliency maps, and the random stream that follows from both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import default_data_collator

from .. import seeding
from ..decoding import read_rows, stacked
from ..settings import brief, check_array


def collated(rows: list[Any]) -> Mapping[str, Any]:
    """Rows of a data set as a batch; what cannot be one is told of in our words."""
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise TypeError(f"a row must be a dict of columns, got {brief(wrong)}; give collate_fn= for other rows")
    try:
        batch: Mapping[str, Any] = default_data_collator(rows)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{len(rows)} rows with the columns {sorted(map(str, rows[0]))!s:.200} make no batch ({error!s:.200}); bring them "
            "to one shape and dtype, or give collate_fn="
        ) from error
    return batch


def maps_of(maps: list[Any], column: str) -> Tensor:
    """Saliency maps of one shape as one tensor."""

    def read(value: Any) -> np.ndarray:
        return check_array(f"a map in {column!r}", value, 2, finite=False).astype(np.float32)

    try:
        return torch.from_numpy(stacked(*read_rows(maps, read, what="row of the batch")[:2]))
    except TypeError as error:
        raise ValueError(f"{error}; every row needs a map (H, W) of numbers") from error


def batch_generator(seed: int, epoch: int, labels: Tensor, maps: Tensor) -> torch.Generator:
    """The random stream of a batch that is mixed from a column of maps.

    It follows from seed, epoch and the batch's own labels and maps, and from nothing else: not from torch's global seed,
    the number of loader workers or processes, nor from the batches before, so that a resumed run draws the same.

    Args:
        seed, epoch: numbers >= 0.
        labels: (B,) or (B, classes).
        maps: (B, H, W) or (B, time, mel) float32.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (labels, maps):
        digest.update(part.detach().cpu().contiguous().numpy().data)
    return seeding.generator(seed, epoch=epoch, worker=int.from_bytes(digest.digest(), "little"))
