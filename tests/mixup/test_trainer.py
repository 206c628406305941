"""A stock Trainer with the collators, for every model family: training, evaluation, prediction, accumulation, workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.collators import DataCollatorForCoMixup, DataCollatorForPuzzleMix
from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.live import LiveMixing
from hf_dataopt.mixup.loss import soft_target_loss
from hf_dataopt.mixup.options import LiveOptions
from hf_dataopt.mixup.result import MixResult
from hf_dataopt.mixup.trainer import CleanLossTrainerMixin

from .models import FAMILIES, make, rows

PUZZLE = PuzzleMixConfig(grid_sizes=(2, 4), neighbourhood=1)


class CleanLossTrainer(CleanLossTrainerMixin, Trainer):
    """Trainer with the mixin."""


def trainer(
    model: Any, folder: Path, collator: Any, *, n: int = 24, kind: type[Trainer] = Trainer, **settings: Any
) -> Trainer:
    settings = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **settings,
    }
    family = "ast" if model.config.model_type == "audio-spectrogram-transformer" else "digits"
    return kind(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=rows(family, n),
        eval_dataset=rows(family, 12, start=200),
        data_collator=collator,
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean()),
            "integer": float(np.issubdtype(found.label_ids.dtype, np.integer) and found.label_ids.ndim == 1),
        },
    )


class Gradients(TrainerCallback):
    """The gradient of each optimizer step, before it is used."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]).clone())


def first_gradient(run: Trainer) -> torch.Tensor:
    """Train, and return the gradient of the first optimizer step."""
    run.args.max_grad_norm = 0.0
    gradients = Gradients()
    run.add_callback(gradients)
    run.train()
    return gradients.seen[0]


def stand_in(model: torch.nn.Module, mixer: Any = None, **options: Any) -> LiveMixing:
    """A stand-in mixing without random numbers, so that the split of a batch does not change what is mixed."""
    live = LiveMixing(mixer or reversed_halves, LiveOptions(**options))
    live.install(model)
    return live


def reversed_halves(
    images: torch.Tensor, targets: torch.Tensor, saliency: torch.Tensor, generator: torch.Generator
) -> MixResult:
    """Each pair (2i, 2i + 1) swaps its bottom halves; the target follows the saliency that is seen."""
    partner = torch.arange(len(images)).view(-1, 2).flip(1).flatten()
    half = images.shape[2] // 2
    top, bottom = saliency[:, :half].sum((1, 2)), saliency[partner, half:].sum((1, 2))
    share = (top / (top + bottom))[:, None]
    return MixResult(
        images=torch.cat([images[:, :, :half], images[partner, :, half:]], 2),
        targets=share * targets + (1 - share) * targets[partner],
        sources=torch.stack([torch.arange(len(images)), partner], 1),
        masks=torch.ones(len(images), 2, 1, 1) / 2,
        ratios=torch.cat([share, 1 - share], 1),
        unmixed=torch.zeros(len(images), dtype=torch.bool),
    )


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("method", ["puzzle", "co"])
def test_every_family_trains_and_evaluates(family: str, method: str, tmp_path: Path) -> None:
    model = make(family)
    collator = (
        DataCollatorForPuzzleMix(model, PUZZLE)
        if method == "puzzle"
        else DataCollatorForCoMixup(model, CoMixupConfig(grid=2, part_size=4, sweeps=2, distance_window=2))
    )
    problem = model.config.problem_type
    run = trainer(model, tmp_path, collator, eval_strategy="steps", eval_steps=1, max_steps=3)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    result = run.train()
    assert np.isfinite(result.training_loss)
    assert any(not torch.equal(before[name], weight) for name, weight in model.named_parameters())
    assert collator.seen == 24 and collator.live.batches == 3
    found = collator.statistics
    assert found is not None and found.outputs == 24 and found.single_input == collator.unmixed / 24
    found = run.evaluate()
    assert found["eval_integer"] == 1.0
    assert collator.seen == 24  # evaluation goes by untouched
    assert not model._forward_hooks and not model._forward_pre_hooks  # gone with the training
    # transformers itself notes the kind of problem at the first evaluation; never several labels per sample
    assert model.config.problem_type in (problem, "single_label_classification")


