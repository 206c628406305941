"""Scores equal Eq. 8.2 taken from the model's own attention weights; scoring leaves no trace."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import KVzipPrompt, build_prompt
from hf_dataopt.kvzip.reading import check_supported
from hf_dataopt.kvzip.scoring import score_context

from ..models import FAMILIES, byte_tokenizer, held, tiny_model
from ..reference.kvzip import scores_of_attention
from .conftest import CONTEXT, Compressed


@pytest.mark.parametrize(
    ("family", "changes"),
    [(family, {}) for family in FAMILIES]
    # Gemma 3 27B scales its logits by another number than sqrt(head_dim); one KV head crashes the reference code
    + [("gemma3", {"query_pre_attn_scalar": 24}), ("llama", {"num_key_value_heads": 1})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_chunk_is_eq_8_2_of_eager_attention(family: str, changes: dict[str, int], dtype: torch.dtype) -> None:
    """Prefix, context and repeat input in one eager forward; its attention weights are the A of Eq. 8.2."""
    config = KVzipConfig.reference()
    prompt = build_prompt(byte_tokenizer(), CONTEXT, config)
    model = tiny_model(family, **changes).to(dtype)
    scores = score_context(prefill(model, prompt, config), config, progress=False)
    [(start, end, ids)] = prompt.repeat_inputs(config.chunk_size, config.overlap)
    assert (start, end) == (0, prompt.context_ids.numel())
    model.set_attn_implementation("eager")
    whole = torch.cat([prompt.ids, ids])[None]
    with torch.no_grad():
        weights = model(whole, output_attentions=True).attentions
    first, last = prompt.prefix_ids.numel(), prompt.ids.numel()
    kv_heads = model.config.num_key_value_heads
    expected = [
        scores_of_attention(weights[layer][0, :, last:], kv_heads, first, last) for layer in check_supported(model)
    ]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.stack(expected).float(), atol=1e-5, rtol=0)


def test_scoring_leaves_the_cache_and_the_model_as_they_were(compressed: Compressed) -> None:
    config = KVzipConfig(chunk_size=20)
    model = tiny_model(compressed.family)
    prefilled = prefill(model, build_prompt(compressed.tokenizer, CONTEXT, config), config)
    before = [(layer.keys.clone(), layer.values.clone(), layer.get_seq_length()) for layer in prefilled.cache.layers]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[-1]
    score_context(prefilled, config, progress=False)
    for layer, (keys, values, length) in zip(prefilled.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert layer.get_seq_length() == length
    with torch.no_grad():
        assert torch.equal(model(ids, output_hidden_states=True).hidden_states[-1], expected)
        # the full cache still continues the context
        continued = model(ids, **held(prefilled.cache)).logits
        whole = torch.cat([prefilled.prompt.ids[None], ids], dim=1)
        plain = model(whole, **held(DynamicCache(config=model.config))).logits[:, -3:]
    torch.testing.assert_close(continued, plain, atol=1e-4, rtol=0)


def test_local_replay_of_a_single_chunk_is_exact(compressed: Compressed) -> None:
    """With one chunk there is nothing outside of prefix and chunk, so both replays see the same keys."""
    exact = score_context(compressed.prefilled, KVzipConfig(replay="exact"), progress=False)
    local = score_context(compressed.prefilled, KVzipConfig(replay="local"), progress=False)
    assert torch.equal(exact, local)


def test_local_replay_of_several_chunks_is_near(llama: Compressed) -> None:
    exact = score_context(llama.prefilled, KVzipConfig(chunk_size=30, replay="exact"), progress=False)
    local = score_context(llama.prefilled, KVzipConfig(chunk_size=30, replay="local"), progress=False)
    assert not torch.equal(exact, local)
    assert torch.equal(exact[0], local[0]), "the first layer's queries do not depend on what was attended to"
    assert torch.corrcoef(torch.stack([exact.flatten(), local.flatten()]))[0, 1] > 0.8


@pytest.mark.parametrize("chunk_size", [1, 7, 41, 42, 83, 84, 1000])
def test_any_chunk_size_scores_every_token(llama: Compressed, chunk_size: int) -> None:
    scores = score_context(llama.prefilled, KVzipConfig(chunk_size=chunk_size), progress=False)
    assert scores.shape == (3, 2, len(CONTEXT))
    assert (scores > 0).all() and (scores <= 1).all()


def test_blocks_of_the_maximum_do_not_change_it(llama: Compressed, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dataopt.kvzip import weights

    whole = score_context(llama.prefilled, KVzipConfig(), progress=False)
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 500)
    torch.testing.assert_close(score_context(llama.prefilled, KVzipConfig(), progress=False), whole)


def test_a_context_without_prefix() -> None:
    """Hand-made prompts may have no prefix; the first chunk is scored as any other."""
    ids = torch.arange(10, 40)
    prompt = KVzipPrompt(ids[:0], ids, ids[:2], ids[:3], ids[:3])
    model = tiny_model("llama")
    prefilled = prefill(model, prompt)
    for chunk_size in (30, 10):
        scores = score_context(prefilled, KVzipConfig(chunk_size=chunk_size), progress=False)
        assert torch.isfinite(scores).all() and (scores > 0).all()
    cache = KVzipCache.from_scores(prefilled, scores, KVzipConfig(keep_ratio=0.05))
    assert min(map(min, cache.stored_lengths)) == 0, "a head may lose everything"
    with torch.no_grad():
        assert torch.isfinite(model(ids[None, :4], **held(cache)).logits).all()
