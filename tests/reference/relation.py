"""The obvious O(n^2) loops of chapter 5 in float64, and a plain transcription of the reference code's tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def weights(
    features: Any,
    probs: Any,
    labels: Any,
    *,
    temperature: float,
    compatibility: bool,
    cutoff: float,
    diagonal: bool,
    rbf_gamma: float | None = None,
) -> np.ndarray:
    """w = -r, entry by entry (Eqs. 5.1, 5.4, 5.5)."""
    f, p = np.asarray(features, np.float64), np.asarray(probs, np.float64)
    n = len(f)
    w = np.zeros((n, n))
    unit = [row / math.sqrt(sum(v * v for v in row)) for row in f]
    for i in range(n):
        for j in range(n):
            if i == j and not diagonal:
                continue
            cosine = float(unit[i] @ unit[j])
            s = (
                max(0.0, cosine)
                if rbf_gamma is None
                else math.exp(-rbf_gamma * float(((unit[i] - unit[j]) ** 2).sum()))
            )
            k = s * (float(p[i] @ p[j]) if compatibility else 1.0)
            k = 0.0 if k <= cutoff else abs(k) ** temperature
            w[i, j] = -k if labels is None or labels[i] == labels[j] else k
    return w


def cut_objective(w: np.ndarray, noisy: np.ndarray, level: float) -> float:
    """Eq. 5.2."""
    return float(sum(w[i, j] for i in np.flatnonzero(noisy) for j in np.flatnonzero(~noisy)) - level * noisy.sum())


def algorithm_4(w: np.ndarray, level: float, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and noisy set, an absolute lambda, at most `passes` passes."""
    s = initial = w.sum(axis=1)
    noisy = np.zeros(len(w), bool)
    for _ in range(passes):
        chosen = s > level
        s = initial - 2 * w[:, chosen].sum(axis=1)
        if (chosen == noisy).all():
            break
        noisy = chosen
    return s, chosen


def reference_scores(features: Tensor, probs: Tensor, labels: Tensor, power: int = 4, chunk: int = 250) -> Tensor:
    """`get_relation` of the reference code: row chunks, a signed kernel, an absolute power; the speed benchmark's peer."""
    features = features / torch.linalg.vector_norm(features, dim=1, keepdim=True)
    scores = []
    for start in range(0, len(features), chunk):
        rows = slice(start, start + chunk)
        halves = []
        for target in torch.arange(len(features)).chunk(2):
            near = slice(int(target[0]), int(target[-1]) + 1)
            kernel = torch.clamp(features[rows] @ features[near].T, min=0.0) * (probs[rows] @ probs[near].T)
            sign = 2 * (labels[rows][:, None] == labels[near][None]).float() - 1
            halves.append(sign * kernel)
        found = torch.cat(halves, dim=-1)
        found[found.abs() <= 0.03] = 0.0
        scores.append((torch.sign(found) * found.abs() ** power).sum(dim=-1))
    return torch.cat(scores)
