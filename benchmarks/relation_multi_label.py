"""Several labels a row: which decisions `RelationCleaner.fit_multi_label` ranks and flags, beside cleanlab in the same run.

    python benchmarks/relation_multi_label.py [--smoke]

Rows of CIFAR-10 (EfficientNet-Lite0 features) with ten labels that its classes have or have not (animal, pet, flies ...), the
rarest on 1 row in 50. Wrong decisions, three kinds: any decision turned around with 3 %; a fifth of the given labels missing
(what taggers forget); confusable: half of the 6 % that a probe on every second feature is least sure of. Probabilities: one
logistic probe a label, out of 4 folds, or fitted on the rows themselves. The form of the model was chosen on rows 0-999, and
the confusable noise made milder there after a first run turned around all of the 3 % and nobody found any.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from _report import write
from data import DataMissingError, cifar10n, cifar_features
from datasets import Dataset
from relation_quality import fit, folded

from hf_dataopt.metrics import average_precision
from hf_dataopt.relation.cleaner import RelationCleaner

Array = np.ndarray
# airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck
LABELS = {
    "animal": (2, 3, 4, 5, 6, 7),
    "flies": (0, 2),
    "four legs": (3, 4, 5, 7),
    "pet": (3, 5),
    "road": (1, 9),
    "water": (6, 8),
    "large animal": (4, 7),
    "motor": (0, 1, 8, 9),
    "dog": (5,),
    "some frogs": (6,),
}
RARE = 0.02


def truth_of(classes: Array) -> Array:
    """(n, L) 0 or 1."""
    truth = np.stack([np.isin(classes, members) for members in LABELS.values()], axis=1).astype(np.int64)
    some = np.flatnonzero(truth[:, -1])
    truth[some[int(RARE * len(classes)) :], -1] = 0
    return truth


def noisy(kind: str, truth: Array, features: Array, rng: np.random.Generator) -> Array:
    """The decisions that are turned around."""
    if kind == "any, 3 %":
        return rng.random(truth.shape) < 0.03
    if kind == "missing, 20 %":
        return (rng.random(truth.shape) < 0.2) & (truth > 0)
    unsure = np.stack(
        [
            np.abs(fit(features[:, ::2], truth[:, k], 0.003).predict_proba(features[:, ::2])[:, 1] - 0.5)
            for k in range(truth.shape[1])
        ],
        axis=1,
    )
    return (unsure <= np.quantile(unsure, 0.06)) & (rng.random(truth.shape) < 0.5)


def probed(kind: str, features: Array, given: Array) -> Array:
    """(n, L) probabilities of one probe a label."""
    if kind == "in-sample":
        found = [fit(features, given[:, k], 0.003).predict_proba(features)[:, 1] for k in range(given.shape[1])]
    else:
        found = [folded(features, given[:, k], 0.003, 0)[:, 1] for k in range(given.shape[1])]
    return np.stack(found, axis=1).astype(np.float32)


def theirs(given: Array, probs: Array) -> tuple[Array, Array]:
    """cleanlab: flagged decisions, and a score of each (higher = worse)."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    flagged, scores = np.zeros(given.shape, bool), np.zeros(given.shape)
    for k in range(given.shape[1]):  # as cleanlab's find_multilabel_issues_per_class does
        two = np.stack([1 - probs[:, k], probs[:, k]], axis=1)
        flagged[:, k] = find_label_issues(given[:, k], two)
        scores[:, k] = -get_label_quality_scores(given[:, k], two)
    return flagged, scores


def f1(flagged: Array, wrong: Array) -> float:
    """Of a set of decisions."""
    return float(2 * (flagged & wrong).sum() / max(1, flagged.sum() + wrong.sum()))


def measured(start: int, count: int) -> list[dict[str, Any]]:
    """One table row for each kind of noise and of probabilities."""
    features = cifar_features(start, start + 10_000)[:count]
    truth = truth_of(np.asarray(cifar10n()["clean_label"][start : start + count], np.int64))
    rows = []
    for kind in ("any, 3 %", "missing, 20 %", "confusable, 3 %"):
        wrong = noisy(kind, truth, features, np.random.default_rng(start))
        given = np.where(wrong, 1 - truth, truth)
        for said in ("4-fold", "in-sample"):
            probs = probed(said, features, given)
            columns = {"features": list(features.astype(np.float32)), "probs": list(probs), "labels": given.tolist()}
            data, begun = Dataset.from_dict(columns), time.process_time()
            report = RelationCleaner(outlier_reference=100).fit_multi_label(data, quiet=True)
            seconds, scores = time.process_time() - begun, report.label_noise_score
            flagged, ranked = theirs(given, probs)
            at_true = np.zeros(scores.size, bool)
            at_true[np.argsort(-scores, axis=None, kind="stable")[: wrong.sum()]] = True
            row: dict[str, Any] = {
                "rows": f"{start:,}",
                "n": count,
                "noise": kind,
                "probs": said,
                "wrong": float(wrong.mean()),
            }
            row |= {"estimated": float(scores.mean()), "AP": average_precision(wrong.ravel(), scores.ravel())}
            row |= {
                "AP cleanlab": average_precision(wrong.ravel(), ranked.ravel()),
                "F1": f1(report.is_label_error, wrong),
            }
            row |= {"F1 at the true rate": f1(at_true.reshape(wrong.shape), wrong), "F1 cleanlab": f1(flagged, wrong)}
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            rows[-1]["CPU-s"] = round(seconds, 2)
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, and write `results/relation_multi_label*.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="1,000 rows of one place")
    args = parser.parse_args()
    torch.set_num_threads(1)
    count, places = (1000, (0,)) if args.smoke else (5000, (0, 20_000))
    try:
        rows = [row for start in places for row in measured(start, count)]
    except DataMissingError as error:
        print(f"skipped: {error}")
        return
    write("relation_multi_label_smoke" if args.smoke else "relation_multi_label", rows, labels=list(LABELS))


if __name__ == "__main__":
    main()
