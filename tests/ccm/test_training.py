"""Training with the stock Trainer: evaluation, resuming, two processes; the saved adapter in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_dataopt import CCMConfig, DataCollatorForCCM

from ..models import byte_tokenizer, tiny_model
from ..processes import launch
from .models import adapted, sample


def dialogues(count: int, turns: int = 4) -> Dataset:
    """Chats whose last turn is a name said in the first: only the memory knows it."""
    names = ["ada", "bob", "cyd", "dan"]
    rows = []
    for index in range(count):
        said = [f"i am {names[index % 4]}", *(f"turn {i}" for i in range(turns - 2)), names[index % 4]]
        rows.append([{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)])
    return Dataset.from_dict({"messages": rows})


def trainer(model: PeftModel, folder: Path, **changes: Any) -> Trainer:
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "report_to": [],
        "remove_unused_columns": False, "use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    collator = DataCollatorForCCM(byte_tokenizer(), model.peft_config["default"])
    arguments = TrainingArguments(**{**settings, **changes})
    return Trainer(
        model=model, args=arguments, train_dataset=dialogues(8), eval_dataset=dialogues(4, 6), data_collator=collator
    )


def logged(run: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_evaluation_and_resuming(memory: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = {"r": 4, "lora_dropout": 0.0, "memory": memory}
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 0,
               "load_best_model_at_end": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}  # fmt: skip
    run = trainer(get_peft_model(tiny_model("llama"), CCMConfig(**fresh)), tmp_path, **options)
    run.train()
    losses, evaluated = logged(run, "loss"), logged(run, "eval_loss")
    assert losses[-1] < losses[0] and len(evaluated) == 3
    # the weights of the best evaluation are back
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluated), abs=1e-5)
    resumed = trainer(get_peft_model(tiny_model("llama"), CCMConfig(**fresh)), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed, "loss")[-2:] == pytest.approx(losses[-2:], abs=1e-4)


def two_steps(folder: str) -> None:
    """One rank has no context at all in its first batch; layers are recomputed in the backward."""
    torch.set_num_threads(1)
    found = {}
    for memory in ("concat", "merge"):
        model = adapted(memory=memory)
        data = [sample((3 + i % 3,) if i in (1, 3) else (5, 4, 6), seed=i) for i in range(8)]
        run = trainer(model, Path(folder), max_steps=2, per_device_train_batch_size=4 // world(), logging_steps=1,
                      gradient_checkpointing=True, dataloader_num_workers=1)  # fmt: skip
        run.train_dataset = data
        run._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(range(8))  # type: ignore
        run.train()
        found[memory] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save(found, Path(folder) / f"rank{rank()}of{world()}.pt")


def world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def test_two_processes_equal_one(tmp_path: Path) -> None:
    launch(two_steps, str(tmp_path))
    two_steps(str(tmp_path))
    first, second, alone = (torch.load(tmp_path / f"rank{name}.pt") for name in ("0of2", "1of2", "0of1"))
    for memory, parameters in alone.items():
        for name, expected in parameters.items():
            assert torch.equal(first[memory][name], second[memory][name]), name
            torch.testing.assert_close(first[memory][name], expected, rtol=0, atol=1e-3)


_READ = """
import sys, torch
{line}
from transformers import AutoModelForCausalLM
from transformers.utils import is_peft_available
assert is_peft_available()  # looks for peft, and imports nothing
from peft import AutoPeftModelForCausalLM, PeftModel
ids, expected = torch.load(sys.argv[2])
base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
adapter = sys.argv[1] + "/adapter"
for model in (PeftModel.from_pretrained(base, adapter), AutoPeftModelForCausalLM.from_pretrained(adapter)):
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, expected)
sys.stdout.write("equal")
"""


def test_train_save_and_read_in_a_fresh_process(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, CCMConfig(r=4, lora_dropout=0.0))
    run = trainer(model, tmp_path / "run")
    run.train()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert run.data_collator is not None
    ids = run.data_collator(list(dialogues(2)))["input_ids"]
    with torch.no_grad():
        torch.save((ids, model(ids).logits), tmp_path / "logits.pt")
    for line, expected in (("import hf_dataopt", "equal"), ("", "KeyError: 'CCM: run `import hf_dataopt`")):
        done = subprocess.run(
            [sys.executable, "-c", _READ.format(line=line), str(tmp_path), str(tmp_path / "logits.pt")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert expected in done.stdout + done.stderr, done.stderr
        assert ("equal" in done.stdout) == bool(line)
