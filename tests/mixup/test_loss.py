"""The soft-label loss equals a loop over classes, and Trainer's element count gives the large batch's gradient."""

from __future__ import annotations

import math

import pytest
import torch

from hf_dataopt.mixup.loss import soft_cross_entropy, soft_target_loss, soft_targets


def some(n: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(n, classes, generator=random).requires_grad_()
    return logits, torch.rand(n, classes, generator=random).softmax(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_the_sum_over_classes(smoothing: float) -> None:
    logits, targets = some()
    found = soft_cross_entropy(logits, targets, smoothing)
    for row in range(len(logits)):
        total = sum(math.exp(value) for value in logits[row].tolist())
        expected = -sum(
            ((1 - smoothing) * float(targets[row, k]) + smoothing / 4)
            * math.log(math.exp(float(logits[row, k])) / total)
            for k in range(4)
        )
        assert float(found[row]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parts_with_the_count_of_all_add_up_to_the_whole(smoothing: float) -> None:
    logits, targets = some()
    whole = soft_target_loss({"logits": logits}, targets, label_smoothing=smoothing)
    count = targets.ne(-100).sum()  # Trainer's count over all micro-batches
    parts = [
        soft_target_loss((logits[i : i + 2],), targets[i : i + 2], count, label_smoothing=smoothing) for i in (0, 2, 4)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_integer_labels_equal_their_one_hot_rows() -> None:
    logits, _ = some()
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    rows = soft_targets(labels, 4)
    assert rows.tolist() == torch.eye(4)[labels].tolist()
    hard = soft_target_loss({"logits": logits}, labels, 12)
    torch.testing.assert_close(hard, soft_target_loss({"logits": logits}, rows, 12 * 4))


def test_evaluation_is_not_smoothed_and_not_mixed() -> None:
    logits, targets = some()
    labels = targets.argmax(1)
    with torch.no_grad():
        plain = soft_target_loss({"logits": logits}, labels)
        assert torch.equal(soft_target_loss({"logits": logits}, labels, label_smoothing=0.3), plain)
        with pytest.raises(ValueError, match="evaluation"):
            soft_target_loss({"logits": logits}, targets)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), "0 to 3"),
        (torch.tensor([-100, 1]), "-100"),
        (torch.zeros(0, dtype=torch.long), "empty"),
        (torch.zeros(2, 2, dtype=torch.long), "shape"),
        (torch.ones(2, 4), "sum to 1"),
        (torch.ones(2, 3) / 3, r"\(batch, 4\)"),
        (torch.tensor([[float("nan"), 1, 0, 0]]), "sum to 1"),
    ],
)
def test_bad_labels_are_named(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_targets(labels, 4)


def test_no_classes_and_one_class() -> None:
    with pytest.raises(ValueError, match="num_labels must be at least 1"):
        soft_targets(torch.tensor([0]), 0)
    assert soft_targets(torch.tensor([0, 0]), 1).tolist() == [[1.0], [1.0]]


def test_missing_labels_and_shapes_are_named() -> None:
    logits, targets = some()
    with pytest.raises(ValueError, match="no labels"):
        soft_target_loss({"logits": logits}, None)
    with pytest.raises(ValueError, match="equal"):
        soft_cross_entropy(logits, targets[:, :2])
