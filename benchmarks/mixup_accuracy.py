"""What mixing is worth: plain, input mixup, CutMix, Puzzle Mix and Co-Mixup with a stock Trainer on CIFAR-10.

    python benchmarks/mixup_accuracy.py                   # every part, an hour and a half on one core; stops and goes on
    python benchmarks/mixup_accuracy.py --part table      # one of: tune, table, saliency, why, curve, tune few, few
    python benchmarks/mixup_accuracy.py --smoke

Class-balanced images out of training rows 0-9,999, averaged down to `side` pixels; tested on rows 10,000-14,999 (unseen); rows
15,000-19,999 choose a learning rate for each method at seed 0. A Hugging Face ResNet of the shape of ResNet-8, SGD with
momentum 0.9, cosine, batch 100, horizontal flips, equal epochs. "+ clean" is the clean loss of weight 1 (section 3.5),
Co-Mixup's preset; without it Co-Mixup's alpha falls to 0.5. Input mixup and CutMix are timm's, alpha 1. Attacks are of 1/255:
at 4/255 every network of this size errs on more than 95 %. CIFAR-10 has no boxes: for the background test of section 4.5.4 the
outer eighth on each side is another image's, or has Gaussian noise added; the localisation test of section 4.5.2 cannot be run.

`results/mixup_accuracy.json` gets every run as it ends, and a run that is in it is not done again. Seconds are CPU seconds of
`Trainer.train`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from _report import RESULTS, show, write
from data import DataMissingError, cifar10
from mixup_measure import logits_of, measure
from mixup_networks import PreActResNet18, resnet8
from mixup_rows import MEAN, STD, MappedRows, Refresh, Rows, rows, unseen
from scipy.stats import t as student
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_dataopt import (
    CoMixupConfig,
    DataCollatorForCoMixup,
    DataCollatorForMixup,
    DataCollatorForPuzzleMix,
    MixupSchedule,
    PuzzleMixConfig,
    seeding,
)

TABLE = (
    *("plain", "input mixup", "cutmix", "puzzle", "comixup + clean"),
    *("comixup", "input mixup + clean", "cutmix + clean", "puzzle + clean"),
)
CURVED = TABLE[:5]
SALIENCY = {
    "puzzle, half-size saliency": 0.5,
    "puzzle, 0.7-size saliency": 0.7,
    "puzzle, half of the steps cutmix": 1.0,
}
EVERY = "puzzle, maps of every {}. epoch"  # kept for each row in between
NOISE = "noise for saliency"  # the same solver on maps that say nothing, so that other parts win every time
WHY: dict[str, dict[str, Any]] = {  # changes of Co-Mixup's preset, one at a time
    NOISE: {},
    "eta x 8": {"eta": 0.4},
    "2x2 cells": {"grid": 2},
    "clean weight 0.25": {"clean_weight": 0.25},
}
RATES = (0.1, 0.3, 1.0)
PARTS = ("tune", "table", "saliency", "why", "curve", "tune few", "few")
SHOWN = (
    "images",
    "epochs",
    "width",
    "method",
    "rate",
    "seeds",
    "accuracy",
    "accuracy sd",
    "nll",
    "over plain",
    "over cutmix",
)
FIGURES = (
    "accuracy",
    "nll",
    "ece",
    "fgsm_error",
    "pgd_error",
    "other_border_error",
    "noisy_border_error",
    "train_accuracy",
    "mixup_inputs_per_output",
    "mixup_largest_share",
    "mixup_single_input",
    "mixup_label_entropy",
    "cpu_seconds",
    "seconds",
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Size of the experiment."""

    images: int = 2_000
    side: int = 16
    width: int = 16
    epochs: int = 30
    network: str = "resnet8"  # or "preactresnet18"


