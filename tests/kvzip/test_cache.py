"""The cache's invariants.

Evicting nothing changes nothing; forks do not see each other; batching, cropping, reordering and copying leave the shared
context alone; what is evicted is really freed; wrong calls are refused before tokens are lost.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.errors import DroppedTokensError, UnsupportedModelError
from hf_dataopt.kvzip.layers import KVzipLayer, KVzipSlidingLayer
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.reading import USER
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.routing.attach import attached, detach

from ..models import byte_tokenizer, held, tiny_model
from .conftest import CONTEXT, Compressed

QUESTIONS = ["Which key is blue?", "Who has the key of room 3, and what colour is it?"]


def new_ids(text: str) -> torch.Tensor:
    return torch.tensor(byte_tokenizer()(text)["input_ids"])[None]


def full_logits(compressed: Compressed, ids: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([compressed.prefilled.prompt.ids[None].expand(ids.shape[0], -1), ids], dim=1)
    with torch.no_grad():
        return compressed.model(whole).logits[:, -ids.shape[1] :]


def test_nothing_evicted_gives_the_plain_logits(compressed: Compressed) -> None:
    ids = new_ids(QUESTIONS[0])
    logits = compressed.logits(compressed.cache(1.0), ids)
    torch.testing.assert_close(logits, full_logits(compressed, ids), atol=1e-4, rtol=0)


def test_eviction_changes_the_logits(compressed: Compressed) -> None:
    """So that the test above cannot pass for a model that ignores its cache."""
    ids = new_ids(QUESTIONS[0])
    assert (compressed.logits(compressed.cache(0.1), ids) - full_logits(compressed, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_nothing_evicted_generates_the_plain_tokens(compressed: Compressed, mode: dict[str, object]) -> None:
    inputs = compressed.cache(1.0).inputs(QUESTIONS[0])
    ours = compressed.model.generate(**inputs, max_new_tokens=12, **mode)
    plain = compressed.model.generate(inputs["input_ids"], max_new_tokens=12, **mode)
    assert ours.tolist() == plain.tolist()


def test_sampling_is_the_plain_sampling(compressed: Compressed) -> None:
    inputs = compressed.cache(1.0).inputs(QUESTIONS[1])
    torch.manual_seed(3)
    ours = compressed.model.generate(**inputs, max_new_tokens=12, do_sample=True, num_return_sequences=2)
    torch.manual_seed(3)
    plain = compressed.model.generate(inputs["input_ids"], max_new_tokens=12, do_sample=True, num_return_sequences=2)
    assert ours.tolist() == plain.tolist()


def test_prefill_at_once_equals_token_by_token(compressed: Compressed) -> None:
    ids = new_ids(QUESTIONS[0])
    cache = compressed.cache(0.4)
    at_once = compressed.logits(cache.fork(), ids)
    fork = cache.fork()
    one_by_one = torch.cat([compressed.logits(fork, ids[:, i : i + 1]) for i in range(ids.shape[1])], dim=1)
    torch.testing.assert_close(at_once, one_by_one, atol=1e-4, rtol=0)
    fork = cache.fork()
    in_pieces = torch.cat([compressed.logits(fork, piece) for piece in ids.split(5, dim=1)], dim=1)
    torch.testing.assert_close(at_once, in_pieces, atol=1e-4, rtol=0)


def test_logical_length_goes_on_where_the_context_ended(compressed: Compressed) -> None:
    cache = compressed.cache(0.3)
    n = compressed.prefilled.prompt.ids.numel()
    assert cache.get_seq_length() == n
    compressed.logits(cache, new_ids("abc"))
    assert cache.get_seq_length() == n + 3
    stored = torch.tensor(cache.stored_lengths)
    assert (stored >= compressed.prefilled.n_prefix).all() and (stored < n).any()
    assert len({*stored.flatten().tolist()}) > 1, "budgets should differ between heads"


def test_forks_do_not_see_each_other(compressed: Compressed) -> None:
    cache = compressed.cache(0.4)
    ids = [new_ids(question) for question in QUESTIONS]
    alone = [compressed.logits(cache.fork(), one) for one in ids]
    forks = [cache.fork(), cache.fork()]
    # interleaved and in the other order
    second_start = compressed.logits(forks[1], ids[1][:, :4])
    first = compressed.logits(forks[0], ids[0])
    second = torch.cat([second_start, compressed.logits(forks[1], ids[1][:, 4:])], dim=1)
    assert torch.equal(first, alone[0])
    torch.testing.assert_close(second, alone[1], atol=1e-4, rtol=0)


def test_forks_share_the_context_memory(compressed: Compressed) -> None:
    cache = compressed.cache(0.4)
    fork, deep = cache.fork(), copy.deepcopy(cache)
    for index in cache.scored_layers:
        for other in (fork, deep):
            assert other.layers[index].context is cache.layers[index].context


def test_deepcopy_keeps_the_tail_and_is_independent(compressed: Compressed) -> None:
    cache = compressed.cache(0.4)
    compressed.logits(cache, new_ids(QUESTIONS[0]))
    twin = copy.deepcopy(cache)
    assert twin.get_seq_length() == cache.get_seq_length()
    ids = new_ids(" Answer")
    first = compressed.logits(cache, ids)
    assert torch.equal(compressed.logits(twin, ids), first)


def test_crop_takes_back_a_turn(llama: Compressed) -> None:
    cache = llama.cache(0.4)
    expected = llama.logits(cache.fork(), new_ids("second"))
    llama.logits(cache, new_ids("first!"))
    cache.crop(-6)
    torch.testing.assert_close(llama.logits(cache, new_ids("second")), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="cannot be cut"):
        cache.crop(-7)


def test_reset_returns_to_the_compressed_context(compressed: Compressed) -> None:
    cache = compressed.cache(0.4)
    ids = new_ids(QUESTIONS[1])
    expected = compressed.logits(cache.fork(), ids)
    compressed.logits(cache, new_ids(QUESTIONS[0]))
    cache.reset()
    assert torch.equal(compressed.logits(cache, ids), expected)


def test_batch_of_questions_equals_single_questions(compressed: Compressed) -> None:
    cache = compressed.cache(0.4)
    batch = cache.inputs(QUESTIONS)
    with torch.no_grad():
        out = compressed.model.generate(**batch, max_new_tokens=6, do_sample=False)
    for row, question in zip(out, QUESTIONS, strict=True):
        inputs = cache.inputs(question)
        single = compressed.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert row[batch["input_ids"].shape[1] :].tolist() == single[0, inputs["input_ids"].shape[1] :].tolist()


def test_reorder_select_and_repeat_touch_the_tail_only(llama: Compressed) -> None:
    cache = llama.cache(0.4)
    rows = torch.cat([new_ids("aaaa"), new_ids("bbbb")])
    llama.logits(cache, rows)
    expected = llama.logits(copy.deepcopy(cache), torch.cat([new_ids("x"), new_ids("x")]))
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(
        llama.logits(swapped, torch.cat([new_ids("x"), new_ids("x")])), expected.flip(0), atol=1e-5, rtol=0
    )
    one = copy.deepcopy(cache)
    one.batch_select_indices(torch.tensor([1]))
    one.batch_repeat_interleave(3)
    out = llama.logits(one, new_ids("x").expand(3, -1))
    torch.testing.assert_close(out, expected[1:].expand(3, -1, -1), atol=1e-5, rtol=0)


def test_evicted_pairs_are_freed() -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT * 10, keep_ratio=0.3, progress=False)
    gc.collect()
    n_context, n_prefix = cache.prompt.context_ids.numel(), cache.prompt.prefix_ids.numel()
    pair = 2 * 8 * 4
    assert cache.context_nbytes == sum(map(sum, cache.stored_lengths)) * pair
    assert cache.full_context_nbytes == 3 * 2 * (n_context + n_prefix) * pair
    kept = (sum(map(sum, cache.stored_lengths)) - 6 * n_prefix) / (6 * n_context)
    assert abs(kept - 0.3) < 1e-3
    # nothing else of the full cache's size is alive
    shape = (1, 2, n_context + n_prefix, 8)
    alive = [obj for obj in gc.get_objects() if type(obj) is torch.Tensor and tuple(obj.shape) == shape]
    assert not alive


def test_sliding_windows_do_not_keep_the_whole_prefill_alive() -> None:
    model, tokenizer = tiny_model("gemma3"), byte_tokenizer()
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT * 10, keep_ratio=0.3, progress=False)
    window = cache.layers[0]
    assert window.keys.shape[-2] == 15
    assert window.keys.untyped_storage().nbytes() == 15 * 2 * 8 * 4
    assert cache.nbytes == cache.context_nbytes + 2 * 15 * 2 * 8 * 4


def test_max_kv_tokens_bounds_what_is_stored() -> None:
    model, tokenizer = tiny_model("qwen2"), byte_tokenizer()
    config = KVzipConfig(max_kv_tokens=150)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT * 5, config=config, progress=False)
    stored = torch.tensor(cache.stored_lengths, dtype=torch.float)
    assert 149 < stored.mean() <= 150
    with pytest.raises(ValueError, match="no room"):
        KVzipCache.from_context(model, tokenizer, CONTEXT, config=KVzipConfig(max_kv_tokens=5), progress=False)


def test_chunked_prefill_equals_one_prefill() -> None:
    model, tokenizer = tiny_model("gemma3"), byte_tokenizer()
    caches = [
        prefill(model, build_prompt(tokenizer, CONTEXT, config), config, progress=False)
        for config in (KVzipConfig(), KVzipConfig(prefill_chunk_size=17))
    ]
    for one, other in zip(caches[0].cache.layers, caches[1].cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)


def test_other_caches_and_models_are_untouched(llama: Compressed) -> None:
    """The attention implementation is switched for the calls that carry the cache, and for no other."""
    ids = new_ids(QUESTIONS[0])
    before = llama.model.config._attn_implementation
    with torch.no_grad():
        expected = llama.model(ids, **held(DynamicCache())).logits
        llama.logits(llama.cache(0.3), ids)
        assert llama.model.config._attn_implementation == before == "sdpa"
        assert torch.equal(llama.model(ids, **held(DynamicCache())).logits, expected)
    hooks = len(llama.model.model._forward_pre_hooks)
    llama.cache(0.3).attach(llama.model)
    assert len(llama.model.model._forward_pre_hooks) == hooks


def test_error_inside_a_call_restores_the_model(llama: Compressed) -> None:
    before = llama.model.config._attn_implementation
    cache = llama.cache(0.3)
    with pytest.raises(IndexError):
        llama.model(torch.tensor([[10_000]]), **held(cache))
    assert llama.model.config._attn_implementation == before
    with torch.no_grad():
        assert llama.model(new_ids("ok"), output_hidden_states=True).hidden_states is not None


def test_eager_models_work_too(llama: Compressed) -> None:
    ids = new_ids(QUESTIONS[0])
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    cache = llama.cache(0.4)
    cache.attach(model)
    with torch.no_grad():
        logits = model(ids, **held(cache.fork())).logits
    torch.testing.assert_close(logits, llama.logits(cache.fork(), ids), atol=1e-4, rtol=0)


def test_half_precision_runs_and_stays_near() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama").to(torch.bfloat16)
    scores = score_context(prefill(model, build_prompt(tokenizer, CONTEXT, KVzipConfig())), progress=False)
    exact = tiny_model("llama")
    reference = score_context(prefill(exact, build_prompt(tokenizer, CONTEXT, KVzipConfig())), progress=False)
    assert scores.dtype == torch.float32
    assert torch.corrcoef(torch.stack([scores.flatten(), reference.flatten()]))[0, 1] > 0.95


class TestRefusals:
    def test_a_model_that_computes_attention_past_transformers_functions(self) -> None:
        """Nothing tells it from the others but the probe; it stays as it was."""
        from transformers import BloomConfig, BloomForCausalLM

        model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=264)).eval()
        before = dict(vars(model))
        with pytest.raises(UnsupportedModelError, match="BloomForCausalLM .*past transformers' attention functions"):
            KVzipCache.from_context(model, byte_tokenizer(), CONTEXT)
        assert dict(vars(model)) == before and not attached(model)

    def test_all_sliding_model(self) -> None:
        with pytest.raises(UnsupportedModelError, match="global attention"):
            KVzipCache.from_context(tiny_model("mistral", sliding_window=8), byte_tokenizer(), CONTEXT)

    def test_model_that_was_not_prepared(self, llama: Compressed) -> None:
        cache, other = llama.cache(0.5), tiny_model("llama")
        with pytest.raises(ValueError, match=r"cache.attach\(model\)"):
            other(new_ids("a"), **held(cache))
        cache.attach(other)
        with torch.no_grad():
            logits = other(new_ids("a"), **held(cache.fork())).logits
        assert torch.equal(logits, llama.logits(cache.fork(), new_ids("a")))
        detach(other, USER)
        with pytest.raises(ValueError, match="attach"):
            other(new_ids("a"), **held(cache.fork()))

    def test_new_ids_without_full_mask(self, llama: Compressed) -> None:
        with pytest.raises(DroppedTokensError, match="cache.inputs"):
            llama.model.generate(new_ids("a question"), **held(llama.cache(0.5).fork()), max_new_tokens=2)
        with pytest.raises(DroppedTokensError, match="no token is left"):
            llama.model(new_ids("")[:, :0], **held(llama.cache(0.5)))
        with pytest.raises(DroppedTokensError, match="mask covers 2 tokens"):
            llama.model(new_ids("ab"), attention_mask=torch.ones(1, 2), **held(llama.cache(0.5)))

    def test_new_ids_with_full_mask_are_served(self, llama: Compressed) -> None:
        cache, ids = llama.cache(0.5), new_ids("a question")
        n = cache.get_seq_length()
        mask = torch.ones(1, n + ids.shape[1], dtype=torch.int64)
        short = llama.model.generate(ids, attention_mask=mask, **held(cache.fork()), max_new_tokens=5)
        full = llama.model.generate(**cache.inputs(ids), max_new_tokens=5)
        assert short[0, ids.shape[1] :].tolist() == full[0, n + ids.shape[1] :].tolist()

    def test_prompt_with_another_context(self, llama: Compressed) -> None:
        cache = llama.cache(0.5)
        good = torch.cat([cache.ids, new_ids("why?")], dim=1)
        cache.check_prompt(good)
        bad = good.clone()
        bad[0, 3] += 1
        with pytest.raises(DroppedTokensError, match="do not start with"):
            cache.check_prompt(bad)
        with pytest.raises(DroppedTokensError, match="do not start with"):
            llama.model.generate(bad, **held(cache.fork()), max_new_tokens=2)
        # longer than the context, so that `generate` alone would take them for a full prompt
        question = new_ids("a long question, " * 20)
        with pytest.raises(DroppedTokensError, match="do not start with"):
            llama.model.generate(question, **held(cache.fork()), max_new_tokens=2)
        assert llama.model.generate(good, **held(cache.fork()), max_new_tokens=2).shape[1] == good.shape[1] + 2
        assert torch.equal(cache.inputs(good)["input_ids"], good)

    @pytest.mark.parametrize("question", [3, [], ["a", 2], torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3)])
    def test_bad_questions(self, llama: Compressed, question: object) -> None:
        with pytest.raises(TypeError):
            llama.cache(0.5).inputs(question)

    def test_bad_masks_and_scores(self, llama: Compressed) -> None:
        with pytest.raises(ValueError, match="mask covers 9 tokens"):
            llama.model(new_ids("a"), attention_mask=torch.ones(1, 1, 1, 9), **held(llama.cache(0.5)))
        with pytest.raises(ValueError, match="scores must be"):
            KVzipCache.from_scores(llama.prefilled, llama.scores[:1], KVzipConfig())
        with pytest.raises(ValueError, match="NaN"):
            KVzipCache.from_scores(llama.prefilled, llama.scores * float("nan"), KVzipConfig())

    def test_empty_context_and_used_up_prefill(self) -> None:
        model, tokenizer = tiny_model("llama"), byte_tokenizer()
        with pytest.raises(ValueError, match="no tokens"):
            KVzipCache.from_context(model, tokenizer, "")
        with pytest.raises(TypeError, match="context must be a str"):
            KVzipCache.from_context(model, tokenizer, [1, 2])
        prefilled = prefill(model, build_prompt(tokenizer, CONTEXT, KVzipConfig()))
        scores = torch.rand(3, 2, prefilled.n_context)
        KVzipCache.from_scores(prefilled, scores, free=True)
        with pytest.raises(ValueError, match="used up"):
            KVzipCache.from_scores(prefilled, scores)


def test_layers_are_ours(compressed: Compressed) -> None:
    cache = compressed.cache(0.5)
    assert [isinstance(layer, KVzipLayer) for layer in cache.layers] == [
        index in cache.scored_layers for index in range(len(cache.layers))
    ]
    assert cache.scored_layers == ([1, 2] if compressed.family == "gemma3" else [0, 1, 2])


def test_several_turns_in_one_fork(compressed: Compressed) -> None:
    """A conversation goes on in the same fork, as with a stock cache."""
    cache = compressed.cache(0.5).fork()
    ids = torch.cat([cache.ids, new_ids("first?")], dim=1)
    for _ in range(2):
        # with a mask, since a random model may write the padding token, which `generate` would mask by itself
        mask = torch.ones_like(ids)
        ids = compressed.model.generate(ids, attention_mask=mask, **held(cache), max_new_tokens=3, do_sample=False)
        ids = torch.cat([ids, new_ids("next?")], dim=1)
    with torch.no_grad():
        n = cache.get_seq_length()
        step = compressed.model(ids[:, n:], **held(cache)).logits
        again = compressed.cache(0.5).fork()
        at_once = compressed.model(ids[:, again.get_seq_length() :], **held(again)).logits
    torch.testing.assert_close(step, at_once[:, -step.shape[1] :], atol=1e-4, rtol=0)


def test_under_peft() -> None:
    """A LoRA-wrapped model compresses and generates; the base model underneath is the one that is prepared."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, keep_ratio=1.0, progress=False)
    inputs = cache.inputs(QUESTIONS[0])
    ours = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert ours.tolist() == model.generate(input_ids=inputs["input_ids"], max_new_tokens=5, do_sample=False).tolist()


