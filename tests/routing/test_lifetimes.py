"""What nobody holds any more is freed at once: a cycle would keep keys in memory until Python looks for one, or for good."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from hf_dataopt import CompressedContextMemory, KVzipConfig
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.scoring import score_context

from ..ccm.models import adapted
from ..models import byte_tokenizer, tiny_model
from .shared import CONTEXTS, GREEDY, QUESTION, compressed


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left(refs: list[Any]) -> int:
    return sum(ref() is not None for ref in refs)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("question", [QUESTION, [QUESTION, "No?"]])
def test_forks_caches_and_models(family: str, question: Any) -> None:
    model, cache = compressed(family)
    inputs = cache.inputs(question)
    model.generate(**inputs, max_new_tokens=3, **GREEDY)
    fork = inputs["past_key_values"]
    refs = [weakref.ref(one) for one in (fork, *fork.layers)]
    del inputs, fork
    assert left(refs) == 0
    refs = [weakref.ref(one) for one in (cache, *cache._pristine)]
    del cache
    assert left(refs) == 0
    refs = [weakref.ref(one) for one in (model, *model.modules())]
    del model
    assert left(refs) == 0


def test_full_caches_once_they_are_scored() -> None:
    prefilled = prefill(tiny_model("llama"), build_prompt(byte_tokenizer(), CONTEXTS[0], KVzipConfig()), progress=False)
    score_context(prefilled, progress=False)
    layers: list[Any] = prefilled.cache.layers
    refs = [weakref.ref(one) for one in (prefilled, *layers, *(layer.keys for layer in layers))]
    del prefilled, layers
    assert left(refs) == 0


def test_memories() -> None:
    memory = CompressedContextMemory(adapted())
    memory.append([5, 6, 7])
    inputs = memory.inputs([8, 9])
    memory.model.generate(**inputs, max_new_tokens=2, **GREEDY)
    fork = inputs["past_key_values"]
    refs = [weakref.ref(one) for one in (memory, fork, *fork.layers, *(keys for keys, _ in memory._layers))]
    del memory, inputs, fork
    assert left(refs) == 0
