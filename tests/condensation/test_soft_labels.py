"""Soft labels of every cell, DD-Ranking's figures, and a stock Trainer with the mixup room's loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value

from hf_dataopt import DatasetCondenser, MultiFormation
from hf_dataopt.condensation.columns import read_images
from hf_dataopt.condensation.evaluation import FIGURES, Score, ranked, scores_as_rows
from hf_dataopt.condensation.multi_formation import stack
from hf_dataopt.condensation.recipe import read_recipe
from hf_dataopt.condensation.saved import load_condensed, save_condensed
from hf_dataopt.condensation.teacher import Teacher
from hf_dataopt.mixup.loss import soft_target_loss

from .test_loop import SMALL, network

SOFT = replace(SMALL, storage="uint8", outer_iterations=0, soft_labels=True, soft_temperature=0.5)


@pytest.mark.parametrize("formation", ["single", "multi", "bound"])
def test_every_formed_row_gets_the_shares_of_its_own_cell(train: Dataset, formation: str) -> None:
    teacher = Teacher.of(network())
    config = replace(SOFT, formation=formation, factor=3, images_per_class=3, storage="float32")
    condensed = DatasetCondenser(config, teacher=teacher).condense(train)
    assert condensed.features["soft_label"] == List(List(Value("float16"), length=3))
    formed = condensed.shuffle(seed=1).map(MultiFormation.from_dataset(condensed), batched=True, batch_size=4)
    images, data = stack([np.asarray(one, np.float32) for one in formed["image"]]), read_images(train)
    expected = (teacher.logits(images, data) / 0.5).softmax(1)
    found = torch.tensor(formed["soft_label"][:])
    assert found.shape == (len(images), 3) and len({tuple(row) for row in found.tolist()}) > 9
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)


def test_soft_labels_are_saved_counted_and_scored(train: Dataset, test_split: Dataset, tmp_path: Path) -> None:
    config = replace(SOFT, evaluation_epochs=4, teacher_images=64)
    condenser = DatasetCondenser(config)
    condensed = condenser.condense(train)
    recipe = read_recipe(condensed)
    assert recipe["teacher"].startswith("ConvNet trained on 64 images") and recipe["soft_temperature"] == 0.5
    scores = condenser.evaluate(condensed, test_split, seeds=2, full_epochs=3)
    assert list(scores) == ["condensed", "soft labels", "random", "full"]
    (hard,), (soft,), (random,), (full,) = scores.values()
    assert (hard.images, soft.images, random.images, full.images) == (24, 24, 6, 90) and full.epochs == 3
    assert hard.accuracies != soft.accuracies
    assert hard.hard_label_recovery == pytest.approx(full.mean - hard.mean) and soft.hard_label_recovery is None
    assert soft.improvement_over_random == pytest.approx(soft.mean - random.mean)
    folder = save_condensed(condensed, tmp_path / "set", config=config, scores=scores)
    loaded = load_condensed(folder)
    assert loaded["soft_label"][:] == condensed["soft_label"][:]
    card = (folder / "README.md").read_text()
    assert f"float16, {24 * 3 * 2} bytes in all" in card and "hard-label recovery" in card
    assert f"| {round(hard.hard_label_recovery or 0, 2)} |" in card
    with pytest.raises(TypeError, match=r"scores\['condensed'\]"):
        save_condensed(condensed, tmp_path / "other", scores={"condensed": 1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="full_epochs needs the training set"):
        DatasetCondenser(config).evaluate(condensed, test_split, seeds=1, full_epochs=1)


def test_figures_are_differences_of_means() -> None:
    def score(*values: float) -> list[Score]:
        return [Score(accuracies=values, network="n", epochs=1, images=1)]

    scores = {"condensed": score(60, 70), "random": score(40.0), "full": score(90.0)}
    (found,) = ranked(scores)["condensed"]
    assert (found.hard_label_recovery, found.improvement_over_random) == (25, 25)
    (alone,) = ranked({"condensed": score(60.0)})["condensed"]
    assert (alone.hard_label_recovery, alone.improvement_over_random) == (None, None)
    rows = scores_as_rows(ranked(scores))
    assert [tuple(row[name] for name in FIGURES) for row in rows] == [(25, 25), (None, None), (None, None)]


def test_a_stock_trainer_takes_them_with_the_soft_target_loss(train: Dataset, tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    condensed = DatasetCondenser(replace(SOFT, teacher_images=64)).condense(train)
    formed = condensed.map(MultiFormation.from_dataset(condensed, output="stored"), batched=True)
    rows = [
        {"pixel_values": np.asarray(row["image"], np.float32)[None] / 255, "labels": np.float32(row["soft_label"])}
        for row in formed
    ]
    config = ResNetConfig(num_channels=1, num_labels=3, embedding_size=4, hidden_sizes=[4], depths=[1])
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no"
    )
    model = ResNetForImageClassification(config)
    before = [value.clone() for value in model.parameters()]
    result = Trainer(model=model, args=args, train_dataset=rows, compute_loss_func=soft_target_loss).train()
    assert 0 < result.training_loss < 5
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_rows_with_other_soft_labels_are_refused(train: Dataset, tmp_path: Path) -> None:
    condensed = DatasetCondenser(replace(SOFT, teacher_images=64)).condense(train)
    formation = MultiFormation.from_dataset(condensed)
    batch = condensed.with_format(None)[:]
    batch["soft_label"][2] = batch["soft_label"][2][:3]
    with pytest.raises(ValueError, match=r"row 2 of the batch has soft labels of shape \(3, 3\) for 4 cells"):
        formation(dict(batch))
    wrong = condensed.map(lambda row: {"soft_label": [[0.5, 0.5, 0.5]] * 4}, features=condensed.features)
    with pytest.raises(ValueError, match="row 0 of this condensed set has soft labels that are no shares"):
        save_condensed(wrong, tmp_path / "wrong")
