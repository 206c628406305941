"""Train an image classifier with Puzzle Mix: a stock Trainer, and a data collator that is given the model.

python examples/puzzlemix_trainer.py                       # a small ResNet on scikit-learn's digits, plain and mixed
python examples/puzzlemix_trainer.py --adversarial 0.1     # Algorithm 2: attacked inputs at no extra pass
python examples/puzzlemix_trainer.py --model microsoft/resnet-18 --dataset cifar10 --column img --epochs 10
python examples/puzzlemix_trainer.py --smoke               # a few steps, under a minute

Integer labels in, plain batches in evaluation; `mixed.png` shows the last batch.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_dataopt import DataCollatorForPuzzleMix, PuzzleMixConfig
from hf_dataopt.mixup.plot import plot_mixup


def digits(smoke: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test rows: (1, 32, 32) images in [0, 1]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.nn.functional.interpolate(torch.from_numpy(found.images / 16).float()[:, None], size=(32, 32))
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, found.target, strict=True)]
    return rows[:300], rows[300 : 500 if smoke else None]


def small_resnet() -> Any:
    """A ResNet for digits."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    config.num_labels = 10
    return ResNetForImageClassification(config)


def from_hub(args: argparse.Namespace) -> tuple[Any, Any, Any, PuzzleMixConfig]:
    """Model, data and settings for a dataset of images on the Hub."""
    from datasets import load_dataset
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    data = load_dataset(args.dataset)
    names = data["train"].features[args.label_column].names
    processor = AutoImageProcessor.from_pretrained(args.model)
    model = AutoModelForImageClassification.from_pretrained(
        args.model, num_labels=len(names), ignore_mismatched_sizes=True
    )

    def prepare(rows: dict[str, Any]) -> dict[str, Any]:
        pixels = processor([image.convert("RGB") for image in rows[args.column]], return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"], "labels": rows[args.label_column]}

    # the data term compares pixels in [0, 1]: the collator must know how they were normalised
    config = PuzzleMixConfig(image_mean=tuple(processor.image_mean), image_std=tuple(processor.image_std))
    return model, data["train"].with_transform(prepare), data["test"].with_transform(prepare), config


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}


def train(args: argparse.Namespace, mixed: bool, folder: str) -> float:
    """Accuracy after training, with or without the collator."""
    set_seed(args.seed)
    if args.dataset:
        model, rows, test, config = from_hub(args)
    else:
        model, (rows, test), config = small_resnet(), digits(args.smoke), PuzzleMixConfig.cifar100()
    if args.adversarial:
        config = config.adversarial(probability=args.adversarial)
    collator = DataCollatorForPuzzleMix(model, config, seed=args.seed) if mixed else None
    if collator is not None:
        collator.keep_result = True
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            num_train_epochs=args.epochs,
            max_steps=10 if args.smoke else -1,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=128,
            learning_rate=args.learning_rate,
            eval_strategy="epoch",
            remove_unused_columns=False,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=args.smoke,
        ),
        train_dataset=rows,
        eval_dataset=test,
        data_collator=collator,
        compute_metrics=accuracy,
    )
    trainer.train()
    if collator is not None and collator.last_result is not None and collator.last_inputs is not None:
        print(collator.statistics)
        plot_mixup(collator.last_result, collator.last_inputs, config).savefig(args.picture)
    return trainer.evaluate()["eval_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="microsoft/resnet-18", help="with --dataset: image classifier to fine-tune")
    parser.add_argument("--dataset", default=None, help="Hub dataset with splits train and test; default: digits")
    parser.add_argument("--column", default="image")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--adversarial", type=float, default=0.0, metavar="P", help="share of inputs attacked")
    parser.add_argument("--picture", default="mixed.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="10 steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scores = {name: train(args, mixed, folder) for name, mixed in (("plain", False), ("Puzzle Mix", True))}
    for name, score in scores.items():
        print(f"{name:>10}: accuracy {score:.3f}")


if __name__ == "__main__":
    main()
