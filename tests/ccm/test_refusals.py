"""What Eq. 7.4 forbids is refused before anything is touched: settings of LoRA, and other adapters beside ours."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from hf_dataopt import CCMConfig
from hf_dataopt.ccm import config as settings_of

from ..models import tiny_model
from .models import adapted

IDS = torch.tensor([[5, 6, 7, 8]])
OTHERS: dict[str, list[Any]] = {
    "bias": ["all", "lora_only"],
    "lora_bias": [True],
    "use_dora": [True],
    "modules_to_save": [["lm_head"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "target_parameters": [["experts.gate_up_proj"]],
    "layer_replication": [[(0, 2), (1, 3)]],
    "alora_invocation_tokens": [[5, 6]],
    "use_qalora": [True],
    "megatron_config": [{"a": 1}],
    "velora_config": [{"num_groups": 2}],
    "monteclora_config": [{}, {"num_samples": 2}],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 2}],
    "kasa_config": [{"beta": 0.1}],
    "loftq_config": [{"loftq_bits": 4}],
    "corda_config": [{"corda_method": "ipm"}],
    "lora_ga_config": [{"direction": "ArBr"}],
    "eva_config": [{"rho": 2.0}],
}


def plain_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga", "mica", "later"]
)
def test_starts_that_change_the_base_are_refused(init: str) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*Eq. 7.4.*'gaussian'"):
        CCMConfig(init_lora_weights=init)  # type: ignore[arg-type]


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_other_starts_leave_plain_text_alone(init: Any) -> None:
    before = plain_logits(tiny_model("llama"))
    model = get_peft_model(tiny_model("llama"), CCMConfig(r=4, init_lora_weights=init)).eval()
    assert torch.equal(plain_logits(model), before)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in OTHERS.items() for value in values])
def test_forbidden_fields_are_refused(field: str, value: Any) -> None:
    if field not in {one.name for one in fields(LoraConfig)}:
        pytest.skip(f"this peft has no {field}")
    with pytest.raises(ValueError, match=rf"{field}=.*is refused.*Eq. 7.4.*leave {field} at"):
        CCMConfig(**{field: value})


def test_every_field_of_lora_is_decided() -> None:
    known = {one.name for one in fields(LoraConfig)}
    assert set(OTHERS) == set(settings_of._FORBIDDEN)
    assert not set(settings_of._FORBIDDEN) & settings_of._ALLOWED
    assert known <= set(settings_of._FORBIDDEN) | settings_of._ALLOWED


def test_fields_of_a_later_peft_are_refused_unless_at_their_default() -> None:
    @dataclass
    class Later(CCMConfig):
        use_everything: bool = False

    assert Later().use_everything is False
    with pytest.raises(ValueError, match="use_everything=True is refused: this field of a newer peft"):
        Later(use_everything=True)


def test_allowed_fields_still_work() -> None:
    config = CCMConfig(
        r=4,
        use_rslora=True,
        exclude_modules=["o_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 4},
        layers_to_transform=[0, 1],
        modules_to_save=[],
    )
    before = plain_logits(tiny_model("llama"))
    assert torch.equal(plain_logits(get_peft_model(tiny_model("llama"), config).eval()), before)


def test_settings_changed_later_are_refused_at_injection() -> None:
    config = CCMConfig(r=4)
    config.use_dora = True
    base = tiny_model("llama")
    before = plain_logits(base)
    with pytest.raises(ValueError, match="use_dora=True is refused"):
        get_peft_model(base, config)
    assert torch.equal(plain_logits(base), before) and not any("lora" in name for name, _ in base.named_modules())


def styled(name: str) -> PeftModel:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=name).eval()
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            weight.data.fill_(0.3)
    return model


@pytest.mark.parametrize("name", ["style", "default"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_plain_lora_is_never_lost(name: str, inner: bool) -> None:
    lora = styled(name)
    before, modules = plain_logits(lora), [module_name for module_name, _ in lora.named_modules()]
    with pytest.raises(ValueError, match=f"already has the adapter '{name}'.*merge_and_unload"):
        get_peft_model(lora.get_base_model() if inner else lora, CCMConfig(r=4))
    assert torch.equal(plain_logits(lora), before) and modules == [
        module_name for module_name, _ in lora.named_modules()
    ]
    assert type(lora.peft_config[name]) is LoraConfig and list(lora.peft_config) == [name]
    merged = get_peft_model(lora.merge_and_unload(), CCMConfig(r=4)).eval()
    torch.testing.assert_close(plain_logits(merged), before, rtol=0, atol=1e-4)


def test_transformers_own_adapters_are_never_lost() -> None:
    model = tiny_model("llama")
    # what `model.add_adapter` of transformers calls, behind a check of peft's version
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), model, "style")
    before = plain_logits(model)
    with pytest.raises(ValueError, match="already has the adapter 'style'"):
        inject_adapter_in_model(CCMConfig(r=4), model, "ccm")
    assert torch.equal(plain_logits(model), before) and list(model.peft_config) == ["style"]


def test_a_plain_lora_that_comes_later_acts_or_is_refused() -> None:
    with pytest.raises(ValueError, match="different peft types"):
        adapted().add_adapter("style", LoraConfig(r=4, target_modules=["q_proj"]))
    ours = adapted()
    before = plain_logits(ours)
    above = get_peft_model(ours, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "style").eval()
    assert not torch.allclose(plain_logits(above), before)
    with pytest.raises(ValueError, match="adapter is disabled"):  # ours does not act any more, and says so
        above(torch.tensor([[5, 6, 264, 265]]))


def test_our_own_adapters_live_together() -> None:
    model = adapted()
    model.add_adapter("second", CCMConfig(r=2))
    assert set(model.peft_config) == {"default", "second"}
    with pytest.raises(ValueError, match=r"model.add_adapter\(name"):
        get_peft_model(model, CCMConfig(r=2), adapter_name="third")
