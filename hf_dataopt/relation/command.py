"""`hf-dataopt clean`: find label errors and outliers of a dataset, write the cleaned set, a report and a card."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import say
from ..settings import check_number, optional
from ..shell.data import STDIN, check_columns, read_dataset
from ..shell.options import (
    DTYPES,
    add_dataset,
    add_device,
    add_hub,
    add_publishing,
    add_seed,
    address,
    check_publishing,
    device_of,
    push_options,
)
from ..shell.usage import check_count, only, refusing
from .set_command import check_sets, fit_sets, holds_sets, outcome_of_sets

if TYPE_CHECKING:
    from .config import RelationConfig

HELP = "find label errors and outliers of a dataset, write it without them (neural relation graph)"
EXAMPLES = [
    "hf-dataopt clean cifar10 --model me/vit-cifar10 --column img --label-column label --output-dir cleaned",
    "hf-dataopt clean reviews.csv --model me/roberta --column text --modality text --noise-rate 0.05 --output-dir cleaned",
    "hf-dataopt clean photos.parquet --features-column clip --folds 4 --label-column kind --output-dir cleaned",
    "hf-dataopt clean saved_folder --features-column features --probs-column probs --output-dir cleaned --json",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt clean`."""
    add_dataset(parser, "what the model reads")
    parser.add_argument("--model", help="classifier (Hub name or folder); without it the columns below must be there")
    parser.add_argument("--modality", choices=["image", "text", "audio"], help="kind of --column (default: image)")
    parser.add_argument("--batch-size", type=int, help="rows a forward pass of the model (default: 64)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model's weights (default: float32)")
    parser.add_argument("--features-column", help="embeddings that are already there (default: features)")
    parser.add_argument("--probs-column", help="class probabilities that are already there (default: probs)")
    parser.add_argument(
        "--folds",
        type=int,
        help="make the probabilities: by a probe on the features, for each of so many parts from the others",
    )
    parser.add_argument(
        "--label-names",
        nargs="+",
        metavar="NAME",
        help="of labels that are texts, several a row: in the order of the probabilities (default: the model's)",
    )
    parser.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="what unreadable rows do")
    parser.add_argument("--temperature", type=float, default=4.0, help="t of Eq. 5.4")
    parser.add_argument(
        "--score", choices=["combined", "label_noise"], default="combined", help="ours, or the score of Algorithm 4"
    )
    parser.add_argument(
        "--cut", choices=["estimated", "algorithm4"], help="which rows go (default: estimated); or give --noise-rate"
    )
    parser.add_argument("--noise-rate", type=float, default=None, help="share of labels expected to be wrong")
    parser.add_argument("--partition-size", type=int, default=None, help="rows of a partition (very large sets)")
    parser.add_argument("--drop-outliers", action="store_true", help="drop outliers too")
    parser.add_argument("--drop-near-duplicates", action="store_true", help="keep one row of each group of copies")
    parser.add_argument("--max-memory-gb", type=float, default=0.06, help="working memory of the graph")
    add_device(parser, default="the CPU for the graph")
    add_seed(parser)
    parser.add_argument("--rows", type=int, default=24, help="rows in the HTML report")
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="folder for the cleaned set, report.html, worst.png, README.md and the scores",
    )
    parser.add_argument(
        "--license", help="of the cleaned set, for its card (default: that of the Hub data set, if it has one)"
    )
    add_hub(parser, "of the data set")
    add_publishing(parser, "the cleaned set, with the report,")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fit, filter, write.

    Args:
        args: the parsed command line.

    Returns:
        Counts, settings, paths and the worst rows, ready for JSON.

    Raises:
        UsageError: neither `--output-dir` nor `--push-to-hub`; a dataset that cannot be read; columns that are not there.
        ValueError: rows or columns that cannot be used.
    """
    from .. import distributed
    from ..publishing.writer import check_target
    from .cleaner import RelationCleaner
    from .labels import read_labels
    from .summary import facts, flagging_rule

    with refusing():
        config = _checked(args)
        out = Path(args.output_dir or f"{args.push_to_hub.split('/')[-1]}-cleaned")
        if distributed.is_main_process():
            check_target(out, "cleaned_dataset")
        source = read_dataset(args.dataset, args.split, args.config, revision=args.revision, token=args.token)
        several = holds_sets(source, args.label_column or "label")
        if several:
            check_sets(source, args)
        else:
            only(args, None, "is about several labels a row", "label_names")
        needed: dict[str, str | None] = {"column": args.column or "image"} if args.model else {**_ready(args)}
        if args.folds is not None or (several and args.probs_column is None):
            needed["probs_column"] = None
        check_columns(source, label_column=args.label_column or "label", **needed)
        if not several:
            read_labels(source, args.label_column or "label")
    dataset = _with_features(source, args)
    if several:
        return _run_sets(dataset, source, config, args, out)
    place = out.resolve()
    unfinished = place.with_name(f"{place.name}.unfinished")  # beside it: the folder itself is replaced as a whole
    report = RelationCleaner(config).fit(
        dataset,
        args.label_column or "label",
        **_ready(args),
        output_dir=unfinished,
        on_error=args.on_error,
        quiet=args.quiet,
    )
    if args.noise_rate is not None:
        report = report.rethreshold(noise_rate=args.noise_rate)
    cleaned = report.filter(source, outliers=args.drop_outliers, near_duplicates=args.drop_near_duplicates)
    result = outcome(report, len(cleaned))
    # every process of accelerate or torchrun comes here; one writes
    if not distributed.is_main_process():
        return result
    told = Told(len(report), facts(report), flagging_rule(report), report.config.to_json_string(), result)
    result["paths"] = _write(args, report, report.fitted(dataset), cleaned, out, told)
    shutil.rmtree(unfinished, ignore_errors=True)
    return result


def _run_sets(dataset: Any, source: Any, config: RelationConfig, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The same for several labels a row: rows with a flagged decision go."""
    from .. import distributed

    report = fit_sets(dataset, config, args)
    cleaned = report.filter(source, outliers=args.drop_outliers, near_duplicates=args.drop_near_duplicates)
    result = outcome_of_sets(report, len(cleaned))
    if distributed.is_main_process():
        told = Told(len(report), report.facts(), report.flagging_rule(), report.config.to_json_string(), result)
        result["paths"] = _write(args, report, dataset, cleaned, out, told)
    return result


