"""Detection quality of the relation graph against unary scores and cleanlab: label errors, text, outliers.

    python benchmarks/relation_quality.py [--smoke] [--part labels|text|ood|all]

Labels: the first 10,000 CIFAR-10 training rows, EfficientNet-Lite0 features, probabilities of a logistic probe fitted on
the noisy labels (in-sample, and out-of-sample by 4 folds; its C is the one with the best 4-fold accuracy on the noisy
labels). Columns: the dissertation's noise (8 % of the correctly classified rows flipped to the second prediction of
another probe, which sees every second feature) and three columns of human labels (CIFAR-10N). The combined score was
chosen on rows 0-4,999; `ap_report` is AP on rows 5,000-9,999, over the same graph. Text: VADER tweets, MiniLM features,
one vote a tweet as its label. Outliers: CIFAR-10 in, Fashion-MNIST and digits out; knn with several k, on the reference rows of
each relation score, and its best k for each set (chosen on that set: nothing that could be had in practice does better).
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import torch
from _report import write
from data import (
    DataMissingError,
    cifar10,
    cifar10n,
    cifar_features,
    digits,
    fashion_mnist,
    image_features,
    tweet_features,
    tweets,
)
from datasets import Dataset

from hf_dataopt.metrics import average_precision, detection_metrics
from hf_dataopt.relation import baselines
from hf_dataopt.relation.cleaner import RelationCleaner
from hf_dataopt.relation.config import RelationConfig

Array = np.ndarray
CS = (0.001, 0.003, 0.01, 0.03)
NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200, 1000)
UNARY = ("loss", "margin", "entropy", "least confidence", "cwe", "tracin", "jsd")


def fit(features: Array, labels: Array, c: float) -> Any:
    """A logistic probe."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=c, max_iter=300).fit(features, labels)


def folded(features: Array, labels: Array, c: float, seed: int) -> Array:
    """Out-of-sample probabilities of four folds."""
    fold = np.random.default_rng(seed).permutation(len(labels)) % 4
    probs = np.zeros((len(labels), int(labels.max()) + 1), np.float32)
    for k in range(4):
        probs[fold == k] = fit(features[fold != k], labels[fold != k], c).predict_proba(features[fold == k])
    return probs


def best_c(features: Array, labels: Array, scale: float) -> float:
    """The regularisation with the best out-of-sample accuracy on the labels as they are."""
    return max(
        (c * scale for c in CS), key=lambda c: float((folded(features, labels, c, 0).argmax(1) == labels).mean())
    )


def top2_flips(features: Array, clean: Array, seed: int) -> Array:
    """8 % of the rows, all correctly classified by a probe on every second feature, flipped to its second class."""
    half = features[:, ::2]
    order = fit(half, clean, 0.003).predict_proba(half).argsort(axis=1)
    right = np.flatnonzero(order[:, -1] == clean)
    rows = np.random.default_rng(seed).choice(right, int(0.08 * len(clean)), replace=False)
    labels = clean.copy()
    labels[rows] = order[rows, -2]
    return labels


def dataset_of(features: Array, probs: Array, labels: Array) -> Dataset:
    """Columns as the cleaner reads them."""
    data = Dataset.from_dict({"label": labels}).with_format("numpy")
    columns = {"features": features.astype(np.float32), "probs": probs.astype(np.float32)}
    return data.map(lambda _, rows: {k: v[rows] for k, v in columns.items()}, batched=True, with_indices=True)


def label_scores(features: Array, probs: Array, labels: Array) -> tuple[dict[str, Array], dict[str, Any]]:
    """Every score of the table (higher = more suspicious), and how many rows each rule flags."""
    from cleanlab import Datalab
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    data = dataset_of(features, probs, labels)
    own = RelationCleaner(outlier_reference=100).fit(data, quiet=True)
    reference = RelationCleaner(RelationConfig.reference(outlier_reference=100)).fit(data, quiet=True)
    authors: dict[str, Any] = {"score": "label_noise", "cut": "algorithm4", "outlier_reference": 100}
    text = RelationCleaner(temperature=1, **authors).fit(data, quiet=True)
    plain = RelationCleaner(**authors).fit(data, quiet=True)
    found: dict[str, Array] = {
        "relation (t=4)": plain.label_noise_score,
        "relation (t=1)": text.label_noise_score,
        "relation, reference code": reference.label_noise_score,
        "relation, combined": own.label_noise_score,
        "loss": baselines.loss(probs, labels),
        "margin": baselines.margin(probs, labels),
        "entropy": baselines.entropy(probs),
        "least confidence": baselines.least_confidence(probs),
        "cwe": baselines.cwe(probs, labels),
        "tracin": baselines.tracin(features, probs, labels),
        "jsd": baselines.jensen_shannon(probs, labels),
    }
    for method in ("self_confidence", "normalized_margin"):
        found[f"cleanlab {method}"] = -get_label_quality_scores(labels, probs, method=method)
    lab = Datalab({"label": labels}, label_name="label", verbosity=0)
    lab.find_issues(features=features, issue_types={"label": {}})
    found["cleanlab Datalab, features"] = -lab.get_issues("label")["label_score"].to_numpy()
    flags = {
        "relation (t=4)": plain.is_label_error,
        "relation (t=1)": text.is_label_error,
        "relation, reference code": reference.is_label_error,
        "relation, combined": own.is_label_error,
        "cleanlab self_confidence": find_label_issues(labels, probs),
        "cleanlab Datalab, features": lab.get_issues("label")["is_label_issue"].to_numpy(),
    }
    return found, flags


