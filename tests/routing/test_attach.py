"""An attached model is the model it was, to whoever copies, saves, compiles, spreads or reconfigures it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_dataopt import CompressedContextMemory, KVzipCache
from hf_dataopt.kvzip.reading import USER
from hf_dataopt.routing.attach import attach, attached, detach
from hf_dataopt.routing.dispatch import RoutedName, routed

from ..ccm.models import adapted
from ..conftest import REPO
from ..models import byte_tokenizer, tiny_model
from .shared import CONTEXTS, GREEDY, QUESTION, compressed, logits, question_ids


def answers(model: Any, cache: KVzipCache) -> list[int]:
    return model.generate(**cache.inputs(QUESTION), max_new_tokens=8, **GREEDY)[0].tolist()


def test_the_name_reads_as_the_users_choice_and_is_looked_up_as_ours() -> None:
    name = routed("sdpa")
    assert (
        (name == "sdpa", name != "sdpa") == (True, False)
        and name in ("eager", "sdpa")
        and f"{name}" == json.loads(json.dumps(name))
    )
    assert name != "eager" and name == RoutedName("sdpa") and type(str(name)) is str
    assert {name: 1}[routed("sdpa")] == {name: 1}[RoutedName("sdpa")] == 1 and name not in {"sdpa": 1}
    assert copy.deepcopy({"a": name})["a"] is copy.copy(name) is pickle.loads(pickle.dumps(name)) is name


def test_detach_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    before, hooks = dict(vars(model)), [len(module._forward_hooks) for module in model.modules()]
    compressed_here = KVzipCache.from_context(model, byte_tokenizer(), CONTEXTS[0], progress=False)
    assert attached(model)
    detach(model, USER)
    assert not attached(model) and dict(vars(model)) == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert type(model.config._attn_implementation) is str
    with pytest.raises(ValueError, match=r"cache.attach\(model\)"):
        logits(model, compressed_here.fork(), question_ids(compressed_here))


def test_detach_by_one_leaves_it_to_the_other() -> None:
    model, cache = compressed()
    attach(model, "other")
    detach(model, "other")
    assert answers(model, cache)
    attach(model, "other")
    detach(model, USER)
    assert attached(model)
    detach(model, "other")
    assert not attached(model)


def test_what_stood_on_the_instance_before_stands_there_again() -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    plain = model.prepare_inputs_for_generation

    def own(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(input_ids.shape[1])
        return plain(input_ids, **kwargs)

    model.prepare_inputs_for_generation = own
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXTS[0], progress=False)
    answers(model, cache)
    assert seen
    detach(model, USER)
    assert model.prepare_inputs_for_generation is own


def test_a_copy_runs_itself_and_answers_the_same() -> None:
    model, cache = compressed()
    expected = answers(model, cache)
    twin = copy.deepcopy(model)
    assert answers(twin, cache) == expected
    assert twin.prepare_inputs_for_generation.__wrapped__.__self__ is twin
    with torch.no_grad():
        twin.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    third = copy.deepcopy(twin)
    with pytest.raises(ValueError, match="other weights"):
        answers(third, cache)
    assert answers(model, cache) == expected


def test_a_pickled_model_works_in_a_fresh_process(tmp_path: Path) -> None:
    model, cache = compressed()
    expected = answers(model, cache)
    torch.save(model, tmp_path / "model.pt")
    torch.save(cache, tmp_path / "cache.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
print(model(torch.tensor([[5, 6, 7]])).logits.shape[1])  # before anything of ours is named
cache = torch.load({str(tmp_path / "cache.pt")!r}, weights_only=False)
print(model.generate(**cache.inputs({QUESTION!r}), max_new_tokens=8, do_sample=False, eos_token_id=None)[0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3", str(expected)]
    assert answers(model, cache) == expected


def test_save_pretrained_writes_the_users_choice(tmp_path: Path) -> None:
    model, cache = compressed()
    model.set_attn_implementation("eager")
    expected = answers(model, cache)
    model.save_pretrained(tmp_path)
    assert "hf_dataopt" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again.config._attn_implementation) is str
    with pytest.raises(ValueError, match="attach"):
        answers(again, cache)
    cache.attach(again)
    assert answers(again, cache) == expected


def test_masks_of_flex_attention_are_read() -> None:
    """Plain calls would compile for minutes here: calls whose every layer answers by itself."""
    model, cache = compressed()
    ids = question_ids(cache)
    expected = logits(model, cache.fork(), ids)
    batch = model.generate(**cache.inputs([QUESTION, "No?"]), max_new_tokens=5, **GREEDY).tolist()
    model.set_attn_implementation("flex_attention")
    fork = cache.fork()
    found = torch.cat([logits(model, fork, part) for part in ids.split(7, dim=1)], 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert model.generate(**cache.inputs([QUESTION, "No?"]), max_new_tokens=5, **GREEDY).tolist() == batch


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_set_attn_implementation_after_attach_is_followed(family: str) -> None:
    model, cache = compressed(family)
    ids, plain_ids = question_ids(cache), torch.tensor([[5, 6, 7, 8]])
    expected = logits(model, cache.fork(), ids)
    with torch.no_grad():
        plain = model(plain_ids).logits
    batch = model.generate(**cache.inputs([QUESTION, "No?"]), max_new_tokens=5, **GREEDY).tolist()
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        torch.testing.assert_close(logits(model, cache.fork(), ids), expected, atol=1e-4, rtol=0)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            output = model(plain_ids, output_attentions=name == "eager")
        torch.testing.assert_close(output.logits, plain, atol=1e-4, rtol=0)
        assert name != "eager" or output.attentions[0].shape == (1, 4, 4, 4)
        assert model.generate(**cache.inputs([QUESTION, "No?"]), max_new_tokens=5, **GREEDY).tolist() == batch
    assert isinstance(model.config._attn_implementation, RoutedName)


def test_masks_of_flash_attention_are_read() -> None:
    """No such kernel here: only calls whose every layer answers by itself can run under its name."""
    model, cache = compressed()
    ids = question_ids(cache)
    fork = cache.fork()
    expected = [logits(model, fork, part) for part in ids.split(7, dim=1)]
    batch = model.generate(**cache.inputs([QUESTION, "No?"]), max_new_tokens=5, **GREEDY).tolist()
    model.config._attn_implementation = "flash_attention_2"
    fork = cache.fork()
    for part, wanted in zip(ids.split(7, dim=1), expected, strict=True):
        torch.testing.assert_close(logits(model, fork, part), wanted, atol=1e-4, rtol=0)
    assert model.generate(**cache.inputs([QUESTION, "No?"]), max_new_tokens=5, **GREEDY).tolist() == batch


def test_plain_calls_of_an_attached_model_compile_to_one_graph() -> None:
    model, _ = compressed()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(ids).logits, expected)


@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_compiled_models_answer_the_same(when: str) -> None:
    expected_model, expected_cache = compressed()
    model = tiny_model("llama")
    used: Any = torch.compile(model, backend="eager") if when == "before" else model
    cache = KVzipCache.from_context(used, byte_tokenizer(), CONTEXTS[0], keep_ratio=0.5, progress=False)
    if when == "after":
        used = torch.compile(model, backend="eager")
    if when == "in place":
        model.compile(backend="eager")
    assert answers(used, cache) == answers(expected_model, expected_cache)
    ids, fork, other = question_ids(cache), cache.fork(), expected_cache.fork()
    for part in ids.split(6, dim=1):
        found = logits(used, fork, part)
        torch.testing.assert_close(found, logits(expected_model, other, part), atol=1e-5, rtol=0)
    assert fork.get_seq_length() == other.get_seq_length()


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_models_that_accelerate_has_spread(where: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    expected_model, expected_cache = compressed()
    expected = answers(expected_model, expected_cache)
    model = tiny_model("llama")
    spread = disk_offload(model, str(tmp_path)) if where == "disk" else cpu_offload(model, torch.device("cpu"))
    assert where != "disk" or spread.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    cache = KVzipCache.from_context(spread, byte_tokenizer(), CONTEXTS[0], keep_ratio=0.5, progress=False)
    assert answers(spread, cache) == expected


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_adapters_on_models_that_accelerate_has_spread(where: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    at_hand = adapted()
    away = disk_offload(adapted(), str(tmp_path)) if where == "disk" else cpu_offload(adapted(), torch.device("cpu"))
    assert where != "disk" or away.get_base_model().model.layers[0].mlp.up_proj.weight.device.type == "meta"
    found = []
    for model in (at_hand, away):
        memory = CompressedContextMemory(model)
        memory.append([5, 6, 7, 8])
        found.append(memory.logits([9, 10]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_under_peft_before_and_after() -> None:
    from peft import LoraConfig, get_peft_model

    model, cache = compressed()
    expected = answers(model, cache)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    inputs = cache.inputs(QUESTION)
    assert wrapped.generate(**inputs, max_new_tokens=8, **GREEDY)[0].tolist() == expected
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.5)
    ids = question_ids(cache)
    adapted_logits = logits(wrapped, cache.fork(), ids)
    with wrapped.disable_adapter():
        assert (adapted_logits - logits(wrapped, cache.fork(), ids)).abs().max() > 1e-3
        assert wrapped.generate(**cache.inputs(QUESTION), max_new_tokens=8, **GREEDY)[0].tolist() == expected
