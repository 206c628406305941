"""The clean-loss term without a second copy of the parameter gradients: a mixin for Trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .live import installed_on


class CleanLossTrainerMixin:
    """Sends the clean loss's gradient straight into `.grad`: `class MyTrainer(CleanLossTrainerMixin, Trainer): pass`.

    A stock Trainer trains with `clean_weight > 0` too, at the same number of passes; there the gradient of the clean pass
    is held aside until the mixed batch's backward. With this mixin the clean pass runs Trainer's own backward: no second
    copy of the gradients, loss scaling under float16, reentrant activation checkpointing. Without a mixup collator, or
    with `clean_weight=0`, nothing changes.

    Raises:
        ValueError: FSDP or DeepSpeed, which must see every backward of a step through their own wrapper.

    Source: section 3.5.
    Cost: as the stock Trainer, less one copy of the parameter gradients.

    Example:
        >>> class CleanLossTrainer(CleanLossTrainerMixin, Trainer): ...  # doctest: +SKIP
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trainer's step, with the clean loss's backward run inside its forward."""
        live = installed_on(model)
        if live is None or not live.options.clean_weight:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        kind = str(self.accelerator.distributed_type)  # type: ignore[attr-defined]
        if any(name in kind for name in ("FSDP", "DEEPSPEED")):
            raise ValueError(f"{kind} cannot run the clean pass outside its wrapper; use DDP, or clean_weight=0")
        scale = self._clean_scale(num_items_in_batch)
        live.clean_backward = lambda loss: self.accelerator.backward(loss * scale)  # type: ignore[attr-defined]
        try:
            # DDP does not listen to gradients before its forward has ended: these add up locally and go out with the
            # mixed batch's
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        finally:
            live.clean_backward = None

    def _clean_scale(self, num_items_in_batch: Tensor | int | None) -> float:
        """What `compute_loss` and `training_step` multiply a loss with before its backward."""
        trainer: Any = self
        counted = num_items_in_batch is not None
        told = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers 5.23
        done = trainer.model_accepts_loss_kwargs and counted if told is None else told
        scale = 1.0 if done else 1.0 / trainer.current_gradient_accumulation_steps
        if trainer.args.average_tokens_across_devices and trainer.model_accepts_loss_kwargs and counted:
            scale *= trainer.accelerator.num_processes
        return scale
