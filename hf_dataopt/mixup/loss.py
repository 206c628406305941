"""Cross entropy with soft labels, for the hook and for a stock Trainer's `compute_loss_func`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..settings import brief, check_int, check_number, check_shares, check_tensor, check_together, optional

logger = logging.getLogger(__name__)
_warned: set[str] = set()


def soft_targets(labels: Tensor, num_labels: int) -> Tensor:
    """Labels as rows that sum to 1.

    Args:
        labels: (B,) int64 classes in [0, num_labels), or (B, num_labels) floats >= 0 whose rows sum to 1.
        num_labels: number of classes.

    Returns:
        (B, num_labels) float32.

    Raises:
        ValueError: an empty batch, another shape, a label out of range, or rows that do not sum to 1.
    """
    check_tensor("labels", labels, floating=None)
    num_labels = check_int("num_labels", num_labels, 1)
    if labels.shape[:1] == (0,):
        raise ValueError("the batch is empty; give at least one sample")
    if labels.is_floating_point():
        return check_shares("soft labels", labels, ("batch", num_labels)).float()
    if labels.ndim != 1:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; give (batch,) classes or (batch, classes) floats")
    labels = labels.long()
    low, high = labels.aminmax()
    if low < 0 or high >= num_labels:
        raise ValueError(
            f"labels run from {int(low)} to {int(high)}, the model has {num_labels} classes (0 to {num_labels - 1}); "
            "check num_labels and that every sample has a label"
        )
    return torch.zeros(len(labels), num_labels, device=labels.device).scatter_(1, labels[:, None], 1.0)


def soft_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each row against its soft target.

    Args:
        logits: (B, classes).
        targets: (B, classes), rows sum to 1.
        label_smoothing: share of each target spread evenly over all classes, in [0, 1).

    Returns:
        (B,) float32.

    Raises:
        ValueError: different shapes, or rows of targets that do not sum to 1.
        TypeError: no tensors of floats.

    Source: section 3.3 (the loss of Eq. 3.1).
    """
    _check_rows(logits, targets)
    return row_losses(logits, targets, check_number("label_smoothing", label_smoothing, 0, 1, below=True))


def _check_rows(logits: Tensor, targets: Tensor) -> None:
    check_tensor("logits", logits, ("B", "classes"))
    check_tensor("targets", targets, ("B", "classes"))
    if logits.shape != targets.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, targets {tuple(targets.shape)}; they must be equal")
    check_shares("targets", targets)
    check_together(logits=logits, targets=targets)


def row_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`soft_cross_entropy` of what was checked before: nothing is looked at, so nothing waits for the device."""
    return torch.nn.functional.cross_entropy(
        logits.float(), targets.float(), reduction="none", label_smoothing=label_smoothing
    )


def softmax_binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of the softmax, each class a yes or no: the authors' loss on CIFAR and Tiny-ImageNet.

    Args:
        logits: (B, classes).
        targets: (B, classes), rows sum to 1.

    Returns:
        Scalar float32, the mean over rows and classes.

    Raises:
        ValueError: different shapes, or rows of targets that do not sum to 1.
        TypeError: no tensors of floats.

    Source: reference code of chapters 3 and 4 (the text names a cross entropy): `DataCollatorForPuzzleMix(model, config,
        loss=softmax_binary_cross_entropy, clean_loss=soft_cross_entropy)` with a clean weight of `2 / classes` where the
        authors have 1.

    Example:
        >>> softmax_binary_cross_entropy(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).item()
        0.6931471824645996
    """
    _check_rows(logits, targets)
    share = logits.float().log_softmax(1)
    rest = torch.log(-torch.expm1(share.clamp_max(-1e-7)))  # log(1 - p), also where p is 1 in float32
    return -(targets * share + (1 - targets) * rest).mean()


def soft_target_loss(
    outputs: Mapping[str, Tensor] | Sequence[Tensor],
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of soft or integer labels, for `Trainer(compute_loss_func=soft_target_loss)`.

    Trainer counts the elements of the labels, batch times classes for soft ones; the sum is divided by the samples they
    stand for, so that gradient accumulation gives the gradient of the large batch. In training without that count
    (a hand-written loop) the mean is taken.

    Args:
        outputs: the model's output, with `logits` (B, classes).
        labels: (B, classes) float, or (B,) int64 (evaluation; unmixed batches). Mixed targets in the output (`labels`, put
            there where the batch was mixed on the model) go before.
        num_items_in_batch: elements that are not -100 in the labels of all accumulated batches, as Trainer counts them.
        label_smoothing: in [0, 1), training only (Trainer's own argument is ignored with a loss function of one's own):
            `functools.partial(soft_target_loss, label_smoothing=0.1)`.

    Returns:
        Scalar float32.

    Raises:
        ValueError: no labels, or soft labels in an evaluation: the evaluation data were mixed.

    Source: section 3.3 (the loss of Eq. 3.1).

    Example:
        >>> soft_target_loss({"logits": torch.zeros(2, 4)}, torch.tensor([1, 2])).item()
        1.3862943649291992
    """
    mixed = outputs.get("labels") if isinstance(outputs, Mapping) else None
    here = mixed is not None
    labels = labels if mixed is None else mixed
    if labels is None:
        raise ValueError("no labels in the batch; a loss needs them (is the label column named 'label' or 'labels'?)")
    check_tensor("labels", labels, floating=None)
    smoothing = check_number("label_smoothing", label_smoothing, 0, 1, below=True)
    logits = check_tensor("logits", _logits_of(outputs), ("B", "classes"))
    items = _items(num_items_in_batch)
    training = torch.is_grad_enabled() and logits.requires_grad
    soft = labels.is_floating_point()
    if soft and not training:
        raise ValueError(
            "soft labels in an evaluation: its batches were mixed. Give the collator's saliency column to the training "
            "data only (eval_dataset.remove_columns)"
        )
    if training and not soft and "unmixed" not in _warned:
        _warned.add("unmixed")
        logger.warning(
            "soft_target_loss got integer labels in training: the batch was not mixed. Did Trainer drop the saliency "
            "column? Set remove_unused_columns=False"
        )
    classes = logits.shape[-1]
    targets = soft_targets(labels, classes)
    if len(targets) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits but {len(targets)} labels; give one label per row")
    check_together(logits=logits, labels=targets)
    rows = row_losses(logits, targets, smoothing if training else 0.0)
    if isinstance(outputs, Mapping) and here and "clean_loss" in outputs:
        rows = rows + outputs["clean_loss"]
    if items is None:
        return rows.mean()
    return rows.sum() / (items / classes if soft and not here else items)


def _logits_of(outputs: Any) -> Any:
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    if isinstance(outputs, list | tuple) and outputs:
        return outputs[0]
    raise TypeError(f"outputs must hold 'logits', or be a tuple that starts with them, got {brief(outputs)}")


def _items(count: Any) -> Any:
    """A number of items; one that lies on a device is not waited for."""
    if isinstance(count, Tensor) and count.numel() == 1 and count.device.type not in ("cpu", "meta"):
        return count
    if isinstance(count, Tensor) and count.shape == (1,):
        count = count[0]
    return optional(check_number, "num_items_in_batch", count, 0, 2**53, above=True)
