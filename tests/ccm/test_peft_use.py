"""PEFT as people use it, row by row: each use is honoured, or refused with words before anything is touched.

The invariant behind every row: without compression tokens the model is its base, bit for bit (Eq. 7.4), and no adapter stops
acting in silence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_dataopt import CCMConfig, CompressedContextMemory, DataCollatorForCCM

from ..models import byte_tokenizer, tiny_model
from .models import adapted, sample

PLAIN = torch.tensor([[5, 6, 7, 8]])


def plain(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PLAIN).logits


def remembered(model: Any) -> torch.Tensor:
    """Logits behind a memory of two turns."""
    memory = CompressedContextMemory(model)
    for turn in ([5, 9, 12], [30, 31]):
        memory.append(turn)
    return memory.logits([7, 8])


def refused(make: Callable[[], Any], base: Any, words: str) -> None:
    """`make` is refused with `words`, and the base stays what it was, names and logits."""
    before, names = plain(base), [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=words):
        make()
    assert torch.equal(plain(base), before) and names == [name for name, _ in base.named_modules()]


FIELDS = {
    "pissa": ({"init_lora_weights": "pissa"}, "would change the base model's weights"),
    "lora_bias": ({"lora_bias": True}, "a bias on the LoRA would act on every token"),
    "dora": ({"use_dora": True}, "DoRA rescales the base weights"),
    "qalora": ({"use_qalora": True}, "without the mask"),
    "alora": ({"alora_invocation_tokens": [5, 6]}, "all tokens after its own invocation tokens"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "fully trained modules would act on every token"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "compression tokens have their own"),
}


@pytest.mark.parametrize("row", FIELDS)
def test_fields_that_reach_other_tokens_are_refused(row: str) -> None:
    settings, words = FIELDS[row]
    base = tiny_model("llama")
    refused(lambda: get_peft_model(base, CCMConfig(r=4, **settings)), base, words)
    late = CCMConfig(r=4)  # as configs read from a file, or edited, come to us
    for name, value in settings.items():
        setattr(late, name, value)
    refused(lambda: get_peft_model(base, late), base, words)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    base = plain(tiny_model("llama"))
    rooted, same, usual = (
        adapted(r=4, lora_alpha=alpha, use_rslora=use) for alpha, use in ((16, True), (32, False), (16, False))
    )
    assert torch.equal(plain(rooted), base)
    torch.testing.assert_close(remembered(rooted), remembered(same), rtol=0, atol=1e-6)
    assert not torch.allclose(remembered(rooted), remembered(usual), atol=1e-3)


def with_lora() -> PeftModel:
    settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model("llama"), settings, adapter_name="style").eval()


def test_a_plain_lora_beside_ours_is_merged_first() -> None:
    style = with_lora()
    styled = plain(style)
    refused(lambda: get_peft_model(style, CCMConfig(r=4)), style, "already has the adapter 'style'.*merge_and_unload")
    model = get_peft_model(style.merge_and_unload(), CCMConfig(r=4)).eval()
    torch.testing.assert_close(plain(model), styled, rtol=0, atol=1e-4)


def test_a_plain_lora_added_to_ours_is_refused() -> None:
    model = adapted()
    refused(
        lambda: model.add_adapter("style", LoraConfig(r=4, target_modules=["q_proj"])), model, "different peft types"
    )


def test_two_active_adapters_are_refused_and_the_first_goes_on() -> None:
    model = adapted()
    before = remembered(model)
    model.add_adapter("second", CCMConfig(r=2))
    refused(lambda: model.base_model.set_adapter(["default", "second"]), model, "one conditional LoRA can be active")
    refused(lambda: model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both"), model, "cannot be combined")
    assert torch.equal(remembered(model), before)


def test_an_adapter_deleted_and_added_again_is_a_new_one() -> None:
    model = adapted()
    model.add_adapter("second", CCMConfig(r=2, lora_dropout=0.0))
    model.set_adapter("second")
    fresh = remembered(model)
    for name, weight in model.named_parameters():
        if ".lora_B.second" in name or name.endswith("lora_comp_embeddings.second"):
            weight.data.add_(0.5)
    assert not torch.allclose(remembered(model), fresh)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    model.add_adapter("second", CCMConfig(r=2, lora_dropout=0.0))
    model.set_adapter("second")
    # B starts at zero and the embeddings at the vocabulary's means: nothing of the old one is left
    torch.testing.assert_close(remembered(model), fresh, rtol=0, atol=1e-5)


def test_merging_is_refused_and_unloading_gives_the_base() -> None:
    model, base = adapted(), tiny_model("llama", num_hidden_layers=3)
    for merge in (model.merge_and_unload, model.merge_adapter):
        refused(merge, model, "cannot be merged")
    unloaded = model.unload()
    assert torch.equal(plain(unloaded), plain(base))
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]


def test_switched_off_it_is_the_base_and_says_so_of_a_memory() -> None:
    model = adapted()
    memory = CompressedContextMemory(model)
    memory.append([5, 9, 12])
    with model.disable_adapter():
        assert torch.equal(plain(model), plain(tiny_model("llama", num_hidden_layers=3)))
        with pytest.raises(ValueError, match="adapter that wrote this memory is disabled"):
            memory.logits([7])
    assert memory.logits([7]).shape == (1, 1, 264)


def test_offloaded_weights_answer_as_those_at_hand() -> None:
    from accelerate import cpu_offload

    expected = remembered(adapted())
    away = cpu_offload(adapted(), torch.device("cpu"))
    assert next(away.parameters()).device.type == "meta"  # the first parameter tells no device
    torch.testing.assert_close(remembered(away), expected, rtol=0, atol=1e-5)


class Packed(nn.Module):
    """What quantising back ends put in place of a linear layer: not `nn.Linear`, no plain weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.register_buffer("qweight", (layer.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scale).T


def test_a_quantised_base_is_refused_where_its_layers_compute_the_update_themselves() -> None:
    base = tiny_model("llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    refused(lambda: get_peft_model(base, CCMConfig(r=4, target_modules=["q_proj"])), base, "q_proj|not supported")


def test_a_quantised_base_is_honoured_where_others_layers_are_adapted() -> None:
    base = tiny_model("llama")
    for layer in base.model.layers:
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    before = plain(base)
    model = get_peft_model(base, CCMConfig(r=4, lora_dropout=0.0)).eval()
    assert torch.equal(plain(model), before) and torch.isfinite(remembered(model)).all()


def packed_by(kind: type[nn.Module], base: Any) -> Any:
    """CCM on a base whose query projections are packed and adapted by PEFT's layers of that kind."""
    for layer in base.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    base.is_quantized = True
    config = CCMConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    config._register_custom_module({Packed: kind})
    return get_peft_model(base, config)


def test_a_quantised_base_is_honoured_where_its_layers_leave_the_update_to_us() -> None:
    from peft.tuners.lora.gptq import GPTQLoraLinear

    model = packed_by(GPTQLoraLinear, tiny_model("llama"))
    with model.disable_adapter():
        expected = plain(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(model.eval()), expected)
    inside = remembered(model)
    for layer in model.modules():
        if isinstance(layer, GPTQLoraLinear):
            layer.lora_B["default"].weight.data.zero_()
    assert not torch.allclose(remembered(model), inside, atol=1e-4)  # the packed layers' own update was in it


def test_a_quantised_base_is_refused_where_its_layers_leave_nothing_to_us() -> None:
    from peft.tuners.lora.awq import AwqLoraLinear

    base = tiny_model("llama")
    with pytest.raises(ValueError, match=r"cannot adapt q_proj \(AwqLoraLinear\) on some tokens only"):
        packed_by(AwqLoraLinear, base)
    assert not any("lora_" in name for name, _ in base.named_modules())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_layers_are_adapted_and_trained(bits: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(str(tmp_path))
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path), quantization_config=settings, device_map="cpu")
    model = get_peft_model(base, CCMConfig(r=4, lora_dropout=0.0)).train()
    model(**DataCollatorForCCM(None, model.peft_config["default"])([sample()])).loss.backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert moved and all(".lora_" in name for name in moved)
    before = plain(model.eval())
    assert torch.isfinite(remembered(model)).all() and torch.equal(plain(model), before)


def test_half_precision_adapters_are_read_back_in_full(tmp_path: Path) -> None:
    model = adapted()
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.half()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=3), str(tmp_path)).eval()
    assert {weight.dtype for name, weight in again.named_parameters() if ".lora_" in name} == {torch.float32}
    torch.testing.assert_close(remembered(again), remembered(adapted()), rtol=0, atol=1e-2)


def test_what_peft_saves_and_pushes_has_our_card_and_the_base(tmp_path: Path) -> None:
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "Compressed Context Memory adapter" in text and "[More Information Needed]" not in text
    assert "base_model: someone/base" in text and "load_ccm('OWNER/NAME', base='someone/base')" in text.replace(
        '"', "'"
    )
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    model.save_pretrained(str(tmp_path))
    assert "# My own words" in (tmp_path / "README.md").read_text()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)  # a folder of this machine is nobody's base
    model.save_pretrained(str(tmp_path / "other"))
    assert str(tmp_path) not in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_s_trainer_trains_it(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = adapted()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    collator = DataCollatorForCCM(byte_tokenizer(), model.peft_config["default"])
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = Dataset.from_list([sample(seed=k) for k in range(4)])
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, processing_class=byte_tokenizer()
    )
    trainer.train()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all(".lora_" in name for name in moved)
