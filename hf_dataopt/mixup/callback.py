"""Mixing comes and goes with a Trainer's training: the callback behind the collators."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import TrainerCallback

_WRAPPED = ("data_collator", "collate_fn", "func", "__wrapped__", "base_dataloader")


class MixupCallback(TrainerCallback):
    """Installs the mixing of a Trainer's data collator on the model that it trains, and takes it off when training ends.

    Every Trainer that is made after a mixup collator was imported has one; it looks for such a collator behind the training
    loader and does nothing where there is none. A Trainer made before: `trainer.add_callback(MixupCallback())`.

    Draws follow from the optimizer step, so that training resumed from a checkpoint draws what the whole run drew. The
    collator's `statistics` of the steps since the last log are added to Trainer's logs (`mixup_inputs_per_output`, ...).

    Raises:
        ValueError: at the beginning of training: `label_smoothing_factor` is set, which takes the labels away.

    Source: the precedent is transformers' own NEFTune hook, which lasts as long as training.
    """

    def __init__(self) -> None:
        self._collator: Any = None
        self._steps_per_epoch: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the collator, and mix from here on."""
        self._collator = collator = collator_behind(kwargs.get("train_dataloader"))
        if collator is None or collator.live is None:
            return
        if args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor takes the labels away before they can be mixed: leave it 0 and give the collator "
                "label_smoothing="
            )
        self._steps_per_epoch = None
        loader = kwargs["train_dataloader"]
        if hasattr(loader, "__len__"):
            self._steps_per_epoch = max(1, -(-len(loader) // args.gradient_accumulation_steps))
        collator.take(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the mixing which step it is."""
        if self._collator is None or self._collator.live is None:
            return
        steps = self._steps_per_epoch
        epochs = state.global_step / steps if steps else state.epoch or 0.0
        self._collator.live.start_step(state.global_step, epochs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add how much was mixed to a training log, where reports get it too."""
        if self._collator is None or logs is None or "loss" not in logs:
            return
        found = self._collator.tally.statistics(since_last=True)
        self._collator.tally.warn()
        if found is None:
            return
        named = {f"mixup_{name}": value for name, value in asdict(found).items() if name != "outputs"}
        logs.update(named)
        if state.log_history:
            state.log_history[-1].update(named)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mix no more."""
        collator, self._collator = self._collator, None
        if collator is not None:
            collator.remove()
            collator.tally.warn()


def collator_behind(loader: Any) -> Any:
    """The mixup collator of a loader, under transformers' removal of columns and the like, or None."""
    found = loader
    for _ in range(8):
        if found is None or (hasattr(found, "tally") and hasattr(found, "take")):
            return found
        inner = [
            getattr(found, name, None) for name in _WRAPPED if not (name == "func" and not isinstance(found, partial))
        ]
        found = next((one for one in inner if one is not None), None)
    return None