def label_rows(
    name: str, features: Array, column: Any, clean: Array, seeds: int, scale: float = 1.0
) -> list[dict[str, Any]]:
    """The table of one label column: mean and spread over the seeds."""
    rows = []
    c = best_c(features, column(0), scale)
    for kind in ("in-sample", "4-fold"):
        per_seed: dict[str, list[dict[str, float]]] = {}
        for seed in range(seeds):
            labels = column(seed)
            wrong = labels != clean
            probs = (
                fit(features, labels, c).predict_proba(features).astype(np.float32)
                if kind == "in-sample"
                else folded(features, labels, c, seed)
            )
            scores, flags = label_scores(features, probs, labels)
            leads = bootstrap_leads(wrong, scores, seed)
            for score, values in scores.items():
                row = detection_metrics(wrong, values)
                late = slice(len(labels) // 2, None)
                row["ap_report"] = detection_metrics(wrong[late], values[late])["ap"]
                row["flagged"] = float(flags[score].sum()) if score in flags else np.nan
                row["precision"] = float(wrong[flags[score]].mean()) if flags.get(score, np.zeros(1)).any() else np.nan
                row |= leads[score]
                per_seed.setdefault(score, []).append(row)
        for score, found in per_seed.items():
            values = {key: [one[key] for one in found] for key in found[0]}
            row = {"labels": name, "probs": kind, "score": score, "noise": round(float(wrong.mean()), 3)}
            row |= {key: _number(np.mean(value)) for key, value in values.items()}
            rows.append(row | {"ap_spread": _number(np.std(values["ap"])), "C": c})
        print(name, kind, f"C {c}", flush=True)
    return rows


def bootstrap_leads(wrong: Array, scores: dict[str, Array], seed: int) -> dict[str, dict[str, float]]:
    """95 % interval of AP(combined) - AP(score) on the report rows, 200 resamples of the rows."""
    late = np.arange(len(wrong) // 2, len(wrong))
    rng = np.random.default_rng(seed)
    draws = [rng.choice(late, len(late)) for _ in range(200)]
    aps = {name: np.array([average_precision(wrong[d], v[d]) for d in draws]) for name, v in scores.items()}
    found = {}
    for name, values in aps.items():
        low, high = np.percentile(aps["relation, combined"] - values, [2.5, 97.5])
        found[name] = {"combined_lead_low": float(low), "combined_lead_high": float(high)}
    return found


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 3)


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The combined score against the best unary score, column by column."""
    found = []
    for name, kind in dict.fromkeys((row["labels"], row["probs"]) for row in rows):
        here = {row["score"]: row for row in rows if (row["labels"], row["probs"]) == (name, kind)}
        best = max(UNARY, key=lambda score: here[score]["ap"])
        line: dict[str, Any] = {"labels": name, "probs": kind, "best unary": best, "its ap": here[best]["ap"]}
        line |= {"relation (t=4)": here["relation (t=4)"]["ap"], "combined": here["relation, combined"]["ap"]}
        late = max(UNARY, key=lambda score: here[score]["ap_report"])
        line |= {"best unary, report rows": here[late]["ap_report"]}
        line["combined, report rows"] = here["relation, combined"]["ap_report"]
        found.append(line | {"lead, 95 %": [here[late]["combined_lead_low"], here[late]["combined_lead_high"]]})
    return found


def image_labels(seeds: int, n: int) -> list[dict[str, Any]]:
    """Flips and human labels on CIFAR-10."""
    features, human = cifar_features()[:n], cifar10n()
    clean = np.asarray(human["clean_label"][:n], np.int64)
    rows = label_rows("top-2 flips", features, lambda seed: top2_flips(features, clean, seed), clean, seeds)
    for name in ("aggre_label", "random_label1", "worse_label"):
        labels = np.asarray(human[name][:n], np.int64)
        rows += label_rows(name, features, lambda _, labels=labels: labels, clean, seeds)
    return rows


def text_labels(seeds: int) -> list[dict[str, Any]]:
    """VADER tweets with a clear consensus; the label is one rater's vote: positive, or not."""
    features, votes = tweet_features(), tweets()[1]
    mean = np.array([np.mean(v) for v in votes])
    keep = np.flatnonzero(np.abs(mean) >= 0.5)

    def one_vote(seed: int) -> Array:
        rng = np.random.default_rng(seed)
        return np.array([int(rng.choice(votes[i]) > 0) for i in keep])

    clean = (mean[keep] > 0).astype(np.int64)
    return label_rows("tweets, one vote", features[keep], one_vote, clean, seeds, scale=300.0)


def outliers(seeds: int) -> list[dict[str, Any]]:
    """CIFAR-10 rows 10,000-11,999 in; Fashion-MNIST and digits out; reference rows 0-9,999."""
    train, inside = cifar_features(), cifar_features(10_000, 12_000)
    labels = np.asarray(cifar10(0, 10_000)[1], np.int64)
    probe = fit(train, labels, 0.003)
    weight, bias = probe.coef_.astype(np.float32), probe.intercept_.astype(np.float32)
    probs = probe.predict_proba(train).astype(np.float32)
    outside = {
        "Fashion-MNIST": image_features("fashion", lambda: fashion_mnist(1_000), 1_000),
        "digits": image_features("digits", lambda: digits(1_000), 1_000),
    }
    outside["both"] = np.concatenate(list(outside.values()))
    reports = {}
    for size in (10_000, 1_000, 400):
        for seed in range(seeds):
            # partitions have no part in outlier scores: they spare the sums over all pairs
            config = RelationConfig(outlier_reference=size, partition_size=500, seed=seed)
            reports[size, seed] = RelationCleaner(config).fit(dataset_of(train, probs, labels), quiet=True)
    rows = []
    for name, out in outside.items():
        query = np.concatenate([inside, out])
        is_out = np.arange(len(query)) >= len(inside)
        asked = probe.predict_proba(query).astype(np.float32)
        logits = query @ weight.T + bias
        scores: dict[str, list[Array]] = {
            "msp": [baselines.max_softmax(logits)],
            "max logit": [baselines.max_logit(logits)],
            "energy": [baselines.energy(logits)],
            "mahalanobis": [baselines.mahalanobis(query, train, labels)],
            "react": [baselines.react(query, weight, bias, baselines.react_threshold(train))],
            "kl matching": [baselines.kl_matching(asked, probs)],
            "local outlier factor": [baselines.local_outlier_factor(query, train)],
        }
        for (size, _), report in reports.items():
            found = report.score_outliers({"features": query, "probs": asked}, quiet=True)
            scores.setdefault(f"relation, {size} reference rows", []).append(found)
            rows_of_s = report.reference[0].features
            for k in NEIGHBOURS if size == 10_000 else [k for k in NEIGHBOURS if k < size]:
                if size < 10_000 or len(scores.get(f"knn k={k}, {size} reference rows", [])) == 0:
                    scores.setdefault(f"knn k={k}, {size} reference rows", []).append(
                        baselines.knn(query, rows_of_s, k=k)
                    )
        table = {}
        for score, found in scores.items():
            metrics = [detection_metrics(is_out, one) for one in found]
            table[score] = {key: round(float(np.mean([m[key] for m in metrics])), 4) for key in metrics[0]}
            rows.append({"out": name, "score": score, "seeds": len(found), **table[score]})
        for size in (10_000, 1_000, 400):
            best = max(
                (one for one in table if one.startswith("knn") and f", {size} " in one),
                key=lambda one: table[one]["auroc"],
            )
            rows.append(
                {
                    "out": name,
                    "score": f"best of knn, {size} reference rows: {best.split(',')[0]}",
                    "seeds": 1,
                    **table[best],
                }
            )
        print("outliers", name, flush=True)
    return rows


def main() -> None:
    """Run the parts and write `results/relation_quality*.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="2,000 rows, one seed, labels only, no file written")
    parser.add_argument("--part", choices=("labels", "text", "ood", "all"), default="all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, n = (1, 2_000) if args.smoke else (3, 10_000)
    about = {"n": n, "seeds": seeds, "features": "EfficientNet-Lite0 at 112 px; MiniLM"}
    try:
        if args.smoke:
            write("relation_quality_smoke", verdicts(image_labels(1, n)), **about)
            return
        if args.part in ("labels", "all"):
            rows = image_labels(seeds, n)
            write("relation_quality_labels", rows, summary=verdicts(rows), **about)
        if args.part in ("text", "all"):
            rows = text_labels(seeds)
            write("relation_quality_text", rows, summary=verdicts(rows), **about)
        if args.part in ("ood", "all"):
            write("relation_quality_outliers", outliers(seeds), **about)
    except DataMissingError as error:
        print(f"skipped: {error}")


if __name__ == "__main__":
    main()
