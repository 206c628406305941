"""The conditional LoRA as a PEFT type: base model untouched, adapters, checkpointing, save and load, Trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from hf_dataopt import CCMConfig, DataCollatorForCCM

from ..models import byte_tokenizer, tiny_model
from .models import adapted, sample


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(memory="merge").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        batch = DataCollatorForCCM(None, model.peft_config["default"])([sample()])
        losses = [model(**batch).loss, model(**batch).loss]
        sum(losses).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert sum(bool(gradient.any()) for gradient in gradients[0].values()) > len(gradients[0]) // 2
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_the_base_model_stays() -> None:
    base = tiny_model("qwen3")
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        expected = base(ids).logits
        model = adapted("qwen3")
        assert torch.equal(model(ids).logits, expected)
        with_comp = torch.cat([ids[:, :9], torch.tensor([model.peft_config["default"].comp_token_ids]), ids[:, 9:]], 1)
        assert not torch.allclose(model(with_comp).logits[:, -5:], expected[:, -5:])
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="compression tokens only"):
                merge()
        assert torch.equal(model.unload()(ids).logits, expected)
    trained = {name.split(".lora_")[1].split(".")[0] for name, p in adapted().named_parameters() if p.requires_grad}
    assert trained == {"A", "B", "comp_embeddings"}


def test_several_adapters() -> None:
    model = adapted(memory="concat")
    batch = DataCollatorForCCM(None, model.peft_config["default"])([sample()])
    with torch.no_grad():
        first = model(**batch).logits
        model.add_adapter("other", CCMConfig(r=2, memory="merge"))
        model.set_adapter("other")
        assert not torch.allclose(model(**batch).logits, first)
        model.set_adapter("default")
        assert torch.equal(model(**batch).logits, first)
        model.delete_adapter("other")
        assert torch.equal(model(**batch).logits, first)


_READ = """
import sys, torch
{line}
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
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
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CCMConfig(r=4, lora_dropout=0.0))
    data = [
        {"messages": [{"role": "user" if i % 2 else "assistant", "content": f"turn {i} {k}"} for i in range(4)]}
        for k in range(8)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        remove_unused_columns=False, use_cpu=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForCCM(byte_tokenizer(), model.peft_config["default"])
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    ids = collator(data[:2])["input_ids"]
    with torch.no_grad():
        torch.save((ids, model(ids).logits), tmp_path / "logits.pt")
    for line, expected in (("import hf_dataopt", "equal"), ("", "KeyError: 'CCM'")):
        done = subprocess.run(
            [sys.executable, "-c", _READ.format(line=line), str(tmp_path), str(tmp_path / "logits.pt")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert expected in done.stdout + done.stderr, done.stderr


def test_settings() -> None:
    for settings in (
        {"memory": "sum"},
        {"num_comp_tokens": 0},
        {"merge_weight": 0.5},
        {"memory": "merge", "merge_weight": 2},
    ):
        with pytest.raises(ValueError):
            CCMConfig(**settings)
    model = adapted()
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="empty batch"):
        DataCollatorForCCM(None, model.peft_config["default"])([])
