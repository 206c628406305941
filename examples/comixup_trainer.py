"""Train an image classifier with Co-Mixup and the clean-loss term: a stock Trainer, and a data collator.

python examples/comixup_trainer.py                    # a small ViT on scikit-learn's digits, plain and mixed
python examples/comixup_trainer.py --mixin            # clean loss through the Trainer mixin: no second gradient copy
python examples/comixup_trainer.py --column           # saliency maps made once, batches mixed in loader workers
python examples/comixup_trainer.py --smoke            # a few steps, under a minute
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_dataopt import CoMixupConfig, DataCollatorForCoMixup, soft_target_loss
from hf_dataopt.mixup.trainer import CleanLossTrainerMixin
from hf_dataopt.saliency import input_saliency


class CleanLossTrainer(CleanLossTrainerMixin, Trainer):
    """A Trainer that runs the backward of the clean loss as soon as the saliency needs it."""


def digits(smoke: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test rows: (1, 32, 32) images in [0, 1]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.nn.functional.interpolate(torch.from_numpy(found.images / 16).float()[:, None], size=(32, 32))
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, found.target, strict=True)]
    return rows[:300], rows[300 : 500 if smoke else None]


def small_vit() -> Any:
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


def with_maps(rows: list[dict[str, Any]], model: Any) -> list[dict[str, Any]]:
    """The rows with a column of saliency maps of a trained model; with `datasets`: `SaliencyExtractor`."""
    images = torch.stack([row["pixel_values"] for row in rows])
    maps = input_saliency(model, {"pixel_values": images}, torch.tensor([row["labels"] for row in rows]))
    return [{**row, "saliency": one} for row, one in zip(rows, maps, strict=True)]


def run(args: argparse.Namespace, collator: Any, model: Any, rows: Any, test: Any, **more: Any) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        kind = CleanLossTrainer if args.mixin else Trainer
        trainer = kind(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=args.epochs,
                max_steps=10 if args.smoke else -1,
                per_device_train_batch_size=20,
                per_device_eval_batch_size=128,
                learning_rate=1e-3,
                dataloader_num_workers=2 if args.column else 0,
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
            compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
            **more,
        )
        trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--clean-weight", type=float, default=1.0, help="weight of the loss on unmixed images")
    parser.add_argument("--mixin", action="store_true", help="CleanLossTrainerMixin instead of a stock Trainer")
    parser.add_argument("--column", action="store_true", help="mix in loader workers, from a column of saliency maps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="10 steps")
    args = parser.parse_args()
    if args.mixin and args.column:
        parser.error("--column has no live model, so no clean loss: leave out --mixin")

    rows, test = digits(args.smoke)
    set_seed(args.seed)
    plain = run(args, None, small_vit(), rows, test)
    print(f"   plain: accuracy {plain.evaluate()['eval_accuracy']:.3f}")

    set_seed(args.seed)
    model = small_vit()
    if args.column:
        collator = DataCollatorForCoMixup(
            None, CoMixupConfig.cifar100(clean_weight=0.0), saliency="saliency", num_labels=10, seed=args.seed
        )
        rows = with_maps(rows, plain.model)
        mixed = run(args, collator, model, rows, test, compute_loss_func=soft_target_loss)
    else:
        config = CoMixupConfig.cifar100(clean_weight=args.clean_weight)
        collator = DataCollatorForCoMixup(model, config, seed=args.seed)
        mixed = run(args, collator, model, rows, test)
    print(f"Co-Mixup: accuracy {mixed.evaluate()['eval_accuracy']:.3f}")
    print(collator.statistics)


if __name__ == "__main__":
    main()
