"""Attention over two sets of keys at once: the ragged compressed context and the dense new tokens.

The parts are computed apart and merged by log-sum-exp, so neither masks nor padding nor copies of the context are needed.
A model reaches this code through the dispatcher (`routing/`), by the tag on the keys that a cache layer handed out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .._compat import cpu_flash, has_cpu_flash, varlen_kernel
from .rules import same_dtype

# rows x keys that the portable path holds at a time, in elements (64 MB in float32)
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class RaggedContext:
    """What one layer keeps of a context; never changed, so every fork of a cache shares it.

    Args:
        keys: (sum of lengths, d), values: (sum of lengths, v): one KV head after the other, each in order of position, keys
            after RoPE.
        lengths: kept pairs of each KV head, prefix included.
        n_tokens: tokens the context had (its logical length).
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: list[int]
    n_tokens: int

    @classmethod
    def evict(cls, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor) -> RaggedContext:
        """Copy the pairs that stay out of a full layer.

        Args:
            keys: (1, KV heads, n, d), values: (1, KV heads, n, v).
            keep: (KV heads, n) bool.

        Returns:
            A context that holds memory for the kept pairs only.
        """
        kept = keep.to(keys.device)
        return cls(keys[0][kept], values[0][kept], kept.sum(dim=1).tolist(), keep.shape[1])

    @cached_property
    def key_heads(self) -> list[torch.Tensor]:
        """Views of `keys` per KV head, (1, 1, length, d)."""
        return [part[None, None] for part in self.keys.split(self.lengths)]

    @cached_property
    def value_heads(self) -> list[torch.Tensor]:
        """Views of `values` per KV head, (1, 1, length, d)."""
        return [part[None, None] for part in self.values.split(self.lengths)]

    @property
    def nbytes(self) -> int:
        """Bytes of the kept keys and values."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedContext:
        return self


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with its log-sum-exp, grouped-query heads included.

    Args:
        query: (B, H, q, d), any float dtype.
        key: (B or 1, Hkv, n, d), H a multiple of Hkv. value: (B or 1, Hkv, n, v).
        scale: factor on the logits.
        mask: (B or 1, 1, q, n) bool (True = visible) or additive float, optional.
        causal: query i sees keys up to i; only with q == n and without `mask`.
        softcap: logits are `softcap * tanh(logits / softcap)`, optional.

    Returns:
        Output (B, H, q, v) in the query's dtype, log-sum-exp (B, H, q) in float32 (very negative where nothing is visible).

    Cost: one fused kernel on CPU; elsewhere O(q n) time in blocks of fixed memory.
    """
    batch, heads, rows, _ = query.shape
    if key.shape[0] != batch:
        key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    if key.shape[2] == 0:
        nothing = query.new_zeros(batch, heads, rows, value.shape[-1])
        return nothing, query.new_full((batch, heads, rows), float("-inf"), dtype=torch.float32)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    with_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    fused = query.device.type == "cpu" and softcap is None and key.shape[-1] == value.shape[-1] and not with_grad
    if fused and has_cpu_flash():
        return cpu_flash(query, key, value, mask, causal, scale)
    return _attend_in_blocks(query, key, value, scale, mask, causal, softcap)


