"""Kernels for ragged heads on a GPU, behind one function: flash-attn where it is installed, torch's own otherwise.

A piece of a KV head's keys plays a sequence, and the queries of that head are the tokens of that sequence; every query sees
every key of its piece.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .._compat import flash_varlen, flex_varlen, varlen_kernel
from .ragged import Ragged
from .rules import wants_gradients

_HALF = (torch.float16, torch.bfloat16)
_WIDEST = 256  # of flash attention's heads
_MOST_IN_GROUP = 64
# (rows (N R, d), keys (n, d), values (n, v), bounds of rows and of keys (N + 1,) int32, longest of both, scale, soft cap) to
# output (N R, v) and log-sum-exp (N R,) float32
Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def takes_kernels(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether a kernel of a GPU attends to keys and values of these dtypes."""
    return device.type == "cuda" and dtypes[0] in _HALF and dtypes[1] == dtypes[0]


def is_one_token(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Ragged) -> bool:
    """Whether a call is one token of one request, whose tail is like its context and which no gradients go back through.

    Args:
        query: (B, H, q, d). key, value: (B, KV heads, n, d), of the tail.
        context: the kept pairs.
    """
    batch, _, rows, _ = query.shape
    if batch != 1 or rows != 1 or key.shape[1] != len(context.lengths):
        return False
    dtype = query.dtype
    alike = dtype == key.dtype == value.dtype and context.dtypes == (dtype, dtype)
    return alike and context.widths == (key.shape[3], value.shape[3]) and not wants_gradients(query, key, value)


def takes_token(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Ragged) -> bool:
    """Whether `decode_kernel` reads this call: one token, without a mask, on a GPU that Triton knows."""
    if not is_one_token(query, key, value, context) or query.shape[1] > _MOST_IN_GROUP * key.shape[1]:
        return False
    dense = all(one.shape[2] and one.stride()[2:] == (one.shape[3], 1) for one in (key, value))
    known = query.dtype in (*_HALF, torch.float32) and max(context.widths) <= _WIDEST
    return dense and known and has_triton(query.device)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is there, and compiles for this device."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def kernel_for(query: torch.Tensor, widths: tuple[int, int], softcap: float | None) -> Kernel:
    """The first of flash-attn, torch's variable-length attention and FlexAttention that can do it.

    Args:
        query: says device, dtype and whether gradients are wanted.
        widths: of keys and values.
        softcap: of the logits, or None.
    """
    alike = widths[0] == widths[1] and widths[0] <= _WIDEST and widths[0] % 8 == 0
    ampere = torch.cuda.get_device_capability(query.device) >= (8, 0) if query.is_cuda else True
    plain = alike and ampere and query.dtype in _HALF and not wants_gradients(query)
    if plain and flash_varlen() is not None:
        return _flash
    if plain and softcap is None and varlen_kernel() is not None:
        return _torch
    return _flex


def _flash(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """flash-attn: log-sum-exp (heads, tokens), and a third result that without dropout is empty."""
    kernel: Any = flash_varlen()
    output, lse, _ = kernel(
        rows[:, None],
        keys[:, None],
        values[:, None],
        *bounds,
        *longest,
        softmax_scale=scale,
        causal=False,
        softcap=softcap or 0.0,
        return_attn_probs=True,
    )
    return output[:, 0], lse[0].float()


def _torch(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's variable-length attention: log-sum-exp (heads, tokens)."""
    kernel: Any = varlen_kernel()
    output, lse = kernel(rows[:, None], keys[:, None], values[:, None], *bounds, *longest, scale=scale)
    return output[:, 0], lse[0].float()


def _flex(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention under a mask of which row belongs to which keys: any width, any dtype, soft caps, gradients."""
    asks, holds = (
        torch.bucketize(torch.arange(int(one[-1]), device=one.device), one[1:], right=True) for one in bounds
    )

    def same(batch: Any, head: Any, row: Any, key: Any) -> Any:
        return asks[row] == holds[key]

    cap = softcap or 1.0

    def capped(score: Any, batch: Any, head: Any, row: Any, key: Any) -> Any:
        return torch.tanh(score / cap) * cap

    output, lse = flex_varlen(
        rows[None, None], keys[None, None], values[None, None], same, None if softcap is None else capped, scale
    )
    return output[0, 0], lse[0, 0].float()
