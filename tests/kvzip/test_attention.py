"""Attention with log-sum-exp, in parts, equals dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_dataopt.kvzip import attention
from hf_dataopt.kvzip.attention import attend, merge

from ..reference.kvzip import dense_attention

SCALE = 0.3


def tensors(batch: int, heads: int, kv_heads: int, rows: int, length: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 100 + length)
    query = torch.randn(batch, heads, rows, 16, generator=generator)
    key = torch.randn(batch, kv_heads, length, 16, generator=generator)
    value = torch.randn(batch, kv_heads, length, 16, generator=generator)
    return query, key, value


def gpu_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch's GPU kernels promise, on a CPU: one key and value head a query head."""
    assert query.shape[:2] == key.shape[:2] == value.shape[:2]
    below = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    output, lse = dense_attention(query, key, value, scale, below if is_causal else None)
    return output.float(), lse.float()


@pytest.fixture(params=["fused", "gpu", "blocks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways through `attend`: the fused kernels of a CPU and of a GPU, and plain operations in blocks of a few rows."""
    if request.param == "gpu":
        monkeypatch.setattr(attention, "takes_gpu_flash", attention._alike)
        monkeypatch.setattr(attention, "gpu_flash", gpu_kernel)
    if request.param == "blocks":
        monkeypatch.setattr(attention, "has_cpu_flash", lambda: False)
        monkeypatch.setattr(attention, "_BLOCK_ELEMENTS", 200)
    return request.param


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (7, 7), (5, 12)])
def test_attend_equals_dense(path: str, heads: int, kv_heads: int, rows: int, length: int) -> None:
    query, key, value = tensors(2, heads, kv_heads, rows, length)
    output, lse = attend(query, key, value, scale=SCALE)
    expected, expected_lse = dense_attention(query, key, value, SCALE)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)


def test_keys_of_one_context_serve_every_row_of_a_batch(path: str) -> None:
    query, _, _ = tensors(3, 6, 2, 5, 12)
    _, key, value = tensors(1, 6, 2, 5, 12)
    output, lse = attend(query, key, value, scale=SCALE)
    expected, expected_lse = dense_attention(query, key.repeat(3, 1, 1, 1), value.repeat(3, 1, 1, 1), SCALE)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_attend_under_a_mask(path: str, kind: str) -> None:
    query, key, value = tensors(2, 6, 2, 6, 6)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    options: dict[str, Any] = {"causal": True}
    if kind != "causal":
        mask = visible[None, None]
        options = {"mask": mask if kind == "bool" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)}
    output, lse = attend(query, key, value, scale=SCALE, **options)
    expected, expected_lse = dense_attention(query, key, value, SCALE, visible.expand(2, 6, 6, 6))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)


def test_a_row_that_sees_nothing_does_not_spoil_a_merge(path: str) -> None:
    """Padding queries see no tail token; merged with a context they must give the context's attention."""
    query, key, value = tensors(1, 4, 2, 3, 5)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 1, :] = False
    tail = attend(query, key, value, scale=SCALE, mask=mask)
    _, key2, value2 = tensors(1, 4, 2, 3, 8)
    context = attend(query, key2, value2, scale=SCALE)
    merged, _ = merge(context, tail)
    torch.testing.assert_close(merged[:, :, 1], context[0][:, :, 1])
    assert torch.isfinite(merged).all()


def test_merge_of_parts_is_the_whole(path: str) -> None:
    query, key, value = tensors(2, 6, 2, 4, 11)
    parts = [attend(query, key[:, :, a:b], value[:, :, a:b], scale=SCALE) for a, b in ((0, 2), (2, 7), (7, 11))]
    output, lse = merge(merge(parts[0], parts[1]), parts[2])
    whole, whole_lse = attend(query, key, value, scale=SCALE)
    torch.testing.assert_close(output, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=0)
    # extreme logits stay finite
    hot = attend(query * 1e3, key, value, scale=SCALE)
    assert torch.isfinite(merge(hot, parts[0])[0]).all()


def test_gradients_flow_through_the_portable_path() -> None:
    query, key, value = tensors(1, 4, 2, 3, 6)
    query.requires_grad_()
    output, _ = attend(query, key, value, scale=SCALE)
    (gradient,) = torch.autograd.grad(output.square().sum(), query)
    twin = query.detach().clone().requires_grad_()
    expected, _ = dense_attention(twin, key, value, SCALE)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), twin)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)
