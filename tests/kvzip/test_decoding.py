"""One decoded token: how many kernels it takes, and where the tail's keys go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_dataopt.kvzip import decode_cpu, layers
from hf_dataopt.kvzip.cache import KVzipCache
from hf_dataopt.kvzip.layers import KVzipLayer
from hf_dataopt.kvzip.ragged import RaggedContext

from ..models import byte_tokenizer, held, tiny_model
from .conftest import CONTEXT, Compressed


def token(letter: str) -> torch.Tensor:
    return torch.tensor([[byte_tokenizer().convert_tokens_to_ids(letter)]])


def calls(function: Callable[[], Any]) -> dict[str, int]:
    """How often each operation of torch was called."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return {event.key: event.count for event in seen.key_averages()}


def test_what_a_token_costs_beside_its_attention() -> None:
    """A layer: a fused kernel a KV head and one for the tail, heads put together, three operations to merge; no copies."""
    model = tiny_model("llama", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, keep_ratio=0.3, progress=False)
    fork = cache.fork()
    with torch.no_grad():
        for letter in "ab":
            model(token(letter), **held(fork))
        counts = calls(lambda: model(token("c"), **held(fork)))
        plain = calls(lambda: model(token("c"), use_cache=False))
    fused = sum(count for name, count in counts.items() if "scaled_dot_product_flash_attention_for_cpu" in name)
    assert fused == (4 + 1) * 4
    assert counts["aten::lerp"] == counts["aten::sigmoid"] == 4 and "aten::logaddexp" not in counts
    assert counts["aten::cat"] == 2 * 4 + 1 + plain["aten::cat"]  # one for the ids that were read


@pytest.mark.parametrize("storage", ["model", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (4, 1), (2, 2)])
def test_a_token_by_itself_is_what_any_query_gets(
    heads: int, kv_heads: int, dtype: torch.dtype, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short way through the same kernels: bit for bit, at every length of the tail."""
    generator = torch.Generator().manual_seed(heads)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lengths = [5, 130, 1][:kv_heads]
    context = RaggedContext(draw(sum(lengths), 16), draw(sum(lengths), 16), lengths, 300).stored(storage)
    tokens = [(draw(1, heads, 1, 16), draw(1, kv_heads, 1, 16), draw(1, kv_heads, 1, 16)) for _ in range(3)]

    def outputs() -> list[torch.Tensor]:
        layer = KVzipLayer(context)
        return [layer.attend(query, *layer.update(key, value), None, 0.3, False) for query, key, value in tokens]

    taken: list[bool] = []

    def takes(*given: Any) -> bool:
        taken.append(decode_cpu.takes_token(*given))
        return taken[-1]

    monkeypatch.setattr(layers, "takes_token_on_cpu", takes)
    short = outputs()
    assert taken == [True] * 3
    monkeypatch.setattr(layers, "takes_token_on_cpu", lambda *_: False)
    assert all(torch.equal(one, other) for one, other in zip(short, outputs(), strict=True))


def test_what_the_short_way_cannot_read_goes_the_long_one() -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    def context(lengths: list[int], width: int = 8) -> RaggedContext:
        return RaggedContext(draw(sum(lengths), 8), draw(sum(lengths), width), lengths, 50)

    usual = (draw(1, 4, 1, 8), draw(1, 2, 3, 8), draw(1, 2, 3, 8), context([4, 7]))
    assert decode_cpu.takes_token(*usual)
    changes: tuple[dict[int, Any], ...] = (
        {0: draw(1, 4, 2, 8)},
        {0: draw(2, 4, 1, 8)},
        {0: draw(1, 4, 1, 8).double()},
        {0: draw(1, 4, 1, 8).requires_grad_()},
        {1: draw(1, 2, 3, 8).bfloat16()},
        {1: draw(1, 1, 3, 8), 2: draw(1, 1, 3, 8)},
        {2: draw(1, 2, 3, 6), 3: context([4, 7], 6)},
        {2: draw(1, 2, 3, 6)},
        {3: context([4, 0])},
        {3: context([4, 7, 1])},
        {0: draw(1, 4, 1, 8).to("meta")},
    )
    for change in changes:
        assert not decode_cpu.takes_token(*(change.get(at, one) for at, one in enumerate(usual)))
    with torch.no_grad():
        assert decode_cpu.takes_token(draw(1, 4, 1, 8).requires_grad_(), *usual[1:])


def test_soft_caps_and_sinks_go_the_long_way() -> None:
    context = RaggedContext(torch.randn(9, 8), torch.randn(9, 8), [4, 5], 50)
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8)
    layer = KVzipLayer(context)
    given = (query, *layer.update(key, key), None, 0.3, False)
    plain = layer.attend(*given)
    for options in ({"softcap": 0.5}, {"s_aux": torch.zeros(4)}):
        assert not torch.allclose(layer.attend(*given, **options), plain, atol=1e-3)


def test_tokens_are_written_into_the_room_that_is_there(llama: Compressed) -> None:
    cache = llama.cache(0.5).fork()
    llama.logits(cache, token("a"))
    llama.logits(cache, token("b"))
    at = [layer.keys.data_ptr() for layer in cache.layers]
    for letter in "cdef":
        llama.logits(cache, token(letter))
    assert [layer.keys.data_ptr() for layer in cache.layers] == at
    assert all(layer.keys.shape[2] == 6 and layer.tail.keys.shape[2] == 64 for layer in cache.layers)
    cache.reset()
    assert all(layer.tail is None for layer in cache.layers)


def test_copies_that_go_on_differently_do_not_see_each_other(llama: Compressed) -> None:
    """The second to go on takes memory of its own; so does one that went back, and a call that failed half-way."""

    def asked(letters: str, start: KVzipCache | None = None) -> torch.Tensor:
        fork = llama.cache(0.5).fork() if start is None else start
        return torch.cat([llama.logits(fork, token(letter)) for letter in letters], 1)

    first = llama.cache(0.5).fork()
    asked("ab", first)
    second, third = copy.copy(first), copy.deepcopy(first)
    found = {name: asked(name, fork) for name, fork in (("cde", first), ("fgh", second), ("ijk", third))}
    for name, logits in found.items():
        torch.testing.assert_close(logits, asked(f"ab{name}")[:, 2:], atol=1e-5, rtol=0)
    first.crop(-2)
    other = copy.copy(first)
    torch.testing.assert_close(asked("xy", first), asked("abcxy")[:, 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(asked("z", other), asked("abcz")[:, 3:], atol=1e-5, rtol=0)


def test_rooms_of_inference_mode_are_left_behind(llama: Compressed) -> None:
    cache = llama.cache(0.5).fork()
    with torch.inference_mode():
        for letter in "abc":
            last = llama.model(token(letter), **held(cache)).logits
    after = llama.logits(cache, token("d"))
    plain = llama.cache(0.5).fork()
    for letter in "abc":
        expected = llama.logits(plain, token(letter))
    torch.testing.assert_close(last.clone(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(after, llama.logits(plain, token("d")), atol=1e-6, rtol=0)
