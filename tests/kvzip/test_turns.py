"""A conversation compressed again.

Invariants: without turns it is compressing once at the smaller budget, to the bit, at every level; turns are scored as KVzip
written out on a plain cache scores them, evicted pairs out of sight; what stays is the best of all that is left, counted
exactly, of all that was ever read; answers are those of the plain cache with the other pairs hidden; other forks stay as they
are; what cannot be scored is refused by name.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates
from hf_dataopt.kvzip.layers import KVzipLayer
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import KVzipPrompt, build_prompt
from hf_dataopt.kvzip.scoring import score_context

from ..families import available
from ..families.plain import prefilled as plain_cache
from ..models import FAMILIES, byte_tokenizer, held, tiny_model
from ..reference.kvzip import top_share
from .conftest import CONTEXT
from .oracle import masked_logits, masked_read, written_out_turn_scores
from .test_gates import random_gates

QUESTION = "Which key is red?"
CONFIG = KVzipConfig(keep_ratio=0.6, chunk_size=32)


def made(model: PreTrainedModel, config: KVzipConfig = CONFIG, **options: Any) -> KVzipCache:
    return KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, config=config, progress=False, **options)


def talked(model: PreTrainedModel, cache: KVzipCache, question: str = QUESTION, tokens: int = 24) -> KVzipCache:
    """A fork that read a question and answered it."""
    inputs = cache.inputs(question)
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return inputs["cache"]


def same(one: KVzipCache, other: KVzipCache) -> bool:
    """Whether both hold the same pairs, to the bit."""
    pairs = [
        (a.context, b.context)
        for a, b in zip(one.pristine_layers, other.pristine_layers, strict=True)
        if isinstance(a, KVzipLayer)
    ]
    return all(
        a.lengths == b.lengths and torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs
    )


# -- without turns


@pytest.mark.parametrize("level", ["pair", "pair-uniform", "head"])
@pytest.mark.parametrize("ties", ["position", "reference"])
def test_without_turns_it_is_compressing_once(level: Any, ties: Any) -> None:
    config = KVzipConfig(keep_ratio=0.8, chunk_size=32, level=level, ties=ties, head_sinks=200, head_recent=5)
    model = tiny_model("qwen3")
    full = prefill(model, build_prompt(byte_tokenizer(), CONTEXT, config), progress=False)
    # many equal ones, so that ties are cut too
    scores = torch.randint(9, (3, 2, full.n_context), generator=torch.Generator().manual_seed(0)).float()
    cache = KVzipCache.from_scores(full, scores, config)
    for ratio in (0.55, 0.3, 0.12, 0.01):
        cache.compress_again(ratio, progress=False)
        assert same(cache, KVzipCache.from_scores(full, scores, replace(config, keep_ratio=ratio))), ratio
        assert cache.config.keep_ratio == ratio
    before = cache.stored_lengths
    cache.compress_again(0.9)  # what is gone does not come back
    assert cache.stored_lengths == before


def test_a_token_budget_again() -> None:
    model = tiny_model("llama")
    cache, once = made(model), made(model, KVzipConfig(max_kv_tokens=110, chunk_size=32))
    cache.compress_again(max_kv_tokens=110)
    assert same(cache, once) and cache.config.max_kv_tokens == 110
    cache.compress_again(0.05)
    assert cache.config.max_kv_tokens is None and cache.nbytes < once.nbytes
    cache.compress_again()  # the budget it has
    assert cache.config.keep_ratio == 0.05


# -- with turns


@pytest.mark.parametrize("replay", ["local", "exact"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "deepseek_v3", "gpt_oss"])
def test_turns_are_scored_and_cut_as_written_out(family: str, replay: Any) -> None:
    make = (lambda: tiny_model(family)) if family in FAMILIES else available()[family].model
    model, untouched = make(), make()
    config = replace(CONFIG, replay=replay, chunk_size=17)
    prompt = build_prompt(byte_tokenizer(), CONTEXT, config)
    full = prefill(model, prompt, config, progress=False)
    scores = score_context(full, config, progress=False)
    cache = KVzipCache.from_scores(full, scores, config, tokenizer=byte_tokenizer())
    talk = cache.fork()
    turns = torch.randint(4, 200, (41,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for part in turns.split(20):
            model(part[None], **held(talk))
    talk.compress_again(0.35, progress=False)

    # the same on a plain cache
    n_prefix, begin = full.n_prefix, prompt.ids.numel()
    keep = top_share(scores, config.keep_ratio)
    prefix = keep.new_ones(keep.shape[1], n_prefix)
    kept = {index: torch.cat([prefix, row], dim=1) for index, row in zip(full.scored_layers, keep, strict=True)}
    _, plain = masked_read(untouched, plain_cache(untouched, prompt.ids), turns, kept)
    whole = replace(prompt, turn_ids=turns)
    found = written_out_turn_scores(untouched, plain, whole, begin, config, kept)
    every = torch.cat([scores.masked_fill(~keep, -1), found], dim=2)
    left = top_share(every, 0.35)
    assert not bool((left & (every == -1)).any())
    told = torch.stack(
        [torch.tensor([len(row) for row in layer.scores]) for layer in talk.layers if hasattr(layer, "scores")]
    )
    assert torch.equal(told, left.sum(-1) + n_prefix)
    assert torch.equal(torch.tensor(talk.stored_lengths), left.sum(-1) + n_prefix)
    assert int(left[:, :, -turns.numel() :].sum()) > 0  # some of the turns stay, and not all
    again = {index: torch.cat([prefix, row], dim=1) for index, row in zip(full.scored_layers, left, strict=True)}
    ids = torch.tensor([9, 8, 7, 6, 5])
    expected = masked_logits(untouched, plain, ids, again)
    with torch.no_grad():
        logits = model(ids[None], **held(talk.fork())).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_with_everything_kept_a_conversation_is_the_plain_one(family: str) -> None:
    model, untouched = tiny_model(family), tiny_model(family)
    cache = made(model, replace(CONFIG, keep_ratio=1.0))
    talk = talked(model, cache)
    for question in ("And the blue one?", "Sure?"):
        talk.compress_again(progress=False)
        inputs = talk.inputs(question)
        ids, options = inputs["input_ids"], {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
        plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(**inputs, **options), untouched.generate(**plain, **options))
        talk = inputs["cache"]


@pytest.mark.parametrize("name", ["kvzip_plus", "kvzip_l2", "kvgrad", "kvgrad_l2"])
@pytest.mark.parametrize("replay", ["local", "exact"])
def test_other_scores_that_look_at_a_repetition_score_turns_too(name: str, replay: Any) -> None:
    model = tiny_model("llama")
    talk = made(model, replace(CONFIG, score=name, replay=replay)).fork()
    with torch.no_grad():
        model(torch.arange(40, 80)[None], **held(talk))
    before, n = talk.get_seq_length(), talk.get_seq_length() - talk.prompt.prefix_ids.numel()
    talk.compress_again(0.3, progress=False)
    assert talk.get_seq_length() == before
    assert sum(map(sum, talk.stored_lengths)) == int(6 * n * 0.3) + 6 * talk.prompt.prefix_ids.numel()


def test_gates_score_turns_as_they_would_in_one_context() -> None:
    model = tiny_model("llama")
    gates, config = random_gates(model), KVzipConfig(keep_ratio=1.0)
    talk = talked(model, made(model, config, gates=gates))
    prompt = replace(talk.prompt, context_ids=torch.cat([talk.prompt.context_ids, talk.read_ids[0]]))
    full, scores = gates.prefill(model, prompt, config, progress=False)
    once = KVzipCache.from_scores(full, scores, KVzipConfig(keep_ratio=0.3))
    talk.compress_again(0.3)
    assert talk.stored_lengths == once.stored_lengths
    for one, other in zip(talk.pristine_layers, once.pristine_layers, strict=True):
        torch.testing.assert_close(one.context.keys, other.context.keys, atol=1e-5, rtol=0)


def test_heads_keep_what_they_are_worth() -> None:
    model = tiny_model("llama")
    worth = torch.arange(6.0).reshape(3, 2)
    config = KVzipConfig(keep_ratio=0.5, head_sinks=0, head_recent=3)
    talk = talked(model, made(model, config, head_scores=worth))
    n, n_prefix = talk.get_seq_length(), talk.prompt.prefix_ids.numel()
    talk.compress_again(0.5)
    assert talk.stored_lengths == [[n_prefix + 3] * 2, [n_prefix + 3] * 2, [n, n]]
    # a dropped head keeps the last tokens of the turns
    plain = plain_cache(tiny_model("llama"), talk.ids[0])
    torch.testing.assert_close(
        talk.pristine_layers[0].context.keys[n_prefix : n_prefix + 3],
        plain.layers[0].keys[0, 0, -3:],
        atol=1e-5,
        rtol=0,
    )


def test_a_conversation_that_stays_within_a_budget() -> None:
    model = tiny_model("qwen3")
    talk = made(model, KVzipConfig(max_kv_tokens=120, chunk_size=32))
    for turn in range(4):
        talk = talked(model, talk, f"And room {turn}?", tokens=30)
        talk.compress_again(progress=False)
        assert sum(map(sum, talk.stored_lengths)) == 120 * 6
    assert talk.get_seq_length() > 2 * 120


@pytest.mark.parametrize(("storage", "step"), [("int8", 1 / 255), ("int4", 1 / 3)])
def test_quantised_pairs_are_opened_cut_and_quantised_again(storage: Any, step: float) -> None:
    model = tiny_model("qwen3")
    cache, plain = made(model, replace(CONFIG, storage=storage)), made(model)
    cache.compress_again(0.4)
    plain.compress_again(0.4)
    assert cache.stored_lengths == plain.stored_lengths and cache.context_nbytes < plain.context_nbytes / 2
    for one, other in zip(cache.pristine_layers, plain.pristine_layers, strict=True):
        for rows, exact in zip(one.context.opened(), other.context.opened(), strict=True):
            assert 0 < (rows - exact).abs().max() <= 2 * step * exact.abs().max()  # quantised twice
    contexts = [layer.context for layer in cache.pristine_layers]
    cache.compress_again(1.0)  # nothing goes: nothing is quantised again
    assert all(layer.context is context for layer, context in zip(cache.pristine_layers, contexts, strict=True))
    talk, n_prefix = talked(model, cache), cache.prompt.prefix_ids.numel()
    tail = [layer.keys for layer in talk.layers]
    talk.compress_again(1.0, progress=False)
    for layer, new, old in zip(talk.pristine_layers, tail, cache.pristine_layers, strict=True):
        rows = layer.context.opened()[0].split(layer.context.lengths)
        assert layer.context.lengths == [length + new.shape[2] for length in old.context.lengths]
        for row, more in zip(rows, new[0], strict=True):
            assert (row[-len(more) :] - more).abs().max() <= step * new.abs().max()
    talk.compress_again(0.2)
    n = talk.get_seq_length() - n_prefix
    assert sum(map(sum, talk.stored_lengths)) == int(6 * n * 0.2) + 6 * n_prefix


# -- what follows


def test_questions_go_on_where_the_answer_ended(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    inputs = made(model).inputs(QUESTION)
    output = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    talk: KVzipCache = inputs["cache"]
    talk.compress_again(0.4, progress=False)
    assert torch.equal(talk.ids, output[:, :-1])
    n = talk.ids.shape[1]
    expected = "<eos>[user]And?<eos>[assistant]"
    messages = [{"role": "user", "content": "And?"}]
    for form in (
        "And?",
        messages[0],
        messages,
        torch.cat([talk.ids[0], torch.tensor(tokenizer(expected)["input_ids"])]),
    ):
        assert tokenizer.decode(talk.inputs(form)["input_ids"][0, n:]) == expected
    longer = talk.inputs([*messages, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}])
    assert tokenizer.decode(longer["input_ids"][0, n:]) == expected + "No.<eos>[user]Why?<eos>[assistant]"
    batch = talk.inputs(["And?", "Why?"])
    assert torch.equal(batch["input_ids"][:1], talk.inputs("And?")["input_ids"])
    # an answer whose end was read is not ended twice
    ended = talk.fork()
    with torch.no_grad():
        model(torch.tensor([[tokenizer.eos_token_id]]), **held(ended))
    ended.compress_again(progress=False)
    assert tokenizer.decode(ended.inputs("And?")["input_ids"][0, n:]) == expected
    # files hold the turns and the scores
    talk.save_pretrained(tmp_path)
    loaded = KVzipCache.from_pretrained(tmp_path, model, tokenizer)
    assert torch.equal(loaded.inputs("And?")["input_ids"], talk.inputs("And?")["input_ids"])
    both = [one.fork() for one in (loaded, talk)]
    for fork in both:
        talked(model, fork)
        fork.compress_again(0.2, progress=False)
    assert same(*both)


def test_other_forks_stay_as_they_are() -> None:
    model = tiny_model("gemma3")
    cache = made(model)
    expected = model.generate(**cache.inputs(QUESTION), max_new_tokens=8, do_sample=False)
    talk = talked(model, cache)
    other, lengths = copy.copy(talk), cache.stored_lengths
    going_on = copy.copy(talk)
    talk.compress_again(0.1, progress=False)
    assert cache.stored_lengths == lengths and cache.config == CONFIG and talk.stored_lengths != lengths
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(model(ids, **held(other)).logits, model(ids, **held(going_on)).logits)
    assert torch.equal(model.generate(**cache.inputs(QUESTION), max_new_tokens=8, do_sample=False), expected)
    talk.reset()
    assert talk.get_seq_length() == talk.ids.shape[1] and talk.read_ids is None


# -- refusals


def test_what_cannot_be_compressed_again_is_refused() -> None:
    model = tiny_model("llama")
    cache = made(model)

    def refused(one: KVzipCache, words: str, **options: Any) -> None:
        lengths = one.stored_lengths
        with pytest.raises(ValueError, match=words):
            one.compress_again(**options)
        assert one.stored_lengths == lengths

    refused(cache, "give one of them", keep_ratio=0.2, max_kv_tokens=300)
    refused(cache, "keep_ratio must be in", keep_ratio=0)
    refused(cache, "leaves no room", max_kv_tokens=3)
    bare = cache.fork()
    bare._pristine = bare.layers = [copy.copy(layer) for layer in cache.pristine_layers]
    bare.layers[1].scores = None
    refused(bare, "does not hold the scores", keep_ratio=0.2)
    with torch.no_grad():
        felt = cache.fork()
        model(inputs_embeds=model.get_input_embeddings()(torch.tensor([[5, 6]])), **held(felt))
        refused(felt, "have no ids", keep_ratio=0.2)
        both = cache.fork()
        model(torch.tensor([[5, 6], [7, 8]]), **held(both))
        refused(both, "batch of 2 rows", keep_ratio=0.2)
        both.batch_select_indices(torch.tensor([1]))
        both.compress_again(0.2, progress=False)
        alone = cache.fork()
        model(torch.tensor([[7, 8]]), **held(alone))
        alone.compress_again(0.2, progress=False)
        assert both.stored_lengths == alone.stored_lengths
        padded = cache.inputs(["Which key?", "Which?"])
        model.generate(**padded, max_new_tokens=2)
        row: KVzipCache = padded["cache"]
        row.batch_select_indices(torch.tensor([1]))
        refused(row, "padded batch", keep_ratio=0.2)
        row.reset()
        row.compress_again(0.2)
        view = cache.fork().view(model, torch.tensor([[5]]), None)
        assert isinstance(view, KVzipCache)
        refused(view, "in the middle of a forward", keep_ratio=0.2)
    ranked = talked(model, made(model, replace(CONFIG, score="h2o")))
    refused(ranked, "score='h2o' ranks a context", keep_ratio=0.2)
    lost = talked(model, cache)
    lost._models.clear()
    refused(lost, "model that this cache was made for is gone", keep_ratio=0.2)
    refused(lost, "other weights", keep_ratio=0.2, model=tiny_model("llama", seed=1))
    lost.compress_again(0.2, model=tiny_model("llama"), progress=False)


def test_repeat_inputs_behind_a_context() -> None:
    ids = torch.arange(100, 110)
    prompt = KVzipPrompt(ids[:2], ids[2:7], ids[7:8], ids[8:9], ids[9:])
    before = torch.tensor([1, 2, 3])
    found = [(start, end, row.tolist()) for start, end, row in prompt.repeat_inputs(4, 2, before)]
    assert found == [(0, 4, [109, 2, 3, 107, 102, 103, 104, 105]), (4, 5, [109, 104, 105, 107, 106])]


def test_a_file_holds_the_scores_that_gates_gave_and_which_gates(tmp_path: Path) -> None:
    model = tiny_model("llama")
    gates = random_gates(model)
    cache = made(model, gates=gates)
    cache.save_pretrained(tmp_path / "cache")
    gates.save_pretrained(tmp_path / "gates")
    loaded = KVzipCache.from_pretrained(tmp_path / "cache", model, byte_tokenizer())
    assert loaded.gates is None and loaded.scored_by == cache.scored_by == gates.digest
    # what they hold needs no gates, what is said about it needs theirs
    again = loaded.fork()
    again.compress_again(0.1, progress=False)
    expected = cache.fork()
    expected.compress_again(0.1, progress=False)
    assert again.stored_lengths == expected.stored_lengths
    with pytest.raises(ValueError, match="set `cache.gates` to those it was made with"):
        talked(model, loaded).compress_again(0.1, progress=False)
    with pytest.raises(ValueError, match=f"scored by gates {gates.digest}, not by these"):
        loaded.gates = random_gates(model, seed=1)
    with pytest.raises(TypeError, match="gates must be a KVzipGates"):
        loaded.gates = gates.weights  # type: ignore[assignment]
    loaded.gates = KVzipGates.from_pretrained(tmp_path / "gates")
    ours, theirs = talked(model, loaded), talked(model, cache)
    for one in (ours, theirs):
        one.compress_again(0.1, progress=False)
    assert ours.stored_lengths == theirs.stored_lengths
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(layer.context.keys, other.context.keys)
    ours.save_pretrained(tmp_path / "again")
    assert KVzipCache.from_pretrained(tmp_path / "again", model).scored_by == gates.digest
    plain = made(model)
    with pytest.raises(ValueError, match="scored by another score"):
        plain.gates = gates
    about = tmp_path / "cache" / "hf_dataopt.json"
    about.write_text(about.read_text().replace(f'"{gates.digest}"', "7"))
    with pytest.raises(ValueError, match="scored by 7, which is no digest"):
        KVzipCache.from_pretrained(tmp_path / "cache", model)
