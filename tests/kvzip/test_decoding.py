"""One decoded token: how many kernels it takes, and where the tail's keys go."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_dataopt.kvzip import decode_cpu, layers
from hf_dataopt.kvzip.cache import KVzipCache
from hf_dataopt.kvzip.layers import KVzipLayer
from hf_dataopt.kvzip.ragged import RaggedContext

from ..models import byte_tokenizer, held, tiny_model
from ..reference.kvzip import dense_attention
from .conftest import CONTEXT, Compressed


def token(letter: str) -> torch.Tensor:
    return torch.tensor([[byte_tokenizer().convert_tokens_to_ids(letter)]])


def attend_token(query: torch.Tensor, context: Any, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    found = decode_cpu.attend_token(query, context, key, value, 0.3)
    assert found is not None
    return found


def calls(function: Callable[[], Any]) -> dict[str, int]:
    """How often each operation of torch was called."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return {event.key: event.count for event in seen.key_averages()}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where numba is not installed."""
    monkeypatch.setattr(decode_cpu, "loops", lambda: None)


@pytest.fixture
def loop_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of every context that the compiled loop was called for, one number a call."""
    pytest.importorskip("numba")
    found: list[int] = []
    loops = decode_cpu.loops()

    def attend(query: int, keys: int, values: int, lengths: Any, *others: Any) -> None:
        found.append(int(lengths.sum()))
        loops.attend(query, keys, values, lengths, *others)

    monkeypatch.setattr(decode_cpu, "loops", lambda: SimpleNamespace(attend=attend, append=loops.append))
    return found


def test_a_token_takes_one_compiled_loop_a_layer(loop_calls: list[int]) -> None:
    """8 KV heads x 4 layers: 4 calls, and no other attention; what it answers is what the fused kernels answer."""
    model = tiny_model("llama", num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8, head_dim=8)
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, keep_ratio=0.3, progress=False)
    fork, other = cache.fork(), cache.fork()
    with torch.no_grad():
        for letter in "ab":
            model(token(letter), **held(fork))
        loop_calls.clear()
        counts = calls(lambda: model(token("c"), **held(fork)))
        assert loop_calls == [sum(layer.context.lengths) for layer in cache.layers] and len(loop_calls) == 4
        found = model(token("d"), **held(fork)).logits
        with pytest.MonkeyPatch.context() as plain:
            plain.setattr(decode_cpu, "loops", lambda: None)
            expected = [model(token(letter), **held(other)).logits for letter in "abcd"][-1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not [name for name in counts if "attention" in name or name in ("aten::softmax", "aten::lerp")]
    assert counts.get("aten::bmm", 0) <= 1  # the angles of all layers, in older transformers


@pytest.mark.parametrize(("lengths", "group", "width"), [([1], 1, 8), ([63, 64, 65], 3, 64), ([130, 2, 300, 5], 4, 20)])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_loop_equals_dense_attention(
    lengths: list[int], group: int, width: int, size: float, loop_calls: list[int]
) -> None:
    """Whole and broken blocks, widths that fill no register, logits up to thousands, tails of every length and head."""
    generator, heads = torch.Generator().manual_seed(sum(lengths)), len(lengths)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    context = RaggedContext(draw(sum(lengths), width), draw(sum(lengths), width), lengths, 400)
    room_k, room_v = draw(2, 1, heads, 70, width)
    for n in (1, 3, 64, 70):
        query, key, value = size * draw(1, heads * group, 1, width), room_k[:, :, :n], room_v[:, :, :n]
        found = attend_token(query, context, key, value)
        for head, (kept_k, kept_v) in enumerate(context.heads()):
            rows = slice(head * group, (head + 1) * group)
            pairs = (torch.cat([kept, tail[:, head : head + 1]], 2) for kept, tail in ((kept_k, key), (kept_v, value)))
            expected, _ = dense_attention(query[:, rows], *pairs, 0.3)
            torch.testing.assert_close(found[:, rows].double(), expected, atol=4e-6 * size, rtol=0)
    assert loop_calls == [sum(lengths)] * 4


@pytest.mark.parametrize("where", ["key", "value", "tail"])
def test_what_is_no_number_stays_none_in_its_own_head(where: str, loop_calls: list[int]) -> None:
    context = RaggedContext(torch.randn(9, 8), torch.randn(9, 8), [4, 5], 50)
    key, value = torch.randn(2, 1, 2, 3, 8)
    {"key": context.keys[6], "value": context.values[6], "tail": key[0, 1, 2]}[where][3] = torch.nan
    found = attend_token(torch.randn(1, 4, 1, 8), context, key, value)
    assert loop_calls and bool(found[:, :2].isfinite().all())
    assert bool(found[:, 2:].isnan().any(-1).all())


def test_what_the_loop_cannot_read_goes_by_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given addresses, so what lies otherwise in memory than it reads must never come to it."""
    pytest.importorskip("numba")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    def turned() -> torch.Tensor:
        return draw(1, 3, 2, 8).transpose(1, 2)

    def context(lengths: list[int], rows: int = 11, width: int = 8) -> RaggedContext:
        return RaggedContext(draw(rows, 8), draw(rows, width), lengths, 50)

    usual = (draw(1, 4, 1, 8), draw(1, 2, 3, 8), draw(1, 2, 3, 8), context([4, 7]))
    assert decode_cpu.takes_loop(*usual) and decode_cpu.takes_loop(*usual[:3], context([0, 11]))
    changes: tuple[dict[int, Any], ...] = (
        {0: draw(1, 4, 2, 8)},
        {0: draw(2, 4, 1, 8)},
        {0: draw(1, 3, 1, 8)},
        {0: draw(1, 8, 1, 8)[:, ::2]},
        {0: draw(1, 4, 1, 16)[..., ::2]},
        {0: draw(1, 4, 1, 8).double()},
        {0: draw(1, 4, 1, 8).requires_grad_()},
        {0: draw(1, 4, 1, 8).to("meta")},
        {1: draw(1, 2, 3, 8).to("meta")},
        {1: draw(1, 2, 3, 8).bfloat16()},
        {2: draw(1, 2, 3, 8).double()},
        {1: draw(2, 2, 3, 8), 2: draw(2, 2, 3, 8)},
        {1: draw(1, 1, 3, 8), 2: draw(1, 1, 3, 8)},
        {1: draw(1, 2, 0, 8), 2: draw(1, 2, 0, 8)},
        {1: turned(), 2: turned()},
        {1: draw(1, 2, 70, 8)[:, :, :3]},
        {2: draw(1, 2, 4, 8)},
        {2: draw(1, 2, 3, 6), 3: context([4, 7], width=6)},
        {3: context([4, 7]).stored("int8")},
        {3: RaggedContext(draw(11, 8).double(), draw(11, 8).double(), [4, 7], 50)},
        {3: RaggedContext(draw(11, 16)[:, :8], draw(11, 8), [4, 7], 50)},
        {3: context([4, 7, 1], rows=12)},
        {3: context([4, 9])},
    )
    taken = [decode_cpu.takes_loop(*(change.get(at, one) for at, one in enumerate(usual))) for change in changes]
    assert [at for at, one in enumerate(taken) if one] == []
    with torch.no_grad():
        assert decode_cpu.takes_loop(draw(1, 4, 1, 8).requires_grad_(), *usual[1:])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not decode_cpu.takes_loop(*usual)


