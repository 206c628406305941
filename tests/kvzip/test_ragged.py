"""Attention over ragged heads, tile by tile and in kernels of a GPU, equals dense attention over what is visible."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_dataopt.kvzip import kernels, ragged, ragged_attention
from hf_dataopt.kvzip.attention import attend
from hf_dataopt.kvzip.ragged import DenseTiles, Pieces, RaggedContext, head_rows, tile_size
from hf_dataopt.kvzip.ragged_attention import attend_ragged

from ..reference.kvzip import dense_attention

SCALE = 0.3
LENGTHS = [[4, 9, 1], [6, 6], [12], [5, 0, 3], [70, 0, 131, 64]]


class Case:
    """Queries (3, 2 heads a KV head, 5, 16) and a context of which each head keeps so many pairs, picked at random."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        heads, n = len(lengths), max(lengths) + 3
        self.query = torch.randn(3, 2 * heads, 5, 16, generator=generator, dtype=dtype)
        self.key, self.value = (torch.randn(1, heads, n, 16, generator=generator, dtype=dtype) for _ in range(2))
        order = torch.rand(heads, n, generator=generator).argsort(1)
        self.keep = order < torch.tensor(lengths)[:, None]
        self.context = RaggedContext.evict(self.key, self.value, self.keep)

    def dense(self, visible: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        visible = self.keep if visible is None else visible
        shown = visible.repeat_interleave(2, 0)[None, :, None].expand(3, -1, 5, -1)
        key, value = (one.expand(3, -1, -1, -1) for one in (self.key, self.value))
        return dense_attention(self.query, key, value, SCALE, shown)


@pytest.fixture(params=[1, 4, 16, 64])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of so many rows, whatever the lengths."""
    monkeypatch.setattr(ragged, "tile_size", lambda *args: request.param)
    return request.param


@pytest.mark.parametrize("lengths", LENGTHS)
def test_ragged_equals_masked_dense(size: int, lengths: list[int]) -> None:
    case = Case(lengths)
    assert case.context.lengths == lengths and case.context.n_tokens == max(lengths) + 3
    assert case.context.tiles.size == size
    output, lse = attend_ragged(case.query, case.context, scale=SCALE)
    expected, expected_lse = case.dense()
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)
    seen = torch.tensor(lengths).repeat_interleave(2) > 0
    torch.testing.assert_close(output.double()[:, seen], expected[:, seen], atol=1e-5, rtol=0)
    assert torch.equal(output[:, ~seen], torch.zeros_like(output[:, ~seen]))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_tail_is_one_more_set_of_keys(size: int, lengths: list[int], rows: int) -> None:
    """The last three tokens play the tail, all visible: context and tail together are dense attention over both."""
    case = Case(lengths)
    case.query = case.query[:, :, :rows]
    keep = case.keep.clone()
    keep[:, -3:] = False
    context = RaggedContext.evict(case.key, case.value, keep)
    tail = attend(case.query, case.key[:, :, -3:], case.value[:, :, -3:], scale=SCALE)
    output, lse = attend_ragged(case.query, context, scale=SCALE, tail=tail)
    keep[:, -3:] = True
    visible = keep.repeat_interleave(2, 0)[None, :, None].expand(3, -1, rows, -1)
    key, value = (one.expand(3, -1, -1, -1) for one in (case.key, case.value))
    expected, expected_lse = dense_attention(case.query, key, value, SCALE, visible)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)
    alone, nothing = attend_ragged(case.query, context, scale=SCALE, tail=tail, with_lse=False)
    assert torch.equal(alone, output) and nothing is None


def test_queries_in_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([70, 0, 131, 64])
    tail = attend(case.query, case.key[:, :, -3:], case.value[:, :, -3:], scale=SCALE)
    output, lse = attend_ragged(case.query, case.context, scale=SCALE, tail=tail)
    monkeypatch.setattr(ragged_attention, "_BLOCK_ELEMENTS", 7 * case.context.tiles.count * 16)
    blocks, block_lse = attend_ragged(case.query, case.context, scale=SCALE, tail=tail)
    torch.testing.assert_close(blocks, output, atol=1e-6, rtol=0)
    torch.testing.assert_close(block_lse, lse, atol=1e-6, rtol=0)


def test_logits_of_any_size_and_soft_caps() -> None:
    """Tiles whose largest logits lie thousands apart, and hidden rows beside them, leave no NaN behind."""
    case = Case([70, 0, 131, 64])
    case.key[:, :, ::2] *= 1e3
    case.context = RaggedContext.evict(case.key, case.value, case.keep)
    output, _ = attend_ragged(case.query, case.context, scale=SCALE)
    seen = [0, 1, 4, 5, 6, 7]
    torch.testing.assert_close(output.double()[:, seen], case.dense()[0][:, seen], atol=1e-4, rtol=0)
    output, _ = attend_ragged(case.query, case.context, scale=SCALE, softcap=3.0)
    capped = torch.tanh(case.query[:, 6:].double() @ case.key[:, 3:].double().transpose(2, 3) * SCALE / 3) * 3
    weights = capped.masked_fill(~case.keep[3], -torch.inf).softmax(-1)
    torch.testing.assert_close(output.double()[:, 6:], weights @ case.value[:, 3:].double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    case = Case([70, 131, 64], dtype)
    output, lse = attend_ragged(case.query, case.context, scale=SCALE)
    assert output.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # logits are not rounded to half precision: only the result is
    tolerance = 1e-12 if dtype == torch.float64 else 2**-8
    torch.testing.assert_close(output.double(), case.dense()[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), case.dense()[1], atol=1e-12 if dtype == torch.float64 else 1e-5, rtol=0)


def test_gradients_reach_the_queries() -> None:
    case = Case([70, 0, 131, 64])
    twin = case.query.double().requires_grad_()
    case.query.requires_grad_()
    tail = attend(case.query, case.key[:, :, -3:], case.value[:, :, -3:], scale=SCALE)
    context = RaggedContext.evict(case.key[:, :, :-3], case.value[:, :, :-3], case.keep[:, :-3])
    output, _ = attend_ragged(case.query, context, scale=SCALE, tail=tail)
    (found,) = torch.autograd.grad(output.square().sum(), case.query)
    keep = torch.cat([case.keep[:, :-3], torch.ones_like(case.keep[:, -3:])], 1)
    visible = keep.repeat_interleave(2, 0)[None, :, None].expand(3, -1, 5, -1)
    key, value = (one.expand(3, -1, -1, -1) for one in (case.key, case.value))
    expected, _ = dense_attention(twin, key, value, SCALE, visible)
    (gradient,) = torch.autograd.grad(expected.square().sum(), twin)
    torch.testing.assert_close(found.double(), gradient, atol=1e-4, rtol=1e-4)


# -- storage


def test_memory_is_that_of_the_pairs_and_half_a_tile_a_head() -> None:
    context = Case([4, 9, 1]).context
    assert context.tiles.size == 1 and context.nbytes == 2 * 14 * 16 * 4
    assert context.full_nbytes == 2 * 12 * 3 * 16 * 4
    for mean, expected in ((39, 1), (40, 2), (640, 32), (1280, 64), (9000, 64)):
        one = torch.empty(1, 2, 1, 16)
        assert tile_size([mean - 20, mean + 20], one, one) == expected
    wide = Case([300, 341]).context
    assert wide.tiles.size == 16 and wide.nbytes == 2 * 41 * 16 * 16 * 4  # 19 and 22 tiles


def test_tiles_hold_each_head_in_order_and_zeros_behind(size: int) -> None:
    case = Case([70, 0, 131, 64])
    keys, values = case.context.rows()
    for head, (key, value) in enumerate(zip(keys, values, strict=True)):
        assert torch.equal(key, case.key[0, head][case.keep[head]])
        assert torch.equal(value, case.value[0, head][case.keep[head]])
    tiles = case.context.tiles
    assert isinstance(tiles, DenseTiles)
    assert tiles.keys.abs().sum() == pytest.approx(float(sum(key.abs().sum() for key in keys)), rel=1e-5)
    assert torch.isfinite(tiles.keys).all()


def test_pieces_cover_every_pair_once() -> None:
    pieces = Pieces.of([70, 0, 131, 64], 64, torch.device("cpu"))
    assert pieces.heads.tolist() == [0, 0, 2, 2, 2, 3] and pieces.longest == 64
    assert pieces.bounds.tolist() == [0, 64, 70, 134, 198, 201, 265] and pieces.bounds.dtype == torch.int32
    assert pieces.last.tolist() == [1, 4]
    assert (pieces.hidden == 0).sum(-1).tolist() == [[6], [3]]
    assert (pieces.member == 0).int().tolist() == [
        [1, 1, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0, 1],
    ]


# -- kernels of a GPU. None in the tests: stand-ins with their signatures and documented meaning check what CUDA would be given


def documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences one after the other, (tokens, heads, d): output alike, log-sum-exp (heads, tokens); NaN where undefined."""
    assert all(one.dtype == torch.int32 and one[0] == 0 for one in bounds)
    assert longest == tuple(int(one.diff().max()) for one in bounds)
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert query.shape[0] == bounds[0][-1] and key.shape[0] == value.shape[0] == bounds[1][-1]
    output = torch.full_like(query, math.nan)
    lse = torch.full((query.shape[1], query.shape[0]), math.nan)
    for q0, q1, k0, k1 in zip(bounds[0][:-1], bounds[0][1:], bounds[1][:-1], bounds[1][1:], strict=True):
        if k1 == k0:
            continue
        logits = query[q0:q1].double().transpose(0, 1) @ key[k0:k1].double().permute(1, 2, 0) * scale
        logits = torch.tanh(logits / softcap) * softcap if softcap else logits
        output[q0:q1] = (logits.softmax(-1) @ value[k0:k1].double().transpose(0, 1)).transpose(0, 1).to(query.dtype)
        lse[:, q0:q1] = logits.logsumexp(-1).float()
    return output, lse


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """flash-attn 2.8's signature; with `return_attn_probs` it returns output, log-sum-exp, and None without dropout."""
    assert softmax_scale is not None and not causal and return_attn_probs and dropout_p == 0.0
    bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return *documented(q, k, v, bounds, longest, softmax_scale, softcap), None


def torch_varlen() -> Callable[..., Any]:
    import torch.nn.attention.varlen as varlen

    @functools.wraps(varlen.varlen_attn)
    def stand_in(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert return_aux.lse
        return documented(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale)

    return stand_in


@pytest.fixture(params=["flash-attn", "torch", "flex"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Half precision goes to a kernel, as on a GPU with that kernel."""
    monkeypatch.setattr(kernels, "takes_flat", lambda keys, values: keys.dtype == torch.bfloat16)
    monkeypatch.setattr(ragged, "takes_flat", kernels.takes_flat)
    monkeypatch.setattr(ragged_attention, "takes_flat", kernels.takes_flat)
    monkeypatch.setattr(
        kernels, "flash_varlen", lambda: flash_attn_varlen_func if request.param == "flash-attn" else None
    )
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen())
    if request.param == "flex":
        monkeypatch.setattr(kernels, "varlen_kernel", lambda: None)
    return request.param


@pytest.mark.parametrize("lengths", [[5, 0, 3], [70, 0, 131, 300], [0, 0]])
@pytest.mark.parametrize("rows", ["few", "many"])
def test_kernels_are_called_right(kernel: str, lengths: list[int], rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rows == "many":
        monkeypatch.setattr(ragged_attention, "_FEW_ROWS", 3)
    case = Case(lengths, torch.bfloat16)
    assert case.context.tiles.size == 1
    expected, expected_lse = case.dense()
    tail = attend(case.query, case.key[:, :, -3:], case.value[:, :, -3:], scale=SCALE)
    output, lse = attend_ragged(case.query, case.context, scale=SCALE)
    assert output.dtype == torch.bfloat16
    seen = torch.tensor(lengths).repeat_interleave(2) > 0
    torch.testing.assert_close(output.double()[:, seen], expected[:, seen], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=0)
    assert torch.equal(output[:, ~seen], torch.zeros_like(output[:, ~seen]))
    both, _ = attend_ragged(case.query, case.context, scale=SCALE, tail=tail)
    assert torch.isfinite(both).all()
    torch.testing.assert_close(both[:, ~seen], tail[0][:, ~seen], atol=1e-2, rtol=1e-2)


def test_kernels_by_what_they_can_do(kernel: str) -> None:
    query = torch.empty(2, 5, 16, dtype=torch.bfloat16)
    half = {"flash-attn": kernels._flash, "torch": kernels._torch, "flex": kernels._flex}[kernel]
    assert kernels.kernel_for(query, (16, 16), None) is half
    capped = kernels._flash if kernel == "flash-attn" else kernels._flex
    assert kernels.kernel_for(query, (16, 16), 30.0) is capped
    for given, widths in ((query, (16, 8)), (query, (288, 288)), (query, (12, 12)), (query.float(), (16, 16))):
        assert kernels.kernel_for(given, widths, None) is kernels._flex
    assert kernels.kernel_for(query.requires_grad_(), (16, 16), None) is kernels._flex


def test_soft_caps_in_kernels(kernel: str) -> None:
    if kernel == "torch":
        pytest.skip("torch's kernel has none: FlexAttention stands in, see above")
    case = Case([5, 0, 30], torch.bfloat16)
    output, _ = attend_ragged(case.query, case.context, scale=SCALE, softcap=2.0)
    logits = torch.tanh(case.query[:, 4:].double() @ case.key[:, 2:].double().transpose(2, 3) * SCALE / 2) * 2
    expected = logits.masked_fill(~case.keep[2], -torch.inf).softmax(-1) @ case.value[:, 2:].double()
    torch.testing.assert_close(output.double()[:, 4:], expected, atol=2e-2, rtol=2e-2)


def test_spans_keep_a_gpu_busy() -> None:
    context = RaggedContext(DenseTiles(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)), [100_000, 0, 28_000], 100_000)
    spans = context.spans
    assert spans.longest == 512 and len(spans.heads) == 196 + 55
    assert spans.bounds[-1] == 128_000 and context.heads.bounds.tolist() == [0, 100_000, 128_000]
    small = RaggedContext(DenseTiles(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)), [300, 5], 300)
    assert small.spans.bounds.tolist() == [0, 128, 256, 300, 305]


def test_views_of_heads_are_views(size: int) -> None:
    context = Case([4, 9, 1]).context
    assert isinstance(context.tiles, DenseTiles)
    head_rows(context.tiles.keys, context.lengths)[1][:] = 7
    assert (context.rows()[0][1] == 7).all()
