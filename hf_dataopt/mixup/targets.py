"""Labels of a training batch, in the three forms that can be mixed: classes, several labels at once, a class for each pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..saliency import class_logits
from ..settings import brief, check_tensor
from .loss import row_losses, soft_targets
from .result import MixResult
from .segmentation import mixed_maps

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, soft targets) -> scalar or (B,)


@dataclass(frozen=True)
class Targets:
    """What a batch shall be recognised as.

    Args:
        values: (B, classes) float32 of `"classes"` (rows sum to 1) or `"several"` (each in [0, 1]), or (B, H, W) int64 of
            `"pixels"`.
        form: which.
    """

    values: Tensor
    form: Literal["classes", "several", "pixels"]

    @classmethod
    def of(cls, labels: Any, model: nn.Module) -> Targets:
        """Read a batch's labels as the model's `config.problem_type` has them; integers (B, H, W) are maps.

        Raises:
            ValueError: another shape, a class that the model does not have, or a regression.
        """
        check_tensor("labels", labels, floating=None)
        if labels.ndim == 3 and not labels.is_floating_point():
            return cls(labels, "pixels")
        kind = getattr(getattr(model, "config", None), "problem_type", None)
        classes = _num_labels(model)
        if kind == "regression":
            raise ValueError("config.problem_type is 'regression'; mixing needs classes")
        if kind != "multi_label_classification":
            return cls(soft_targets(labels, classes), "classes")
        values = labels.float()
        if values.shape != (len(labels), classes) or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"labels of a multi-label model must be ({len(labels)}, {classes}) numbers in [0, 1], got {brief(labels)}"
            )
        return cls(values, "several")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def for_mixer(self) -> Tensor:
        """(B, K) shares for a mixer: the targets themselves, or which input is which, so that its weights come back."""
        return self.values if self.form == "classes" else torch.eye(len(self.values), device=self.values.device)

    def mixed(self, result: MixResult) -> MixResult:
        """The result with the mixed targets in its `targets` (maps: the class that shows most at each pixel)."""
        if self.form == "classes":
            return result
        if self.form == "several":
            return replace(result, targets=result.targets @ self.values)
        return replace(result, targets=mixed_maps(result, self.values))

    def loss(self, logits: Tensor, loss: Loss | None, label_smoothing: float = 0.0) -> Tensor:
        """Mean loss of a batch: the user's, or a cross entropy, or a binary one where labels are several."""
        values = self.values.to(logits.device)
        if loss is not None:
            found = loss(logits.float(), values)
            if not isinstance(found, Tensor) or found.shape not in ((), (len(values),)):
                raise ValueError(
                    f"loss= must return a scalar or one number a row, ({len(values)},); got {brief(found)}"
                )
            return found.mean()
        if self.form == "several":
            return nn.functional.binary_cross_entropy_with_logits(logits.float(), values)
        return row_losses(logits, values, label_smoothing).mean()

    def mean_loss(self, loss: Loss | None) -> Callable[[nn.Module, Mapping[str, Any]], Tensor]:
        """The same from a model and its inputs; a model of pixels has its own loss."""

        def of_pixels(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
            found = model.forward(**inputs, labels=self.values)
            own = found.get("loss") if isinstance(found, Mapping) else found[0]
            if not isinstance(own, Tensor) or own.ndim:
                raise ValueError(f"{type(model).__name__} returned no loss for labels (B, H, W); mixing maps needs one")
            return own

        if self.form == "pixels":
            return of_pixels
        return lambda model, inputs: self.loss(class_logits(model, inputs, len(self.values)), loss)


def _num_labels(model: nn.Module) -> int:
    for owner, name in ((getattr(model, "config", None), "num_labels"), (model, "num_labels"), (model, "num_classes")):
        count = getattr(owner, name, None)
        if isinstance(count, int):
            return count
    raise ValueError(f"{type(model).__name__} does not say how many classes it has; set model.num_labels")
