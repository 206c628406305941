"""The authors' recipe on a GPU: CIFAR-100, PreActResNet18, 300 epochs; plain, input mixup, CutMix, Puzzle Mix, Co-Mixup.

    python benchmarks/mixup_authors.py --methods "plain;comixup" --seeds 1     # hours a run on one GPU; stops and goes on
    python benchmarks/mixup_authors.py --smoke                                 # noise, a narrow network, seconds on a CPU

Batch 100, SGD 0.2 with Nesterov momentum 0.9, weight decay 1e-4, learning rate times 0.1 after a third and two thirds of the
epochs, random crops out of a border of 2 pixels, flips. The loss is theirs: binary cross entropy of the softmax, and for
Co-Mixup a clean cross entropy of weight 2 / classes. Images come from the Hub. Not run for the tables here, which are made on
a CPU; the authors' log of Co-Mixup ends at 80.19 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import DATA, show, write
from mixup_measure import measure
from mixup_networks import PreActResNet18
from mixup_rows import Rows
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
from hf_dataopt.mixup.loss import soft_cross_entropy, softmax_binary_cross_entropy

CLASSES = 100
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
METHODS = ("plain", "input mixup", "cutmix", "puzzle", "comixup")


def cifar100(split: str, smoke: bool) -> Rows:
    """Normalised images and labels of a split."""
    if smoke:
        random = np.random.default_rng(0)
        pixels, labels = random.integers(256, size=(60, 32, 32, 3), dtype=np.uint8), random.integers(CLASSES, size=60)
    else:
        from datasets import load_dataset

        found = load_dataset("uoft-cs/cifar100", split=split)
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in found["img"]])
        labels = np.asarray(found["fine_label"])
    return Rows(pixels, labels, 32, (MEAN, STD))


def cropped(seed: int) -> Any:
    """Collates rows: 2 pixels of border, a random crop, half of the images mirrored."""
    draws = seeding.generator(seed, epoch=7)

    def collate(features: list[Any]) -> dict[str, Tensor]:
        images = nn.functional.pad(torch.stack([row["pixel_values"] for row in features]), (2, 2, 2, 2))
        places = torch.randint(5, (len(images), 2), generator=draws).tolist()
        images = torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(images, places, strict=True)])
        mirrored = torch.rand(len(images), generator=draws) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return {"pixel_values": images, "labels": torch.tensor([row["labels"] for row in features])}

    return collate


def collator(method: str, model: nn.Module, seed: int) -> Any:
    """The data collator of a method, with the authors' loss."""
    collate = cropped(seed)
    options: dict[str, Any] = {"collate_fn": collate, "seed": seed, "loss": softmax_binary_cross_entropy}
    known: dict[str, Any] = {"image_mean": MEAN, "image_std": STD}
    if method == "plain":
        return collate
    if method == "puzzle":
        return DataCollatorForPuzzleMix(model, PuzzleMixConfig.cifar100(**known), **options)
    if method == "comixup":
        config = CoMixupConfig.cifar100(clean_weight=2 / CLASSES, **known)
        return DataCollatorForCoMixup(model, config, clean_loss=soft_cross_entropy, **options)
    schedule = MixupSchedule(probabilities={"mixup" if method == "input mixup" else method: 1.0})
    return DataCollatorForMixup(model, schedule, **options)


def train(method: str, seed: int, data: Rows, epochs: int, folder: Path, smoke: bool) -> nn.Module:
    """One run; a folder with checkpoints of it goes on."""
    torch.manual_seed(seed)
    model = PreActResNet18(4 if smoke else 64, CLASSES, softmax_binary_cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps = epochs * -(-len(data) // 100)
    falls = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 3, 2 * steps // 3], 0.1)
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=100,
        seed=seed,
        save_strategy="no" if smoke else "steps",
        save_steps=max(1, steps // 12),
        save_total_limit=1,
        logging_steps=max(1, steps // 300),
        report_to=[],
        remove_unused_columns=False,
        max_grad_norm=0.0,
        dataloader_num_workers=0 if smoke else 4,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=collator(method, model, seed),
        optimizers=(optimizer, falls),
    )
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return model.eval()


def main() -> None:
    """Run what is missing, write `results/mixup_authors.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="noise, a narrow network, one epoch; nothing is kept")
    parser.add_argument("--methods", default=";".join(METHODS), help="names with semicolons between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=300)
    args = parser.parse_args()
    if not (args.smoke or torch.cuda.is_available()):
        print("skipped: no GPU, on which 300 epochs take hours; on this CPU they would take months")
        return
    data, test = cifar100("train", args.smoke), cifar100("test", args.smoke)
    epochs, seeds, runs = (1, 1, DATA / "smoke") if args.smoke else (args.epochs, args.seeds, DATA / "mixup_authors")
    done = []
    for seed in range(seeds):
        for method in args.methods.split(";"):
            folder = runs / f"{method.replace(' ', '_')}_{epochs}_{seed}"
            figures = folder / "figures.json"
            if args.smoke or not figures.exists():
                model = train(method, seed, data, epochs, folder, args.smoke)
                figures.write_text(json.dumps(measure(model, test, STD)))
            done.append({"method": method, "seed": seed, **json.loads(figures.read_text())})
    if args.smoke:
        show("mixup_authors (smoke)", done)
    else:
        write("mixup_authors", done, epochs=epochs, model="PreActResNet18", data="CIFAR-100")


if __name__ == "__main__":
    main()
