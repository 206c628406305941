"""What a report comes to: facts for people, which classes are taken for which, and which rows to look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .cut import groups_of
from .row_scores import RowScores

# what each score is called, and where it comes from
SCORES = {
    "combined": ("probability that the label is wrong", ", from the model and the nearest rows"),
    "label_noise": ("noisiness s", " of Algorithm 4"),
}
PAIRS = 3  # of classes that are most often taken for each other, in the facts


def facts(report: RowScores) -> list[tuple[str, str]]:
    """Names and texts of what was found and how, for `summary`, page and card."""
    first = report.about["checkpoints"][0]
    skipped = report.about.get("skipped", {}).get("reasons", {})
    unlabelled = int((report.labels < 0).sum())
    copies = groups_of(report.group)
    some = {
        "rows left out": ", ".join(f"{count:,}: {why}" for why, count in skipped.items()),
        "class sizes": _sizes(report),
        "unlabelled rows": f"{unlabelled:,}" if unlabelled else "",
        "estimated share of wrong labels": f"{report.noise_rate:.1%}" if report.noise_rate >= 0 else "",
        "most often wrong": _pairs(report),
        "near duplicates": f"{sum(map(len, copies)):,} rows in {len(copies):,} groups" if copies else "",
    }
    return [
        ("rows", f"{len(report):,}"),
        ("classes", f"{len(report.label_names):,}"),
        *((name, text) for name, text in some.items() if text),
        ("label errors", f"{int(report.is_label_error.sum()):,} ({report.is_label_error.mean():.1%})"),
        ("outliers", f"{int(report.is_outlier.sum()):,} ({report.is_outlier.mean():.1%})"),
        ("score", f"{report.config.score}: {''.join(SCORES[report.config.score])}"),
        ("flagged", flagging_rule(report)),
        ("temperature", f"{report.config.temperature:g}"),
        ("max-cut objective of Algorithm 4's set (Eq. 5.2)", f"{first['objective']:.4g}"),
        ("passes", f"{first['passes']} ({', '.join(first['stopped'])})"),
    ]


def flagging_rule(report: RowScores) -> str:
    """What a row was flagged by, in one phrase."""
    cut = report.about.get("cut", {"rule": "algorithm4"})
    if cut["rule"] == "algorithm4":
        return "the set that Algorithm 4 found"
    score = "the probability that the label is wrong" if report.config.score == "combined" else "Algorithm 4's score"
    if cut["rule"] == "estimated":
        return f"the {cut['value']:.1%} of the labels that are worst by {score}; how many was estimated"
    return f"the worst by {score}, cut at {cut['rule']} {cut['value']:g}"


def wrong_of(report: RowScores) -> NDArray[np.float64]:
    """(n,) probabilities that labels are wrong, whatever the report's score; of older reports, 1 where flagged."""
    return report.parts.get("combined", report.is_label_error.astype(np.float64))


def confusion_of(report: RowScores) -> NDArray[np.float64]:
    """(classes, classes) expected counts, [given, likely]; see `RelationReport.confusion`."""
    named, count = np.flatnonzero(report.labels >= 0), len(report.label_names)
    given, other, wrong = report.labels[named], report.other_label[named], wrong_of(report)[named]
    table = np.bincount(given * count + other, weights=wrong, minlength=count * count)
    table += np.bincount(given * count + given, weights=1 - wrong, minlength=count * count)
    return np.asarray(table.reshape(count, count))


def review_order(report: RowScores) -> NDArray[np.int64]:
    """All labelled rows, one of each group of copies, by falling doubt times copies; see `RelationReport.review`."""
    named = np.flatnonzero(report.labels >= 0)
    wrong = np.clip(wrong_of(report), 1e-12, 1 - 1e-12)
    doubt = -wrong * np.log(wrong) - (1 - wrong) * np.log1p(-wrong)
    worth = doubt * np.bincount(report.group, minlength=len(report))[report.group]
    order = named[np.argsort(-worth[named], kind="stable")]
    _, first = np.unique(report.group[order], return_index=True)
    return order[np.sort(first)]


def _sizes(report: RowScores) -> str:
    sizes = np.bincount(report.labels[report.labels >= 0], minlength=len(report.label_names))
    least, most = int(sizes.argmin()), int(sizes.argmax())
    return f"{sizes[least]:,} ({report.label_names[least]}) to {sizes[most]:,} ({report.label_names[most]})"


def _pairs(report: RowScores) -> str:
    table = confusion_of(report)
    np.fill_diagonal(table, 0)
    best = np.argsort(-table, axis=None, kind="stable")[:PAIRS]
    pairs = [(*np.unravel_index(one, table.shape), table.flat[one]) for one in best]
    return "; ".join(
        f"{report.label_names[i]}, likely {report.label_names[j]}: about {count:.0f}"
        for i, j, count in pairs
        if count >= 0.5
    )
