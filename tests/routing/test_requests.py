"""A request's state belongs to the request.

Four threads on one model get what one thread gets; a call that fails or is interrupted inside a forward leaves cache, model
and settings as they were.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_dataopt.kvzip.layers import KVzipLayer, KVzipSlidingLayer
from hf_dataopt.routing.cache import RoutedCache

from .shared import GREEDY, QUESTION, Served, compressed, logits, question_ids

THREADS, REQUESTS, INTERRUPTS = 4, 50, 20


@pytest.fixture(scope="module")
def served() -> Served:
    return Served()


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change places as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_get_what_one_thread_gets(served: Served, hasty: None) -> None:
    numbers = range(5)
    expected = {(kind, i): ask(i) for kind, ask in served.kinds.items() for i in numbers}
    wrong: list[Any] = []
    answered: list[str] = []

    def user(seed: int) -> None:
        drawn = random.Random(seed)
        for _ in range(REQUESTS):
            kind, i = drawn.choice(list(served.kinds)), drawn.choice(numbers)
            try:
                if served.kinds[kind](i) != expected[kind, i]:
                    wrong.append((kind, i))
            except Exception as error:  # noqa: BLE001 - counted
                wrong.append((kind, i, repr(error)[:200]))
            answered.append(kind)

    threads = [threading.Thread(target=user, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of {len(answered)}: {wrong[:3]}"
    assert len(answered) == THREADS * REQUESTS and len(set(answered)) == len(served.kinds)


def test_interrupts_inside_forwards_leave_model_and_settings(served: Served) -> None:
    expected = {kind: ask(1) for kind, ask in served.kinds.items()}
    base = served.model.get_base_model()
    settings = base.config.to_dict() | {"attention": base.config._attn_implementation}
    state = {name: set(vars(module)) for name, module in base.named_modules()}
    drawn = random.Random(0)
    for _ in range(INTERRUPTS):
        place = drawn.choice([*base.model.layers, base.model.layers[1].self_attn, base.model.norm, base.lm_head])

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = place.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            drawn.choice(list(served.kinds.values()))(0)
        handle.remove()
        kind = drawn.choice(list(served.kinds))
        assert served.kinds[kind](1) == expected[kind]
    assert {kind: ask(1) for kind, ask in served.kinds.items()} == expected
    assert base.config.to_dict() | {"attention": base.config._attn_implementation} == settings
    assert {name: set(vars(module)) for name, module in base.named_modules()} == state


def test_keys_that_an_interrupt_left_unanswered_answer_no_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = compressed()
    ids, update = question_ids(cache), RoutedCache.update
    with torch.no_grad():
        plain, behind = model(ids).logits, logits(model, cache.fork(), ids)
    for number in range(len(model.model.layers)):

        def stopped(*args: Any, number: int = number, **kwargs: Any) -> Any:
            handed = update(*args, **kwargs)
            if args[3] == number:
                raise KeyboardInterrupt
            return handed

        fork = cache.fork()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
            patch.setattr(RoutedCache, "update", stopped)
            logits(model, fork, ids)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain), number
        assert torch.equal(logits(model, fork, ids), behind), number
        del caught  # what holds the layer whose keys were handed out


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_fails_half_way_leaves_the_fork(family: str, error: type[BaseException]) -> None:
    model, cache = compressed(family)
    fork, ids = cache.fork(), question_ids(cache)
    logits(model, fork, ids[:, :3])
    before, length = logits(model, fork.__copy__(), ids[:, 3:]), fork.get_seq_length()
    for place in (*model.model.layers, model.lm_head):

        def fail(*_: Any) -> None:
            raise error("half-way")

        handle = place.register_forward_pre_hook(fail)
        with pytest.raises(error):
            logits(model, fork, ids[:, 3:])
        handle.remove()
        assert fork.get_seq_length() == length
    assert torch.equal(logits(model, fork, ids[:, 3:]), before)


def test_a_memory_s_fork_survives_a_failed_forward(served: Served) -> None:
    from hf_dataopt import CompressedContextMemory

    memory = CompressedContextMemory(served.model)
    memory.append([5, 6, 7, 8])
    inputs = memory.inputs([9, 10, 11])
    layer = served.model.get_base_model().model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("half-way")))
    with pytest.raises(RuntimeError, match="half-way"):
        served.model(**inputs)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(served.model(**inputs).logits, memory.logits([9, 10, 11]))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_views_forks_and_models_die_at_once(family: str) -> None:
    """Nothing of a request is held by a circle, which only the garbage collector would break, or by a thread."""
    model, cache = compressed(family)
    ids = question_ids(cache)
    logits(model, cache.fork(), ids)

    def alive() -> int:
        return sum(isinstance(thing, KVzipLayer | KVzipSlidingLayer) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        fork = cache.fork()
        fork.activate_past_recording()
        for token in ids.split(1, dim=1):
            logits(model, fork, token)
        fork.crop(-2)
        logits(model, fork, ids[:, -2:])
        del fork, token
        model.generate(**cache.inputs([QUESTION, "No?"]), max_new_tokens=3, **GREEDY)
        assert alive() == before
        held = [weakref.ref(layer) for layer in cache.layers]
        kept = weakref.ref(model)
        del cache
        assert not any(reference() for reference in held)
        del model
        assert kept() is None
    finally:
        gc.enable()