def _attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` from plain tensor operations, for any device and dtype."""
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    key_t, value = key[:, :, None].transpose(-1, -2), value[:, :, None]
    block = max(_BLOCK_ELEMENTS // max(batch * heads * length, 1), 1)
    outputs, lses = [], []
    for start in range(0, rows, block):
        logits = (grouped[..., start : start + block, :] @ key_t).float() * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if causal:
            visible = (
                torch.arange(length, device=query.device)
                <= (torch.arange(start, min(start + block, rows), device=query.device)[:, None])
            )
            logits = logits.masked_fill(~visible, torch.finfo(torch.float32).min)
        elif mask is not None:
            logits = logits + mask[:, :, None, start : start + block].float()
        lse = torch.logsumexp(logits, dim=-1)
        outputs.append(torch.exp(logits - lse[..., None]).to(value.dtype) @ value)
        lses.append(lse)
    output, lse = torch.cat(outputs, dim=-2), torch.cat(lses, dim=-1)
    return output.reshape(batch, heads, rows, -1), lse.reshape(batch, heads, rows)


def attend_ragged(
    query: torch.Tensor, context: RaggedContext, *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over all kept pairs of its KV head, where heads keep different numbers of pairs.

    Args:
        query: (B, H, q, d). All batch rows share the one context, which is never repeated.
        context: the kept pairs.
        scale: factor on the logits.
        softcap: as `attend`.

    Returns:
        Output (B, H, q, v) and log-sum-exp (B, H, q) as `attend`.

    Source: section 8.4.1 (non-uniform head budgets with variable-length attention).
    Cost: O(B H q d * kept pairs per head), no padding; on CUDA in half precision one variable-length kernel.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = len(context.lengths)
    group = heads // kv_heads
    # a head's queries over batch and group are the rows of one problem: the context is read once for all of them
    by_head = (
        query.reshape(batch, kv_heads, group * rows, dim)
        .transpose(0, 1)
        .reshape(kv_heads, 1, batch * group * rows, dim)
    )
    half_on_cuda = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    alike = softcap is None and context.keys.shape == context.values.shape and context.keys.dtype == query.dtype
    alike = alike and bool(max(context.lengths))
    kernel = varlen_kernel() if half_on_cuda and alike and not torch.is_grad_enabled() else None
    if kernel is not None:
        output, lse = _varlen(kernel, by_head[:, 0], context, scale)
    else:
        parts = [
            attend(*same_dtype(one, key, value), scale=scale, softcap=softcap)
            for one, key, value in zip(by_head.split(1), context.key_heads, context.value_heads, strict=True)
        ]
        output, lse = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    output = output.reshape(kv_heads, batch, group * rows, -1).transpose(0, 1).reshape(batch, heads, rows, -1)
    return output, lse.reshape(kv_heads, batch, group * rows).transpose(0, 1).reshape(batch, heads, rows)


def _varlen(
    kernel: Any, by_head: torch.Tensor, context: RaggedContext, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_ragged` in one variable-length kernel: a KV head plays a sequence, its queries are that sequence's tokens."""
    kv_heads, rows, dim = by_head.shape
    lengths = context.lengths
    cu_query = torch.arange(0, (kv_heads + 1) * rows, rows, dtype=torch.int32, device=by_head.device)
    cu_key = torch.tensor([0, *lengths], dtype=torch.int32, device=by_head.device).cumsum(0, dtype=torch.int32)
    output, lse = kernel(
        by_head.reshape(-1, 1, dim),
        context.keys[:, None],
        context.values[:, None],
        cu_query,
        cu_key,
        rows,
        max(lengths),
        scale=scale,
    )
    # a head without pairs: the kernel leaves its rows undefined
    empty = torch.tensor([length == 0 for length in lengths], device=by_head.device)[:, None]
    output = output.reshape(kv_heads, rows, dim).masked_fill(empty[..., None], 0)
    return output, lse.float().reshape(kv_heads, rows).masked_fill(empty, float("-inf"))


def merge(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention over the union of two disjoint key sets, from the attention over each.

    Args:
        one, other: outputs (B, H, q, d) and log-sum-exps (B, H, q); in every row at least one of them sees a key.

    Returns:
        Output and log-sum-exp over all keys, shaped like one part.
    """
    # softmax over two numbers is a sigmoid of their difference: three small kernels per decoded token and layer
    first, second = same_dtype(one[0], other[0])
    weight = torch.sigmoid(other[1] - one[1]).unsqueeze(-1).to(first.dtype)
    return torch.lerp(first, second, weight), torch.logaddexp(one[1], other[1])
