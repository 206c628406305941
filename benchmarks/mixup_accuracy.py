"""What mixing is worth: plain, input mixup, CutMix, Puzzle Mix and Co-Mixup with a stock Trainer on CIFAR-10.

    python benchmarks/mixup_accuracy.py                   # every part, an hour and a half on one core; stops and goes on
    python benchmarks/mixup_accuracy.py --part table      # one of: tune, table, saliency, why, curve
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
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from _report import RESULTS, show, write
from data import DataMissingError, cifar10
from scipy.stats import t as student
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from hf_dataopt import (
    CoMixupConfig,
    DataCollatorForCoMixup,
    DataCollatorForMixup,
    DataCollatorForPuzzleMix,
    MixupSchedule,
    PuzzleMixConfig,
    seeding,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
TABLE = (
    *("plain", "input mixup", "cutmix", "puzzle", "comixup + clean"),
    *("comixup", "input mixup + clean", "cutmix + clean", "puzzle + clean"),
)
CURVED = ("plain", "input mixup", "puzzle", "comixup + clean")
SALIENCY = {
    "puzzle, half-size saliency": 0.5,
    "puzzle, 3/4-size saliency": 0.75,
    "puzzle, half of the steps cutmix": 1.0,
}
NOISE = "noise for saliency"  # the same solver on maps that say nothing, so that other parts win every time
WHY: dict[str, dict[str, Any]] = {  # changes of Co-Mixup's preset, one at a time
    NOISE: {},
    "eta x 8": {"eta": 0.4},
    "2x2 cells": {"grid": 2},
    "clean weight 0.25": {"clean_weight": 0.25},
}
RATES = (0.1, 0.3, 1.0)
PARTS = ("tune", "table", "saliency", "why", "curve")
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
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Size of the experiment."""

    images: int = 2_000
    side: int = 16
    width: int = 16
    epochs: int = 30


STUDIED = Setting(images=1_000)
CURVE = {
    **{f"{images} images": Setting(images=images) for images in (500, 1_000, 2_000, 5_000)},
    **{f"{epochs} epochs": Setting(epochs=epochs) for epochs in (15, 60, 120)},
    **{f"width {width}": Setting(width=width) for width in (8, 32)},
}
CURVE_RATE = 0.3  # one for all points and methods


class Rows(torch.utils.data.Dataset):
    """Normalised images and integer labels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, side: int, scale: Any = (MEAN, STD)) -> None:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        images = nn.functional.interpolate(images, size=(side, side), mode="area")
        mean, std = (torch.tensor(value)[:, None, None] for value in scale)
        self.images = (images - mean) / std
        self.labels = torch.from_numpy(labels)

    def first(self, rows: int) -> Rows:
        """The first rows."""
        few = copy(self)
        few.images, few.labels = self.images[:rows], self.labels[:rows]
        return few

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.images[row], "labels": int(self.labels[row])}


def rows(images: int, side: int) -> Rows:
    """A class-balanced training set."""
    pixels, labels = cifar10(0, 10_000)
    keep = np.concatenate([np.flatnonzero(labels == k)[: images // 10] for k in range(10)])
    return Rows(pixels[keep], labels[keep], side)


def resnet8(width: int, seed: int) -> nn.Module:
    """HF ResNet with a 3 x 3 stem of stride 1 and three stages of one basic block."""
    torch.manual_seed(seed)
    sizes = [width, 2 * width, 4 * width]
    config = ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[1, 1, 1], layer_type="basic")
    config.num_labels = 10
    model = ResNetForImageClassification(config)
    stem = model.resnet.embedder
    stem.embedder.convolution = nn.Conv2d(3, width, 3, padding=1, bias=False)
    stem.pooler = nn.Identity()
    return model.to(memory_format=torch.channels_last)  # a third faster on a CPU


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
        return nn.functional.interpolate(cells, size=images.shape[2:])[:, 0]

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
    if name.startswith("puzzle"):
        return DataCollatorForPuzzleMix(model, puzzle, saliency_scale=SALIENCY.get(name, 1.0), **options)
    schedule = MixupSchedule(probabilities={"mixup" if name == "input mixup" else name: 1.0}, clean_weight=clean)
    return DataCollatorForMixup(model, schedule, **options)


def train(method: str, seed: int, rate: float, data: Rows, setting: Setting) -> tuple[nn.Module, dict[str, float]]:
    """One run: its model, its CPU seconds, and how much was mixed."""
    model = resnet8(setting.width, seed)
    collate = collator(method, model, setting.side, seed)
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
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
        start = time.process_time()
        trainer.train()
        found = {"cpu_seconds": round(time.process_time() - start, 1)}
    mixing = getattr(collate, "statistics", None)
    if mixing is not None:
        found |= {f"mixup_{name}": round(value, 4) for name, value in asdict(mixing).items()}
    return model.eval(), found


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(n, classes), without gradients."""
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [model(pixel_values=part.to(device))["logits"].float().cpu() for part in images.split(250)]
    return torch.cat(parts)


def attacked(model: nn.Module, data: Rows, radius: Tensor, steps: int) -> Tensor:
    """Images moved `steps` times along the sign of the gradient, never further than `radius` (C, 1, 1).

    In one step by all of it (FGSM), in each of several by a quarter (PGD).
    """
    device = next(model.parameters()).device
    radius, moved = radius.to(device), []
    for start, labels in zip(data.images.to(device).split(250), data.labels.to(device).split(250), strict=True):
        now = start
        for _ in range(steps):
            leaf = now.clone().requires_grad_()
            (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(pixel_values=leaf)["logits"], labels), leaf)
            now = now + radius * (1 if steps == 1 else 0.25) * grad.sign()
            now = torch.minimum(torch.maximum(now, start - radius), start + radius)
        moved.append(now)
    return torch.cat(moved)


