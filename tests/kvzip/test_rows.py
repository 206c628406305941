"""Several contexts in one cache.

Invariants: every row is answered as its own cache answers, to float tolerance, whatever the lengths of contexts and questions,
the padding, the storage and the score; beams stay with their context; a call with other rows, or a mask that does not know
where contexts begin, is refused; so is a model whose layers cannot be padded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_dataopt import KVzipCache, KVzipConfig, plot_retention
from hf_dataopt.errors import DroppedTokensError, UnsupportedModelError

from ..families import available
from ..families.plain import generate
from ..models import FAMILIES, byte_tokenizer, held, tiny_model
from .conftest import CONTEXT
from .test_gates import random_gates

CONTEXTS = [CONTEXT, "The lock is red.", CONTEXT[20:70]]
QUESTIONS: list[Any] = ["Which key is red?", "Who?", [{"role": "user", "content": "Is the lock red or blue today?"}]]
CONFIG = KVzipConfig(keep_ratio=0.5, chunk_size=32)
LENGTH = 6


def together(model: Any, config: KVzipConfig = CONFIG, **options: Any) -> KVzipCache:
    return KVzipCache.from_contexts(model, byte_tokenizer(), CONTEXTS, config=config, progress=False, **options)


def alone(model: Any, row: int, config: KVzipConfig = CONFIG, **options: Any) -> KVzipCache:
    return KVzipCache.from_context(model, byte_tokenizer(), CONTEXTS[row], config=config, progress=False, **options)


def check(model: Any, cache: KVzipCache, singles: list[KVzipCache], questions: list[Any] = QUESTIONS) -> None:
    """Rows of a generation against those of single caches: tokens and logits."""
    found = generate(model, LENGTH, **cache.inputs(questions))
    for row, (single, question) in enumerate(zip(singles, questions, strict=True)):
        expected = generate(model, LENGTH, **single.inputs(question))
        assert torch.equal(found.sequences[row, -LENGTH:], expected.sequences[0, -LENGTH:])
        logits = torch.stack([one[row] for one in found.logits])
        torch.testing.assert_close(logits, torch.cat(expected.logits), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gpt_oss"])
def test_every_row_is_answered_as_its_own_cache_answers(family: str) -> None:
    model = tiny_model(family) if family in FAMILIES else available()[family].model()
    cache, singles = together(model), [alone(model, row) for row in range(3)]
    check(model, cache, singles)
    check(model, cache, singles, ["Who?"] * 3)  # the same question, told once or three times
    assert torch.equal(cache.inputs("Who?")["input_ids"], cache.inputs(["Who?"] * 3)["input_ids"])
    lengths = [sum(layers, []) for layers in zip(*(one.stored_lengths for one in singles), strict=True)]
    assert cache.stored_lengths == lengths
    assert cache.context_nbytes == sum(one.context_nbytes for one in singles)


@pytest.mark.parametrize("settings", [{"storage": "int8"}, {"storage": "int4"}, {"level": "head"}, {"score": "snapkv"}])
def test_with_any_storage_level_and_score(settings: dict[str, Any]) -> None:
    model, config = tiny_model("qwen3"), KVzipConfig(keep_ratio=0.5, chunk_size=32, **settings)
    check(model, together(model, config), [alone(model, row, config) for row in range(3)])


def test_with_gates_and_a_budget_in_tokens() -> None:
    model, config = tiny_model("gemma3"), KVzipConfig(max_kv_tokens=105, prefill_chunk_size=11)
    gates = random_gates(model)
    cache = together(model, config, gates=gates)
    check(model, cache, [alone(model, row, config, gates=gates) for row in range(3)])


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_beams_stay_with_their_context(family: str) -> None:
    model = tiny_model(family)
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = model.generate(**together(model).inputs(QUESTIONS), **options)
    for row, question in enumerate(QUESTIONS):
        expected = model.generate(**alone(model, row).inputs(question), **options)
        assert torch.equal(found[row, -5:], expected[0, -5:])


def test_contexts_of_one_length_need_no_mask() -> None:
    model, contexts = tiny_model("qwen3"), ["The lock is red.", "The door is big."]
    cache = KVzipCache.from_contexts(model, byte_tokenizer(), contexts, config=CONFIG, progress=False)
    ids = torch.tensor([[7, 8, 9], [10, 11, 12]])
    with torch.no_grad():
        found = model(ids, **held(cache.fork())).logits
        for row, text in enumerate(contexts):
            single = KVzipCache.from_context(model, byte_tokenizer(), text, config=CONFIG, progress=False)
            expected = model(ids[row : row + 1], **held(single)).logits[0]
            torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_turns_forks_and_resets() -> None:
    model, cache = tiny_model("qwen3"), together(tiny_model("qwen3"))
    cache.attach(model)
    inputs = cache.inputs(QUESTIONS)
    first = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    fork: KVzipCache = inputs["cache"]
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 7, dtype=torch.int64)], dim=1)
    more = torch.cat([first, torch.tensor([[7, 8, 9]]).expand(3, -1)], dim=1)
    going_on = model.generate(more, attention_mask=mask, max_new_tokens=4, do_sample=False, **held(fork))
    again = model.generate(more, attention_mask=mask, max_new_tokens=4, do_sample=False, **held(cache.fork()))
    assert torch.equal(going_on, again)
    fork.reset()
    inputs = cache.inputs(QUESTIONS)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(first, model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, **held(fork)))
    elsewhere = cache.moved_to("cpu").inputs(QUESTIONS)
    assert torch.equal(first, model.generate(**elsewhere, max_new_tokens=4, min_new_tokens=4, do_sample=False))


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    cache = together(model)
    for questions, words in (
        (["Who?"], "takes a list of as many questions"),
        (3, "takes a list of as many questions"),
        ([["Who?", "What?"], "Who?", "Who?"], "takes one question"),
        (["Who?", " ", "Who?"], "question is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            cache.inputs(questions)
    inputs = cache.inputs(QUESTIONS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    n = cache.ids.shape[1]
    with torch.no_grad():
        for new, seen in (
            (ids[:, n:], None),
            (ids[:, n:], torch.ones_like(mask)),
            (ids[:2, n:], mask[:2]),
            (ids[[1, 0, 2], n:], mask[[1, 0, 2]]),
        ):
            with pytest.raises(DroppedTokensError, match="holds 3 contexts of"):
                model(new, attention_mask=seen, **held(cache.fork()))
    with pytest.raises(DroppedTokensError, match="do not start with"):
        model.generate(ids[[1, 0, 2]], attention_mask=mask, max_new_tokens=2, **held(cache.fork()))
    fork: KVzipCache = inputs["cache"]
    with torch.no_grad():
        model(ids[:, n:], attention_mask=mask, **held(fork))
    with pytest.raises(ValueError, match="cannot change places"):
        fork.batch_select_indices(torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="cannot change places"):
        fork.batch_select_indices(torch.tensor([0]))
    for refused in (
        lambda: cache.compress_again(0.1),
        lambda: cache.save_pretrained("x"),
        lambda: plot_retention(cache),
    ):
        with pytest.raises(ValueError, match="several contexts"):
            refused()
    with pytest.raises(ValueError, match="a cache of its own"):
        together(model, KVzipConfig(max_kv_tokens=200, standing=True), gates=random_gates(model))
    for contexts, error in (("one", TypeError), ([], ValueError), (["one", 3], TypeError), (["one", ""], ValueError)):
        with pytest.raises(error):
            KVzipCache.from_contexts(model, byte_tokenizer(), contexts, progress=False)


@pytest.mark.parametrize(
    ("family", "words"),
    [("deepseek_v3", "latents"), ("llama4_text", "attention in chunks"), ("qwen3_next", "linear attention")],
)
def test_models_whose_rows_cannot_be_padded_are_refused(family: str, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        together(available()[family].model())
