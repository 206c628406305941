"""Adapters know the model they were trained on: any other is refused by name, and `load_ccm` finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_dataopt import CCMConfig, load_ccm
from hf_dataopt.ccm.active import base_identity
from hf_dataopt.ccm.saved import base_of, load_adapter, save_adapter

from ..models import byte_tokenizer, tiny_model
from .models import adapted

TURN, QUESTION = [5, 9, 12, 40], [7, 8, 30]


def base(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("llama", num_hidden_layers=3).to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(adapted(), tmp_path / "adapter")


def test_the_record_of_a_base_sees_through_adapters() -> None:
    plain, model = base(), adapted()
    assert base_identity(model) == base_identity(plain)
    with torch.no_grad():
        plain.lm_head.weight[0, 0] += 1
    assert base_identity(plain)["weights"] != base_identity(model)["weights"]


def test_its_own_base_is_taken_in_any_dtype(folder: Path) -> None:
    assert load_adapter(base(), folder).peft_config["default"].memory == "concat"
    assert load_adapter(base(torch.bfloat16), folder).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_another_tuning_of_the_base_is_refused(folder: Path, name: str) -> None:
    tuned = base()
    with torch.no_grad():
        tuned.get_parameter(name).mul_(1.01)
    with pytest.raises(ValueError, match="made by other weights .*train an adapter on this one"):
        load_adapter(tuned, folder)


def test_a_base_is_named_and_told_how_it_was_tuned(tmp_path: Path) -> None:
    folder = save_adapter(adapted(), tmp_path / "adapter", trained_on="Tiny Llama, 40 steps on *my* chats")
    assert json.loads((folder / "hf_dataopt.json").read_text())["base"]["tuned"] == "Tiny Llama, 40 steps on *my* chats"
    assert "for `Tiny Llama, 40 steps on *my* chats`: it compresses" in (folder / "README.md").read_text()
    tuned = base()
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"trained on 'Tiny Llama, 40 steps on \*my\* chats'.* made by other weights"):
        load_adapter(tuned, folder)
    with pytest.raises(ValueError, match="trained_on"):
        save_adapter(adapted(), tmp_path / "other", trained_on="")


def test_a_base_of_other_sizes_is_refused_in_any_dtype(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="num_hidden_layers 3, here 2"):
            load_adapter(tiny_model("llama", num_hidden_layers=2).to(dtype), folder)


def test_weights_that_cannot_be_compared_are_not(folder: Path) -> None:
    half = base()
    half.model.norm.weight = torch.nn.Parameter(
        torch.ones(1, dtype=torch.int8), requires_grad=False
    )  # as a quantised one
    assert "weights" not in base_identity(half)
    record = json.loads((folder / "hf_dataopt.json").read_text())
    assert {"name", "dtype", "sizes", "weights"} == set(record["base"])
    del record["base"]  # of an adapter that 0.1 saved
    (folder / "hf_dataopt.json").write_text(json.dumps(record))
    tuned = base()
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.01)
    assert load_adapter(tuned, folder).peft_config["default"].memory == "concat"


def test_three_things_from_one_name(folder: Path, tmp_path: Path) -> None:
    expected = load_adapter(base(), folder)
    base().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="names no base model on the Hub; give base="):
        load_ccm(folder)
    assert base_of(folder) is None
    model, tokenizer, memory = load_ccm(folder, base=base())
    assert tokenizer is None and memory.model is model and not model.training
    memory.append(TURN)
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([QUESTION])).logits, expected(torch.tensor([QUESTION])).logits)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer, memory = load_ccm(folder, base=tmp_path / "base", dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16 and memory.tokenizer is tokenizer
    assert load_ccm(folder, base=str(tmp_path / "base")).model.dtype == torch.float32  # what it was trained in
    with pytest.raises(TypeError, match="base must be"):
        load_ccm(folder, base=3)


def test_a_base_out_of_a_folder_leaves_no_path(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CCMConfig(num_comp_tokens=2))
    folder = save_adapter(model, tmp_path / "adapter")
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")  # as PEFT has it
    loaded = load_ccm(folder, base=tmp_path / "base", tokenizer=byte_tokenizer()).model
    with torch.no_grad():
        ids = torch.tensor([QUESTION])
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    tuned = base()
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.01)
    with pytest.raises(ValueError, match="the adapter in .* was made by other weights"):
        load_adapter(tuned, folder)


def test_the_base_is_found_by_the_name_that_the_record_gives(folder: Path) -> None:
    record = json.loads((folder / "hf_dataopt.json").read_text())
    for name, found in (("me/tiny", "me/tiny"), ("../x", None), ("OWNER/MODEL", None), (7, None), (None, None)):
        assert base_of(folder, record | {"base": {**record["base"], "name": name}}) == found
        assert base_of(folder, {"code": {"model": name}}) == found
