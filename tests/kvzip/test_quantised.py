"""8 and 4 bits: codes equal the quantiser written out, attention is that over the opened pairs, all a cache does goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.kvzip.cache import KVzipLayer
from hf_dataopt.kvzip.command import add_arguments
from hf_dataopt.kvzip.config import _CHOICES
from hf_dataopt.kvzip.quantised import BITS, QuantisedRows
from hf_dataopt.kvzip.ragged import QuantisedContext, RaggedContext
from hf_dataopt.kvzip.ragged_attention import attend_ragged

from ..families import FAMILIES
from ..families.plain import generate
from ..hub.damage import without_list
from ..models import byte_tokenizer, held, tiny_model
from ..reference.quantiser import keys_as_stored, values_as_stored
from .conftest import CONTEXT, Compressed
from .exactness import QUESTION
from .peak import PeakOfPairs
from .test_gates import random_gates
from .test_ragged import SCALE, Case, kernel  # noqa: F401 - a fixture

LENGTHS = [70, 0, 129, 64]


def numbers(lengths: list[int], width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows whose channels differ in size and place, as keys do."""
    generator = torch.Generator().manual_seed(width)
    size = torch.logspace(-2, 1, width)[torch.randperm(width, generator=generator)]
    return ((torch.randn(sum(lengths), width, generator=generator) + 2) * size).to(dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [8, 21, 70])
def test_rows_are_those_of_the_slow_quantiser(width: int, bits: int) -> None:
    rows = numbers(LENGTHS, width)
    keys = QuantisedRows.of(rows, LENGTHS, bits, per_channel=True)
    slow = torch.cat([keys_as_stored(part, bits) for part in rows.split(LENGTHS) if len(part)])
    torch.testing.assert_close(keys.opened(LENGTHS), slow, atol=1e-5, rtol=0)
    values = QuantisedRows.of(rows, LENGTHS, bits, per_channel=False)
    torch.testing.assert_close(values.opened(LENGTHS), values_as_stored(rows, bits), atol=1e-5, rtol=0)
    for made in (keys, values):
        heads = [one.opened([n]) for one, n in zip(made.heads(LENGTHS), LENGTHS, strict=True)]
        assert torch.equal(torch.cat(heads), made.opened(LENGTHS))
        assert made.codes.dtype == torch.uint8 and made.scales.dtype == made.zeros.dtype == torch.float16


def test_bytes_are_codes_and_scales_and_zeros_of_keys() -> None:
    lengths = [640, 128]
    for storage, bits in BITS.items():
        context = RaggedContext(numbers(lengths, 64), numbers(lengths, 64), lengths, 900).stored(storage)
        order = 2 * 2 * 64 if storage == "int4" else 0
        assert context.nbytes == 768 * 2 * 64 * bits // 8 + 768 * 64 // 64 * (4 + 2) + order
        assert context.full_nbytes == 2 * 900 * 2 * 64 * 4  # heads, tokens, keys and values, numbers, bytes


def test_groups_without_a_range_and_numbers_beyond_16_bits() -> None:
    rows = torch.full((70, 8), -3.25)
    for bits in (8, 4):
        for per_channel in (True, False):
            found = QuantisedRows.of(rows, [70], bits, per_channel=per_channel).opened([70])
            torch.testing.assert_close(found, rows, atol=2e-3 * (not per_channel), rtol=0)
            zero = QuantisedRows.of(rows * 0, [70], bits, per_channel=per_channel).opened([70])
            assert torch.equal(zero, rows * 0)
            for far in (7e4, -7e4, float("nan")):
                with pytest.raises(ValueError, match="storage='model'"):
                    QuantisedRows.of(torch.full((3, 8), far), [3], bits, per_channel=per_channel)
    empty = QuantisedRows.of(torch.empty(0, 8), [0, 0], 4, per_channel=True)
    assert empty.opened([0, 0]).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("storage", list(BITS))
