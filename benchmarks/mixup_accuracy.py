"""What mixing does to a classifier: CIFAR-10, plain, input mixup, CutMix (both timm), Puzzle Mix, Co-Mixup.

python benchmarks/mixup_accuracy.py                            # 2,000 training images, 60 epochs, 3 seeds; hours on a CPU
python benchmarks/mixup_accuracy.py --methods plain puzzle     # some of it: finished runs are kept and reused
python benchmarks/mixup_accuracy.py --smoke                    # digits, seconds: that it runs

Every method trains the same HF ResNet by the same stock Trainer from the same seeds, with flips and shifted crops; the
Trainer's own evaluation is plain. Accuracy, negative log-likelihood, expected calibration error (15 bins) and the error
under FGSM (8/255) are of the last epoch, on held-out images; nothing is tuned on them.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _report
import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from hf_dataopt import (
    CoMixupConfig,
    DataCollatorForCoMixup,
    DataCollatorForPuzzleMix,
    PuzzleMixConfig,
    soft_target_loss,
)
from hf_dataopt.saliency import input_gradient

METHODS = ("plain", "input", "cutmix", "puzzle", "co")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FGSM = 8 / 255


class Images(torch.utils.data.Dataset):
    """Normalised images; training ones are flipped and shifted by up to 4 pixels, by torch's seeded random numbers."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, augment: bool) -> None:
        mean, std = (np.array(value, np.float32) for value in (MEAN, STD))
        self.images = torch.from_numpy((images / np.float32(255) - mean) / std).permute(0, 3, 1, 2).float()
        self.labels, self.augment = labels.tolist(), augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        if self.augment:
            image = image.flip(-1) if torch.rand(()) < 0.5 else image
            top, left = torch.randint(0, 9, (2,)).tolist()
            padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
            image = padded[:, top : top + 32, left : left + 32]
        return {"pixel_values": image, "labels": self.labels[index]}


def data(smoke: bool, n_train: int, n_test: int) -> tuple[Images, Images]:
    """Training and held-out images; digits (in three equal channels) where it is a smoke run."""
    if smoke:
        from sklearn.datasets import load_digits

        found = load_digits()
        images = np.kron(found.images * 15.9, np.ones((4, 4)))[..., None].repeat(3, -1)
        return Images(images[:100], found.target[:100], True), Images(images[100:200], found.target[100:200], False)
    from data import cifar10

    images, labels = cifar10(0, n_train + n_test)
    return Images(images[:n_train], labels[:n_train], True), Images(images[n_train:], labels[n_train:], False)


def network(smoke: bool) -> Any:
    """ResNet-8 of CIFAR size: a stride-1 stem without pooling would need another model, so the first stage keeps its size."""
    sizes: dict[str, Any] = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1]}
    if smoke:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=10, **sizes))
    stem = model.resnet.embedder
    stem.embedder.convolution = torch.nn.Conv2d(3, sizes["embedding_size"], 3, padding=1, bias=False)
    stem.pooler = torch.nn.Identity()
    return model


