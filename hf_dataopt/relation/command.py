"""`hf-dataopt clean`: find label errors and outliers of a dataset, write the cleaned set, a report and a card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "find label errors and outliers of a dataset, write it without them (neural relation graph)"
EXAMPLES = [
    "hf-dataopt clean cifar10 --model me/vit-cifar10 --column img --label-column label --out cleaned",
    "hf-dataopt clean reviews.csv --model me/roberta --column text --modality text --noise-rate 0.05 --out cleaned",
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
    parser.add_argument("--label-column", default="label", help="the labels to check")
    parser.add_argument("--temperature", type=float, default=4.0, help="t of Eq. 5.4")
    parser.add_argument(
        "--score", choices=["label_noise", "combined"], default="label_noise", help="Algorithm 4, or ours"
    )
    parser.add_argument("--noise-rate", type=float, default=None, help="share of labels expected to be wrong")
    parser.add_argument("--partition-size", type=int, default=None, help="rows of a partition (very large sets)")
    parser.add_argument("--drop-outliers", action="store_true", help="drop outliers too")
    parser.add_argument("--max-memory-gb", type=float, default=0.06, help="working memory of the graph")
    parser.add_argument("--device", default=None, help="where the graph is computed, such as cuda; default the CPU")
    parser.add_argument("--rows", type=int, default=24, help="rows in the HTML report")
    parser.add_argument("--out", help="folder for the cleaned set, report.html, worst.png, README.md and the scores")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="push the cleaned set, with the report, to this repository"
    )
    parser.add_argument("--private", action="store_true", help="make that repository private")


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
    from .cleaner import RelationCleaner
    from .config import RelationConfig

    if not args.out and not args.push_to_hub:
        raise ValueError("nowhere to write to: give --out DIR or --push-to-hub REPO")
    config = RelationConfig(
        score=args.score,
        temperature=args.temperature,
        partition_size=args.partition_size,
        max_memory_gb=args.max_memory_gb,
        device=args.device,
        seed=args.seed,
    )
    source = read_dataset(args.dataset, args.split, args.config)
    dataset = _with_features(source, args)
    out = Path(args.out or f"{args.push_to_hub.split('/')[-1]}-cleaned")
    report = RelationCleaner(config).fit(
        dataset,
        args.label_column,
        features_column=args.features_column,
        probs_column=args.probs_column,
        output_dir=out / "report",
    )
    if args.noise_rate is not None:
        report = report.rethreshold(noise_rate=args.noise_rate)
        if distributed.is_main_process():
            report.save(out / "report")
    cleaned = report.filter(source, outliers=args.drop_outliers)
    result = summary(report, len(cleaned))
    # every process of accelerate or torchrun comes here; one writes
    return {**result, "paths": _write(args, report, dataset, cleaned, out)} if distributed.is_main_process() else result


def read_dataset(name: str, split: str, config: str | None = None) -> Any:
    """A dataset from the Hub, from `save_to_disk`, or from a file.

    Raises:
        ValueError: nothing there, or no such split.
    """
    import datasets

    path = Path(name)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"{name} has the splits {list(found)}, not {split!r}; set --split")
            return found[split]
        return found
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if path.is_file():
        if path.suffix not in kinds:
            raise ValueError(
                f"{name} is no {', '.join(kinds)} file; save the dataset with save_to_disk and name the folder"
            )
        return datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    return datasets.load_dataset(name, config, split=split)


def _with_features(dataset: Any, args: argparse.Namespace) -> Any:
    if args.model is None:
        return dataset
    from ..features import FeatureExtractor

    extractor = FeatureExtractor(args.model, column=args.column, modality=args.modality)
    return dataset.map(extractor, batched=True, batch_size=args.batch_size, desc="Features")


def _write(args: argparse.Namespace, report: Any, dataset: Any, cleaned: Any, out: Path) -> dict[str, str]:
    """Cleaned set first, then page, picture and card; returns where they are."""
    from ..errors import MissingExtraError
    from .pages import draw_worst, write_page

    out.mkdir(parents=True, exist_ok=True)
    if args.out:
        cleaned.save_to_disk(out / "dataset")
    write_page(report, dataset, out / "report.html", count=args.rows)
    paths = {"report": str(out / "report.html"), "scores": str(out / "report")}
    try:
        draw_worst(report, dataset).savefig(out / "worst.png", dpi=120)
        paths["picture"] = str(out / "worst.png")
    except (MissingExtraError, ValueError):  # no matplotlib, or no images in the set
        pass
    (out / "README.md").write_text(card(args, report, len(cleaned)), encoding="utf-8")
    if args.out:
        paths["dataset"] = str(out / "dataset")
    if args.push_to_hub:
        paths["repository"] = _push(args, report, cleaned, out)
    return paths


def summary(report: Any, kept: int) -> dict[str, Any]:
    """Counts, settings and the worst rows, ready for JSON."""
    return {
        "rows": len(report),
        "label_errors": int(report.is_label_error.sum()),
        "outliers": int(report.is_outlier.sum()),
        "kept": kept,
        "config": json.loads(report.config.to_json_string()),
        "summary": report.summary,
        "worst": [
            {
                "row": int(row),
                "label": report.label_names[report.labels[row]],
                "suggested": report.label_names[report.suggested_label[row]],
                "score": float(report.label_noise_score[row]),
            }
            for row in report.worst(10)
        ],
        "paths": {},
    }


def card(args: argparse.Namespace, report: Any, kept: int, metadata: dict[str, Any] | None = None) -> str:
    """The dataset card: what was dropped, with which settings; `metadata` is what the repository's card says already."""
    from ..cards import render
    from .pages import facts

    local = Path(args.dataset).exists()
    source = None if local else [args.dataset]
    return render(
        "cleaned_dataset",
        {**(metadata or {}), "tags": ["hf-dataopt", "label-noise", "neural-relation-graph"], "source_datasets": source},
        name=args.push_to_hub or Path(args.out).name,
        source=f"`{Path(args.dataset).name if local else args.dataset}`, split `{args.split}`,",
        repo_id=args.push_to_hub,
        split=args.split,
        facts=facts(report),
        dropped=f"{len(report) - kept:,}",
        rows=f"{len(report):,}",
        settings=report.config.to_json_string(),
        model=f"`{Path(args.model).name if Path(args.model).exists() else args.model}`"
        if args.model
        else "given columns",
    )


