"""One call contract: ids, mask and cache length are reconciled, whoever calls."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from hf_dataopt import CompressedContextMemory, KVzipCache
from hf_dataopt.errors import DroppedTokensError, UnsupportedModelError
from hf_dataopt.routing.attach import attached

from ..ccm.models import adapted
from ..models import FAMILIES, byte_tokenizer, held, tiny_model
from .shared import CONTEXTS, GREEDY, QUESTION, compressed, logits, question_ids


@pytest.mark.parametrize("family", list(FAMILIES))
def test_assisted_decoding_gives_the_greedy_tokens(family: str) -> None:
    model, cache = compressed(family)
    options = {"max_new_tokens": 16, **GREEDY}
    expected = model.generate(**cache.inputs(QUESTION), **options)
    # of a family without windows: old releases fail by themselves on assistants with windows
    for how in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny_model("llama")},
        {"assistant_model": tiny_model("llama", seed=3)},
    ):
        inputs = cache.inputs(QUESTION)
        assert torch.equal(model.generate(**inputs, **how, **options), expected)
        tail = inputs["past_key_values"].get_seq_length() - cache.get_seq_length()
        assert tail <= expected.shape[1] - cache.ids.shape[1], "the context was read again"


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_assisted_decoding_behind_a_memory(memory: str) -> None:
    one = CompressedContextMemory(adapted(memory=memory))
    one.append([5, 6, 7, 8, 9])
    question, options = [20, 21, 22, 20, 21, 22], {"max_new_tokens": 12, **GREEDY}
    expected = one.generate(question, **options)
    assert torch.equal(one.generate(question, prompt_lookup_num_tokens=2, **options), expected)


def test_inputs_serve_one_call() -> None:
    model, cache = compressed()
    inputs = cache.inputs(QUESTION)
    model.generate(**inputs, max_new_tokens=4, **GREEDY)
    with pytest.raises(DroppedTokensError, match="new `cache.fork\\(\\)`"):
        model.generate(**inputs, max_new_tokens=4, **GREEDY)
    longer = cache.inputs(QUESTION * 5) | {"past_key_values": inputs["past_key_values"]}
    with pytest.raises(DroppedTokensError, match="new `cache.fork\\(\\)`"):
        model.generate(**longer, max_new_tokens=4, **GREEDY)
    one = CompressedContextMemory(adapted())
    one.append([5, 6, 7])
    question = one.inputs([8, 9])
    one.model.generate(**question, max_new_tokens=2, **GREEDY)
    with pytest.raises(DroppedTokensError):
        one.model.generate(**question, max_new_tokens=2, **GREEDY)


def test_a_turn_goes_on_with_the_ids_that_were_read() -> None:
    model, cache = compressed()
    inputs = cache.inputs(QUESTION)
    fork = inputs["past_key_values"]
    said = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    further = torch.cat([said, question_ids(cache, "And then?")], 1)
    mask = torch.ones_like(further)
    answer = model.generate(further, attention_mask=mask, **held(fork), max_new_tokens=4, **GREEDY)
    at_once = model.generate(**cache.inputs(further), max_new_tokens=4, **GREEDY)
    assert torch.equal(answer, at_once)
    other = further.clone()
    other[0, cache.ids.shape[1] + 2] += 1
    with pytest.raises(DroppedTokensError, match="this fork has read since"):
        model.generate(other, attention_mask=mask, **held(fork), max_new_tokens=2, **GREEDY)


def test_cropping_and_reordering_carry_the_read_ids_along() -> None:
    model, cache = compressed()
    fork, ids = cache.fork(), question_ids(cache)
    logits(model, fork, ids)
    full = torch.cat([cache.ids, ids], 1)
    assert fork.begins(torch.cat([full, ids[:, :1]], 1)) and not fork.begins(full)
    fork.crop(-3)
    assert fork.begins(full)
    fork.batch_repeat_interleave(2)
    rows = torch.cat([full[:, :-2], full[:, :-2]])
    rows[1, -1] += 1
    logits(model, fork, rows[:, -1:])
    fork.reorder_cache(torch.tensor([1, 0]))
    longer = torch.cat([rows.flip(0), rows[:, :1]], 1)
    assert fork.begins(longer) and not fork.begins(longer.flip(0))
    fork.batch_select_indices(torch.tensor([0]))
    assert fork.begins(longer[:1])
    fork.reset()
    assert fork.begins(full) and fork.get_seq_length() == cache.get_seq_length()


def test_a_fork_on_another_model_is_refused() -> None:
    _, cache = compressed()
    for other in (tiny_model("llama", seed=5), tiny_model("qwen2"), tiny_model("llama", num_hidden_layers=2)):
        KVzipCache.from_context(other, byte_tokenizer(), CONTEXTS[0], progress=False)
        for call in (
            lambda other=other: other.generate(**cache.inputs(QUESTION), max_new_tokens=2),
            lambda other=other: logits(other, cache.fork(), question_ids(cache)),
            lambda other=other: logits(other.model, cache.fork(), question_ids(cache)),
        ):
            with pytest.raises(
                ValueError, match="other weights|another kind of model|was not made by|not those of this"
            ):
                call()
    one, two = CompressedContextMemory(adapted()), adapted(seed=2)
    one.append([5, 6, 7])
    with pytest.raises(ValueError, match="another model"):
        two(**one.inputs([8, 9]))


def test_copies_of_a_cache_are_forks() -> None:
    model, cache = compressed("gemma3")
    ids = question_ids(cache)
    expected = logits(model, cache.fork(), ids)
    started = cache.fork()
    logits(model, started, ids[:, :4])
    for twin in (copy.copy(started), copy.deepcopy(started)):
        torch.testing.assert_close(logits(model, twin, ids[:, 4:]), expected[:, 4:], atol=1e-4, rtol=0)
    assert started.get_seq_length() == cache.get_seq_length() + 4
    logits(model, copy.copy(cache), ids)
    assert torch.equal(logits(model, cache, ids), expected)


def test_copies_of_a_memory_s_fork_are_forks() -> None:
    one = CompressedContextMemory(adapted())
    one.append([5, 6, 7, 8])
    inputs = one.inputs([9, 10, 11])
    started, model = inputs["past_key_values"], one.model
    with torch.no_grad():
        model(**inputs)
        further = {"input_ids": torch.tensor([[12, 13]]), "attention_mask": torch.ones(1, started.get_seq_length() + 2)}
        twins = [copy.copy(started), copy.deepcopy(started)]
        model_twin, third = copy.deepcopy((model, started))
        expected = model(**further, **held(started)).logits
        for twin in twins:
            assert torch.equal(model(**further, **held(twin)).logits, expected)
        assert torch.equal(model_twin(**further, **held(third)).logits, expected)


@pytest.mark.parametrize("form", ["bool", "additive", "whole length"])
def test_ready_masks_are_read(form: str) -> None:
    model, cache = compressed()
    ids, fork = question_ids(cache), cache.fork()
    expected = logits(model, cache.fork(), ids)
    q = ids.shape[1]
    visible = torch.ones(q, q, dtype=torch.bool).tril()[None, None]
    if form == "whole length":
        visible = torch.cat([torch.ones(1, 1, q, cache.get_seq_length(), dtype=torch.bool), visible], -1)
    mask = (
        visible if form == "bool" else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    )
    with torch.no_grad():
        found = model(ids, attention_mask=mask, **held(fork)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    hidden = torch.cat([torch.ones(1, 1, q, cache.get_seq_length(), dtype=torch.bool), visible[..., -q:]], -1)
    hidden[..., 5] = False
    per_head = visible.expand(1, 4, -1, -1)
    for bad, words in ((hidden, "hides tokens"), (visible[..., 1:], "covers"), (per_head, "one mask for all")):
        with pytest.raises(ValueError, match=words):
            model(ids, attention_mask=bad, **held(cache.fork()))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_arguments_by_position(family: str) -> None:
    model, cache = compressed(family)
    ids, fork, n = question_ids(cache), cache.fork(), cache.get_seq_length()
    expected = logits(model, cache.fork(), ids)
    mask, positions = torch.ones(1, n + ids.shape[1], dtype=torch.int64), torch.arange(n, n + ids.shape[1])[None]
    with torch.no_grad():
        assert torch.equal(model(ids, None, None, fork).logits, expected)
        assert fork.get_seq_length() == mask.shape[1]
        assert torch.equal(model(ids, mask, positions, cache.fork(), return_dict=False)[0], expected)
        hidden = model.model(ids, mask, None, cache.fork())[0]
        assert torch.equal(hidden, model.model(ids, **held(cache.fork()))[0])
    with pytest.raises(DroppedTokensError, match="mask covers"):
        model(ids, mask[:, 1:], None, cache.fork())
    one = CompressedContextMemory(adapted(family))
    one.append([5, 6, 7])
    inputs = one.inputs([8, 9])
    given = (inputs["input_ids"], inputs["attention_mask"], None, inputs["past_key_values"])
    with torch.no_grad():
        assert torch.equal(one.model.get_base_model()(*given).logits, one.logits([8, 9]))


def test_a_mask_that_hides_the_context_is_refused() -> None:
    model, cache = compressed()
    for column in (0, 5, cache.ids.shape[1] - 1):
        inputs = cache.inputs(QUESTION)
        inputs["attention_mask"][0, column] = 0
        with pytest.raises(DroppedTokensError, match="hides tokens"):
            model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_without_use_cache_is_refused(family: str) -> None:
    model, cache = compressed(family)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(**cache.inputs(QUESTION), use_cache=False, max_new_tokens=3)
    ids = question_ids(cache)
    with torch.no_grad():  # one forward with a cache has it read
        assert torch.equal(model(ids, use_cache=False, **held(cache.fork())).logits, logits(model, cache.fork(), ids))


def test_prefill_in_pieces_is_right_or_refused() -> None:
    model, cache = compressed()
    expected = model.generate(**cache.inputs(QUESTION), max_new_tokens=6, **GREEDY)
    try:
        found = model.generate(**cache.inputs(QUESTION), prefill_chunk_size=7, max_new_tokens=6, **GREEDY)
    except DroppedTokensError:
        return  # up to 5.22 transformers reads the whole prompt
    assert torch.equal(found, expected)


def test_layers_that_leave_the_cache_out_are_noticed() -> None:
    model, cache = compressed()
    ids, fork = question_ids(cache), cache.fork()
    expected = logits(model, cache.fork(), ids)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="did not write its tokens"):
        model(ids, **held(fork))
    assert fork.get_seq_length() == cache.get_seq_length()
    model.gradient_checkpointing_disable()
    output = model(ids, labels=ids, **held(fork))
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=0)
    assert all(weight.grad is not None for weight in model.model.layers.parameters())


def test_no_future_warning_reaches_a_user() -> None:
    with_adapter = adapted()  # peft's own call warns
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model, cache = compressed()
        model.generate(**cache.inputs(QUESTION), max_new_tokens=2)
        one = CompressedContextMemory(with_adapter)
        one.append([5, 6, 7])
        one.generate([8, 9], max_new_tokens=2)
        one.logits([8])


def test_under_autocast() -> None:
    model, cache = compressed()
    expected = logits(model, cache.fork(), question_ids(cache))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model, cache.fork(), question_ids(cache)).float()
        made_here = KVzipCache.from_context(model, byte_tokenizer(), CONTEXTS[0], keep_ratio=0.5, progress=False)
        again = logits(model, made_here.fork(), question_ids(cache)).float()
        model.generate(**made_here.inputs(QUESTION), max_new_tokens=3)
    for one in (found, again):
        assert torch.nn.functional.cosine_similarity(one, expected, dim=-1).min() > 0.95


def test_embeddings_instead_of_ids() -> None:
    model, cache = compressed()
    inputs: dict[str, Any] = cache.inputs(QUESTION)
    expected = model.generate(**cache.inputs(QUESTION), max_new_tokens=6, **GREEDY)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    found = model.generate(
        inputs_embeds=embedded,
        attention_mask=inputs["attention_mask"],
        **held(inputs["past_key_values"]),
        max_new_tokens=6,
        **GREEDY,
    )
    assert found[0].tolist() == expected[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_padded_forward_answers_as_its_rows() -> None:
    for family in ("llama", "gemma3"):
        model, cache = compressed(family)
        inputs = cache.inputs([QUESTION, "No?"])
        n = cache.get_seq_length()
        with torch.no_grad():
            both = model(
                inputs["input_ids"][:, n:], attention_mask=inputs["attention_mask"], **held(cache.fork())
            ).logits
        for row, question in zip(both, (QUESTION, "No?"), strict=True):
            alone = logits(model, cache.fork(), question_ids(cache, question))[0]
            torch.testing.assert_close(row[-len(alone) :], alone, atol=1e-4, rtol=0)


def test_virtual_tokens_before_every_prompt_are_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        KVzipCache.from_context(model, byte_tokenizer(), CONTEXTS[0], progress=False)


@pytest.mark.parametrize("make", [lambda model: model.bfloat16(), lambda model: model.half()])
def test_a_model_cast_after_compression_still_answers(make: Any) -> None:
    model, cache = compressed()
    expected = logits(model, cache.fork(), question_ids(cache))
    cast = make(model)
    found = cast(question_ids(cache), **held(cache.fork())).logits
    assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.95


def test_detach_of_the_class() -> None:
    model, cache = compressed()
    KVzipCache.detach(model)
    assert not attached(model)
    with pytest.raises(ValueError, match="attach"):
        logits(model, cache.fork(), question_ids(cache))
    cache.attach(model)
    logits(model, cache.fork(), question_ids(cache))


def test_crop_takes_negative_numbers_on_every_release() -> None:
    _, cache = compressed()
    with pytest.raises(ValueError, match="negative number"):
        cache.fork().crop(3)