def test_problem_type_is_left_alone_by_training(tmp_path: Path) -> None:
    model = make("vit")
    trainer(model, tmp_path, DataCollatorForPuzzleMix(model, PUZZLE)).train()
    assert model.config.problem_type is None


@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
@pytest.mark.parametrize("family", ["vit", "convnext", "timm", "ast"])
def test_accumulation_gives_the_gradient_of_the_large_batch(family: str, clean_weight: float, tmp_path: Path) -> None:
    found = []
    for size, steps in ((8, 1), (2, 4)):
        model = make(family)
        live = stand_in(model, clean_weight=clean_weight)
        run = trainer(
            model,
            tmp_path,
            default_data_collator,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        found.append(first_gradient(run))
        assert live.samples == 8
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert float(found[1].norm() / found[0].norm()) == pytest.approx(1.0, abs=5e-4)


@pytest.mark.parametrize("family", ["vit", "convnext", "resnet"])
def test_clean_loss_through_the_graph_and_through_the_mixin_are_equal(family: str, tmp_path: Path) -> None:
    found = []
    for kind, weight in ((Trainer, 0.7), (CleanLossTrainer, 0.7), (Trainer, 0.0)):
        model = make(family)
        stand_in(model, clean_weight=weight)
        run = trainer(
            model,
            tmp_path,
            default_data_collator,
            kind=kind,
            max_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )
        found.append(first_gradient(run))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert float((found[2] - found[0]).norm() / found[0].norm()) > 0.05


def test_mixin_without_a_collator_is_a_plain_trainer(tmp_path: Path) -> None:
    found = []
    for kind in (Trainer, CleanLossTrainer):
        run = trainer(make("vit"), tmp_path, default_data_collator, kind=kind, max_steps=1)
        found.append(first_gradient(run))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "clean_weight": 0.5},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_training_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    """The first gradient is that of the plain run (bf16: close to it), and both batches are mixed."""
    settings = dict(settings)
    config = PuzzleMixConfig(grid_sizes=(2,), neighbourhood=1, clean_weight=settings.pop("clean_weight", 0.0))
    found = []
    for changes in ({}, settings):
        model = make("vit")
        collator = DataCollatorForPuzzleMix(model, config, seed=4)
        found.append(first_gradient(trainer(model, tmp_path, collator, **changes)))
        assert collator.seen == 16 and collator.live.batches == 2
    apart = float((found[1] - found[0]).norm() / found[0].norm())
    assert apart < (0.2 if "bf16" in settings else 1e-4)


def test_column_of_maps_mixed_in_workers(tmp_path: Path) -> None:
    model = make("vit")
    collator = DataCollatorForPuzzleMix(None, PUZZLE, saliency="map", num_labels=10)
    run = trainer(
        model,
        tmp_path,
        collator,
        dataloader_num_workers=2,
        remove_unused_columns=False,
        max_steps=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        n=64,
    )
    run.compute_loss_func = soft_target_loss
    run.train_dataset = [{**row, "map": row["pixel_values"][0]} for row in run.train_dataset]
    run.train()
    assert collator.seen >= 64  # a loader may be a batch ahead
    assert run.evaluate()["eval_integer"] == 1.0
    run.eval_dataset = run.train_dataset
    with pytest.raises(ValueError, match="soft labels in an evaluation"):
        run.evaluate()


def test_column_of_maps_mixed_on_the_model(tmp_path: Path) -> None:
    """With a model the maps travel beside the batch: evaluation data may have the column too."""
    model = make("vit")
    collator = DataCollatorForPuzzleMix(model, PUZZLE, saliency="map")
    run = trainer(model, tmp_path, collator, dataloader_num_workers=2, remove_unused_columns=False)
    run.train_dataset = [{**row, "map": row["pixel_values"][0]} for row in run.train_dataset]
    run.train()
    assert collator.seen == 16
    run.eval_dataset = run.train_dataset
    assert run.evaluate()["eval_integer"] == 1.0 and collator.seen == 16


def test_trainers_own_label_smoothing_is_refused(tmp_path: Path) -> None:
    model = make("vit")
    run = trainer(model, tmp_path, DataCollatorForPuzzleMix(model, PUZZLE), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing="):
        run.train()
