"""`hf-dataopt condense`: a few synthetic images per class out of a labelled image data set."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import say
from ..shell.data import STDIN, check_columns, read_dataset
from ..shell.options import (
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

if TYPE_CHECKING:
    from datasets import Dataset

    from .config import IDCConfig

FLAGS = {"image_column": "--column"}
HELP = "condense a labelled image data set to a few images per class (IDC, mosaics, RDED, DM, DSA, herding)"
EXAMPLES = [
    "hf-dataopt condense cifar10 --column img --preset cifar10 --method idc-short --images-per-class 10 --output-dir run1",
    "hf-dataopt condense ./my_images --factor 2 --width 32 --outer-iterations 20 --output-dir run2 --evaluate",
    "hf-dataopt condense ./train.parquet --test ./test.parquet --evaluate --output-dir run3 --json",
]

_METHODS = ("idc", "idc-short", "idc-i", "mosaic", "rded", "dm", "dsa", "herding", "random")
_PRESETS = ("cifar10", "cifar100", "svhn", "mnist", "fashion_mnist", "imagenet_subset", "speech")
# options that set a field of IDCConfig, with its type or its words; None leaves the preset's value
_FIELDS: dict[str, tuple[type | tuple[str, ...], str]] = {
    "images_per_class": (int, "stored images per class"),
    "factor": (int, "multi-formation: factor^2 training images per stored one"),
    "width": (float, "channels of the network (128 in the dissertation; 32 is minutes on a CPU)"),
    "depth": (int, "blocks of the network"),
    "metric": (("mse", "l1", "l1_mean", "cos"), "what the match compares gradients by"),
    "learning_rate": (float, "of the images, at 10 images per class"),
    "outer_iterations": (int, "network lives"),
    "inner_iterations": (int, "rounds over the classes in each"),
    "network_images": (int, "real images the network sees per round"),
    "initialisation": (("random", "herding", "mix", "mix_herding", "patches", "noise"), "what the images start from"),
    "augmentation": (str, "of the match"),
    "storage": (("uint8", "float16", "float32"), "of the images"),
    "evaluation_epochs": (int, "epochs of a scoring run"),
    "dtype": (("float32", "bfloat16"), "of the networks"),
}
_MATCH = ("metric", "learning_rate", "inner_iterations", "network_images", "augmentation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt condense`."""
    add_dataset(parser, "images or arrays")
    parser.add_argument("--test", metavar="DATASET", help="data set to score on; default: the split 'test' of the same")
    parser.add_argument("--test-split", help="split of --test (default: test; train of a file)")
    parser.add_argument(
        "--output-dir", metavar="DIR", required=True, help="checkpoints, preview.png and artifact/; resumable"
    )
    parser.add_argument(
        "--method", choices=_METHODS, default="idc", help="idc-short, mosaic and rded take seconds to minutes"
    )
    parser.add_argument(
        "--teacher", default=None, help="trained image classifier (Hub name or folder) for rded and herding"
    )
    parser.add_argument(
        "--soft-labels", action="store_true", help="add the teacher's class shares of every cell, float16"
    )
    parser.add_argument("--preset", choices=_PRESETS, default=None, help="start from a setting of the dissertation")
    parser.add_argument(
        "--evaluate", action="store_true", help="train networks on the result and on random real images"
    )
    parser.add_argument("--full-epochs", type=int, help="score the whole training set too, trained for so many epochs")
    parser.add_argument("--seeds", type=int, help="scoring runs (default: 3)")
    parser.add_argument("--image-size", type=int, help="side in pixels that all images are brought to")
    parser.add_argument("--image-mode", choices=["RGB", "L"], help="colour or grey, what images are brought to")
    parser.add_argument("--background", help="colour under transparent pixels (default: white)")
    parser.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="what unreadable rows do")
    parser.add_argument(
        "--report-to", metavar="TRACKER", action="append", help="tensorboard, wandb, ...: gets the matching losses"
    )
    add_device(parser)
    add_seed(parser)
    add_hub(parser, "of the data set")
    add_publishing(parser, "the result")
    group = parser.add_argument_group("settings (see IDCConfig)")
    for name, (kind, text) in _FIELDS.items():
        taken: dict[str, Any] = {"type": kind} if isinstance(kind, type) else {"choices": kind}
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **taken)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Condense, save, and score if asked.

    Args:
        args: the parsed command line.

    Returns:
        Files, settings, losses and scores, ready for JSON.

    Raises:
        UsageError: the data set cannot be read, or an option is out of range or has no effect.
        ValueError: images or labels that cannot be used.
    """
    from ..distributed import is_main_process
    from ..publishing.writer import check_target

    columns: Any = {"image_column": args.column or "image", "label_column": args.label_column or "label"}
    with refusing():
        check_publishing(args)
        scoring = ("test", "test_split", "full_epochs", "seeds")
        only(args, args.evaluate, "needs --evaluate", *scoring)
        only(args, args.test, "needs --test", "test_split")
        for name in ("seeds", "full_epochs"):
            check_count(name, 1 if getattr(args, name) is None else getattr(args, name))
        config = config_from(args)
        _check_effect(args, config)
        if is_main_process():
            check_target(Path(args.output_dir) / "artifact", "condensed_dataset")
        device = device_of(args.device)
        train = _read(args, args.dataset, args.split)
        test = _test(args) if args.evaluate else None
        for dataset in [train] if test is None else [train, test]:
            check_columns(dataset, column=columns["image_column"], label_column=columns["label_column"])
    from .condenser import DatasetCondenser
    from .tracking import check_trackers

    with refusing():
        condenser = DatasetCondenser(
            config, method=args.method, teacher=args.teacher, device=device, on_error=args.on_error
        )
        check_trackers(args.report_to, Path(args.output_dir))
        cost = condenser.estimate(train, **columns)
    say(str(cost))
    condensed = condenser.condense(train, output_dir=args.output_dir, report_to=args.report_to, **columns)
    result: dict[str, Any] = {
        "images": len(condensed),
        "method": args.method,
        "classes": len(set(condensed[columns["label_column"]])),
        "outer_iterations": condenser.config.outer_iterations,
        "losses": condenser.losses,
        "short": {name: list(found) for name, found in condenser.short.items()},
        "skipped": dict(Counter(condenser.skipped.values())),
        "config": condenser.config.to_json_string(),
    }
    if not is_main_process():
        return result
    from ..publishing.artifacts import push_folder
    from .saved import save_condensed

    if test is not None:
        result["scores"] = _rows(
            condenser.evaluate(condensed, test, seeds=args.seeds or 3, full_epochs=args.full_epochs)
        )
    folder = save_condensed(
        condensed,
        Path(args.output_dir) / "artifact",
        config=condenser.config,
        scores=result.get("scores", ()),
        source=None if args.dataset == STDIN or Path(args.dataset).exists() else args.dataset,
        name=args.push_to_hub or Path(args.output_dir).name,
    )
    result |= {"folder": str(folder), "preview": str(folder / "preview.png")}
    if args.push_to_hub:
        result["repository"] = address(push_folder(folder, args.push_to_hub, **push_options(args)))
    return result


def config_from(args: argparse.Namespace) -> IDCConfig:
    """The preset with the options that were given."""
    from .config import IDCConfig

    changes = {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
    if args.soft_labels:
        changes["soft_labels"] = True
    for name in ("image_size", "image_mode", "background"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    make = getattr(IDCConfig, args.preset) if args.preset else IDCConfig
    config: IDCConfig = make(**changes, seed=args.seed)
    return config


def _check_effect(args: argparse.Namespace, config: IDCConfig) -> None:
    """Refuse settings that the method has its own values for, and those of a match where images are only chosen."""
    from .baselines import method_config

    without = config_from(argparse.Namespace(**{**vars(args), **dict.fromkeys(_FIELDS)}))
    made = method_config(args.method, config)
    for name in _FIELDS:
        if getattr(made, name) != getattr(config, name):
            other = method_config(args.method, replace(config, **{name: getattr(without, name)}))
            only(args, other != made, f"has no effect with --method {args.method}, which has its own", name)
    chosen = method_config(args.method, without).outer_iterations == 0
    only(
        args, not chosen, f"has no effect with --method {args.method}, which only chooses images", *_MATCH, "report_to"
    )


def _read(args: argparse.Namespace, name: str, split: str | None) -> Dataset:
    found: Dataset = read_dataset(name, split, args.config, revision=args.revision, token=args.token)
    return found


def _test(args: argparse.Namespace) -> Dataset:
    """What is scored on: a data set of its own, or the split `test` of the one that is condensed."""
    if args.test:
        alone = args.test == STDIN or Path(args.test).is_file()
        return read_dataset(args.test, args.test_split or ("train" if alone else "test"), token=args.token)
    if args.dataset == STDIN or Path(args.dataset).is_file():
        raise ValueError(f"--evaluate: {args.dataset} has no split 'test'; name a data set to score on with --test")
    return _read(args, args.dataset, "test")


def _rows(scores: dict[str, Any]) -> list[dict[str, Any]]:
    from .evaluation import scores_as_rows

    return scores_as_rows(scores)


def show(result: dict[str, Any], console: Any) -> None:
    """What was written, and the accuracies."""
    from rich.markup import escape

    console.print(f"{result['images']} images of {result['classes']} classes")
    for name in ("folder", "preview", "repository"):
        if name in result:
            console.print(f"{name}: {escape(str(result[name]))}", soft_wrap=True)
    if result.get("skipped"):
        console.print(f"rows left out: {sum(result['skipped'].values())}")
    if result.get("short"):
        console.print(f"classes with fewer images than asked, all used: {escape(', '.join(result['short']))}")
    if result["losses"]:
        console.print(f"matching loss {result['losses'][0]:.4g} -> {result['losses'][-1]:.4g}")
    if result.get("scores"):
        _show_scores(result["scores"], console)


def _show_scores(rows: list[dict[str, Any]], console: Any) -> None:
    """A table that fits 80 characters: what no row has takes no column, and what was alike for all stands below."""
    from rich.markup import escape
    from rich.table import Table

    alike = [name for name in ("network", "epochs", "seeds") if len({row[name] for row in rows}) == 1]
    table = Table(
        title="Test accuracy of networks trained on it",
        caption=", ".join(f"{name} {escape(str(rows[0][name]))}" for name in alike) or None,
    )
    columns = [name for name in rows[0] if name not in alike and any(row[name] is not None for row in rows)]
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*("" if row[name] is None else escape(str(row[name])) for name in columns))
    console.print(table)


def digits(size: int = 16) -> tuple[Dataset, Dataset]:
    """Scikit-learn's handwritten digits as grey images of `size` pixels: 1,437 for training, 360 for testing."""
    import torch
    import torch.nn.functional as F
    from datasets import ClassLabel, Dataset, Features, Image

    from ..errors import MissingExtraError
    from ..seeding import generator
    from .multi_formation import to_images

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "the digits data set") from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=generator(0))
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    splits = [
        Dataset.from_dict({"image": to_images(images[rows]), "label": labels[rows].tolist()}, features=features)
        for rows in (order[360:], order[:360])
    ]
    return splits[0], splits[1]