STUDIED = Setting(images=1_000)
FEW = Setting(images=500)  # with learning rates of its own
CURVE = {
    **{f"{images} images": Setting(images=images) for images in (500, 1_000, 2_000, 5_000)},
    "10000 images, 15 epochs": Setting(images=10_000, epochs=15),
    **{f"{epochs} epochs": Setting(epochs=epochs) for epochs in (15, 60, 120)},
    **{f"width {width}": Setting(width=width) for width in (8, 32)},
}
CURVE_RATE = 0.3  # one for all points and methods


def flipping(seed: int) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
    """Collates rows, half of the images mirrored."""
    draws = seeding.generator(seed, epoch=7)

    def collate(features: list[Any]) -> dict[str, torch.Tensor]:
        images = torch.stack([row["pixel_values"] for row in features])
        mirrored = torch.rand(len(images), generator=draws) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return {"pixel_values": images, "labels": torch.tensor([row["labels"] for row in features])}

    return collate


def noise_maps(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Maps (B, H, W) of log-normal noise, a value a cell of the grid; of a size that mixes as much as live maps do."""
    draws = seeding.generator(seed, epoch=11)

    def maps(images: Tensor, _: Tensor) -> Tensor:
        cells = (0.25 * torch.randn(len(images), 1, 4, 4, generator=draws)).exp()
        return nn.functional.interpolate(cells, size=images.shape[2:])[:, 0].to(images.device)

    return maps


def co_mixup_config(change: str, **more: Any) -> CoMixupConfig:
    """Co-Mixup's preset, or one change of it."""
    return CoMixupConfig.cifar100(image_mean=MEAN, image_std=STD, **WHY.get(change, {}), **more)


def collator(method: str, model: nn.Module, side: int, seed: int) -> Any:
    """The data collator of a method."""
    collate = flipping(seed)
    options: dict[str, Any] = {"collate_fn": collate, "seed": seed}
    name, clean = method.removesuffix(" + clean"), float(method.endswith(" + clean"))
    grids = tuple(grid for grid in (2, 4, 8, 16) if 2 * grid <= side)  # cells of 2 pixels at least, as at 32
    puzzle = PuzzleMixConfig.cifar100(grid_sizes=grids, image_mean=MEAN, image_std=STD, clean_weight=clean)
    if name == "plain":
        return collate
    if name.startswith("comixup"):
        change = name.removeprefix("comixup, ")
        config = co_mixup_config(change) if change in WHY or clean else co_mixup_config("", clean_weight=0.0)
        if change == NOISE:
            options["saliency"] = noise_maps(seed)
        return DataCollatorForCoMixup(model, config, **options)
    if name.endswith("cutmix") and name != "cutmix":
        schedule = MixupSchedule(probabilities={"puzzle_mix": 0.5, "cutmix": 0.5}, puzzle_mix=puzzle)
        return DataCollatorForMixup(model, schedule, **options)
    if refreshed(name):
        return DataCollatorForPuzzleMix(model, puzzle, saliency="saliency", seed=seed)  # the rows are mirrored already
    if name.startswith("puzzle"):
        return DataCollatorForPuzzleMix(model, puzzle, saliency_scale=SALIENCY.get(name, 1.0), **options)
    schedule = MixupSchedule(probabilities={"mixup" if name == "input mixup" else name: 1.0}, clean_weight=clean)
    return DataCollatorForMixup(model, schedule, **options)


def refreshed(method: str) -> int:
    """Epochs after which the maps are taken anew; 0: they are this step's."""
    before, after = EVERY.split("{}")
    return int(method.removeprefix(before).removesuffix(after)) if method.startswith(before) else 0


def network(setting: Setting, seed: int) -> nn.Module:
    """The setting's network, freshly drawn."""
    if setting.network == "resnet8":
        return resnet8(setting.width, seed)
    torch.manual_seed(seed)
    return PreActResNet18(setting.width, 10, nn.functional.cross_entropy).to(memory_format=torch.channels_last)


def train(method: str, seed: int, rate: float, data: Rows, setting: Setting) -> tuple[nn.Module, dict[str, float]]:
    """One run: its model, its seconds, and how much was mixed."""
    model = network(setting, seed)
    collate = collator(method, model, setting.side, seed)
    kept = MappedRows(data, seed) if refreshed(method) else None
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=setting.epochs,
            per_device_train_batch_size=100,
            learning_rate=rate,
            optim="sgd",
            optim_args="momentum=0.9",
            weight_decay=1e-4,
            lr_scheduler_type="cosine",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=kept or data,
            data_collator=collate,
            callbacks=None if kept is None else [Refresh(kept, refreshed(method))],
        )
        start, begun = time.process_time(), time.perf_counter()
        trainer.train()
        found = {"cpu_seconds": round(time.process_time() - start, 1), "seconds": round(time.perf_counter() - begun, 1)}
    mixing = getattr(collate, "statistics", None)
    if mixing is not None:
        found |= {f"mixup_{name}": round(value, 4) for name, value in asdict(mixing).items()}
    return model.eval(), found