def _push(args: argparse.Namespace, report: Any, cleaned: Any, out: Path) -> str:
    """The cleaned set and, beside it, card, page and scores; the card keeps the metadata that `datasets` wrote."""
    from huggingface_hub import DatasetCard, HfApi

    cleaned.push_to_hub(args.push_to_hub, split=args.split, private=args.private)
    written = DatasetCard.load(args.push_to_hub).data.to_dict()
    (out / "README.md").write_text(card(args, report, len(cleaned), written), encoding="utf-8")
    HfApi().upload_folder(
        repo_id=args.push_to_hub,
        repo_type="dataset",
        folder_path=out,
        allow_patterns=["README.md", "report.html", "worst.png", "report/*"],
        commit_message="Report and card",
    )
    return str(args.push_to_hub)


def show(result: dict[str, Any], console: Any) -> None:
    """Counts, and the rows to look at first."""
    from rich.markup import escape
    from rich.table import Table

    console.print(
        f"{result['rows']:,} rows: {result['label_errors']:,} label errors, {result['outliers']:,} outliers, "
        f"{result['kept']:,} kept"
    )
    table = Table(title="Labels to look at first")
    for name in ("row", "label", "suggested", "score"):
        table.add_column(name)
    for row in result["worst"]:
        table.add_row(str(row["row"]), escape(row["label"]), escape(row["suggested"]), f"{row['score']:.3g}")
    console.print(table)
    for name, path in result["paths"].items():
        console.print(f"{name}: {escape(str(path))}")


def demo(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The demo's section: flip labels of handwritten digits, find them, train before and after."""
    from .demo import clean_digits, show_digits

    result = clean_digits(output_dir / "relation", args.seed)  # seconds: the same with --smoke
    show_digits(result, args.console)
    return result