def trainer(method: str, model: Any, train: Images, args: argparse.Namespace, seed: int, folder: str) -> Trainer:
    """A stock Trainer; timm's mixups come as collators with the package's soft-label loss."""
    settings = TrainingArguments(
        output_dir=folder,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        optim="sgd",
        optim_args="momentum=0.9,nesterov=True",
        learning_rate=args.learning_rate,
        weight_decay=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        bf16=args.bf16,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    collator: Callable[..., Any] | None = None
    loss = None
    if method in ("input", "cutmix"):
        alphas = {"mixup_alpha": 1.0} if method == "input" else {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}
        collator, loss = (
            functools.partial(timm_mixed, Mixup(**alphas, label_smoothing=0.0, num_classes=10)),
            soft_target_loss,
        )
    elif method == "puzzle":
        config = PuzzleMixConfig.cifar100(image_mean=MEAN, image_std=STD)
        collator = DataCollatorForPuzzleMix(model, config, seed=seed)
    elif method == "co":
        collator = DataCollatorForCoMixup(model, CoMixupConfig.cifar100(), clean_weight=args.co_clean_weight, seed=seed)
    return Trainer(model=model, args=settings, train_dataset=train, data_collator=collator, compute_loss_func=loss)


def timm_mixed(mixup: Mixup, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch mixed by timm."""
    images = torch.stack([row["pixel_values"] for row in rows])
    images, targets = mixup(images, torch.tensor([row["labels"] for row in rows]))
    return {"pixel_values": images, "labels": targets}


def measured(model: Any, test: Images) -> dict[str, float]:
    """Accuracy, NLL, ECE and FGSM error in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    std = torch.tensor(STD, device=device)[:, None, None]
    low, high = ((value - torch.tensor(MEAN, device=device)[:, None, None]) / std for value in (0.0, 1.0))
    logits, attacked = [], []
    labels = torch.tensor(test.labels)
    for start in range(0, len(test), 250):
        images, known = test.images[start : start + 250].to(device), labels[start : start + 250].to(device)
        step = FGSM / std * input_gradient(model, {"pixel_values": images}, known).sign()
        with torch.no_grad():
            logits.append(model(pixel_values=images).logits.float().cpu())
            attacked.append(model(pixel_values=(images + step).clamp(low, high)).logits.float().cpu())
    probs = torch.cat(logits).softmax(1)
    top, guess = probs.max(1)
    right = (guess == labels).float()
    bins = (top * 15).long().clamp(max=14)
    sums = [torch.zeros(15).scatter_add_(0, bins, value) for value in (right, top)]
    return {
        "accuracy": float(right.mean()),
        "nll": float(torch.nn.functional.cross_entropy(torch.cat(logits), labels)),
        "ece": float((sums[0] - sums[1]).abs().sum() / len(labels)),
        "fgsm_error": float((torch.cat(attacked).argmax(1) != labels).float().mean()),
    }


def run(method: str, seed: int, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """One training, or its stored figures."""
    settings = {key: value for key, value in vars(args).items() if key not in ("methods", "seeds")}
    key = {"method": method, "seed": seed, **settings}
    path = cache / f"{method}_{seed}.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found["key"] == key:
            return found
    set_seed(seed)
    train, test = data(args.smoke, args.train, args.test)
    model = network(args.smoke)
    with tempfile.TemporaryDirectory() as folder:
        training = trainer(method, model, train, args, seed, folder)
        start = time.perf_counter()
        training.train()
        seconds = time.perf_counter() - start
    if hasattr(training.data_collator, "remove"):
        training.data_collator.remove()
    found = {"key": key, **measured(model, test), "seconds": seconds}
    cache.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    print(f"{method}, seed {seed}: accuracy {found['accuracy']:.4f} in {seconds:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=2_000, help="training images (at most 40,000 with --test)")
    parser.add_argument("--test", type=int, default=5_000, help="held-out images, after the training ones")
    parser.add_argument("--epochs", type=float, default=60)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--co-clean-weight", type=float, default=1.0, help="Co-Mixup's clean loss (reference code: 1)")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--smoke", action="store_true", help="digits, one epoch, a smaller network")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.batch_size, args.seeds = 1, 20, args.seeds[:2]
    torch.set_num_threads(1)
    cache = _report.DATA / ("mixup_accuracy_smoke" if args.smoke else f"mixup_accuracy_{args.train}_{args.epochs:g}")
    rows = []
    for method in args.methods:
        runs = [run(method, seed, args, cache) for seed in args.seeds]
        row: dict[str, Any] = {"method": method, "seeds": len(runs)}
        for name in ("accuracy", "nll", "ece", "fgsm_error"):
            values = [found[name] for found in runs]
            row[name], row[f"{name}_std"] = float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))
        rows.append({**row, "seconds": float(np.mean([found["seconds"] for found in runs]))})
    if args.smoke:
        _report.show("mixup_accuracy (smoke)", rows)
    else:
        _report.write("mixup_accuracy", rows, settings={k: v for k, v in vars(args).items() if k != "methods"})


if __name__ == "__main__":
    main()