def test_attention_is_that_over_the_opened_pairs(storage: Any, dtype: torch.dtype) -> None:
    case = Case(LENGTHS, dtype)
    stored = case.context.stored(storage)
    keys, values = stored.opened()
    assert keys.dtype == values.dtype == dtype and stored.dtypes == (dtype, dtype) and stored.widths == (16, 16)
    case.key[0][case.keep], case.value[0][case.keep] = keys, values
    expected, expected_lse = case.dense()
    output, lse = attend_ragged(case.query, stored, scale=SCALE)
    seen = torch.tensor(LENGTHS).repeat_interleave(2) > 0
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double()[:, seen], expected[:, seen], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=0)


def test_kernels_of_a_gpu_are_given_the_opened_layer(kernel: str) -> None:  # noqa: F811
    case = Case(LENGTHS, torch.bfloat16)
    stored = case.context.stored("int4")
    opened = RaggedContext(*stored.opened(), stored.lengths, stored.n_tokens)
    for one, other in zip(*(attend_ragged(case.query, made, scale=SCALE) for made in (stored, opened)), strict=True):
        assert torch.equal(one, other)


# -- caches


def test_logits_come_close_and_closer_with_more_bits(compressed: Compressed) -> None:
    ids = torch.arange(20, 32)[None]
    exact = compressed.logits(compressed.cache(0.5), ids)
    off = []
    for storage in BITS:
        config = KVzipConfig(keep_ratio=0.5, storage=storage)  # type: ignore[arg-type]
        cache = KVzipCache.from_scores(compressed.prefilled, compressed.scores, config)
        assert cache.stored_lengths == compressed.cache(0.5).stored_lengths
        assert cache.full_context_nbytes == compressed.cache(0.5).full_context_nbytes
        off.append(float((compressed.logits(cache, ids) - exact).abs().mean() / exact.abs().mean()))
        other = cache.fork()
        for one, two in zip(cache.pristine_layers, other.pristine_layers, strict=True):
            assert not isinstance(one, KVzipLayer) or one.context is two.context
    assert 0 < off[0] < 0.1 * off[1] and off[1] < 0.3


@pytest.mark.parametrize("storage", list(BITS))
def test_batches_beams_and_questions_in_turn(storage: Any) -> None:
    model, tokenizer = tiny_model("qwen3"), byte_tokenizer()
    config = KVzipConfig(keep_ratio=0.5, storage=storage)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, progress=False)
    opened = opened_twin(cache)
    for settings in ({}, {"num_beams": 3}):
        asked = [QUESTION, "Is it?"]
        found = [generate(model, 6, **made.inputs(asked), **settings) for made in (cache, opened)]
        assert torch.equal(found[0].sequences, found[1].sequences)
    together = torch.stack(generate(model, 4, **cache.inputs(asked)).logits, dim=1)
    alone = torch.stack([torch.cat(generate(model, 4, **cache.inputs(one)).logits) for one in asked])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def opened_twin(cache: KVzipCache) -> KVzipCache:
    """The same cache with the opened pairs as the model would have made them."""
    layers = cache.pristine_layers
    for layer in layers:
        if isinstance(layer, KVzipLayer):
            layer.context = RaggedContext(*layer.context.opened(), layer.context.lengths, layer.context.n_tokens)
    twin = KVzipCache(layers, cache.prompt, cache.config, cache.tokenizer, cache.made_by)
    return twin


def test_latents_that_the_model_expands() -> None:
    model, tokenizer = FAMILIES["deepseek_v3"].model(), byte_tokenizer()
    config = KVzipConfig(keep_ratio=0.5, storage="int4", chunk_size=32)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, progress=False)
    assert all(layer.latent and isinstance(layer.context, QuantisedContext) for layer in cache.layers)
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        found, expected = (model(ids, **held(made.fork())).logits for made in (cache, opened_twin(cache)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("storage", list(BITS))
def test_gates_quantise_what_is_left_in_the_end(storage: Any) -> None:
    model, tokenizer = tiny_model("gemma3"), byte_tokenizer()
    gates, config = random_gates(model), KVzipConfig(keep_ratio=0.4, storage=storage)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, gates=gates, progress=False)
    prefilled, scores = gates.prefill(model, cache.prompt, config, progress=False)
    whole = KVzipCache.from_scores(prefilled, scores, config, tokenizer=tokenizer)
    for one, other in zip(cache.pristine_layers, whole.pristine_layers, strict=True):
        assert isinstance(one, KVzipLayer) == isinstance(other, KVzipLayer)
        if isinstance(one, KVzipLayer):
            assert one.context.lengths == other.context.lengths
            for name, tensor in one.context.tensors.items():
                assert torch.equal(tensor, other.context.tensors[name])


def test_one_head_is_open_at_a_time() -> None:
    heads, width = 4, 8
    model, tokenizer = tiny_model("qwen3", num_key_value_heads=heads), byte_tokenizer()
    config = KVzipConfig(keep_ratio=1.0, storage="int4")
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT * 3, config=config, progress=False)
    layer = cache.full_context_nbytes // 3
    with PeakOfPairs(width, heads) as peak, torch.no_grad():
        model(torch.arange(20, 24)[None], **held(cache.fork()))
    assert layer // heads < peak.bytes < 0.9 * layer  # a head's keys and values, and steps on the way to them