def _checked(args: argparse.Namespace) -> RelationConfig:
    """Options that go together, and the settings they make; nothing is read yet."""
    from .config import RelationConfig

    if not args.output_dir and not args.push_to_hub:
        raise ValueError("nowhere to write to: give --output-dir DIR or --push-to-hub REPO")
    check_publishing(args)
    only(args, args.model, "needs --model", "column", "modality", "batch_size", "dtype")
    only(
        args,
        not args.model,
        "is about columns that are there; --model makes its own",
        "features_column",
        "probs_column",
    )
    only(args, args.noise_rate is None, "and --noise-rate are two cuts; give one", "cut")
    optional(check_number, "noise_rate", args.noise_rate, 0, 1)
    check_count("rows", args.rows)
    if args.folds is not None:
        check_count("folds", args.folds, 2)
    check_count("batch_size", 64 if args.batch_size is None else args.batch_size)
    return RelationConfig(
        score=args.score,
        cut=args.cut or "estimated",
        temperature=args.temperature,
        partition_size=args.partition_size,
        max_memory_gb=args.max_memory_gb,
        device=args.device and device_of(args.device),
        seed=args.seed,
    )


def _ready(args: argparse.Namespace) -> dict[str, str]:
    """Columns of features and probabilities, as `fit` takes them; the model's go by the usual names."""
    return {
        "features_column": args.features_column or "features",
        "probs_column": args.probs_column or "probs",
    }


def _with_features(dataset: Any, args: argparse.Namespace) -> Any:
    """Columns as `fit` reads them: of the model, of a probe on the features, or those that are there."""
    if args.model is not None:
        from ..features import FeatureExtractor

        modality, column = args.modality or "image", args.column or "image"
        extractor = FeatureExtractor(
            args.model, column=column, modality=modality, dtype=args.dtype or "float32", on_error=args.on_error
        )
        say(f"features of {len(dataset):,} rows by {args.model}")
        size = args.batch_size or 64
        dataset = dataset.map(extractor, batched=True, with_indices=True, batch_size=size, desc="Features")
    else:
        for column in [one for one in _ready(args).values() if one in dataset.column_names]:
            dataset = _read_lists(dataset, column, skip=args.on_error == "skip")
        dataset = _with_thumbnails(dataset, args.on_error)
    if args.folds is None:
        return dataset
    from .probe import out_of_sample_probs

    options: dict[str, Any] = {**_ready(args), "folds": args.folds, "seed": args.seed, "on_error": args.on_error}
    taken = [name for name in [options["probs_column"]] if name in dataset.column_names]
    return out_of_sample_probs(dataset.remove_columns(taken), args.label_column or "label", quiet=args.quiet, **options)


def _with_thumbnails(dataset: Any, on_error: Any) -> Any:
    """The dataset with the thumbnails of its pictures, where one column holds some: copies are told by them too."""
    from datasets import Image

    from ..thumbnails import COLUMN, Thumbnails

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if len(columns) != 1 or COLUMN in dataset.column_names:
        return dataset
    small = Thumbnails(columns[0], on_error=on_error)
    return dataset.map(small, batched=True, with_indices=True, desc="Thumbnails")


