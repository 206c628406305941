"""Attention with its log-sum-exp, so that the attention over two sets of keys can be merged to that over both.

Parts are computed apart, so neither masks nor copies of a context are needed. A model reaches this code through the dispatcher
(`routing/`), by the tag on the keys that a cache layer handed out. What heads of different lengths need is in
`ragged_attention.py`.
"""

from __future__ import annotations

import torch

from .._compat import cpu_flash, gpu_flash, has_cpu_flash
from .rules import same_dtype, wants_gradients

# rows x keys that the portable path holds at a time, in elements (64 MB in float32; a GPU has more, and launches cost)
_BLOCK_ELEMENTS, _BLOCK_ELEMENTS_GPU = 1 << 24, 1 << 27
_WIDEST = 256  # heads that the fused kernels of a GPU take


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

    Cost: one fused kernel on a CPU, and on a GPU without a mask; elsewhere O(q n) time in blocks of fixed memory.
    """
    batch, heads, rows, _ = query.shape
    if key.shape[0] != batch:
        key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    if key.shape[2] == 0:
        nothing = query.new_zeros(batch, heads, rows, value.shape[-1])
        return nothing, query.new_full((batch, heads, rows), float("-inf"), dtype=torch.float32)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    if mask is None and takes_gpu_flash(query, key, value, softcap):
        return _attend_on_gpu(query, key, value, scale, causal)
    if not takes_cpu_flash(query, key, value, softcap):
        return _attend_in_blocks(query, key, value, scale, mask, causal, softcap)
    if rows > 1 or heads == key.shape[1]:
        return cpu_flash(query, key, value, mask, causal, scale)
    # one token: the heads of a group are rows that read their keys once
    output, lse = cpu_flash(query.reshape(batch, key.shape[1], -1, query.shape[3]), key, value, mask, False, scale)
    return output.reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1)


def takes_cpu_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softcap: float | None) -> bool:
    """Whether torch's fused CPU kernel can attend so; it has no gradients, soft caps or values of another width."""
    return query.device.type == "cpu" and has_cpu_flash() and _alike(query, key, value, softcap)


def takes_gpu_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softcap: float | None) -> bool:
    """Whether one of torch's fused GPU kernels can attend so."""
    # 16 bytes a load
    fits = query.dtype != torch.float64 and query.shape[-1] * query.element_size() % 16 == 0
    return query.device.type == "cuda" and fits and query.shape[-1] <= _WIDEST and _alike(query, key, value, softcap)


def _alike(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softcap: float | None) -> bool:
    same = key.shape[-1] == value.shape[-1] and query.dtype == key.dtype == value.dtype
    return softcap is None and same and not wants_gradients(query, key, value)


def _attend_on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` in one kernel, each KV head a problem of its own: nothing is repeated for the heads of a group."""
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    by_head = query.reshape(batch * kv_heads, -1, rows, dim)
    if not causal:  # they are more rows, so that keys are read once
        by_head = by_head.reshape(batch * kv_heads, 1, -1, dim)
    group = by_head.shape[1]
    key, value = (one.reshape(len(by_head), 1, *one.shape[2:]).expand(-1, group, -1, -1) for one in (key, value))
    output, lse = gpu_flash(by_head, key, value, causal, scale)
    return output.reshape(batch, heads, rows, -1), lse.reshape(batch, heads, rows)


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
    elements = _BLOCK_ELEMENTS_GPU if query.is_cuda else _BLOCK_ELEMENTS
    block = max(elements // max(batch * heads * length, 1), 1)
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


def merge(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention over the union of two disjoint key sets, from the attention over each.

    Args:
        one, other: outputs (B, H, q, d) and log-sum-exps (B, H, q); in every row at least one of them sees a key.

    Returns:
        Output and log-sum-exp over all keys, shaped like one part.
    """
    return merged_output(one, other), torch.logaddexp(one[1], other[1])


def merged_output(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`merge` where nobody reads the log-sum-exp."""
    # softmax over two numbers is a sigmoid of their difference: three small kernels per decoded token and layer
    first, second = same_dtype(one[0], other[0])
    weight = torch.sigmoid(other[1] - one[1]).unsqueeze(-1).to(first.dtype)
    return torch.lerp(first, second, weight)