def borders(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images with another image's border, and with noise of a standard deviation of the pixels added to their own."""
    edge = images.shape[-1] // 8
    inner = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inner[edge:-edge, edge:-edge] = True
    generator = seeding.generator(0, epoch=3)
    other = images[torch.randperm(len(images), generator=generator)]
    noise = images + torch.randn(images.shape, generator=generator)
    return torch.where(inner, images, other), torch.where(inner, images, noise)


def measure(model: nn.Module, data: Rows, std: tuple[float, ...] = STD) -> dict[str, float]:
    """Accuracy, NLL, expected calibration error (15 bins), errors under FGSM and PGD (10 steps, first 1,000 rows) of 1/255, and
    with corrupted borders."""
    found, labels = logits_of(model, data.images), data.labels
    confidence, guess = found.softmax(1).max(1)
    right = (guess == labels).float()
    bins = (confidence * 15).long().clamp(max=14)
    ece = sum(float((confidence[bins == b] - right[bins == b]).sum().abs()) for b in range(15)) / len(labels)
    radius = 1 / 255 / torch.tensor(std)[:, None, None]
    few = data.first(1_000)
    other, noisy = borders(data.images)

    def error(images: Tensor) -> float:
        return float((logits_of(model, images).argmax(1) != labels[: len(images)]).float().mean())

    return {
        "accuracy": float(right.mean()),
        "nll": float(nn.functional.cross_entropy(found, labels)),
        "ece": ece,
        "fgsm_error": error(attacked(model, data, radius, 1)),
        "pgd_error": error(attacked(model, few, radius, 10)),
        "other_border_error": error(other),
        "noisy_border_error": error(noisy),
    }


def part_runs(part: str, seeds: int, rates: dict[str, float]) -> Iterator[tuple[Setting, str, int, float]]:
    """Setting, method, seed and learning rate of every run of a part."""
    base = Setting()
    if part == "tune":
        yield from ((base, method, 0, rate) for rate in RATES for method in TABLE)
    named: dict[str, list[tuple[Setting, str]]] = {
        "table": [(base, method) for method in TABLE],
        "saliency": [(base, method) for method in SALIENCY],
        "why": [(STUDIED, method) for method in ("comixup + clean", *(f"comixup, {change}" for change in WHY))],
        "curve": [(setting, method) for setting in CURVE.values() for method in CURVED],
    }
    for seed in range(seeds):
        for setting, method in named.get(part, []):
            yield setting, method, seed, CURVE_RATE if part == "curve" else rate_of(method, rates)


def rate_of(method: str, rates: dict[str, float]) -> float:
    """The method's learning rate, or that of the one it is a change of."""
    if method.startswith("comixup"):
        return rates.get(method, rates.get("comixup + clean", 0.1))
    return rates.get(method, rates.get(method.removesuffix(" + clean").split(",")[0], 0.1))


def best_rates(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of every method the learning rate with the best accuracy on the rows kept for that."""
    tried = [run for run in runs if run["setting"] == asdict(Setting()) and run["seed"] == 0 and run["method"] in TABLE]
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


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every setting, method and learning rate, and distances to three peers."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((*run["setting"].values(), run["method"], run["rate"]), []).append(run)
    rates, lines = best_rates(runs), []
    for (*setting, method, rate), group in groups.items():
        line: dict[str, Any] = {**group[0]["setting"], "method": method, "rate": rate, "seeds": len(group)}
        for key in FIGURES:
            values = [run[key] for run in group if key in run]
            line[key] = round(statistics.mean(values), 4) if values else None
            line[f"{key} sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
        for peer in ("plain", "input mixup", "cutmix"):
            others = groups.get((*setting, peer, rate_of(peer, rates)), [])
            line[f"over {peer}"] = paired(group, others) if peer != method else None
        lines.append(line)
    return lines


class Kept:
    """The runs so far, in the results' file."""

    def __init__(self, name: str, again: bool) -> None:
        path = RESULTS / f"{name}.json"
        self.name, self.runs = name, list(json.loads(path.read_text())["runs"]) if path.exists() and not again else []

    def has(self, about: dict[str, Any]) -> bool:
        """Whether this run was done."""
        return any(about.items() <= run.items() for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run."""
        self.runs.append({name: round(value, 5) if isinstance(value, float) else value for name, value in run.items()})
        write(self.name, table(self.runs), quiet=True, runs=self.runs)


def run_all(setting_runs: Iterator[tuple[Setting, str, int, float]], kept: Kept, smoke: bool) -> None:
    """Train and measure whatever is not kept yet."""
    rows_of_test, rows_of_choice = (
        ((10_000, 10_200), (15_000, 15_200)) if smoke else ((10_000, 15_000), (15_000, 20_000))
    )
    for setting, method, seed, rate in setting_runs:
        about = {"setting": asdict(setting), "method": method, "seed": seed, "rate": rate}
        if kept.has(about):
            continue
        data = rows(setting.images, setting.side)
        test, choice = (Rows(*cifar10(*part), setting.side) for part in (rows_of_test, rows_of_choice))
        model, found = train(method, seed, rate, data, setting)
        validation = (logits_of(model, choice.images).argmax(1) == choice.labels).float().mean()
        seen = (logits_of(model, data.images).argmax(1) == data.labels).float().mean()
        found |= {"validation_accuracy": float(validation), "train_accuracy": float(seen)}
        kept.add({**about, **found, **measure(model, test)})
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
        runs = part_runs(part, 1 if args.smoke else args.seeds, best_rates(kept.runs))
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