def _read_lists(dataset: Any, column: str, *, skip: bool) -> Any:
    """The dataset with lists of numbers where a column holds them as text, as csv files do: "[0.1, 0.2]" or "[0.1 0.2]"."""
    from datasets import Features, List, Value

    if getattr(dataset.features.get(column), "dtype", None) not in ("string", "large_string"):
        return dataset

    def read(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        found: list[list[float] | None] = []
        for row, text in zip(rows, batch[column], strict=True):
            try:
                found.append(
                    None if text is None else [float(one) for one in text.strip("[] \n").replace(",", " ").split()]
                )
            except ValueError as error:
                if not skip:
                    raise ValueError(f"row {row}: {column} holds {text!r:.60}, no list of numbers") from error
                found.append(None)
        return {column: found}

    kinds = Features({**dataset.features, column: List(Value("float32"))})
    return dataset.map(read, batched=True, with_indices=True, features=kinds, desc=f"Numbers of {column}")


@dataclass(frozen=True)
class Told:
    """What a card says of a report."""

    rows: int
    facts: list[tuple[str, str]]
    rule: str
    settings: str
    outcome: dict[str, Any]


def _write(args: argparse.Namespace, report: Any, dataset: Any, cleaned: Any, out: Path, told: Told) -> dict[str, str]:
    """Page and picture, then the artifact with its card; returns where they are."""
    from ..errors import MissingExtraError
    from ..publishing.artifacts import push_folder
    from ..publishing.writer import replacing
    from .pages import draw_worst, write_page
    from .report import RelationReport
    from .set_pages import write_sets_page

    paths = {"report": "report.html", "scores": "report", "dataset": "data"}
    with replacing(out, "cleaned_dataset") as draft:
        report.save(draft / "report")
        gone = report.dropped(outliers=args.drop_outliers, near_duplicates=args.drop_near_duplicates)
        options: dict[str, Any] = {"count": args.rows, "dropped": gone, "quiet": args.quiet}
        one_label = isinstance(report, RelationReport)
        (write_page if one_label else write_sets_page)(report, dataset, draft / "report.html", **options)
        with suppress(MissingExtraError, ValueError):  # no matplotlib, or no images in the set
            if one_label:
                draw_worst(report, dataset).savefig(draft / "worst.png", dpi=120)
                paths["picture"] = "worst.png"
        save_cleaned(cleaned, told, draft, args)
    paths = {name: str(out / path) for name, path in paths.items()}
    if args.push_to_hub:
        paths["repository"] = address(push_folder(out, args.push_to_hub, **push_options(args)))
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


def save_cleaned(cleaned: Any, told: Told, folder: Path, args: argparse.Namespace) -> Path:
    """Cleaned rows as parquet, beside a card that says what was dropped, with which settings."""
    from ..publishing.cards import size_category
    from ..publishing.dataset_files import write_parquet
    from ..publishing.writer import finish

    local = args.dataset == STDIN or Path(args.dataset).exists()
    split = re.split(r"[^\w.]", args.split or "train")[0]  # "train[:1000]" is published as "train"
    return finish(
        folder,
        "cleaned_dataset",
        about={"rows": len(cleaned), "dropped": told.rows - len(cleaned), "summary": told.outcome},
        metadata={
            "tags": ["label-noise", "neural-relation-graph"],
            "license": args.license,
            "source_datasets": None if local else [args.dataset],
            "task_categories": [f"{args.modality or _modality(cleaned, args.column)}-classification"],
            "size_categories": [size_category(len(cleaned))],
            **write_parquet(cleaned, folder, split),
        },
        code={"split": split},
        origin=None if local else ("dataset", args.dataset),
        name=args.push_to_hub or Path(args.output_dir).resolve().name,
        source="standard input" if args.dataset == STDIN else Path(args.dataset).name if local else args.dataset,
        split=args.split or "train",
        facts=told.facts,
        rule=told.rule,
        dropped=f"{told.rows - len(cleaned):,}",
        rows=f"{told.rows:,}",
        settings=told.settings,
        model=args.model and (Path(args.model).name if Path(args.model).exists() else args.model),
    )


def _modality(dataset: Any, column: str | None) -> str:
    """What is classified, by the kinds of the columns: pictures, sounds or, where there are neither, texts or numbers."""
    import datasets

    kinds = [dataset.features[column]] if column in dataset.features else list(dataset.features.values())
    for kind, word in ((datasets.Image, "image"), (datasets.Audio, "audio")):
        if any(isinstance(one, kind) for one in kinds):
            return word
    text = any(getattr(one, "dtype", "") in ("string", "large_string") for one in kinds)
    return "text" if text else "tabular"


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

    result = clean_digits(output_dir / "relation", args.seed, args.device)  # seconds: the same with --smoke
    show_digits(result, args.console)
    return {**result, "claims": claims(result)}
