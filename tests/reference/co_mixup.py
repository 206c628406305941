"""The reference code's Co-Mixup, step by step with dense arrays and alpha-beta swap; and exhaustive search of small grids.

A transcription of the published rules (MIT licence, snu-mllab/Co-Mixup), one output after another, every input multiplied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Solver = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def energy(unary: np.ndarray, pair: np.ndarray, beta: float, labels: np.ndarray) -> float:
    """Unaries (h, w, L) and pair costs of 4-neighbours, cell by cell."""
    height, width = labels.shape
    total = 0.0
    for r in range(height):
        for c in range(width):
            total += float(unary[r, c, labels[r, c]])
            if r + 1 < height:
                total += beta * float(pair[labels[r, c], labels[r + 1, c]])
            if c + 1 < width:
                total += beta * float(pair[labels[r, c], labels[r, c + 1]])
    return total


def exhaustive(unary: np.ndarray, pair: np.ndarray, beta: float) -> float:
    """Least energy over all labellings."""
    height, width, n = unary.shape
    return min(
        energy(unary, pair, beta, np.array(labels).reshape(height, width))
        for labels in itertools.product(range(n), repeat=height * width)
    )


def swap(unary: np.ndarray, pair: np.ndarray, beta: float) -> np.ndarray:
    """Alpha-beta swap of gco-wrapper (research licence: tests and benchmarks only)."""
    import gco

    height, width, _ = unary.shape
    return gco.cut_grid_graph(
        np.ascontiguousarray(unary, np.float32),
        np.ascontiguousarray(pair, np.float32),
        np.full((height - 1, width), beta, np.float32),
        np.full((height, width - 1), beta, np.float32),
        algorithm="swap",
    ).reshape(height, width)


def joint_objective(z: np.ndarray, cost: np.ndarray, a: np.ndarray, settings: dict[str, Any]) -> dict[str, float]:
    """Eq. 4.1 of dense masks z (J, h, w, m), in the reference code's smoothness and per-input hard clip, and its terms."""
    n_outputs, height, width, m = z.shape
    cells = height * width
    unary = float((z * cost.transpose(1, 2, 0)).sum())
    smooth = float(((z[:, 1:] - z[:, :-1]) ** 2).sum() + ((z[:, :, 1:] - z[:, :, :-1]) ** 2).sum()) / 2
    text = float((1 - (z[:, 1:] * z[:, :-1]).sum(-1)).sum() + (1 - (z[:, :, 1:] * z[:, :, :-1]).sum(-1)).sum())
    used = z.reshape(n_outputs, -1, m).sum(1)
    compat = clipped = 0.0
    for j in range(n_outputs):
        near = a @ sum(used[i] for i in range(n_outputs) if i != j)
        compat += float(near @ used[j])
        clipped += float(near[near > settings["thres"] * cells] @ used[j][near > settings["thres"] * cells])
    beta, gamma = settings["beta"] / cells, settings["gamma"] / cells
    most = settings["thres"] * cells * cells * n_outputs
    return {
        "unary": unary,
        "smooth": beta * smooth,
        "smooth_dissertation": beta * text,
        "compat": compat,
        "clipped": gamma * clipped,
        "total_unclipped": unary + beta * smooth + gamma * compat,
        "total_clipped": unary + beta * smooth + gamma * clipped,
        "total_text": unary + beta * text + gamma * max(most, compat),
    }


def masks(
    cost: np.ndarray,
    a: np.ndarray,
    init: np.ndarray,
    settings: dict[str, Any],
    solve: Solver = swap,
    most: Callable[[torch.Tensor], torch.Tensor] = lambda count: torch.topk(count, 3).indices,
) -> np.ndarray:
    """The sweeps: cost (m, h, w) with prior, A (m, m), init (J, h, w) -> z (J, h, w, m).

    `most` names the three most used inputs; topk breaks ties as it likes.
    """
    m, height, width = cost.shape
    n_outputs, cells = len(init), height * width
    beta, gamma = settings["beta"] / cells, settings["gamma"] / cells
    tau = settings["thres"] * cells
    cost_t, a_t = torch.from_numpy(cost).float(), torch.from_numpy(a).float()
    z = torch.nn.functional.one_hot(torch.from_numpy(init).long(), m).float()
    penalty = z.sum((0, 1, 2))
    extra = torch.zeros(n_outputs, m)
    last = _watched(z, cost_t, beta, gamma)
    for t in range(settings["niter"]):
        for j in range(n_outputs):
            count = z[j].sum((0, 1))
            penalty = penalty - count
            near = a_t @ penalty
            if settings["thres_type"] == "hard":
                modular = ((near > tau).float() * a_t) @ penalty
            else:
                modular = (near > tau).float() * (near - tau)
            unary = (cost_t + (2 * gamma * modular + gamma * extra[j])[:, None, None]).permute(1, 2, 0)
            z[j] = _one_output(unary, count, t > 0, beta, solve, most)
            penalty = penalty + z[j].sum((0, 1))
        if t == settings["niter"] - 2 and settings["set_resolve"]:
            extra = _resolve((z.sum((1, 2)) > 0).float())
        now = _watched(z, cost_t, beta, gamma)
        if abs(last - now) / abs(now) < 1e-6:
            break
        last = now
    return z.numpy()


