"""Losses of one's own train on the mixed targets: gradients equal a hand-written step; wrong targets are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - everybody's name
from transformers import Trainer
from transformers.modeling_outputs import ImageClassifierOutput

from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.collators import DataCollatorForCoMixup, DataCollatorForPuzzleMix
from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.loss import soft_cross_entropy, soft_target_loss, softmax_binary_cross_entropy
from hf_dataopt.mixup.outputs import with_targets

from .models import batch, make, rows
from .test_trainer import first_gradient, trainer

PUZZLE = PuzzleMixConfig(grid_sizes=(2, 4), neighbourhood=1)
WEIGHTS = torch.linspace(0.2, 2.0, 10)


def weighted(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, weight=WEIGHTS)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    share = logits.softmax(1)
    return -(targets * (1 - share) ** 2 * share.log()).sum(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted": weighted,
    "focal": focal,
    "bce": nn.BCEWithLogitsLoss(),
    "authors": softmax_binary_cross_entropy,
}


def by_hand(
    collator: Any, loss: Callable[[Tensor, Tensor], Tensor], clean: float = 0.0, clean_loss: Any = None
) -> Tensor:
    """The gradient of one step on the batch that the collator has mixed, written out."""
    result, images = collator.last_result, collator.last_inputs
    model = make("vit").train()
    total = loss(model(pixel_values=result.images).logits, result.targets).mean()
    if clean:
        own = torch.eye(10)[
            [row["labels"] for image in images for row in rows("digits", 24) if torch.equal(row["pixel_values"], image)]
        ]
        total = total + clean * (clean_loss or loss)(model(pixel_values=images).logits, own).mean()
    total.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def collator_of(model: nn.Module, config: PuzzleMixConfig = PUZZLE, **options: Any) -> DataCollatorForPuzzleMix:
    collator = DataCollatorForPuzzleMix(model, config, **options)
    collator.keep_result = True
    return collator


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("clean", [0.0, 0.7])
def test_loss_of_the_collator(name: str, clean: float, tmp_path: Path) -> None:
    model = make("vit")
    config = PuzzleMixConfig(grid_sizes=(2, 4), neighbourhood=1, clean_weight=clean)
    collator = collator_of(model, config, loss=LOSSES[name])
    found = first_gradient(trainer(model, tmp_path, collator, max_steps=1))
    torch.testing.assert_close(found, by_hand(collator, LOSSES[name], clean), rtol=1e-6, atol=1e-6)


def test_authors_cifar_recipe(tmp_path: Path) -> None:
    """Binary cross entropy of the softmax, and a clean cross entropy of weight 2 / classes."""
    model = make("vit")
    config = PuzzleMixConfig(grid_sizes=(2,), neighbourhood=1, clean_weight=2 / 10)
    collator = collator_of(model, config, loss=softmax_binary_cross_entropy, clean_loss=soft_cross_entropy)
    found = first_gradient(trainer(model, tmp_path, collator, max_steps=1))
    expected = by_hand(collator, lambda x, t: F.binary_cross_entropy(x.softmax(1), t), 0.2, F.cross_entropy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Weighted(Trainer):
    """As the Trainer docs write it, with the targets of the output."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = weighted(outputs.get("logits"), getattr(outputs, "labels", labels))
        return (loss, outputs) if return_outputs else loss


