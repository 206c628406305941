"""Pictures that are copies of each other by their thumbnails: encoded again, scaled a little, or byte by byte the same.

A network sees a difference where a picture was encoded again: its features may lie as far apart then as those of two pictures,
but 8 x 8 averages hardly change. Two rows are copies where these lie closer to each other than `SHARE` of how far a row usually
lies from the `RANK`-th nearest, and than `CONTRAST` of what either picture varies by itself.

Not in the dissertation. Both numbers were chosen on CIFAR-10 rows 20,000-24,999 and the first 5,000 test images of
Fashion-MNIST; figures are of other rows (`benchmarks/relation_labels.py --part duplicates`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ..seeding import generator
from ..thumbnails import COLUMN, SIDE, WIDTH
from .rows import Rows, rows_of_column

Index = NDArray[np.int64]
Values = NDArray[np.float32]
SHARE = 0.18
RANK = 10
CONTRAST = 0.25
AXES = 16  # principal axes that candidates are looked up by
NEAREST = 8  # candidates a picture
SAMPLE = 256  # rows that the usual distance is measured on
_FITTED = 8192  # rows that the axes are fitted to
_BLOCK = 4096


def picture_pairs(dataset: Any, seed: int) -> tuple[Index, Index]:
    """`picture_copies` of the dataset's thumbnails; none where it has no column of them."""
    if COLUMN not in dataset.column_names:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return picture_copies(rows_of_column(dataset, COLUMN), seed)


def joined(group: Index, left: Index, right: Index) -> Index:
    """Groups after some pairs were found to be copies; each named by its smallest row."""
    count = len(group)
    ends = np.concatenate([np.arange(count), left]), np.concatenate([group, right])
    pairs = coo_matrix((np.ones(len(ends[0]), bool), ends), shape=(count, count))
    _, component = connected_components(pairs, directed=False)
    least = np.full(component.max(initial=-1) + 1, count)
    np.minimum.at(least, component, np.arange(count))
    return np.asarray(least[component], np.int64)


def picture_copies(thumbnails: Rows, seed: int = 0) -> tuple[Index, Index]:
    """Pairs of rows whose pictures are copies; groups of more hang together by them.

    Args:
        thumbnails: (n, 192) numbers from 0 to 255.
        seed: draws the rows that are measured.

    Returns:
        (m,) row numbers, twice. Pictures of one colour throughout are in none.

    Raises:
        ValueError: rows of another width.

    Cost: n log n look-ups in a tree of 16 axes, and 2^17 n operations; 450 bytes a row.
    """
    if thumbnails.width != WIDTH:
        raise ValueError(
            f"column {COLUMN!r} has rows of {thumbnails.width} numbers, a thumbnail has {WIDTH}; map Thumbnails over the "
            "dataset, or rename the column"
        )
    small = np.empty((len(thumbnails), WIDTH), np.uint8)
    for start in range(0, len(small), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(small)))
        small[rows] = _read(thumbnails, rows)
    varied = np.flatnonzero(_contrast(small) > 0)
    _, first, place = np.unique(small[varied], axis=0, return_index=True, return_inverse=True)
    one, rest = varied[first], np.setdiff1d(np.arange(len(varied)), first)
    left, right = _close(small[one], seed)
    return np.concatenate([one[left], varied[rest]]), np.concatenate([one[right], one[place.reshape(-1)[rest]]])


def _read(thumbnails: Rows, rows: Index) -> Values:
    out = np.empty((len(rows), WIDTH), np.float32)
    thumbnails.take(rows, out)
    return out


def _contrast(small: NDArray[np.uint8]) -> Values:
    """(n,) root mean square of how much each colour varies over the places."""
    found = np.empty(len(small), np.float32)
    for start in range(0, len(small), _BLOCK):
        colours = small[start : start + _BLOCK].reshape(-1, SIDE * SIDE, 3).astype(np.float32)
        found[start : start + _BLOCK] = np.sqrt(colours.var(axis=1).mean(axis=1))
    return found


def _close(small: NDArray[np.uint8], seed: int) -> tuple[Index, Index]:
    """Pairs among different thumbnails; candidates are looked up by the axes along which they differ most."""
    from scipy.spatial import cKDTree

    count = len(small)
    if count < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    level, contrast = SHARE * _usual(small, seed), CONTRAST * _contrast(small)
    fitted = small[np.linspace(0, count - 1, min(count, _FITTED)).astype(np.int64)].astype(np.float32)
    mean = fitted.mean(axis=0)
    axes = np.linalg.eigh((fitted - mean).T @ (fitted - mean))[1][:, -AXES:].astype(np.float32)
    places = np.concatenate(
        [(small[start : start + _BLOCK].astype(np.float32) - mean) @ axes for start in range(0, count, _BLOCK)]
    )
    tree, pairs = cKDTree(places), []
    for start in range(0, count, _BLOCK):
        own = np.arange(start, min(start + _BLOCK, count))
        # a rounded distance along the axes may be a little above the whole one
        _, near = tree.query(places[own], k=NEAREST + 1, distance_upper_bound=level * np.sqrt(WIDTH) * 1.0001)
        i, k = np.nonzero((near < count) & (near != own[:, None]))
        left, right = own[i], near[i, k].astype(np.int64)
        apart = small[left].astype(np.float32) - small[right].astype(np.float32)
        distance = np.sqrt(np.einsum("ij,ij->i", apart, apart) / WIDTH)
        found = distance <= np.minimum(level, np.minimum(contrast[left], contrast[right]))
        pairs.append((left[found], right[found]))
    left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return left, right


def _usual(small: NDArray[np.uint8], seed: int) -> float:
    """Median distance of a row to the `RANK`-th nearest, a root mean square."""
    count = len(small)
    rank = min(RANK, count - 1)
    drawn = torch.randperm(count, generator=generator(seed, epoch=4))[:SAMPLE].numpy()
    asked = torch.from_numpy(small[drawn].astype(np.float32))
    best = torch.full((len(drawn), rank + 1), torch.inf)
    for start in range(0, count, _BLOCK):
        block = torch.from_numpy(small[start : start + _BLOCK].astype(np.float32))
        squares = (asked**2).sum(dim=1)[:, None] + (block**2).sum(dim=1) - 2 * asked @ block.T
        best = torch.cat([best, squares], dim=1).topk(rank + 1, dim=1, largest=False, sorted=True).values
    return float((best[:, rank].clamp(min=0) / WIDTH).sqrt().median())
