"""What mixing is worth: plain, input mixup, CutMix, Puzzle Mix and Co-Mixup with a stock Trainer on CIFAR-10.

    python benchmarks/mixup_accuracy.py [--smoke] [--methods plain,puzzle] [--seeds 3]

2,000 class-balanced images out of training rows 0-9,999; tested on rows 10,000-14,999 (unseen). A Hugging Face
ResNet of the size of ResNet-8 (width 16, 78 k parameters), 60 epochs, SGD 0.1 momentum 0.9, cosine, batch 100, horizontal
flips. "comixup + clean" adds the loss of the unmixed batch (weight 1), as the reference code trains CIFAR-100.
Input mixup and CutMix are timm's, alpha 1. Every finished run is kept in benchmarks/.data/, so a killed benchmark
goes on. Wall time is that of `Trainer.train`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _report import DATA, write
from data import DataMissingError, cifar10
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from hf_dataopt import seeding
from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.collators import DataCollatorForCoMixup, DataCollatorForPuzzleMix
from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.loss import soft_target_loss

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
METHODS = ("plain", "input mixup", "cutmix", "puzzle", "comixup", "comixup + clean")
TRAIN, TEST = 2_000, 5_000


class Rows(torch.utils.data.Dataset):
    """Normalised images and integer labels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        self.images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.images[row], "labels": int(self.labels[row])}


def rows(train: int, test: int) -> tuple[Rows, Rows]:
    """A class-balanced training set and a test set."""
    pixels, labels = cifar10(0, 10_000)
    keep = np.concatenate([np.flatnonzero(labels == k)[: train // 10] for k in range(10)])
    return Rows(pixels[keep], labels[keep]), Rows(*cifar10(10_000, 10_000 + test))


def resnet8(seed: int) -> nn.Module:
    """HF ResNet with a 3 x 3 stem of stride 1 and three stages of one basic block."""
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    config.num_labels = 10
    model = ResNetForImageClassification(config)
    stem = model.resnet.embedder
    stem.embedder.convolution = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    stem.pooler = nn.Identity()
    return model


def flipping(seed: int) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
    """Collates rows, half of the images mirrored."""
    draws = seeding.generator(seed, epoch=7)

    def collate(features: list[Any]) -> dict[str, torch.Tensor]:
        images = torch.stack([row["pixel_values"] for row in features])
        mirrored = torch.rand(len(images), generator=draws) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return {"pixel_values": images, "labels": torch.tensor([row["labels"] for row in features])}

    return collate


def collator(method: str, model: nn.Module, seed: int) -> tuple[Any, Any]:
    """The data collator of a method, and its loss function where the stock one does not do."""
    collate = flipping(seed)
    if method == "plain":
        return collate, None
    if method in ("input mixup", "cutmix"):
        from timm.data import Mixup

        alphas = {"mixup_alpha": 1.0} if method == "input mixup" else {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}
        mixup = Mixup(**alphas, label_smoothing=0.0, num_classes=10)
        np.random.seed(seed)  # noqa: NPY002 - timm draws from the global stream

        def mixed(features: list[Any]) -> dict[str, torch.Tensor]:
            batch = collate(features)
            images, targets = mixup(batch["pixel_values"], batch["labels"])
            return {"pixel_values": images, "labels": targets}

        return mixed, soft_target_loss
    if method == "puzzle":
        config = PuzzleMixConfig.cifar100(image_mean=MEAN, image_std=STD)
        return DataCollatorForPuzzleMix(model, config, collate_fn=collate, seed=seed), None
    clean = 1.0 if method == "comixup + clean" else 0.0
    options = {"mean": MEAN, "std": STD, "collate_fn": collate, "seed": seed, "clean_weight": clean}
    return DataCollatorForCoMixup(model, CoMixupConfig.cifar100(), **options), None


def train(method: str, seed: int, data: Rows, epochs: int) -> tuple[nn.Module, float]:
    """One run, and its seconds."""
    model = resnet8(seed)
    collate, loss = collator(method, model, seed)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
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
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate, compute_loss_func=loss)
        start = time.perf_counter()
        trainer.train()
        taken = time.perf_counter() - start
    if hasattr(collate, "remove"):
        collate.remove()
    return model.eval(), taken


def measure(model: nn.Module, data: Rows) -> dict[str, float]:
    """Accuracy, NLL, expected calibration error (15 bins), error after FGSM of 4/255."""
    logits, attacked = [], []
    device = next(model.parameters()).device
    step = 4 / 255 / torch.tensor(STD, device=device)[:, None, None]
    for start in range(0, len(data), 250):
        images = data.images[start : start + 250].to(device).requires_grad_()
        labels = data.labels[start : start + 250].to(device)
        out = model(pixel_values=images).logits
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(out, labels), images)
        with torch.no_grad():
            attacked.append(model(pixel_values=images + step * grad.sign()).logits.argmax(1).cpu())
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


def main() -> None:
    """Run what is missing, write `results/mixup_accuracy.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="200 images, 2 epochs, one seed, no file kept")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    epochs, seeds, sizes = (2, 1, (200, 500)) if args.smoke else (args.epochs, args.seeds, (TRAIN, TEST))
    try:
        data, test = rows(*sizes)
    except DataMissingError as error:
        print(f"skipped: {error}")
        return
    kept = DATA / f"mixup_accuracy_{epochs}.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() and not args.smoke else []
    for seed in range(seeds):
        for method in args.methods.split(","):
            if any((run["method"], run["seed"]) == (method, seed) for run in done):
                continue
            model, seconds = train(method, seed, data, epochs)
            run = {"method": method, "seed": seed, "seconds": seconds, **measure(model, test)}
            done.append(run)
            print(run, flush=True)
            if not args.smoke:
                with kept.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    table = []
    for method in METHODS:
        runs = [run for run in done if run["method"] == method]
        if not runs:
            continue
        line: dict[str, Any] = {"method": method, "seeds": len(runs)}
        for key in ("accuracy", "nll", "ece", "fgsm_error", "seconds"):
            values = [run[key] for run in runs]
            line[key] = round(statistics.mean(values), 4)
            line[f"{key} spread"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
        table.append(line)
    name = "mixup_accuracy_smoke" if args.smoke else "mixup_accuracy"
    write(name, table, runs=done, n=len(data), test=len(test), epochs=epochs, model="HF ResNet-8, width 16")


if __name__ == "__main__":
    main()
