"""Attention over a ragged context, where KV heads keep different numbers of pairs.

On a CPU, each head is one call of torch's fused kernel. Tiles of one size in one batched product, whatever their heads, were
measured there and are no faster: the products take as long, and the steps that put tiles together cost more than the calls
saved. On a GPU, one variable-length kernel a layer.
"""

from __future__ import annotations

import torch

from .._compat import cpu_flash
from .attention import attend, takes_cpu_flash
from .kernels import kernel_for, takes_kernels
from .ragged import Ragged
from .rules import same_dtype

# queries a head, up to which a GPU has processors to spare for pieces of a head
_FEW_ROWS = 128
Part = tuple[torch.Tensor, torch.Tensor]


def attend_ragged(
    query: torch.Tensor, context: Ragged, *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over all kept pairs of its KV head, where heads keep different numbers of pairs.

    Args:
        query: (B, H, q, d). All batch rows share the one context, which is never repeated.
        context: the kept pairs.
        scale: factor on the logits.
        softcap: as `attention.attend`.

    Returns:
        Output (B, H, q, v), zero where a head keeps nothing, and log-sum-exp (B, H, q) as `attention.attend`.

    Source: section 8.4.1 (non-uniform head budgets with variable-length attention).
    Cost: O(B H q d * kept pairs per head), no padding; on CUDA in half precision one variable-length kernel.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = len(context.lengths)
    # a head's queries over batch and group are the rows of one problem: the context is read once for all of them
    by_head = query.reshape(batch, kv_heads, -1, dim)
    if batch > 1:
        by_head = by_head.transpose(0, 1).reshape(1, kv_heads, -1, dim)
    if takes_kernels(context.device, context.dtypes):
        output, lse = _in_kernel(by_head[0], context, scale, softcap)
    else:
        parts = _head_by_head(by_head, context, scale, softcap)
        output, lse = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    if batch > 1:
        output = output.reshape(kv_heads, batch, -1, output.shape[-1]).transpose(0, 1)
        lse = lse.reshape(kv_heads, batch, -1).transpose(0, 1)
    return output.reshape(batch, heads, rows, -1).to(query.dtype), lse.reshape(batch, heads, rows)


def _head_by_head(by_head: torch.Tensor, context: Ragged, scale: float, softcap: float | None) -> list[Part]:
    """Attention of queries (1, KV heads, R, d): for each head, output (1, 1, R, v) and log-sum-exp (1, 1, R)."""
    found = []
    for one, (key, value) in zip(by_head.split(1, 1), context.heads(), strict=True):
        if key.shape[2] and takes_cpu_flash(one, key, value, softcap):
            found.append(cpu_flash(one, key, value, None, False, scale))
        else:
            found.append(attend(*same_dtype(one, key, value), scale=scale, softcap=softcap))
    return found


def _in_kernel(by_head: torch.Tensor, context: Ragged, scale: float, softcap: float | None) -> Part:
    """Attention of queries (KV heads, R, d) from one variable-length kernel; pieces of a head are put together again."""
    n_rows = by_head.shape[1]
    pieces = context.spans if n_rows <= _FEW_ROWS else context.whole_heads
    rows = by_head.to(context.dtypes[0]).index_select(0, pieces.heads)
    count = rows.shape[0]
    if not count:
        nothing = by_head.new_zeros(*by_head.shape[:2], context.widths[1])
        return nothing, by_head.new_full(by_head.shape[:2], float("-inf"), dtype=torch.float32)
    kernel = kernel_for(rows, context.widths, softcap)
    asked = torch.arange(0, (count + 1) * n_rows, n_rows, dtype=torch.int32, device=rows.device)
    bounds, longest = (asked, pieces.bounds), (n_rows, pieces.longest)
    output, lse = kernel(rows.flatten(0, 1), *context.opened(), bounds, longest, scale, softcap)
    shares = lse.unflatten(0, (count, n_rows)).t()[:, None] + pieces.member
    found = output.unflatten(0, (count, n_rows)).transpose(0, 1).to(shares.dtype)
    weights = torch.softmax(shares, -1)
    if 0 in context.lengths:
        weights = weights.masked_fill(pieces.empty, 0)
    mixed = torch.bmm(weights, found)
    return mixed.transpose(0, 1), shares.logsumexp(-1).t()
