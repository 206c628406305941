"""`hf-dataopt clean` where a row has several labels: what is asked of the options, the fit, and what is told of it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..shell.usage import only

if TYPE_CHECKING:
    from .config import RelationConfig
    from .multi_label import MultiLabelReport


def holds_sets(dataset: Any, column: str) -> bool:
    """Whether a label column is there and holds lists."""
    from datasets import LargeList, List

    return isinstance(dataset.features.get(column), List | LargeList | list)


def check_sets(dataset: Any, args: argparse.Namespace) -> None:
    """Refuse options that are about one label a row, before anything is computed.

    Args:
        dataset: what was read.
        args: the parsed command line.

    Raises:
        ValueError: `--folds`, `--score label_noise`, `--cut algorithm4`, `--on-error skip`; texts without names.
    """
    why = f"is about one label a row, {args.label_column or 'label'!r} holds several"
    only(args, None, why, "folds")
    chosen = (args.score, "--score label_noise"), (args.cut, "--cut algorithm4"), (args.on_error, "--on-error skip")
    for value, option in chosen:
        if value == option.split()[1]:
            raise ValueError(f"{option} {why}")
    texts = dataset.features[args.label_column or "label"].feature.dtype in ("string", "large_string")
    if texts and args.label_names is None and args.model is None and _probs_column(dataset, args) is not None:
        raise ValueError(
            "labels are texts: give --label-names in the order of the probabilities, or leave the probabilities out"
        )


def fit_sets(dataset: Any, config: RelationConfig, args: argparse.Namespace) -> MultiLabelReport:
    """Several labels a row, by nearest rows and, where there are some, probabilities.

    Args:
        dataset: with features.
        config: settings; `--noise-rate` is a share of the decisions.
        args: the parsed command line.
    """
    from dataclasses import replace

    from .cleaner import RelationCleaner

    if args.noise_rate is not None:
        config = replace(config, cut=args.noise_rate)
    names = args.label_names
    texts = dataset.features[args.label_column or "label"].feature.dtype in ("string", "large_string")
    if names is None and args.model is not None and texts:
        from transformers import AutoConfig

        told = AutoConfig.from_pretrained(args.model).id2label
        names = [told[k] for k in sorted(told)]
    return RelationCleaner(config).fit_multi_label(
        dataset,
        args.label_column or "label",
        features_column=args.features_column or "features",
        probs_column=_probs_column(dataset, args),
        label_names=names,
        quiet=args.quiet,
    )


def _probs_column(dataset: Any, args: argparse.Namespace) -> str | None:
    """The column that was named or made; where none is there the nearest rows are asked alone."""
    name = args.probs_column or "probs"
    return name if args.probs_column or args.model or name in dataset.column_names else None


def outcome_of_sets(report: MultiLabelReport, kept: int) -> dict[str, Any]:
    """Counts, settings and the worst decisions, ready for JSON."""
    flagged, given, rates = report.is_label_error, report.sets.given, report.noise_rate
    known = dict(zip(report.sets.names, rates.tolist(), strict=True))
    return {
        "rows": len(report),
        "label_errors": int(flagged.any(axis=1).sum()),
        "too_many": int((flagged & (given > 0)).sum()),
        "missing": int((flagged & (given == 0)).sum()),
        "outliers": int(report.is_outlier.sum()),
        "kept": kept,
        "config": json.loads(report.config.to_json_string()),
        "noise_rate": {name: None if rate != rate else rate for name, rate in known.items()},
        "near_duplicates": len(report.near_duplicates()),
        "summary": {},
        "worst": [
            {
                "row": one["row"],
                "label": report.label_text(one["row"]),
                "suggested": f"{'without' if one['given'] else 'with'} {one['label']}",
                "score": one["wrong"],
            }
            for one in report.review(10)
        ],
        "paths": {},
    }