def digits_config(**changes: Any) -> IDCConfig:
    """Settings that condense the digits to one image per class in about a minute."""
    from .config import IDCConfig

    values: dict[str, Any] = {
        "images_per_class": 1,
        "factor": 2,
        "width": 32,
        "outer_iterations": 8,
        "inner_iterations": 20,
        "network_images": 256,
        "learning_rate": 0.002,
        "scale_learning_rate": False,
        "evaluation_epochs": 300,
        "evaluation_augmentation": "color_crop_scale_rotate",
        "evaluation_cutmix": 0.0,
    }
    return IDCConfig(**{**values, **changes})


def demo(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The demo's section: handwritten digits in ten images, against the mosaics they start from and random images."""
    from .condenser import DatasetCondenser

    train, test = digits()
    changes: dict[str, Any] = {"seed": args.seed}
    if args.smoke:
        changes |= {"outer_iterations": 1, "inner_iterations": 4, "evaluation_epochs": 40}
    condenser = DatasetCondenser(digits_config(**changes), device=args.device)
    args.console.print(f"1,437 digits into 10 images, {condenser.estimate(train)} (and as long for the scores)")
    condensed = condenser.condense(train, output_dir=output_dir / "condensation")
    seeds = 1 if args.smoke else 2
    scores = condenser.evaluate(condensed, test, seeds=seeds)
    before = condenser.evaluate(condenser.initial(train), test, seeds=seeds)["condensed"]
    named = {"random images": scores["random"], "mosaics before": before, "condensed": scores["condensed"]}
    result = {
        "images": len(condensed),
        "classes": 10,
        "losses": condenser.losses,
        "preview": str(output_dir / "condensation" / "preview.png"),
        "scores": _rows(named),
    }
    show(result, args.console)
    return {**result, "claims": _claims(result)}


def _claims(result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows for the demo's last table."""
    *others, ours = result["scores"]

    def accuracy(row: dict[str, Any]) -> str:
        spread = f" ± {row['spread']:.1f}" if row["seeds"] > 1 else ""
        return f"{row['accuracy']:.1f}{spread} %"

    return [
        {
            "claim": f"test accuracy after training on {result['images']} images",
            "baseline": "; ".join(f"{row['trained on']} {accuracy(row)}" for row in others),
            "ours": accuracy(ours),
        }
    ]