class Unaware(Trainer):
    """The docs' own, which reads the labels of the batch."""

    how = "pop"

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels") if self.how == "pop" else inputs["labels"]
        outputs = model(**inputs)
        logits = outputs[1] if self.how == "index" else outputs.get("logits")
        loss = F.cross_entropy(logits, labels, weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


def test_docs_style_trainer(tmp_path: Path) -> None:
    model = make("vit")
    collator = collator_of(model)
    run = trainer(model, tmp_path, collator, kind=Weighted, max_steps=1)
    torch.testing.assert_close(first_gradient(run), by_hand(collator, weighted), rtol=1e-6, atol=1e-6)
    assert "eval_loss" in run.evaluate()


@pytest.mark.parametrize("how", ["pop", "get", "index"])
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_trainer_that_reads_the_unmixed_labels_is_refused(how: str, settings: Any, tmp_path: Path) -> None:
    model = make("vit")
    run = trainer(model, tmp_path, DataCollatorForPuzzleMix(model, PUZZLE), kind=Unaware, **settings)
    run.how = how
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"outputs\.labels"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def of_outputs(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    return weighted(outputs["logits"], outputs.get("labels", labels))


def test_compute_loss_func(tmp_path: Path) -> None:
    for call, loss in ((of_outputs, weighted), (soft_target_loss, soft_cross_entropy)):
        model = make("vit")
        collator = collator_of(model)
        run = trainer(model, tmp_path, collator, max_steps=1)
        run.compute_loss_func = call
        torch.testing.assert_close(first_gradient(run), by_hand(collator, loss), rtol=1e-6, atol=1e-6)
        assert "eval_loss" in run.evaluate()
    model = make("vit")
    run = trainer(model, tmp_path, DataCollatorForPuzzleMix(model, PUZZLE))
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: weighted(outputs.logits, labels)
    with pytest.raises(ValueError, match=r"outputs\.labels"):
        run.train()


def test_clean_loss_beside_a_loss_of_ones_own(tmp_path: Path) -> None:
    config = PuzzleMixConfig(grid_sizes=(2,), neighbourhood=1, clean_weight=0.5)

    def with_clean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return weighted(outputs["logits"], outputs["labels"]) + outputs["clean_loss"]

    model = make("vit")
    collator = collator_of(model, config)
    run = trainer(model, tmp_path, collator, max_steps=1)
    run.compute_loss_func = with_clean
    expected = by_hand(collator_after(run, collator), weighted, 0.5, F.cross_entropy)
    torch.testing.assert_close(GRADIENT[0], expected, rtol=1e-5, atol=1e-6)
    model = make("vit")
    run = trainer(model, tmp_path, DataCollatorForPuzzleMix(model, config))
    run.compute_loss_func = of_outputs
    with pytest.raises(ValueError, match="clean_loss"):
        run.train()


GRADIENT: list[Tensor] = []


def collator_after(run: Trainer, collator: Any) -> Any:
    GRADIENT[:] = [first_gradient(run)]
    return collator


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_co_mixup_too(weight: float, tmp_path: Path) -> None:
    model = make("vit")
    config = CoMixupConfig(grid=2, part_size=4, distance_window=2, clean_weight=weight)
    collator = DataCollatorForCoMixup(model, config, loss=weighted)
    collator.keep_result = True
    found = first_gradient(trainer(model, tmp_path, collator, max_steps=1))
    torch.testing.assert_close(found, by_hand(collator, weighted, weight), rtol=1e-6, atol=1e-6)


def test_several_labels_at_once() -> None:
    """Targets are the inputs' labels by the weights of the mix; the loss is a binary cross entropy."""
    model = make("vit").train()
    model.config.problem_type = "multi_label_classification"
    collator = collator_of(model)
    data = batch("vit", 6)
    tags = (torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    with collator.mixing(model):
        output = model(pixel_values=data["pixel_values"], labels=tags)
        result = collator.last_result
        assert result is not None
        expected = (result.ratios[:, :, None] * tags[result.sources]).sum(1)
        torch.testing.assert_close(output.labels, expected)
        torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, expected))
        with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
            model(pixel_values=data["pixel_values"], labels=tags * 3)
    model.config.problem_type = "regression"
    with collator.mixing(model), pytest.raises(ValueError, match="regression"):
        model(**data)


def test_a_loss_of_another_shape_is_refused() -> None:
    model = make("vit").train()
    collator = DataCollatorForPuzzleMix(model, PUZZLE, loss=nn.BCEWithLogitsLoss(reduction="none"))
    with collator.mixing(), pytest.raises(ValueError, match="one number a row"):
        model(**batch("vit", 4))


def test_outputs_are_what_they_were_and_more() -> None:
    logits = torch.zeros(2, 3, requires_grad=True) + 0
    output = with_targets(ImageClassifierOutput(logits=logits), logits.sum(), torch.eye(3)[:2], None)
    assert isinstance(output, ImageClassifierOutput) and list(output) == ["loss", "logits", "labels"]
    assert torch.equal(output[1], logits) and len(output.to_tuple()) == 3
    twin = pickle.loads(pickle.dumps({name: value.detach() for name, value in output.items()}))
    assert torch.equal(twin["labels"], torch.eye(3)[:2])
    again = copy.deepcopy(with_targets(ImageClassifierOutput(logits=torch.zeros(2, 3)), None, torch.eye(3)[:2], None))
    assert isinstance(again, ImageClassifierOutput) and torch.equal(again.labels, torch.eye(3)[:2])
    bare = with_targets(logits, logits.sum(), torch.eye(3)[:2], None)
    assert set(bare) == {"loss", "logits", "labels"}
    first, *rest = with_targets((logits, "more"), logits.sum(), torch.eye(3)[:2], None)
    assert first.ndim == 0 and torch.equal(rest[0], logits) and rest[1] == "more"