def test_one_token_is_written_where_it_belongs_and_nowhere_else() -> None:
    pytest.importorskip("numba")
    room_k, room_v = torch.randn(2, 1, 3, 70, 8)
    keys, values = torch.randn(1, 3, 1, 8), torch.randn(1, 1, 3, 8).transpose(1, 2)
    expected = room_k.index_copy(2, torch.tensor([7]), keys), room_v.index_copy(2, torch.tensor([7]), values)
    assert decode_cpu.append_token((room_k, room_v), 7, keys, values)
    two, half = torch.randn(1, 3, 2, 8), keys.bfloat16()
    for other in (
        (two, two),
        (half, half),
        (keys, values[..., :4]),
        (keys[:, :2], values[:, :2]),
        (keys, two[:, :, ::2]),
    ):
        assert not decode_cpu.append_token((room_k, room_v), 8, *other)
    assert not decode_cpu.append_token((room_k.bfloat16(), room_v.bfloat16()), 8, half, half)
    assert torch.equal(room_k, expected[0]) and torch.equal(room_v, expected[1])


def test_without_numba_there_is_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "hf_dataopt.kvzip.decode_compiled", raising=False)
    monkeypatch.delattr("hf_dataopt.kvzip.decode_compiled", raising=False)
    assert decode_cpu.loops.__wrapped__() is None


@pytest.mark.usefixtures("fused")
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


@pytest.mark.usefixtures("fused")
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

    def takes(*given: Any) -> Any:
        found = decode_cpu.attend_token(*given)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(layers, "attend_token_on_cpu", takes)
    short = outputs()
    assert taken == [True] * 3
    monkeypatch.setattr(layers, "attend_token_on_cpu", lambda *_: None)
    assert all(torch.equal(one, other) for one, other in zip(short, outputs(), strict=True))


def test_what_the_short_way_cannot_read_goes_the_long_one() -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    def context(lengths: list[int], width: int = 8) -> RaggedContext:
        return RaggedContext(draw(sum(lengths), 8), draw(sum(lengths), width), lengths, 50)

    usual = (draw(1, 4, 1, 8), draw(1, 2, 3, 8), draw(1, 2, 3, 8), context([4, 7]))
    assert decode_cpu.takes_fused(*usual)
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
        assert not decode_cpu.takes_fused(*(change.get(at, one) for at, one in enumerate(usual)))
    with torch.no_grad():
        assert decode_cpu.takes_fused(draw(1, 4, 1, 8).requires_grad_(), *usual[1:])


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
