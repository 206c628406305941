"""What mixing is worth: plain, input mixup, CutMix, Puzzle Mix and Co-Mixup with a stock Trainer on CIFAR-10.

    python benchmarks/mixup_accuracy.py [--smoke] [--methods "plain;cutmix"] [--seeds 3]
    python benchmarks/mixup_accuracy.py --images 2000 --side 32 --width 16 --epochs 60    # four times the time

Class-balanced images out of training rows 0-9,999, averaged down to `--side` pixels; tested on rows 10,000-14,999 (unseen;
`--validate`: 15,000-16,999, for choosing a setting). A Hugging Face ResNet of the shape of ResNet-8, SGD 0.1 momentum 0.9 for
every method (not tuned for each), cosine, batch 100, horizontal flips. Every method has its preset's recipe: Co-Mixup its
clean loss of weight 1, Puzzle Mix none; input mixup and CutMix are timm's, alpha 1. Every finished run is kept in
benchmarks/.data/, so a killed benchmark goes on. Seconds are CPU seconds of `Trainer.train`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from _report import DATA, write
from data import DataMissingError, cifar10
from torch import nn
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
METHODS = ("plain", "input mixup", "cutmix", "puzzle", "puzzle, half-size saliency", "comixup")
FIGURES = ("accuracy", "nll", "ece", "fgsm_error", "train_accuracy", "mixup_largest_share", "cpu_seconds")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Size of the experiment."""

    images: int
    side: int
    width: int
    epochs: int


class Rows(torch.utils.data.Dataset):
    """Normalised images and integer labels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, side: int, scale: Any = (MEAN, STD)) -> None:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        images = nn.functional.interpolate(images, size=(side, side), mode="area")
        mean, std = (torch.tensor(value)[:, None, None] for value in scale)
        self.images = (images - mean) / std
        self.labels = torch.from_numpy(labels)

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


def collator(method: str, model: nn.Module, side: int, seed: int) -> Any:
    """The data collator of a method."""
    collate = flipping(seed)
    options: dict[str, Any] = {"collate_fn": collate, "seed": seed}
    if method == "plain":
        return collate
    if method in ("input mixup", "cutmix"):
        schedule = MixupSchedule(probabilities={"mixup" if method == "input mixup" else method: 1.0})
        return DataCollatorForMixup(model, schedule, **options)
    if method.startswith("puzzle"):
        grids = tuple(grid for grid in (2, 4, 8, 16) if 2 * grid <= side)  # cells of 2 pixels at least, as at 32
        config = PuzzleMixConfig.cifar100(grid_sizes=grids, image_mean=MEAN, image_std=STD)
        scale = 0.5 if method.endswith("half-size saliency") else 1.0
        return DataCollatorForPuzzleMix(model, config, saliency_scale=scale, **options)
    return DataCollatorForCoMixup(model, CoMixupConfig.cifar100(image_mean=MEAN, image_std=STD), **options)


def train(method: str, seed: int, data: Rows, setting: Setting) -> tuple[nn.Module, dict[str, float]]:
    """One run: its model, its CPU seconds, and how much was mixed."""
    model = resnet8(setting.width, seed)
    collate = collator(method, model, setting.side, seed)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=setting.epochs,
            per_device_train_batch_size=100,
            learning_rate=0.1,
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
        found = {"cpu_seconds": time.process_time() - start}
    mixing = getattr(collate, "statistics", None)
    if mixing is not None:
        found |= {f"mixup_{name}": value for name, value in asdict(mixing).items()}
    return model.eval(), found


def measure(model: nn.Module, data: Rows, std: tuple[float, ...] = STD) -> dict[str, float]:
    """Accuracy, NLL, expected calibration error (15 bins), error after FGSM of 4/255."""
    logits, attacked = [], []
    device = next(model.parameters()).device
    step = 4 / 255 / torch.tensor(std, device=device)[:, None, None]
    for start in range(0, len(data), 250):
        images = data.images[start : start + 250].to(device).requires_grad_()
        labels = data.labels[start : start + 250].to(device)
        out = model(pixel_values=images)["logits"]
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(out, labels), images)
        with torch.no_grad():
            attacked.append(model(pixel_values=images + step * grad.sign())["logits"].argmax(1).cpu())
        logits.append(out.detach().cpu())
    found, labels = torch.cat(logits), data.labels
    confidence, guess = found.softmax(1).max(1)
    right = (guess == labels).float()
    bins = (confidence * 15).long().clamp(max=14)
    ece = sum(float((confidence[bins == b] - right[bins == b]).sum().abs()) for b in range(15)) / len(labels)
    return {
        "accuracy": float(right.mean()),
        "nll": float(nn.functional.cross_entropy(found, labels)),
        "ece": ece,
        "fgsm_error": float((torch.cat(attacked) != labels).float().mean()),
    }


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every setting and method."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((*run["setting"].values(), run["method"]), []).append(run)
    lines = []
    for group in groups.values():
        line: dict[str, Any] = {**group[0]["setting"], "method": group[0]["method"], "seeds": len(group)}
        for key in FIGURES:
            values = [run[key] for run in group if key in run]
            line[key] = round(statistics.mean(values), 4) if values else None
            line[f"{key} sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
        lines.append(line)
    return lines


def main() -> None:
    """Run what is missing, write `results/mixup_accuracy.json` with all settings run so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="200 images, 2 epochs, one seed, no file kept")
    parser.add_argument("--methods", default=";".join(METHODS), help="names with semicolons between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--validate", action="store_true", help="test on other rows, keep nothing: to choose a setting")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(images=args.images, side=args.side, width=args.width, epochs=args.epochs)
    if args.smoke:
        setting = Setting(images=200, side=16, width=8, epochs=2)
    tested = (15_000, 17_000) if args.validate else (10_000, 10_500 if args.smoke else 15_000)
    try:
        data, test = rows(setting.images, setting.side), Rows(*cifar10(*tested), setting.side)
    except DataMissingError as error:
        print(f"skipped: {error}")
        return
    keep = not (args.smoke or args.validate)
    kept = DATA / "mixup_accuracy.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if keep and kept.exists() else []
    for seed in range(1 if args.smoke else args.seeds):
        for method in args.methods.split(";"):
            about = {"setting": asdict(setting), "method": method, "seed": seed}
            if any(about.items() <= run.items() for run in done):
                continue
            model, found = train(method, seed, data, setting)
            run = {**about, **found, **measure(model, test), "train_accuracy": measure(model, data)["accuracy"]}
            done.append(run)
            print(run, flush=True)
            if keep:
                with kept.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    write("mixup_accuracy" if keep else "mixup_accuracy_smoke", table(done), runs=done, test=len(test))


if __name__ == "__main__":
    main()
