"""Chapter 3 the slow obvious way: every labelling tried, Algorithm 1 literally, pixels moved one cell at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np


def energy(unary: np.ndarray, vertical: np.ndarray, horizontal: np.ndarray, labels: np.ndarray) -> float:
    """Eq. 3.4 of one grid, cell by cell."""
    rows, columns, count = unary.shape
    z = labels / (count - 1)
    total = 0.0
    for y in range(rows):
        for x in range(columns):
            total += unary[y, x, labels[y, x]]
            if y + 1 < rows:
                total += vertical[y, x] * (z[y, x] - z[y + 1, x]) ** 2
            if x + 1 < columns:
                total += horizontal[y, x] * (z[y, x] - z[y, x + 1]) ** 2
    return total


def least_energy(unary: np.ndarray, vertical: np.ndarray, horizontal: np.ndarray) -> float:
    """The least energy over all K^n labellings of one grid (vectorised over labellings)."""
    rows, columns, count = unary.shape
    every = np.array(list(itertools.product(range(count), repeat=rows * columns))).reshape(-1, rows, columns)
    total = np.take_along_axis(unary[None], every[..., None], -1)[..., 0].sum((1, 2))
    z = every / (count - 1)
    total += (vertical * (z[:, 1:] - z[:, :-1]) ** 2).sum((1, 2))
    total += (horizontal * (z[:, :, 1:] - z[:, :, :-1]) ** 2).sum((1, 2))
    return float(total.min())


def algorithm_1(cost: np.ndarray, large: float = 1e3) -> tuple[np.ndarray, int]:
    """Algorithm 1 as printed, to convergence: source of every column, and the number of steps."""
    n = len(cost)
    current = cost.astype(np.float64)
    for step in range(n * n):
        target = current.argmin(1)
        plan = np.zeros((n, n))
        plan[np.arange(n), target] = 1
        conflict = np.where(plan > 0, current, large)
        winner = np.zeros((n, n))
        winner[conflict.argmin(0), np.arange(n)] = 1
        winner *= plan
        loser = (1 - winner) * plan
        if not loser.any():
            return winner.argmax(0), step + 1
        current = current + large * loser
    raise AssertionError("Algorithm 1 did not converge")


def squared_distances(rows: int, columns: int) -> np.ndarray:
    """C of Eq. 3.5, pair by pair."""
    cells = list(itertools.product(range(rows), range(columns)))
    side = max(1, max(rows, columns) - 1)
    return np.array([[((a - c) ** 2 + (b - d) ** 2) / side**2 for c, d in cells] for a, b in cells], dtype=np.float32)


def log_prior(count: int, lam: float) -> list[float]:
    """Binomial prior of the mask values 1, ..., 0."""
    top = count - 1
    return [math.log(math.comb(top, k) * lam ** (top - k) * (1 - lam) ** k + 1e-8) for k in range(count)]


def text_energy(
    saliency: tuple[np.ndarray, np.ndarray],
    phi: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]],
    mask: np.ndarray,
    weights: tuple[float, float, float],
    lam: float,
    count: int,
) -> float:
    """Eq. 3.4 with Definition 3, term by term as printed; mask 1 shows the first input.

    Args:
        saliency: s(x) and s(x') on the grid.
        phi: binary distances `(a, b) -> (vertical, horizontal)`, a and b 1 for the first input.
        mask: values in {0, 1/(K-1), ..., 1}.
        weights: beta, gamma, eta of Eq. 3.4.
        lam: prior mean of the mask.
        count: K.
    """
    beta, gamma, eta = weights
    total = float((mask * saliency[1] + (1 - mask) * saliency[0]).sum())
    prior = log_prior(count, lam)
    total -= eta * sum(prior[round((1 - z) * (count - 1))] for z in mask.ravel())
    for axis in (0, 1):
        binary = {key: value[axis] for key, value in phi.items()}
        cross = (binary[0, 1] + binary[1, 0]) / 2
        same = (binary[0, 0] + binary[1, 1]) / 2
        primed = {
            key: value + (cross if key in ((0, 0), (1, 1)) else same) for key, value in binary.items()
        }  # Definition 3
        i, j = (mask[:-1], mask[1:]) if axis == 0 else (mask[:, :-1], mask[:, 1:])
        data = i * j * primed[1, 1] + i * (1 - j) * primed[1, 0] + (1 - i) * j * primed[0, 1]
        data = data + (1 - i) * (1 - j) * primed[0, 0]
        total += float((beta * (i - j) ** 2 + gamma * data).sum())
    return total


def blocks(rows: int, columns: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Cell number and pixels of every cell of a grid of square cells."""
    for cell in range(rows * columns):
        y, x = divmod(cell, columns)
        yield cell, slice(y * size, (y + 1) * size), slice(x * size, (x + 1) * size)


def mixed_image(images: list[np.ndarray], masks: list[np.ndarray], plans: list[np.ndarray]) -> np.ndarray:
    """`sum_k mask_k * moved(image_k)`, one cell at a time."""
    rows, columns = masks[0].shape
    size = images[0].shape[1] // rows
    where = {cell: (down, across) for cell, down, across in blocks(rows, columns, size)}
    out = np.zeros_like(images[0])
    for image, mask, plan in zip(images, masks, plans, strict=True):
        for cell, (down, across) in where.items():
            read = where[int(plan[cell])]
            out[:, down, across] += mask.ravel()[cell] * image[:, read[0], read[1]]
    return out
