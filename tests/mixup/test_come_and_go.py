"""Mixing comes and goes with training: on the model that is trained, resumed bit for bit, gone from saved and copied models."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F  # noqa: N812 - everybody's name
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_dataopt.mixup import statistics
from hf_dataopt.mixup.callback import MixupCallback, collator_behind
from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.collators import DataCollatorForCoMixup, DataCollatorForMixup, DataCollatorForPuzzleMix
from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.live import installed_on
from hf_dataopt.mixup.loss import soft_cross_entropy
from hf_dataopt.mixup.schedule import MixupSchedule

from .models import batch, make, rows
from .test_trainer import trainer

PUZZLE = PuzzleMixConfig(grid_sizes=(2, 4), neighbourhood=1)


def weights(model: Any) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


class Meanwhile(TrainerCallback):
    """Does something in the middle of training."""

    def __init__(self, what: Any) -> None:
        self.what, self.found = what, []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found.append(self.what(model))


def test_model_init(tmp_path: Path) -> None:
    """The model that is trained is mixed, not the one given."""
    given = make("vit")
    collator = DataCollatorForPuzzleMix(given, PUZZLE)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, report_to="none", use_cpu=True
    )
    run = Trainer(
        args=args, model_init=lambda: make("vit", 1), train_dataset=rows("digits", 16), data_collator=collator
    )
    for seen in (16, 32):
        run.train()
        assert collator.seen == seen and collator.live is not None and collator.live.batches == seen // 8
    assert run.model is not given and not given._forward_hooks and not run.model._forward_hooks


@pytest.mark.parametrize("given", ["base", "wrapped"])
def test_lora(given: str, tmp_path: Path) -> None:
    """Whichever of the two is given to the collator, the one that Trainer trains is mixed; only the adapter gets gradients."""
    base = make("vit")
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", modules_to_save=["classifier"]))
    collator = DataCollatorForPuzzleMix(base if given == "base" else model, PUZZLE, loss=soft_cross_entropy)
    settings: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"]}
    run = trainer(model, tmp_path, collator, **settings)
    before = {name: value.clone() for name, value in model.named_parameters()}
    run.train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert collator.seen == 16 and changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    assert "eval_loss" in run.evaluate() and not model._forward_hooks and not base._forward_hooks


def test_nothing_is_installed_before_and_after(tmp_path: Path) -> None:
    model = make("vit")
    collator = DataCollatorForPuzzleMix(model, PUZZLE)
    assert not model._forward_hooks and not model._forward_pre_hooks
    seen = Meanwhile(lambda model: installed_on(model) is collator.live)
    run = trainer(model, tmp_path, collator)
    run.add_callback(seen)
    run.train()
    assert seen.found == [True, True] and installed_on(model) is None and not model._forward_hooks
    assert set(collator(rows("vit", 2))) == {"pixel_values", "labels"}


def test_two_collators_on_one_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make("vit")
    first, second = (DataCollatorForPuzzleMix(model, PUZZLE, seed=seed) for seed in (0, 1))
    for collator in (first, second, first):
        trainer(model, tmp_path, collator).train()
    assert (first.seen, second.seen) == (32, 16)
    with first.mixing(model), pytest.raises(ValueError, match="another mixing"):
        second.install(model)
    # a training that broke off leaves its hooks; the next one takes them off
    run = trainer(model, tmp_path, first)
    run.add_callback(Meanwhile(lambda _: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert installed_on(model) is first.live
    with caplog.at_level(logging.WARNING):
        trainer(model, tmp_path, second).train()
    assert second.seen == 32 and "taken off" in caplog.text and installed_on(model) is None


def test_models_saved_and_copied_inside_training(tmp_path: Path) -> None:
    def saved(model: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False), copy.deepcopy(model)

    model = make("vit")
    collator = DataCollatorForPuzzleMix(model, PUZZLE)
    meanwhile = Meanwhile(saved)
    run = trainer(model, tmp_path, collator)
    run.add_callback(meanwhile)
    run.train()
    data = batch("vit", 4)
    for pair in meanwhile.found:
        for twin in pair:
            output = twin.train()(**data)  # plain: the mixing stayed behind
            torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, data["labels"]))
            assert not hasattr(output, "labels")
    assert collator.seen == 16
    torch.testing.assert_close(weights(meanwhile.found[-1][0]), weights(model), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "workers"), [("puzzle", 0), ("co", 0), ("schedule", 1)])
def test_resumed_in_the_middle_of_an_epoch(kind: str, workers: int, tmp_path: Path) -> None:
    """Bit for bit what the uninterrupted run gives, accumulation and a ragged last batch included.

    A ResNet: transformers 5.24 cannot resume its ViT, whose saved weights have other names.
    """

    def run(**settings: Any) -> Trainer:
        model = make("resnet")
        co = CoMixupConfig(grid=2, part_size=4, sweeps=2, distance_window=2)
        schedule = MixupSchedule(
            probabilities={"puzzle_mix": 0.4, "cutmix": 0.3, "mixup": 0.1},
            puzzle_mix=PuzzleMixConfig(grid_sizes=(2,), neighbourhood=1),
            warmup_epochs=1,
        )
        collator: Any = {
            "puzzle": lambda: DataCollatorForPuzzleMix(model, PUZZLE),
            "co": lambda: DataCollatorForCoMixup(model, co),
            "schedule": lambda: DataCollatorForMixup(model, schedule),
        }[kind]()
        return trainer(
            model,
            tmp_path,
            collator,
            n=28,
            max_steps=7,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
            **settings,
        )

    whole = run(save_strategy="steps", save_steps=3)
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert 0 < resumed.data_collator.live.batches < whole.data_collator.live.batches  # it did not start over
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_accelerate_loop_and_its_checkpoints(tmp_path: Path) -> None:
    """The documented way: make the collator, train inside `mixing`, register it for checkpoints."""

    def run(steps: range, folder: Path | None = None, *, load: bool = False) -> torch.Tensor:
        accelerator = Accelerator(cpu=True)
        model = make("vit").train()
        collator = DataCollatorForPuzzleMix(model, PUZZLE)
        loader: Any = DataLoader(rows("digits", 32), batch_size=8, collate_fn=collator)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        accelerator.register_for_checkpointing(collator)
        if load:
            accelerator.load_state(str(folder))
        with collator.mixing(model):
            for step, data in enumerate(loader):
                if step in steps:
                    accelerator.backward(model(**data).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        assert collator.seen == 8 * len(steps) and not model._forward_hooks
        if folder is not None and not load:
            accelerator.save_state(str(folder))
        return weights(model)

    whole = run(range(4))
    run(range(2), tmp_path)
    assert torch.equal(run(range(2, 4), tmp_path, load=True), whole)


class LightningStyle:
    """The guide's lines (tried with Lightning 2.6) and what else Lightning calls of a module, in its order."""

    def __init__(self, model: torch.nn.Module, collator: DataCollatorForPuzzleMix) -> None:
        self.model, self.collator, self.current_epoch = model, collator, 0

    def on_fit_start(self) -> None:
        self.collator.install(self.model)

    def on_train_epoch_start(self) -> None:
        self.collator.set_epoch(self.current_epoch)

    def training_step(self, data: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**data).loss

    def validation_step(self, data: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**data).loss

    def on_fit_end(self) -> None:
        self.collator.remove()


