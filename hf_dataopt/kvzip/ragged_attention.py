"""Attention over a ragged context and the dense tokens behind it: one call a layer, however many pairs each head keeps.

Pieces of a head's keys (`ragged.py`) are attended to apart; softmax over their log-sum-exps weighs them, and the tail among
them, to the attention over all. On a GPU a piece is a sequence of a variable-length kernel, elsewhere a tile of a batched
product.
"""

from __future__ import annotations

import torch

from .kernels import kernel_for, takes_flat
from .ragged import DenseTiles, Pieces, RaggedContext

# logits held at a time, in elements (16 MB in float32)
_BLOCK_ELEMENTS = 1 << 22
# queries a head, up to which a GPU has processors to spare for pieces of a head
_FEW_ROWS = 128
Part = tuple[torch.Tensor, torch.Tensor]


def attend_ragged(
    query: torch.Tensor,
    context: RaggedContext,
    *,
    scale: float,
    softcap: float | None = None,
    tail: Part | None = None,
    with_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of every query over all kept pairs of its KV head, where heads keep different numbers of pairs.

    Args:
        query: (B, H, q, d). All batch rows share the one context, which is never repeated.
        context: the kept pairs.
        scale: factor on the logits.
        softcap: as `attention.attend`.
        tail: the same queries' attention over other keys, as `attention.attend` gives it: output (B, H, q, v) and
            log-sum-exp (B, H, q). The result is then that over both.
        with_lse: whether anybody reads the log-sum-exp.

    Returns:
        Output (B, H, q, v) in the query's dtype, zero where a head keeps nothing and there is no tail; and the log-sum-exp
        (B, H, q), or None.

    Source: section 8.4.1 (non-uniform head budgets with variable-length attention).
    Differs: a head is cut into tiles, so that one batched product serves heads of all lengths; half precision is multiplied
        in float32 on a CPU.
    Cost: O(B H q d * kept pairs per head) and half a tile a head; two products, whatever the number of heads.
    """
    batch, heads, rows, _ = query.shape
    kv_heads = len(context.lengths)
    shape = (batch, kv_heads, heads // kv_heads * rows)
    # a head's queries over batch and group are the rows of one problem: the context is read once for all of them
    by_head = _by_head(query, shape)
    beside = None if tail is None else (_by_head(tail[0], shape), _by_head(tail[1][..., None], shape)[..., 0])
    tiles = context.tiles
    flat = isinstance(tiles, DenseTiles) and takes_flat(tiles.keys, tiles.values) and tiles.size == 1
    held = max(tiles.count * max(tiles.size, *tiles.widths), 1)
    step = by_head.shape[1] if flat else max(_BLOCK_ELEMENTS // held, 1)
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for start in range(0, by_head.shape[1], step):
        part = by_head[:, start : start + step]
        more = None if beside is None else (beside[0][:, start : start + step], beside[1][:, start : start + step])
        if flat:
            pieces, result = _in_kernel(part, context, scale, softcap)
        else:
            pieces, result = context.pieces, _in_tiles(part, context, scale, softcap)
        found.append(_weighed(result, pieces, more, with_lse))
    output = found[0][0] if len(found) == 1 else torch.cat([one[0] for one in found], 1)
    if tail is None and 0 in context.lengths:
        output = output.nan_to_num(0.0)
    output = _by_query(output, query.shape[:3]).to(query.dtype)
    lses = [one[1] for one in found if one[1] is not None]
    return output, _by_query(torch.cat(lses, 1)[..., None], query.shape[:3])[..., 0] if with_lse else None


def _by_head(tensor: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """(B, H, q, width) as (KV heads, B * group * q, width); a view for one row."""
    batch, kv_heads, rows = shape
    width = tensor.shape[-1]
    if batch == 1:
        return tensor.reshape(kv_heads, rows, width)
    return tensor.reshape(batch, kv_heads, rows, width).transpose(0, 1).reshape(kv_heads, batch * rows, width)


def _by_query(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The way back from `_by_head`, to (B, H, q, width)."""
    kv_heads, _, width = tensor.shape
    if shape[0] > 1:
        tensor = tensor.reshape(kv_heads, shape[0], -1, width).transpose(0, 1)
    return tensor.reshape(*shape, width)


def _in_tiles(by_head: torch.Tensor, context: RaggedContext, scale: float, softcap: float | None) -> Part:
    """Attention within every tile, from two batched products: output (tiles, R, v), log-sum-exp (tiles, R)."""
    tiles, pieces = context.tiles, context.pieces
    dtype = torch.promote_types(torch.promote_types(by_head.dtype, tiles.dtype), torch.float32)
    query = by_head.to(dtype).mul(scale).index_select(0, pieces.heads)
    logits = tiles.logits(query)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if pieces.last.numel():
        logits.index_add_(0, pieces.last, pieces.hidden.to(dtype).expand(-1, logits.shape[1], -1))
    weights = torch.softmax(logits, -1)
    # the largest weight is 1 over the sum that softmax has divided by
    return tiles.mix(weights), logits.amax(-1) - weights.amax(-1).log()


def _in_kernel(
    by_head: torch.Tensor, context: RaggedContext, scale: float, softcap: float | None
) -> tuple[Pieces, Part]:
    """Attention within every piece, from one variable-length kernel."""
    tiles, n_rows = context.tiles.dense(), by_head.shape[1]
    pieces = context.spans if n_rows <= _FEW_ROWS else context.heads
    rows = by_head.to(tiles.dtype).index_select(0, pieces.heads)
    count = rows.shape[0]
    if not count:
        return pieces, (rows.new_zeros(0, n_rows, tiles.widths[1]), rows.new_zeros(0, n_rows, dtype=torch.float32))
    kernel = kernel_for(rows, tiles.widths, softcap)
    asked = torch.arange(0, (count + 1) * n_rows, n_rows, dtype=torch.int32, device=rows.device)
    keys, values = tiles.keys[:, 0], tiles.values[:, 0]
    bounds, longest = (asked, pieces.bounds), (n_rows, pieces.longest)
    output, lse = kernel(rows.flatten(0, 1), keys, values, bounds, longest, scale, softcap)
    return pieces, (output.unflatten(0, (count, n_rows)), lse.unflatten(0, (count, n_rows)))


def _weighed(part: Part, pieces: Pieces, tail: Part | None, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over all pieces of each head, and over its tail: output (KV heads, R, v), log-sum-exp (KV heads, R)."""
    (output, lse), member = part, pieces.member
    if tail is None:
        member = member[:, : len(pieces.heads)]
    else:
        output, lse = torch.cat([output.to(lse.dtype), tail[0].to(lse.dtype)]), torch.cat([lse, tail[1].to(lse.dtype)])
    shares = lse.t()[:, None] + member
    mixed = torch.bmm(torch.softmax(shares, -1), output.to(shares.dtype).transpose(0, 1)).transpose(0, 1)
    return mixed, shares.logsumexp(-1).t() if with_lse else None