# -- files


@pytest.mark.parametrize("family, storage", [("llama", "int8"), ("gemma3", "int4")])
def test_saved_and_loaded_bit_for_bit(family: str, storage: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), byte_tokenizer()
    config = KVzipConfig(keep_ratio=0.4, storage=storage)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT * 2, config=config, progress=False)
    cache.save_pretrained(tmp_path / "c")
    loaded = KVzipCache.from_pretrained(tmp_path / "c", tiny_model(family), tokenizer)
    assert loaded.config == config and loaded.nbytes == cache.nbytes
    for one, other in zip(cache.pristine_layers, loaded.pristine_layers, strict=True):
        if isinstance(one, KVzipLayer):
            assert one.context.lengths == other.context.lengths
            for name, tensor in one.context.tensors.items():
                assert torch.equal(tensor, other.context.tensors[name])
    loaded.save_pretrained(tmp_path / "twice")
    for name in ("cache.safetensors", "hf_dataopt.json", "README.md"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert storage in (tmp_path / "c" / "README.md").read_text()


def test_codes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("qwen3"), byte_tokenizer()
    config = KVzipConfig(storage="int4")
    KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, progress=False).save_pretrained(tmp_path)
    without_list(tmp_path)
    whole = load_file(tmp_path / "cache.safetensors")
    scales, order = whole["layer.1.keys.scales"], whole["layer.0.keys.order"]
    for name, value in (
        ("layer.0.keys.codes", whole["layer.0.keys.codes"][1:]),
        ("layer.0.keys.codes", whole["layer.0.keys.codes"].int()),
        ("layer.0.values.codes", whole["layer.0.values.codes"][:, 1:]),
        ("layer.1.keys.scales", scales.float()),
        ("layer.1.keys.scales", scales[1:]),
        ("layer.1.keys.scales", -scales),
        ("layer.1.keys.scales", scales * float("nan")),
        ("layer.1.keys.scales", torch.full_like(scales, 60_000)),
        ("layer.2.keys.zeros", torch.full_like(whole["layer.2.keys.zeros"], 65_504)),
        ("layer.2.values.scales", torch.full_like(whole["layer.2.values.scales"], 10_000)),
        ("layer.0.keys.order", order * 0),
        ("layer.0.keys.order", order - 1),
        ("layer.0.keys.order", order[:1]),
    ):
        save_file({**whole, name: value.contiguous()}, tmp_path / "cache.safetensors")
        with pytest.raises(ValueError, match="no whole cache"):
            KVzipCache.from_pretrained(tmp_path, model)
    save_file({k: v for k, v in whole.items() if k != "layer.2.keys.order"}, tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="no whole cache"):
        KVzipCache.from_pretrained(tmp_path, model)
    save_file(whole, tmp_path / "cache.safetensors")
    about = json.loads((tmp_path / "hf_dataopt.json").read_text())
    for storage in ("model", "int8"):
        about["config"]["storage"] = storage
        (tmp_path / "hf_dataopt.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match="no whole cache"):
            KVzipCache.from_pretrained(tmp_path, model)


def test_the_command_offers_every_storage() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    [option] = [one for one in parser._actions if one.dest == "storage"]
    assert tuple(option.choices) == _CHOICES["storage"] and option.default == KVzipConfig().storage