def test_lightning_style_loop() -> None:
    model = make("vit")
    collator = DataCollatorForPuzzleMix(model, PUZZLE)
    collator.keep_result = True
    module = LightningStyle(model, collator)
    loader = DataLoader(rows("digits", 16), batch_size=8, collate_fn=collator, num_workers=1)
    module.on_fit_start()
    masks = []
    for module.current_epoch in (0, 1, 0):
        module.on_train_epoch_start()
        model.train()
        for index, data in enumerate(loader):
            loss = module.training_step(data, index)
            result = collator.last_result
            assert result is not None
            with collator.paused():
                logits = model(pixel_values=result.images).logits
            torch.testing.assert_close(loss, soft_cross_entropy(logits, result.targets).mean())
            masks.append(result.masks)
        model.eval()
        plain = module.validation_step(batch("digits", 8), 0)
        torch.testing.assert_close(
            plain,
            F.cross_entropy(
                model(pixel_values=batch("digits", 8)["pixel_values"]).logits, batch("digits", 8)["labels"]
            ),
        )
    module.on_fit_end()
    assert collator.seen == 48 and not model._forward_hooks
    # the same batch and weights: mixed anew in another epoch, and as before in the same
    assert not torch.equal(masks[0], masks[2]) and torch.equal(masks[0], masks[4])


