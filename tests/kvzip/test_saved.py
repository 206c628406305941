"""Saved caches: what is loaded answers as what was saved, for models with and without windows; strangers are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.publishing.identity import identity

from ..hub.damage import without_list
from ..models import byte_tokenizer, tiny_model
from .conftest import CONTEXT

QUESTION = "Who has the key?"


@pytest.mark.parametrize("family, level", [("llama", "pair"), ("gemma3", "pair"), ("qwen3", "head")])
def test_a_loaded_cache_answers_as_the_saved_one(family: str, level: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), byte_tokenizer()
    config = KVzipConfig(keep_ratio=0.4, level=level, chunk_size=16)  # type: ignore[arg-type]
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT * 2, config=config, progress=False)
    before = model.generate(**cache.inputs(QUESTION), max_new_tokens=8, do_sample=False)
    cache.save_pretrained(tmp_path / "c")
    again = tiny_model(family)  # equal weights, another object
    loaded = KVzipCache.from_pretrained(tmp_path / "c", again, tokenizer)
    assert loaded.config == config and loaded.stored_lengths == cache.stored_lengths and loaded.nbytes == cache.nbytes
    assert torch.equal(again.generate(**loaded.inputs(QUESTION), max_new_tokens=8, do_sample=False), before)
    loaded.save_pretrained(tmp_path / "twice")
    for name in ("cache.safetensors", "hf_dataopt.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    KVzipCache.from_context(model, tokenizer, CONTEXT, progress=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another kind of model"):
        KVzipCache.from_pretrained(tmp_path, tiny_model("qwen3"))
    with pytest.raises(ValueError, match="other weights"):
        KVzipCache.from_pretrained(tmp_path, tiny_model("llama", seed=1))
    with pytest.raises(ValueError, match="dtype"):
        KVzipCache.from_pretrained(tmp_path, tiny_model("llama").bfloat16())
    tuned = tiny_model("llama")
    with torch.no_grad():
        tuned.model.layers[1].self_attn.k_proj.weight[0].mul_(1.01)
    assert identity(tuned) != identity(model) and identity(tiny_model("llama")) == identity(model)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    KVzipCache.from_context(model, tokenizer, CONTEXT, progress=False).save_pretrained(tmp_path)
    without_list(tmp_path)
    tensors = load_file(tmp_path / "cache.safetensors")
    for name, value in (
        ("layer.0.lengths", torch.tensor([10**6, 3])),
        ("layer.0.lengths", torch.tensor([-1, 3])),
        ("layer.1.keys", tensors["layer.1.keys"][1:]),
        ("layer.2.values", tensors["layer.2.values"].double()),
        ("context_ids", tensors["context_ids"][None]),
        ("context_ids", tensors["context_ids"].float()),
        ("context_ids", tensors["context_ids"] + 10**6),
    ):
        save_file({**tensors, name: value.contiguous()}, tmp_path / "cache.safetensors")
        with pytest.raises(ValueError, match="no whole cache"):
            KVzipCache.from_pretrained(tmp_path, model)
    save_file({k: v for k, v in tensors.items() if k != "layer.2.keys"}, tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="no whole cache"):
        KVzipCache.from_pretrained(tmp_path, model)


def test_a_cache_of_unknown_origin_is_not_saved(tmp_path: Path) -> None:
    cache = KVzipCache.from_context(tiny_model("llama"), byte_tokenizer(), CONTEXT, progress=False)
    with pytest.raises(ValueError, match="does not know its model"):
        KVzipCache(cache.pristine_layers, cache.prompt, cache.config).save_pretrained(tmp_path)