def test_a_prepared_model_can_be_copied_and_saved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, progress=False)
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path)
    assert twin.generate(new_ids("a"), max_new_tokens=2).shape == (1, 3)


# -- elsewhere


@pytest.mark.parametrize("storage", ["model", "int4"])
def test_moved_caches_answer_as_before(storage: Any) -> None:
    model, tokenizer = tiny_model("gemma3"), byte_tokenizer()
    config = KVzipConfig(keep_ratio=0.5, storage=storage)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, progress=False)
    fork, ids = cache.fork(), torch.arange(20, 29)[None]
    with torch.no_grad():
        model(ids, **held(fork))
        expected = model(ids, **held(copy.deepcopy(fork))).logits
        for where in ("cpu", torch.device("cpu"), model):
            moved = fork.moved_to(where)
            layer, pristine = moved.layers[1], moved._pristine[1]
            assert layer.context is pristine.context and layer.tail is None
            assert moved.get_seq_length() == fork.get_seq_length() and moved.nbytes == fork.nbytes
            assert torch.equal(model(ids, **held(moved)).logits, expected)
            assert torch.equal(model(ids, **held(moved.fork())).logits, model(ids, **held(cache.fork())).logits)
    with pytest.raises(TypeError, match="language model"):
        cache.moved_to(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="holds no values"):
        cache.moved_to("meta")


def test_a_context_on_another_device_is_refused_with_what_to_do(llama: Compressed) -> None:
    cache = llama.cache(0.5)
    for layer in cache.layers:
        layer.context = layer.context.to(torch.device("meta"))
    with pytest.raises(ValueError, match=r"cache\.moved_to\(model\)"):
        llama.logits(cache, torch.arange(20, 29)[None])
    model = tiny_model("gemma3")
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, keep_ratio=0.5, progress=False)
    assert isinstance(cache.layers[0], KVzipSlidingLayer)
    cache.layers[0].keys = cache.layers[0].keys.to("meta")
    with pytest.raises(ValueError, match=r"cache\.moved_to\(model\)"):
        model(torch.arange(20, 29)[None], **held(cache))
