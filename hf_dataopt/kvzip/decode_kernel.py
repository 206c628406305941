"""One decoded token on a GPU: a ragged context and the tail behind it, in two kernels a layer.

Read by way of general kernels, that token costs some 15 launches a layer, which is more than a GPU computes meanwhile. Here a
first kernel attends to pieces of the heads' pairs, the tail of each head being one more piece, and a second one joins the
pieces. Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .ragged import Ragged

# queries that one program holds: matrix units take 16 at least
_LEAST = 16
_KEYS = 64  # at a time
_JOINED = 32  # pieces at a time


@triton.jit(do_not_specialize=["n_tail", "n_pieces", "stride_k", "stride_v"])
def _attend_pieces(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    tail_keys,
    tail_values,
    heads,
    bounds,
    found,
    lses,
    n_pieces,
    n_tail,
    stride_k,
    stride_v,
    scale,
    softcap,
    n_rows: tl.constexpr,
    width: tl.constexpr,
    width_v: tl.constexpr,
    capped: tl.constexpr,
    rows_at_once: tl.constexpr,
    width_up: tl.constexpr,
    width_v_up: tl.constexpr,
    keys_at_once: tl.constexpr,
):
    """Softmax of one KV head's queries over one run of keys: output (N, R, v) and log-sum-exp (N, R), float32."""
    piece = tl.program_id(0)
    if piece < n_pieces:
        head = tl.load(heads + piece).to(tl.int64)
        begin = tl.load(bounds + piece).to(tl.int64)
        length = tl.load(bounds + piece + 1) - tl.load(bounds + piece)
        first_key = keys + begin * width
        first_value = values + begin * width_v
    else:
        head = (piece - n_pieces).to(tl.int64)
        length = n_tail
        first_key = tail_keys + head * stride_k
        first_value = tail_values + head * stride_v
    row, at = tl.arange(0, rows_at_once), tl.arange(0, keys_at_once)
    column, column_v = tl.arange(0, width_up), tl.arange(0, width_v_up)
    real_row = row < n_rows
    asked = tl.load(
        query + (head * n_rows + row[:, None]) * width + column[None, :],
        mask=real_row[:, None] & (column < width)[None, :],
        other=0.0,
    )
    best = tl.full([rows_at_once], float("-inf"), tl.float32)
    total = tl.zeros([rows_at_once], tl.float32)
    sums = tl.zeros([rows_at_once, width_v_up], tl.float32)
    for start in range(0, length, keys_at_once):
        real = start + at < length
        key = tl.load(
            first_key + (start + at)[None, :] * width + column[:, None],
            mask=real[None, :] & (column < width)[:, None],
            other=0.0,
        )
        logits = tl.dot(asked, key, input_precision="ieee") * scale
        if capped:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
        logits = tl.where(real[None, :], logits, float("-inf"))
        highest = tl.maximum(best, tl.max(logits, 1))
        weight = tl.exp(logits - highest[:, None])
        shrink = tl.exp(best - highest)
        value = tl.load(
            first_value + (start + at)[:, None] * width_v + column_v[None, :],
            mask=real[:, None] & (column_v < width_v)[None, :],
            other=0.0,
        )
        sums = sums * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        best = highest
    place = piece.to(tl.int64) * n_rows + row
    tl.store(lses + place, best + tl.log(total), mask=real_row)
    tl.store(
        found + place[:, None] * width_v + column_v[None, :],
        sums / total[:, None],
        mask=real_row[:, None] & (column_v < width_v)[None, :],
    )


@triton.jit(do_not_specialize=["n_pieces"])
def _join_pieces(  # type: ignore[no-untyped-def]
    found,
    lses,
    firsts,
    output,
    output_lse,
    n_pieces,
    n_rows: tl.constexpr,
    width_v: tl.constexpr,
    width_v_up: tl.constexpr,
    pieces_at_once: tl.constexpr,
):
    """One row of one head: its pieces of the context, and its tail."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, at = tl.arange(0, width_v_up), tl.arange(0, pieces_at_once)
    inside = column < width_v
    place = (n_pieces + head) * n_rows + row
    best = tl.load(lses + place)
    total = 1.0
    sums = tl.load(found + place * width_v + column, mask=inside, other=0.0)
    first, last = tl.load(firsts + head), tl.load(firsts + head + 1)
    for start in range(first, last, pieces_at_once):
        real = start + at < last
        places = (start + at).to(tl.int64) * n_rows + row
        lse = tl.load(lses + places, mask=real, other=float("-inf"))
        highest = tl.maximum(best, tl.max(lse, 0))
        weight, shrink = tl.exp(lse - highest), tl.exp(best - highest)
        part = tl.load(
            found + places[:, None] * width_v + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
        )
        sums = sums * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        best = highest
    here = head * n_rows + row
    tl.store(output + here * width_v + column, (sums / total).to(output.dtype.element_ty), mask=inside)
    tl.store(output_lse + here, best + tl.log(total))


def attend_token(
    query: torch.Tensor,
    context: Ragged,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one token's query heads over the kept pairs of their KV head and over its tail.

    Args:
        query: (1, H, 1, d) float16, bfloat16 or float32.
        context: the kept pairs.
        key: (1, KV heads, n, d), value: (1, KV heads, n, v): the tail, all of it visible, of the query's dtype; pairs of a head
            lie side by side.
        scale: factor on the logits.
        softcap: logits are `softcap * tanh(logits / softcap)`, optional.

    Returns:
        Output (1, H, 1, v) in the query's dtype and log-sum-exp (1, H, 1) float32.

    Source: section 8.4.1 (non-uniform head budgets).
    Cost: two kernels.
    """
    heads, kv_heads, pieces = query.shape[1], key.shape[1], context.spans
    n_rows, width, width_v, n_pieces = heads // kv_heads, query.shape[3], value.shape[3], len(pieces.heads)
    query, (keys, values) = query.contiguous(), context.opened()
    found = torch.empty(n_pieces + kv_heads, n_rows, width_v, dtype=torch.float32, device=query.device)
    lses = torch.empty(n_pieces + kv_heads, n_rows, dtype=torch.float32, device=query.device)
    up_v = max(triton.next_power_of_2(width_v), _LEAST)
    _attend_pieces[(n_pieces + kv_heads,)](
        query,
        keys,
        values,
        key,
        value,
        pieces.heads,
        pieces.bounds,
        found,
        lses,
        n_pieces,
        key.shape[2],
        key.stride(1),
        value.stride(1),
        scale,
        softcap or 1.0,
        n_rows=n_rows,
        width=width,
        width_v=width_v,
        capped=softcap is not None,
        rows_at_once=max(triton.next_power_of_2(n_rows), _LEAST),
        width_up=max(triton.next_power_of_2(width), _LEAST),
        width_v_up=up_v,
        keys_at_once=_KEYS,
    )
    output = query.new_empty(1, heads, 1, width_v)
    lse = lses.new_empty(1, heads, 1)
    _join_pieces[(kv_heads, n_rows)](
        found,
        lses,
        pieces.firsts,
        output,
        lse,
        n_pieces,
        n_rows=n_rows,
        width_v=width_v,
        width_v_up=up_v,
        pieces_at_once=_JOINED,
    )
    return output, lse