def test_a_loop_that_forgets_to_install_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = make("vit").train()
    collator = DataCollatorForPuzzleMix(model, PUZZLE)
    collator(rows("digits", 4))
    collator(rows("digits", 4))
    assert caplog.text.count("collator.mixing(model)") == 1


def test_a_trainer_made_before_the_collator(tmp_path: Path) -> None:
    model = make("vit")
    run = trainer(model, tmp_path, None)
    run.data_collator = collator = DataCollatorForPuzzleMix(model, PUZZLE)
    run.train()
    assert collator.seen == 16  # it has the callback, which looks at the loader when training begins
    assert sum(isinstance(one, MixupCallback) for one in run.callback_handler.callbacks) == 1
    assert collator_behind(DataLoader([0])) is None and collator_behind(None) is None


def test_compiled_model_is_evaluated_after_the_hooks_are_gone(tmp_path: Path) -> None:
    model = make("vit")
    collator = DataCollatorForPuzzleMix(model, PUZZLE)
    run = trainer(
        model,
        tmp_path,
        collator,
        torch_compile=True,
        torch_compile_backend="eager",
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    logits = run.predict(run.eval_dataset).predictions
    expected = model.eval()(pixel_values=torch.stack([row["pixel_values"] for row in run.eval_dataset])).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected.detach(), rtol=1e-4, atol=1e-5)
    assert collator.seen == 16


def test_logs_have_the_statistics_and_reports_get_them(tmp_path: Path) -> None:
    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            SEEN.append(dict(logs))

    SEEN: list[dict[str, float]] = []  # noqa: N806 - filled by the class above
    model = make("vit")
    collator = DataCollatorForPuzzleMix(model, PUZZLE)
    run = trainer(model, tmp_path, collator, max_steps=3, logging_steps=1, eval_strategy="steps", eval_steps=3)
    run.add_callback(Report())
    run.train()
    training = [log for log in SEEN if "loss" in log]
    assert len(training) == 3
    for log in training:
        assert 1 <= log["mixup_inputs_per_output"] <= 2 and 0.5 <= log["mixup_largest_share"] <= 1
        assert 0 <= log["mixup_single_input"] <= 1 and log["mixup_label_entropy"] >= 0
    assert all("mixup_single_input" not in log for log in SEEN if "loss" not in log)
    assert [log["mixup_single_input"] for log in run.state.log_history if "loss" in log] == [
        log["mixup_single_input"] for log in training
    ]
    found = collator.statistics
    assert found is not None  # of everything; the logs are of their own steps
    assert found.single_input == pytest.approx(sum(log["mixup_single_input"] for log in training) / 3)


def test_hardly_any_mixing_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_ENOUGH", 64)
    model = make("vit")
    # smoothness above all: no output shows two inputs
    config = CoMixupConfig(grid=2, part_size=4, beta=100.0, distance_window=2)
    collator = DataCollatorForCoMixup(model, config)
    trainer(model, tmp_path, collator, n=64, max_steps=8).train()
    assert collator.unmixed == collator.seen == 64 and caplog.text.count("show one input only") == 1
