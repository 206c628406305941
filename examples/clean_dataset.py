"""Find the wrong labels of a dataset, look at the reasons, drop them.

python examples/clean_dataset.py                                                    # digits with 10 % flipped labels
python examples/clean_dataset.py --dataset cifar10 --model me/vit-cifar10 --column img
python examples/clean_dataset.py --smoke

Without --dataset the labels of scikit-learn's digits are flipped and a small network is trained on them, so that what is
found can be compared with what was flipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image, load_dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from hf_dataopt import FeatureExtractor, RelationCleaner
from hf_dataopt.metrics import detection_metrics


def flipped_digits(rows: int, seed: int) -> tuple[Dataset, np.ndarray]:
    """Digits with 10 % random labels, and the true labels."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))[:rows]
    truth = digits.target[order]
    labels = np.where(rng.random(len(order)) < 0.1, rng.integers(0, 10, len(order)), truth)
    pictures = (digits.images[order] * 15.9).astype(np.uint8)
    features = Features(
        image=Image(),
        pixel_values=Array3D((1, 8, 8), "float32"),
        label=ClassLabel(names=[str(k) for k in range(10)]),
    )
    columns = {"image": list(pictures), "pixel_values": list(pictures[:, None] / np.float32(255)), "label": labels}
    return Dataset.from_dict(columns, features=features), truth


def train(data: Dataset, epochs: int, seed: int, folder: Path) -> Any:
    """A small ResNet, trained with a stock Trainer on the noisy labels."""
    torch.manual_seed(seed)
    config = ResNetConfig(num_channels=1, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    config.num_labels = 10
    model = ResNetForImageClassification(config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=5e-3,
        seed=seed,
        save_strategy="no",
        report_to=[],
    )
    Trainer(model=model, args=arguments, train_dataset=data.select_columns(["pixel_values", "label"])).train()
    return model


def main() -> None:
    """Features, graph, reasons, cleaned set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="Hub name; default: digits with flipped labels")
    parser.add_argument("--model", help="classifier that was trained on it")
    parser.add_argument("--column", default="image")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--output-dir", default="clean_output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    out = Path(args.output_dir)
    truth = None
    if args.dataset:
        dataset = load_dataset(args.dataset, split="train")
        extractor = FeatureExtractor(args.model, column=args.column)
    else:
        dataset, truth = flipped_digits(400 if args.smoke else 1_797, args.seed)
        model = train(dataset, 12 if args.smoke else 8, args.seed, out)
        extractor = FeatureExtractor(model, column="pixel_values")

    dataset = dataset.map(extractor, batched=True)
    report = RelationCleaner(temperature=4).fit(dataset, label_column=args.label_column, output_dir=out / "report")
    dataset = dataset.map(report.annotate, batched=True, with_indices=True)
    clean = report.filter(dataset)
    print(f"{len(dataset)} rows, {int(report.is_label_error.sum())} flagged, {len(clean)} kept")
    if truth is not None:
        wrong = np.asarray(dataset[args.label_column]) != truth
        print("against the flips:", detection_metrics(wrong, report.label_noise_score))

    worst = int(report.worst(1)[0])
    evidence = report.evidence(worst, 3)
    names = report.label_names
    print(f"row {worst} is labelled {names[evidence.label]!r}; the most similar rows with another label:")
    for row, label, relation in zip(
        evidence.conflicting, evidence.conflicting_labels, evidence.conflicting_relations, strict=True
    ):
        print(f"  row {row}: {names[label]!r}, relation {relation:+.2f}")
    report.relation_map(worst).savefig(out / f"row_{worst}.png")
    stricter = report.rethreshold(noise_rate=0.05)  # another cut costs nothing
    print(f"with 5 % expected noise {int(stricter.is_label_error.sum())} rows are flagged")
    clean.save_to_disk(out / "clean")
    print(f"written to {out}: clean/, report/, row_{worst}.png")


if __name__ == "__main__":
    main()
