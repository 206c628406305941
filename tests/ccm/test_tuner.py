"""The conditional LoRA as a PEFT type: base model untouched, several adapters, refusals, every way of loading, copies."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_dataopt import CCMConfig, CompressedContextMemory, DataCollatorForCCM
from hf_dataopt.ccm.tuner import EMBEDDINGS

from ..models import tiny_model
from .models import adapted, sample


def batch_for(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    return DataCollatorForCCM(None, model.peft_config[adapter])([sample()])


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def randomize(model: PeftModel, adapter: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and f".{adapter}" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


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
            with pytest.raises(ValueError, match="adapter is disabled"):
                model(with_comp)
        memory = CompressedContextMemory(model)
        memory.append([5, 6, 7])
        inputs = memory.inputs([8, 9])
        with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
            model(**inputs)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="compression tokens only"):
                merge()
        plain = model.unload()
        assert torch.equal(plain(ids).logits, expected)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in base.named_parameters()]


def test_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[1].split(".")[0] for name in trained} == {"A", "B", "comp_embeddings"}
    model.print_trainable_parameters()
    assert f"trainable params: {sum(p.numel() for p in trained.values()):,} ||" in capsys.readouterr().out


def test_several_adapters(tmp_path: Path) -> None:
    model = adapted(memory="concat")
    first = logits(model, batch_for(model))
    model.add_adapter("other", CCMConfig(r=2, memory="merge", num_comp_tokens=3, lora_dropout=0.0))
    randomize(model, "other")
    assert torch.equal(logits(model, batch_for(model)), first)
    model.set_adapter("other")
    assert {name.split(".")[-1 if "embeddings" in name else -2] for name, p in model.named_parameters()
            if p.requires_grad} == {"other"}  # fmt: skip
    second = logits(model, batch_for(model, "other"))
    assert CompressedContextMemory(model).config.num_comp_tokens == 3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    again.load_adapter(tmp_path / "other", adapter_name="other")
    assert torch.equal(logits(again, batch_for(again)), first)
    again.set_adapter("other")
    assert torch.equal(logits(again, batch_for(again, "other")), second)
    for refused in (
        lambda: model.base_model.set_adapter(["default", "other"]),
        lambda: model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both"),
        lambda: model(**batch_for(model), adapter_names=["default"]),
        lambda: model.add_adapter("plain", LoraConfig(target_modules=["q_proj"])),
    ):
        with pytest.raises(ValueError, match="one conditional|combine|mix"):
            refused()
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model, batch_for(model)), first)


def test_every_way_of_loading(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = adapted(memory="merge")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    batch, adapter = batch_for(model), str(tmp_path / "adapter")
    expected = logits(model, batch)
    native = tiny_model("llama")
    native.load_adapter(adapter)
    loaded = {
        "peft": PeftModel.from_pretrained(tiny_model("llama"), adapter),
        "peft, low memory": PeftModel.from_pretrained(tiny_model("llama"), adapter, low_cpu_mem_usage=True),
        "auto": AutoPeftModelForCausalLM.from_pretrained(adapter),
        "transformers": AutoModelForCausalLM.from_pretrained(adapter),
        "transformers, load_adapter": native,
        "copy": copy.deepcopy(model),
    }
    del model
    for name, other in loaded.items():
        assert torch.equal(logits(other, batch), expected), name
    trainable = PeftModel.from_pretrained(tiny_model("llama"), adapter, is_trainable=True)
    assert any("comp_embeddings" in name for name, p in trainable.named_parameters() if p.requires_grad)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"].startswith("CCM")


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model = adapted()
    batch = batch_for(model)
    model.save_pretrained(tmp_path)
    larger = tiny_model("llama")
    larger.resize_token_embeddings(270)
    with pytest.raises(ValueError, match="trained on 264 token embeddings.*has 270"):
        PeftModel.from_pretrained(larger, tmp_path)
    model.get_base_model().resize_token_embeddings(270)
    with pytest.raises(ValueError, match="ids from 264 on"):
        model(**batch)


def test_a_copy_is_independent() -> None:
    model = adapted()
    batch = batch_for(model)
    other = copy.deepcopy(model)
    expected = logits(model, batch)
    randomize(other, "default")
    assert not torch.allclose(logits(other, batch), expected)
    with model.disable_adapter():
        logits(other, batch)
    one = CompressedContextMemory(other)
    one.append([5, 6, 7])
    assert one.generate([8, 9], max_new_tokens=2, do_sample=False).shape[1] > 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(family, memory="merge").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        batch = batch_for(model)
        plain = {name: rows[:, :6] for name, rows in batch.items()}
        # two forwards before the backward, and one without compression tokens
        losses = [model(**batch).loss, model(**batch).loss, model(**{**plain, "labels": plain["input_ids"]}).loss]
        sum(losses).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert sum(bool(gradient.any()) for gradient in gradients[0].values()) > len(gradients[0]) // 2
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_a_training_batch_without_contexts() -> None:
    model = adapted().train()
    ids = torch.arange(4, 20)[None]
    output = model(ids, labels=ids)
    with torch.no_grad():
        assert torch.equal(output.logits, tiny_model("llama")(ids).logits)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_bf16(memory: str) -> None:
    full, half = adapted(memory=memory), adapted(memory=memory)
    half.get_base_model().to(torch.bfloat16)
    batch = batch_for(full)
    expected, found = logits(full, batch), logits(half, batch)
    assert found.dtype == torch.bfloat16
    similarity = torch.nn.functional.cosine_similarity(found[0].float(), expected[0], dim=-1)
    assert similarity.min() > 0.98
    online = CompressedContextMemory(half)
    for context in sample()["contexts"]:
        online.append(context)
    assert online.layers[0][0].dtype == torch.bfloat16
    answer = online.logits([*sample()["input"], *sample()["output"]])[0].float()
    assert torch.nn.functional.cosine_similarity(answer, expected[0, -len(answer) :], dim=-1).min() > 0.98
    half.train()(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)


def test_compile() -> None:
    model = adapted(memory="merge", layers=1)
    batch = batch_for(model)
    gradients = []
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        run(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-5)
    plain = batch["input_ids"][:, :6]
    assert torch.equal(run(plain).logits, model(plain).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compression_tokens_start_from_vocabulary_rows(family: str) -> None:
    base = tiny_model(family)
    looked_up = base.get_input_embeddings()(torch.tensor([[7, 9, 7]]))[0]
    model = get_peft_model(base, CCMConfig(num_comp_tokens=3, comp_init_token_ids=[7, 9]))
    rows = getattr(model.get_base_model().get_input_embeddings(), EMBEDDINGS)["default"]
    torch.testing.assert_close(rows.detach(), looked_up.detach())
    with pytest.raises(ValueError, match="comp_init_token_ids must be in"):
        get_peft_model(tiny_model(family), CCMConfig(comp_init_token_ids=[10**6]))


def test_settings() -> None:
    for settings in (
        {"memory": "sum"},
        {"num_comp_tokens": 0},
        {"num_comp_tokens": True},
        {"merge_weight": 0.5},
        {"memory": "merge", "merge_weight": 2},
        {"comp_init_token_ids": []},
        {"comp_init_token_ids": ["\n"]},
        {"use_dora": True},
        {"bias": "all"},
    ):
        with pytest.raises((ValueError, TypeError), match=list(settings)[-1]):
            CCMConfig(**settings)
    model = adapted()
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    batch = batch_for(model)
    with pytest.raises(ValueError, match="2-D"):
        model(**{**batch, "attention_mask": batch["attention_mask"][:, :5]})


def test_a_mask_that_flash_attention_cannot_take_is_answered_by_sdpa() -> None:
    model = adapted(memory="merge")
    batch = batch_for(model)
    expected = logits(model, batch)
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    assert torch.equal(logits(model, batch), expected)