def part_runs(part: str, seeds: int, rates: dict[str, float]) -> Iterator[tuple[Setting, str, int, float]]:
    """Setting, method, seed and learning rate of every run of a part."""
    base = Setting()
    if part == "tune":
        yield from ((base, method, 0, rate) for rate in RATES for method in TABLE)
    if part == "tune few":
        yield from ((FEW, method, 0, rate) for rate in RATES for method in TABLE[:5])
    named: dict[str, list[tuple[Setting, str]]] = {
        "table": [(base, method) for method in TABLE],
        "saliency": [(base, method) for method in (*SALIENCY, EVERY.format(2))],
        "why": [(STUDIED, method) for method in ("comixup + clean", *(f"comixup, {change}" for change in WHY))],
        "curve": [(setting, method) for setting in CURVE.values() for method in CURVED],
        "few": [(FEW, method) for method in TABLE[:5]],
    }
    for seed in range(seeds):
        for setting, method in named.get(part, []):
            yield setting, method, seed, CURVE_RATE if part == "curve" else rate_of(method, rates)


def rate_of(method: str, rates: dict[str, float]) -> float:
    """The method's learning rate, or that of the one it is a change of."""
    if method.startswith("comixup"):
        return rates.get(method, rates.get("comixup + clean", 0.1))
    return rates.get(method, rates.get(method.removesuffix(" + clean").split(",")[0], 0.1))


def best_rates(runs: list[dict[str, Any]], setting: Setting | None = None) -> dict[str, float]:
    """Of every method the learning rate with the best accuracy, in this setting, on the rows kept for that."""
    where = asdict(setting or Setting())
    tried = [run for run in runs if run["setting"] == where and run["seed"] == 0 and run["method"] in TABLE]
    tried.sort(key=lambda run: run["validation_accuracy"])
    return {run["method"]: run["rate"] for run in tried}