def _watched(z: torch.Tensor, cost: torch.Tensor, beta: float, gamma: float) -> float:
    used = z.sum((1, 2))
    smooth = ((z[:, 1:] - z[:, :-1]) ** 2).sum() + ((z[:, :, 1:] - z[:, :, :-1]) ** 2).sum()
    crowd = (used.sum(0) ** 2).sum() - (used**2).sum()
    return float((z * cost.permute(1, 2, 0)).sum() + beta / 2 * smooth + gamma * crowd)


def _one_output(
    unary: torch.Tensor,
    count: torch.Tensor,
    halves: bool,
    beta: float,
    solve: Solver,
    most: Callable[..., torch.Tensor],
) -> torch.Tensor:
    m = unary.shape[2]
    n_used = int((count > 0).sum()) if halves else 0
    names = torch.eye(m)
    pair = 1 - torch.eye(m)
    if n_used >= 2:
        used = torch.nonzero(count > 0)[:, 0] if n_used == 2 else most(count).sort().values
        pairs = list(itertools.combinations(used.tolist(), 2))
        half = torch.stack([(unary[..., i] + unary[..., k]) / 2 - 5e-4 for i, k in pairs], -1)
        unary = torch.cat([unary, half], -1)
        names = torch.cat([names, torch.stack([(names[i] + names[k]) / 2 for i, k in pairs])])
        full = 1 - torch.eye(m + len(pairs))
        for e, members in enumerate(pairs):
            for i in members:
                full[m + e, i] = full[i, m + e] = 0.25
        pair = full
    labels = solve(unary.numpy(), pair.numpy(), beta)
    return names[torch.from_numpy(np.ascontiguousarray(labels)).long()]


def _resolve(inputs: torch.Tensor) -> torch.Tensor:
    extra = torch.zeros_like(inputs)
    for one in range(len(inputs)):
        for two in range(one + 1, len(inputs)):
            sources = torch.nonzero(inputs[one])[:, 0]
            if len(sources) > 1 and torch.equal(inputs[one], inputs[two]):
                extra[one, sources[0]] = 1.0
                extra[two, sources[1]] = 1.0
    return extra


def mix(z: np.ndarray, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every input times its enlarged mask, summed; targets in proportion."""
    mask = torch.from_numpy(z).float()
    enlarged = torch.nn.functional.interpolate(mask.permute(0, 3, 1, 2), size=images.shape[-2:], mode="nearest")
    target = (mask @ targets).flatten(1, 2).sum(1)
    return (enlarged[:, :, None] * images[None]).sum(1), target / target.sum(-1, keepdim=True)


def prepare(
    saliency: torch.Tensor, grid: int, alpha: float, eta: float, omega: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """cost with prior (m, h, w) and A (m, m) of one part of square images."""
    m, size = len(saliency), saliency.shape[-1]
    pooled = torch.nn.functional.avg_pool2d(saliency[:, None], size // grid)[:, 0]
    cost = -(pooled / pooled.sum((1, 2), keepdim=True)).numpy().astype(np.float64)
    cost -= eta / grid**2 * np.log(generator.dirichlet([alpha] * m) + 1e-8)[:, None, None]
    z = torch.nn.functional.avg_pool2d(saliency[:, None], min(8, size), 1)[:, 0]
    place = z.flatten(1).argmax(1)
    where = torch.stack([place // z.shape[-1], place % z.shape[-1]], 1).float()
    distance = (where[:, None] - where[None]).abs().sum(-1).numpy().astype(np.float64)
    return cost, (1 - omega) * np.eye(m) + omega * distance / distance.sum() * m
