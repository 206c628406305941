"""What training runs share: how long and at which learning rate, an adapter's run that is kept, a base in half precision."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

WARM = 0.03  # share of the run with a rising rate
EVERY = 20  # seconds between two checkpoints


class Pace:
    """Warm-up and a cosine over a run: over its steps, or over seconds where those are over sooner.

    Args:
        steps: at most.
        seconds: of wall time at most; 0 for no such end.
        spent: seconds that an earlier part of the run took.
    """

    def __init__(self, steps: int, seconds: float = 0.0, spent: float = 0.0) -> None:
        self.steps, self.seconds, self._begun = steps, seconds, time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds since the run began, earlier parts of it included."""
        return time.monotonic() - self._begun

    def progress(self, step: int) -> float:
        """Share of the run that is over before step `step` (from 0); 1 and more is the end."""
        return max(step / self.steps, self.spent / self.seconds if self.seconds else 0.0)

    def scale(self, step: int) -> float:
        """Share of the highest learning rate at step `step`."""
        done = self.progress(step)
        return min((done + 1 / self.steps) / WARM, 0.5 * (1 + math.cos(math.pi * min(1.0, done))), 1.0)


class Descent:
    """AdamW without decay over what asks for gradients, gradients clipped at 1, at a pace.

    Args:
        model: what is trained.
        lr: the highest learning rate.
    """

    def __init__(self, model: Any, lr: float) -> None:
        self.lr, self.weights = lr, [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, weight_decay=0.0)

    def take(self, loss: torch.Tensor, scale: float) -> torch.Tensor:
        """One step at `scale` of the learning rate; returns the loss without its graph."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def fit(
    model: Any,
    loss_of: Callable[[int], torch.Tensor],
    file: Path,
    *,
    lr: float,
    pace: Pace,
    until: int | None = None,
    checkpoint: Callable[[], object] = lambda: None,
) -> list[dict[str, float]]:
    """AdamW with 3 % warm-up and a cosine; a run that was stopped goes on where it was.

    Args:
        model: `PeftModel`; what asks for gradients is trained.
        loss_of: the loss of one step, from 0.
        file: holds adapter, optimizer and curve; if it is there, the run goes on from it.
        lr: the highest.
        pace: of a run from its start.
        until: of its steps; default all.
        checkpoint: called when `file` has been written.

    Returns:
        The mean losses between two checkpoints.
    """
    descent = Descent(model, lr)
    curve, recent, step = [], [], 0
    if file.exists():
        kept = torch.load(file, weights_only=True)
        set_peft_model_state_dict(model, kept["adapter"])
        descent.optimizer.load_state_dict(kept["optimizer"])
        curve, step, pace = kept["curve"], kept["step"], Pace(pace.steps, pace.seconds, kept["spent"])
    last = pace.steps if until is None else until
    saved, before = time.monotonic(), curve[-1]["cpu_s"] if curve else 0.0
    before, over = before - time.process_time(), pace.progress(step) >= 1 or step >= last
    model.train()
    while not over:
        scale = pace.scale(step)
        recent.append(descent.take(loss_of(step), scale))
        step += 1
        over = pace.progress(step) >= 1 or step >= last
        if over or time.monotonic() - saved > EVERY:
            mean, cpu = float(torch.stack(recent).mean()), before + time.process_time()
            curve.append({"step": step, "loss": round(mean, 4), "s": round(pace.spent, 1), "cpu_s": round(cpu, 1)})
            print(curve[-1], flush=True)
            state = {"adapter": get_peft_model_state_dict(model), "optimizer": descent.optimizer.state_dict()}
            torch.save({**state, "curve": curve, "spent": pace.spent, "step": step}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
            checkpoint()
            recent, saved = [], time.monotonic()
    model.eval()
    return curve


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A copy with weights of that dtype; buffers, rotary frequencies above all, stay in theirs."""
    copied = copy.deepcopy(model).to(dtype)
    for mine, theirs in zip(copied.modules(), model.modules(), strict=True):
        for name, buffer in theirs.named_buffers(recurse=False):
            setattr(mine, name, buffer.clone())
    return copied
