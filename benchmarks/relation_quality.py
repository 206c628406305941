"""Label-error detection on CIFAR-10N and dissertation-style flips: relation graph against unary scores and cleanlab.

    python benchmarks/relation_quality.py [--smoke]

One seed by default. The "combined" score is chosen nowhere: its candidates are all printed, AP also for the first half
of the rows (choose) and the second (report). The relation sums here are the initial scores
(Eq. 5.2 without the Kernighan-Lin passes).
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from _report import write
from data import DataMissingError, cifar10n, cifar_features

from hf_dataopt.metrics import detection_metrics
from hf_dataopt.relation import baselines

CLASSES = 10


def probe(features: torch.Tensor, labels: np.ndarray, steps: int = 150, decay: float = 1e-3) -> torch.Tensor:
    """Weight (d + 1, C) of a logistic probe on standardised features, full-batch Adam from zero."""
    weight = torch.zeros(features.shape[1] + 1, CLASSES, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    target = torch.from_numpy(labels)
    for _ in range(steps):
        optimizer.zero_grad()
        objective = torch.nn.functional.cross_entropy(features @ weight[:-1] + weight[-1], target)
        (objective + decay * weight[:-1].square().sum()).backward()
        optimizer.step()
    return weight.detach()


def predict(features: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """Class probabilities."""
    return torch.softmax(features @ weight[:-1] + weight[-1], dim=1).numpy()


def cross_probs(features: torch.Tensor, labels: np.ndarray, seed: int) -> np.ndarray:
    """Out-of-sample probabilities of four folds."""
    fold = np.random.default_rng(seed).permutation(len(labels)) % 4
    probs = np.zeros((len(labels), CLASSES), np.float32)
    for k in range(4):
        weight = probe(features[fold != k], labels[fold != k])
        probs[fold == k] = predict(features[fold == k], weight)
    return probs


def top2_flips(features: torch.Tensor, clean: np.ndarray, seed: int) -> np.ndarray:
    """8 % of the rows, all correctly classified by a probe on every second feature, flipped to its second class."""
    half = features[:, ::2]
    order = predict(half, probe(half, clean)).argsort(axis=1)
    right = np.flatnonzero(order[:, -1] == clean)
    rows = np.random.default_rng(seed).choice(right, int(0.08 * len(clean)), replace=False)
    labels = clean.copy()
    labels[rows] = order[rows, -2]
    return labels


def relation_sums(unit: torch.Tensor, probs: np.ndarray, labels: np.ndarray, powers: tuple[int, ...]) -> dict[int, Any]:
    """Noise scores `-sum_j r_ij`, diagonal off, cut-off 0.03, in tiles of 1,000 rows."""
    p, y = torch.from_numpy(probs), torch.from_numpy(labels)
    sums: dict[int, list[torch.Tensor]] = {t: [] for t in powers}
    for start in range(0, len(y), 1000):
        rows = slice(start, start + 1000)
        kernel = (unit[rows] @ unit.T).clamp(min=0) * (p[rows] @ p.T)
        kernel[torch.arange(len(kernel)), torch.arange(start, start + len(kernel))] = 0
        kernel[kernel <= 0.03] = 0
        sign = 2 * (y[rows, None] == y).float() - 1
        for t in powers:
            sums[t].append(-(sign * kernel**t).sum(dim=1))
    return {t: torch.cat(parts).numpy() for t, parts in sums.items()}


def rank(scores: np.ndarray) -> np.ndarray:
    """Ranks in [0, 1]."""
    return scores.argsort(kind="stable").argsort(kind="stable") / (len(scores) - 1)


def scores_of(raw: np.ndarray, unit: torch.Tensor, probs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Every score of the table."""
    from cleanlab.rank import get_label_quality_scores

    sums = relation_sums(unit, probs, labels, (1, 4))
    jsd, margin = baselines.jensen_shannon(probs, labels), baselines.margin(probs, labels)
    found = {
        "relation t=4 (initial)": sums[4],
        "relation t=1 (initial)": sums[1],
        "loss": baselines.loss(probs, labels),
        "margin": margin,
        "entropy": baselines.entropy(probs),
        "least confidence": baselines.least_confidence(probs),
        "cwe": baselines.cwe(probs, labels),
        "tracin": baselines.tracin(raw, probs, labels),
        "jsd": jsd,
    }
    for method in ("self_confidence", "normalized_margin"):
        found[f"cleanlab {method}"] = -get_label_quality_scores(labels, probs, method=method)
    for t in (1, 4):
        found[f"ranks: relation t={t} + jsd"] = rank(sums[t]) + rank(jsd)
        found[f"ranks: relation t={t} + margin"] = rank(sums[t]) + rank(margin)
    found["ranks: relation t=4 + jsd + margin"] = rank(sums[4]) + rank(jsd) + rank(margin)
    return found


def main() -> None:
    """Score every label column and write `results/relation_quality.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="1,000 rows and one column")
    parser.add_argument("--rows", type=int, default=10_000, help="first rows only; halves choose and report")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        raw, human = cifar_features(), cifar10n()
    except DataMissingError as error:
        print(f"skipped: {error}")
        return
    n = 1000 if args.smoke else min(args.rows, len(raw))
    raw = raw[:n]
    features = torch.from_numpy(raw)
    unit = torch.nn.functional.normalize(features, dim=1)
    standard = (features - features.mean(0)) / (features.std(0) + 1e-6)
    clean = np.asarray(human["clean_label"][:n], dtype=np.int64)
    columns = {"top-2 flips": top2_flips(standard, clean, seed=0)}
    for name in () if args.smoke else ("aggre_label", "random_label1", "worse_label"):
        columns[name] = np.asarray(human[name][:n], dtype=np.int64)
    rows: list[dict[str, Any]] = []
    for column, labels in columns.items():
        wrong = labels != clean
        for kind in ("in-sample", "4-fold"):
            fitted = kind == "in-sample"
            probs = predict(standard, probe(standard, labels)) if fitted else cross_probs(standard, labels, 0)
            for name, score in scores_of(raw, unit, probs, labels).items():
                row = {"labels": column, "probs": kind, "score": name}
                row |= {key: round(value, 3) for key, value in detection_metrics(wrong, score).items()}
                row["ap_choose"] = round(detection_metrics(wrong[: n // 2], score[: n // 2])["ap"], 3)
                row["ap_report"] = round(detection_metrics(wrong[n // 2 :], score[n // 2 :])["ap"], 3)
                rows.append(row)
            print(column, kind, f"noise {wrong.mean():.3f}", flush=True)
        name = "relation_quality_smoke" if args.smoke else "relation_quality"  # written after each column
        write(name, rows, n=n, seed=0, data="CIFAR-10 training rows, CIFAR-10N labels, EfficientNet-Lite0 at 112 px")


if __name__ == "__main__":
    main()
