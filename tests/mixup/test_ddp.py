"""Two processes on gloo: the gradient is that of one process with the whole batch, and ranks draw their own partners."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer, default_data_collator

from hf_dataopt.mixup.collators import DataCollatorForPuzzleMix
from hf_dataopt.mixup.config import PuzzleMixConfig

from ..processes import launch
from .models import make
from .test_trainer import CleanLossTrainer, first_gradient, stand_in, trainer

CASES = {"plain": (Trainer, 0.0, 1), "accumulated": (Trainer, 0.5, 2), "mixin": (CleanLossTrainer, 0.5, 2)}


def gradients(folder: Path, size: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, (kind, clean_weight, steps) in CASES.items():
        model = make("vit")
        stand_in(model, clean_weight=clean_weight)
        run = trainer(
            model,
            folder,
            default_data_collator,
            kind=kind,
            max_steps=1,
            per_device_train_batch_size=size // steps,
            gradient_accumulation_steps=steps,
        )
        found[name] = first_gradient(run)
    return found


def work(folder: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, object] = {"gradients": gradients(Path(folder), 4)}
    model = make("vit")
    collator = DataCollatorForPuzzleMix(model, PuzzleMixConfig(grid_sizes=(2,), neighbourhood=1))
    collator.keep_result = True
    trainer(model, Path(folder), collator, max_steps=2, eval_strategy="steps", eval_steps=1).train()
    assert collator.last_result is not None
    found["partners"] = collator.last_result.sources[:, 1].tolist()
    found["weights"] = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    torch.save(found, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    launch(work, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, expected in gradients(tmp_path, 8).items():
        torch.testing.assert_close(first["gradients"][name], second["gradients"][name], rtol=0, atol=0)
        torch.testing.assert_close(first["gradients"][name], expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(first["weights"], second["weights"])
    assert first["partners"] != second["partners"]
