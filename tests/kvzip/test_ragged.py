"""Attention over ragged heads, head by head and in kernels of a GPU, equals dense attention over what is visible."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_dataopt.kvzip import attention, kernels, ragged_attention
from hf_dataopt.kvzip.attention import attend, merge
from hf_dataopt.kvzip.ragged import Pieces, RaggedContext
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

    def dense(self, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
        shown = self.keep.repeat_interleave(2, 0)[None, :, None].expand(3, -1, rows, -1)
        key, value = (one.expand(3, -1, -1, -1) for one in (self.key, self.value))
        return dense_attention(self.query[:, :, :rows], key, value, SCALE, shown)


@pytest.fixture(params=["fused", "blocks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The fused CPU kernel, and plain operations."""
    if request.param == "blocks":
        monkeypatch.setattr(attention, "has_cpu_flash", lambda: False)
    return request.param


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_ragged_equals_masked_dense(path: str, lengths: list[int], rows: int) -> None:
    case = Case(lengths)
    assert case.context.lengths == lengths and case.context.n_tokens == max(lengths) + 3
    for batch in (1, 3):
        output, lse = attend_ragged(case.query[:batch, :, :rows], case.context, scale=SCALE)
        expected, expected_lse = (one[:batch] for one in case.dense(rows))
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)
        seen = torch.tensor(lengths).repeat_interleave(2) > 0
        torch.testing.assert_close(output.double()[:, seen], expected[:, seen], atol=1e-5, rtol=0)
        assert torch.equal(output[:, ~seen], torch.zeros_like(output[:, ~seen]))


def test_soft_caps() -> None:
    case = Case([70, 0, 131, 64])
    output, _ = attend_ragged(case.query, case.context, scale=SCALE, softcap=3.0)
    capped = torch.tanh(case.query[:, 6:].double() @ case.key[:, 3:].double().transpose(2, 3) * SCALE / 3) * 3
    weights = capped.masked_fill(~case.keep[3], -torch.inf).softmax(-1)
    torch.testing.assert_close(output.double()[:, 6:], weights @ case.value[:, 3:].double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_and_mixed_ones(dtype: torch.dtype) -> None:
    case = Case([70, 131, 64], dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    expected = case.dense()[0]
    for query in (case.query, case.query.float()):  # autocast mixes them
        output, _ = attend_ragged(query, case.context, scale=SCALE)
        assert output.dtype == query.dtype
        torch.testing.assert_close(output.double(), expected, atol=max(tolerance, 1e-5), rtol=tolerance)


def test_gradients_reach_the_queries() -> None:
    case = Case([70, 0, 131, 64])
    twin = case.query.double().requires_grad_()
    case.query.requires_grad_()
    output, _ = attend_ragged(case.query, case.context, scale=SCALE)
    (found,) = torch.autograd.grad(output.square().sum(), case.query)
    case.query = twin
    expected, _ = case.dense()
    seen = [0, 1, 4, 5, 6, 7]
    (gradient,) = torch.autograd.grad(expected[:, seen].square().sum(), twin)
    torch.testing.assert_close(found.double(), gradient, atol=1e-4, rtol=1e-4)


# -- storage


def test_memory_is_that_of_the_pairs() -> None:
    context = Case([4, 9, 1]).context
    assert context.nbytes == 2 * 14 * 16 * 4
    assert copy.deepcopy(context) is context


def test_pieces_cover_every_pair_once() -> None:
    pieces = Pieces.of([70, 0, 131, 64], 64, torch.device("cpu"))
    assert pieces.heads.tolist() == [0, 0, 2, 2, 2, 3] and pieces.longest == 64
    assert pieces.bounds.tolist() == [0, 64, 70, 134, 198, 201, 265] and pieces.bounds.dtype == torch.int32
    assert pieces.empty.flatten().tolist() == [False, True, False, False]
    assert (pieces.member == 0).int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert torch.isneginf(pieces.member).sum() == 18
    long = RaggedContext(torch.zeros(40_000, 2), torch.zeros(40_000, 2), [39_000, 1_000], 39_000)
    assert long.spans.longest == 256 and len(long.spans.heads) == 157  # 40,000 rows for 256 spans, in whole 128s
    assert long.whole_heads.bounds.tolist() == [0, 39_000, 40_000]


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
    monkeypatch.setattr(kernels, "takes_kernels", lambda device, dtypes: dtypes[0] == torch.bfloat16)
    monkeypatch.setattr(ragged_attention, "takes_kernels", kernels.takes_kernels)
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
    expected, expected_lse = case.dense()
    tail = attend(case.query, case.key[:, :, -3:], case.value[:, :, -3:], scale=SCALE)
    output, lse = attend_ragged(case.query, case.context, scale=SCALE)
    assert output.dtype == torch.bfloat16
    seen = torch.tensor(lengths).repeat_interleave(2) > 0
    torch.testing.assert_close(output.double()[:, seen], expected[:, seen], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=0)
    assert torch.equal(output[:, ~seen], torch.zeros_like(output[:, ~seen]))
    both, _ = merge((output, lse), tail)
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
    context = RaggedContext(torch.zeros(1, 8), torch.zeros(1, 8), [100_000, 0, 28_000], 100_000)
    spans = context.spans
    assert spans.longest == 512 and len(spans.heads) == 196 + 55
    assert spans.bounds[-1] == 128_000 and context.whole_heads.bounds.tolist() == [0, 100_000, 128_000]
    small = RaggedContext(torch.zeros(1, 8), torch.zeros(1, 8), [300, 5], 300)
    assert small.spans.bounds.tolist() == [0, 128, 256, 300, 305]