def paired(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> str | None:
    """Mean difference of accuracy in points, with its 95 % interval over pairs of the same seed."""
    before = {run["seed"]: run["accuracy"] for run in others}
    found = [100 * (run["accuracy"] - before[run["seed"]]) for run in runs if run["seed"] in before]
    if len(found) < 2:
        return f"{found[0]:+.1f}" if found else None
    half = student.ppf(0.975, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return f"{statistics.mean(found):+.1f} +- {half:.1f}"


def table(
    runs: list[dict[str, Any]], rates: Callable[[Setting], dict[str, float]] | None = None
) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every setting, method and learning rate, and distances to three peers.

    `rates` says the methods' best rates for a setting; by default those tried in it.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((*run["setting"].values(), run["method"], run["rate"]), []).append(run)
    lines = []
    for (*setting, method, rate), group in groups.items():
        where = Setting(**group[0]["setting"])
        best = rates(where) if rates else best_rates(runs, where)
        line: dict[str, Any] = {**group[0]["setting"], "method": method, "rate": rate, "seeds": len(group)}
        for key in FIGURES:
            values = [run[key] for run in group if key in run]
            line[key] = round(statistics.mean(values), 4) if values else None
            line[f"{key} sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
        for peer in ("plain", "input mixup", "cutmix"):
            others = groups.get((*setting, peer, rate_of(peer, best)), [])
            line[f"over {peer}"] = paired(group, others) if peer != method else None
        lines.append(line)
    return lines


class Kept:
    """The runs so far, in the results' file."""

    def __init__(self, name: str, again: bool) -> None:
        path = RESULTS / f"{name}.json"
        self.name, self.runs = name, list(json.loads(path.read_text())["runs"]) if path.exists() and not again else []
        for run in self.runs:  # older ones name no network
            run["setting"] = asdict(Setting(**run["setting"]))

    def has(self, about: dict[str, Any]) -> bool:
        """Whether this run was done."""
        return any(about.items() <= run.items() for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run."""
        self.runs.append({name: round(value, 5) if isinstance(value, float) else value for name, value in run.items()})
        write(self.name, table(self.runs), quiet=True, runs=self.runs)


def figures(setting: Setting, method: str, seed: int, rate: float, asked: int) -> dict[str, Any]:
    """Train, and measure on so many rows; as many others choose."""
    data = rows(setting.images, setting.side)
    test, choice = (unseen(start, start + asked, setting.side) for start in (10_000, 15_000))
    model, found = train(method, seed, rate, data, setting)
    validation = (logits_of(model, choice.images).argmax(1) == choice.labels).float().mean()
    seen = (logits_of(model, data.images).argmax(1) == data.labels).float().mean()
    found |= {"validation_accuracy": float(validation), "train_accuracy": float(seen)}
    return {**found, **measure(model, test)}


def run_all(setting_runs: Iterator[tuple[Setting, str, int, float]], kept: Kept, smoke: bool) -> None:
    """Train and measure whatever is not kept yet."""
    for setting, method, seed, rate in setting_runs:
        about = {"setting": asdict(setting), "method": method, "seed": seed, "rate": rate}
        if kept.has(about):
            continue
        kept.add({**about, **figures(setting, method, seed, rate, 200 if smoke else 5_000)})
        print(
            {name: kept.runs[-1][name] for name in (*about, "validation_accuracy", "accuracy", "cpu_seconds")},
            flush=True,
        )


def main() -> None:
    """Run what is missing of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="200 images, 2 epochs, one seed")
    parser.add_argument("--part", choices=PARTS, help="default: all of them")
    parser.add_argument("--methods", help="these of the part's methods only; semicolons between")
    parser.add_argument("--points", help=f"these of the curve only; semicolons between: {', '.join(CURVE)}")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept("mixup_accuracy_smoke" if args.smoke else "mixup_accuracy", again=args.smoke)
    try:
        cifar10(0, 10)
    except DataMissingError as error:
        print(f"skipped: {error}")
        return
    for part in [args.part] if args.part else PARTS:
        rates = best_rates(kept.runs, FEW if part == "few" else None)
        runs = part_runs(part, 1 if args.smoke else args.seeds, rates)
        chosen = (run for run in runs if args.methods is None or run[1] in args.methods.split(";"))
        if args.points is not None and part == "curve":
            points = [CURVE[name] for name in args.points.split(";")]
            chosen = (run for run in chosen if run[0] in points)
        if args.smoke and part not in ("table", "saliency"):
            continue
        if args.smoke:
            small = Setting(images=200, width=8, epochs=2)
            chosen = ((small, method, seed, rate) for _, method, seed, rate in chosen)
        run_all(chosen, kept, args.smoke)
    show(kept.name, [{name: line[name] for name in SHOWN} for line in table(kept.runs)])


if __name__ == "__main__":
    main()
