"""`hf-dataopt clean`: find label errors and outliers of a dataset, write the cleaned set, a report and a card."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..publishing.push import add_push_arguments, push_options

HELP = "find label errors and outliers of a dataset, write it without them (neural relation graph)"
EXAMPLES = [
    "hf-dataopt clean cifar10 --model me/vit-cifar10 --column img --label-column label --out cleaned",
    "hf-dataopt clean reviews.csv --model me/roberta --column text --modality text --noise-rate 0.05 --out cleaned",
    "hf-dataopt clean photos.parquet --features-column clip --folds 4 --label-column kind --out cleaned",
    "hf-dataopt clean saved_folder --features-column features --probs-column probs --label-column label --out cleaned --json",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt clean`."""
    parser.add_argument("dataset", help="Hub name, folder of `save_to_disk`, or a csv, json, jsonl or parquet file")
    parser.add_argument("--config", default=None, help="configuration of a Hub dataset that has several")
    parser.add_argument("--split", default="train", help="split to clean")
    parser.add_argument("--model", help="classifier (Hub name or folder); without it the columns below must be there")
    parser.add_argument("--column", default="image", help="what the model reads")
    parser.add_argument("--modality", choices=["image", "text", "audio"], default="image", help="kind of that column")
    parser.add_argument("--batch-size", type=int, default=64, help="rows a forward pass")
    parser.add_argument("--features-column", default="features", help="embeddings that are already there")
    parser.add_argument("--probs-column", default="probs", help="class probabilities that are already there")
    parser.add_argument(
        "--folds",
        type=int,
        help="probabilities of a logistic probe on the features, out of so many folds, not the model's",
    )
    parser.add_argument("--label-column", default="label", help="the labels to check")
    parser.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="what unreadable rows do")
    parser.add_argument("--temperature", type=float, default=4.0, help="t of Eq. 5.4")
    parser.add_argument(
        "--score", choices=["combined", "label_noise"], default="combined", help="ours, or the score of Algorithm 4"
    )
    parser.add_argument(
        "--cut", choices=["estimated", "algorithm4"], default="estimated", help="which rows go; or give --noise-rate"
    )
    parser.add_argument("--noise-rate", type=float, default=None, help="share of labels expected to be wrong")
    parser.add_argument("--partition-size", type=int, default=None, help="rows of a partition (very large sets)")
    parser.add_argument("--drop-outliers", action="store_true", help="drop outliers too")
    parser.add_argument("--drop-near-duplicates", action="store_true", help="keep one row of each group of copies")
    parser.add_argument("--max-memory-gb", type=float, default=0.06, help="working memory of the graph")
    parser.add_argument("--device", default=None, help="where the graph is computed, such as cuda; default the CPU")
    parser.add_argument("--rows", type=int, default=24, help="rows in the HTML report")
    parser.add_argument("--out", help="folder for the cleaned set, report.html, worst.png, README.md and the scores")
    add_push_arguments(parser, "the cleaned set, with the report,")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fit, filter, write.

    Args:
        args: the parsed command line.

    Returns:
        Counts, settings, paths and the worst rows, ready for JSON.

    Raises:
        ValueError: neither `--out` nor `--push-to-hub`; a dataset that cannot be read; unfit columns.
    """
    from .. import distributed
    from ..publishing.dataset_files import read_dataset
    from ..publishing.writer import check_target
    from .cleaner import RelationCleaner
    from .config import RelationConfig

    if not args.out and not args.push_to_hub:
        raise ValueError("nowhere to write to: give --out DIR or --push-to-hub REPO")
    config = RelationConfig(
        score=args.score,
        cut=args.cut,
        temperature=args.temperature,
        partition_size=args.partition_size,
        max_memory_gb=args.max_memory_gb,
        device=args.device,
        seed=args.seed,
    )
    out = Path(args.out or f"{args.push_to_hub.split('/')[-1]}-cleaned")
    if distributed.is_main_process():
        check_target(out, "cleaned_dataset")
    place = out.resolve()
    unfinished = place.with_name(f"{place.name}.unfinished")  # beside it: the folder itself is replaced as a whole
    source = read_dataset(args.dataset, args.split, args.config)
    dataset = _with_features(source, args)
    report = RelationCleaner(config).fit(
        dataset,
        args.label_column,
        features_column=args.features_column,
        probs_column=args.probs_column,
        output_dir=unfinished,
        on_error=args.on_error,
    )
    if args.noise_rate is not None:
        report = report.rethreshold(noise_rate=args.noise_rate)
    cleaned = report.filter(source, outliers=args.drop_outliers, near_duplicates=args.drop_near_duplicates)
    result = outcome(report, len(cleaned))
    # every process of accelerate or torchrun comes here; one writes
    if not distributed.is_main_process():
        return result
    result["paths"] = _write(args, report, report.fitted(dataset), cleaned, out)
    shutil.rmtree(unfinished, ignore_errors=True)
    return result


def _with_features(dataset: Any, args: argparse.Namespace) -> Any:
    if args.model is not None:
        from ..features import FeatureExtractor

        extractor = FeatureExtractor(args.model, column=args.column, modality=args.modality, on_error=args.on_error)
        dataset = dataset.map(extractor, batched=True, with_indices=True, batch_size=args.batch_size, desc="Features")
    if args.folds is None:
        return dataset
    from .probe import out_of_sample_probs

    taken = [args.probs_column] if args.probs_column in dataset.column_names else []
    return out_of_sample_probs(
        dataset.remove_columns(taken),
        args.label_column,
        features_column=args.features_column,
        probs_column=args.probs_column,
        folds=args.folds,
        seed=args.seed,
        on_error=args.on_error,
    )


def _write(args: argparse.Namespace, report: Any, dataset: Any, cleaned: Any, out: Path) -> dict[str, str]:
    """Page and picture, then the artifact with its card; returns where they are."""
    from ..errors import MissingExtraError
    from ..publishing.artifacts import push_folder
    from ..publishing.writer import replacing
    from .pages import draw_worst, write_page

    paths = {"report": "report.html", "scores": "report", "dataset": "data"}
    with replacing(out, "cleaned_dataset") as draft:
        report.save(draft / "report")
        write_page(report, dataset, draft / "report.html", count=args.rows)
        try:
            draw_worst(report, dataset).savefig(draft / "worst.png", dpi=120)
            paths["picture"] = "worst.png"
        except (MissingExtraError, ValueError):  # no matplotlib, or no images in the set
            pass
        save_cleaned(cleaned, report, draft, args)
    paths = {name: str(out / path) for name, path in paths.items()}
    if args.push_to_hub:
        paths["repository"] = push_folder(out, args.push_to_hub, **push_options(args))
    return paths


def outcome(report: Any, kept: int) -> dict[str, Any]:
    """Counts, settings and the worst rows, ready for JSON; rows by their numbers in the dataset that was given."""
    numbers = report.rows
    return {
        "rows": len(report),
        "label_errors": int(report.is_label_error.sum()),
        "outliers": int(report.is_outlier.sum()),
        "kept": kept,
        "config": json.loads(report.config.to_json_string()),
        "noise_rate": report.noise_rate,
        "near_duplicates": len(report.near_duplicates()),
        "summary": report.about,
        "worst": [
            {
                "row": int(numbers[row]),
                "label": report.name_of(report.labels[row]),
                "suggested": report.name_of(report.suggested_label[row]),
                "score": float(report.label_noise_score[row]),
            }
            for row in report.worst(10)
        ],
        "paths": {},
    }


def save_cleaned(cleaned: Any, report: Any, folder: Path, args: argparse.Namespace) -> Path:
    """Cleaned rows as parquet, beside a card that says what was dropped, with which settings."""
    from ..publishing.dataset_files import write_parquet
    from ..publishing.writer import finish
    from .summary import facts, flagging_rule

    local = Path(args.dataset).exists()
    split = re.split(r"[^\w.]", args.split)[0]  # "train[:1000]" is published as "train"
    return finish(
        folder,
        "cleaned_dataset",
        about={"rows": len(cleaned), "dropped": len(report) - len(cleaned), "summary": outcome(report, len(cleaned))},
        metadata={
            "tags": ["label-noise", "neural-relation-graph"],
            "source_datasets": None if local else [args.dataset],
            **write_parquet(cleaned, folder, split),
        },
        code={"split": split},
        origin=None if local else ("dataset", args.dataset),
        name=args.push_to_hub or Path(args.out).resolve().name,
        source=Path(args.dataset).name if local else args.dataset,
        split=args.split,
        facts=facts(report),
        rule=flagging_rule(report),
        dropped=f"{len(report) - len(cleaned):,}",
        rows=f"{len(report):,}",
        settings=report.config.to_json_string(),
        model=args.model and (Path(args.model).name if Path(args.model).exists() else args.model),
    )


def show(result: dict[str, Any], console: Any) -> None:
    """Counts, and the rows to look at first."""
    from rich.markup import escape
    from rich.table import Table

    console.print(
        f"{result['rows']:,} rows: {result['label_errors']:,} label errors, {result['outliers']:,} outliers, "
        f"{result['kept']:,} kept"
    )
    if "skipped" in result["summary"]:
        reasons = result["summary"]["skipped"]["reasons"]
        console.print(
            "left out: " + ", ".join(f"{count:,} rows: {why}" for why, count in reasons.items()), markup=False
        )
    table = Table(title="Labels to look at first")
    for name in ("row", "label", "suggested", "score"):
        table.add_column(name)
    for row in result["worst"]:
        table.add_row(str(row["row"]), escape(row["label"]), escape(row["suggested"]), f"{row['score']:.3g}")
    console.print(table)
    for name, path in result["paths"].items():
        console.print(f"{name}: {escape(str(path))}", soft_wrap=True)


def demo(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The demo's section: flip labels of handwritten digits, find them, train before and after."""
    from .demo import claims, clean_digits, show_digits

    result = clean_digits(output_dir / "relation", args.seed)  # seconds: the same with --smoke
    show_digits(result, args.console)
    return {**result, "claims": claims(result)}
