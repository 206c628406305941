"""A budget that holds while decoding.

Invariants: behind every forward no more is held than the budget, however long it goes on; what stays are the best pairs of the
gates' scores, in order, with the newest half block whole; below the budget nothing changes; forks start from the whole
context; what cannot be kept within it is refused.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.kvzip.layers import KVzipLayer
from hf_dataopt.routing.layer_inputs import listening

from ..models import byte_tokenizer, held, tiny_model
from .conftest import CONTEXT
from .test_gates import random_gates
from .test_turns import talked

BUDGET = 150


def made(model: Any, budget: int = BUDGET, **settings: Any) -> KVzipCache:
    config = KVzipConfig(max_kv_tokens=budget, standing=True, **settings)
    gates = random_gates(model)
    return KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, config=config, gates=gates, progress=False)


def pairs(cache: KVzipCache) -> float:
    """Held pairs a head, on average."""
    layers = [layer for layer in cache.layers if isinstance(layer, KVzipLayer)]
    found = [length + layer.n_tail for layer in layers for length in layer.context.lengths]
    return sum(found) / len(found)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("level", ["pair", "pair-uniform"])
def test_a_long_generation_stays_within_its_budget(family: str, level: Any) -> None:
    model = tiny_model(family)
    cache = made(model, level=level)
    fork, seen = cache.fork(), []
    n_prefix, ids = cache.prompt.prefix_ids.numel(), torch.arange(20, 60)[None]
    with torch.no_grad():
        for _ in range(90):
            logits = model(ids, **held(fork)).logits
            ids = logits[:, -1:].argmax(-1)
            seen.append(pairs(fork))
    assert max(seen) <= BUDGET and min(seen[1:]) >= BUDGET - 1.5 * ((BUDGET - n_prefix) // 4) - 1
    assert len({round(one) for one in seen}) > 5  # it grows between cuts
    assert fork.get_seq_length() == cache.ids.shape[1] + 40 + 89
    for layer in fork.layers:
        if isinstance(layer, KVzipLayer):
            assert [len(row) for row in layer.scores] == layer.context.lengths
            assert layer.tail_scores.shape == (2, layer.n_tail) and layer.n_tail < 40
    if level == "pair-uniform":
        assert len({length for layer in fork.stored_lengths for length in layer}) == 1
    # other requests start from the whole context; this one does too, once it is reset
    before = cache.stored_lengths
    assert cache.fork().stored_lengths == before != fork.stored_lengths
    fork.reset()
    assert fork.stored_lengths == before


def test_the_best_by_the_gates_stay() -> None:
    model = tiny_model("llama")
    cache = made(model)
    n_prefix, gates = cache.prompt.prefix_ids.numel(), cache.gates
    given: dict[int, torch.Tensor] = {}
    fork, ids = cache.fork(), torch.randint(4, 200, (1, 30), generator=torch.Generator().manual_seed(1))
    free = KVzipCache(fork.pristine_layers, cache.prompt, KVzipConfig(), made_by=cache.made_by)
    free.attach(model)
    with torch.no_grad():
        model(ids, **held(free))
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: given.update({module.layer_idx: kwargs["hidden_states"][0]}),
                with_kwargs=True,
            )
            for layer in model.model.layers
        ]
        model(ids, **held(fork))
        for hook in hooks:
            hook.remove()
    block = (BUDGET - n_prefix) // 4
    recent = block // 2
    scores = []
    for place, layer in enumerate(cache.pristine_layers):
        new = gates.score(place, given[place])[:, : 30 - recent]
        scores += [torch.cat([old, one]) for old, one in zip(layer.scores, new, strict=True)]
    best = torch.cat(scores).sort(descending=True).values[6 * (BUDGET - block - recent) - 1]
    for place, layer in enumerate(fork.layers):
        assert layer.n_tail == recent
        torch.testing.assert_close(layer.keys, free.layers[place].keys[:, :, -recent:], atol=1e-5, rtol=0)
        whole = zip(
            cache.pristine_layers[place].context.keys.split(cache.pristine_layers[place].context.lengths),
            free.layers[place].keys[0, :, : 30 - recent],
            scores[2 * place : 2 * place + 2],
            layer.context.keys.split(layer.context.lengths),
            strict=True,
        )
        for old, new, row, stays in whole:
            torch.testing.assert_close(torch.cat([old, new])[row >= best], stays, atol=1e-5, rtol=0)


def test_below_the_budget_nothing_changes() -> None:
    model = tiny_model("qwen3")
    cache = made(model, budget=400)
    free = replace(cache.config, standing=False)
    other = KVzipCache.from_context(
        model, byte_tokenizer(), CONTEXT, config=free, gates=random_gates(model), progress=False
    )
    options = {"max_new_tokens": 30, "do_sample": False}
    assert torch.equal(
        model.generate(**cache.inputs("Which?"), **options), model.generate(**other.inputs("Which?"), **options)
    )


def test_a_conversation_goes_on_with_the_scores_at_hand() -> None:
    model = tiny_model("qwen3")
    cache = made(model)
    for turn in range(3):
        cache = talked(model, cache, f"And room {turn}?", tokens=50)
        assert pairs(cache) <= BUDGET
        other = copy.copy(cache)
        other.gates = None  # not asked again
        other.compress_again(progress=False)
        cache.compress_again(progress=False)
        assert cache.stored_lengths == other.stored_lengths and pairs(cache) <= BUDGET
    assert cache.get_seq_length() > 2.5 * BUDGET


def test_steps_are_taken_back_with_their_scores() -> None:
    model = tiny_model("llama")
    fork = made(model, budget=400).fork()
    with torch.no_grad():
        model(torch.arange(20, 30)[None], **held(fork))
        fork.crop(-4)
        assert fork.layers[0].tail_scores.shape == (2, 6)
        model(torch.arange(40, 44)[None], **held(fork))
    assert fork.layers[2].tail_scores.shape == (2, fork.layers[2].n_tail) == (2, 10)


def test_a_forward_that_fails_leaves_cache_and_thread_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    fork = made(model).fork()
    with torch.no_grad():
        model(torch.arange(20, 50)[None], **held(fork))
        lengths, length = fork.stored_lengths, fork.get_seq_length()
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on the way"):
            patch.setattr(model.model.layers[2].mlp, "forward", _fails)
            model(torch.arange(20, 60)[None], **held(fork))
        assert fork.stored_lengths == lengths and fork.get_seq_length() == length
        model(torch.tensor([[9]]), **held(fork))
        assert fork.heard is None and pairs(fork) <= BUDGET
        with listening() as heard:
            model(torch.tensor([[9]]))
        assert heard.take(2) is not None


def _fails(*args: Any) -> Any:
    raise RuntimeError("on the way")


def test_what_cannot_stay_within_a_budget_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    for settings in (
        {},
        {"max_kv_tokens": 200, "level": "head"},
        {"max_kv_tokens": 200, "storage": "int4"},
    ):
        with pytest.raises(ValueError, match="standing=True needs max_kv_tokens"):
            KVzipConfig(standing=True, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs gates"):
        KVzipCache.from_context(model, tokenizer, CONTEXT, config=KVzipConfig(max_kv_tokens=150, standing=True))
    cache = made(model)
    for inputs, options in ((cache.inputs(["Which?", "Who?"]), {}), (cache.inputs("Which?"), {"num_beams": 2})):
        with pytest.raises(ValueError, match="one request within its budget"):
            model.generate(**inputs, max_new_tokens=2, **options)
    bare = cache.fork()
    bare.gates = None
    with pytest.raises(ValueError, match=r"set `cache.gates`"):
        model.generate(**bare.inputs("Which?"), max_new_tokens=2)
    bare = cache.fork()
    for layer in bare.layers:
        layer.scores = None
    with pytest.raises(ValueError, match=r"which files of 0\.1 leave out"):
        model(torch.tensor([[7]]), **held(bare))
    # a file has them
    cache.save_pretrained(tmp_path)
    loaded = KVzipCache.from_pretrained(tmp_path, model, tokenizer)
    with pytest.raises(ValueError, match=r"set `cache.gates`"):
        model.generate(**loaded.inputs("Which?"), max_new_tokens=2)
    loaded.gates = cache.gates
    options: Any = {"max_new_tokens": 90, "do_sample": False}
    inputs = [one.inputs("Which?") for one in (loaded, cache)]
    ours, theirs = (model.generate(**one, **options) for one in inputs)
    assert torch.equal(ours, theirs) and pairs(inputs[0]["cache"]) <= BUDGET
