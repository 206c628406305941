"""One decoded token on a CPU, and little beside its kernels: one compiled loop a layer where numba is installed, or a fused
kernel for each head of a ragged context and one for the tail behind it.

The fused kernels are those of `attend_ragged` and `attend`, bit for bit, and the loop is within rounding of them; what these
check and reshape for any query costs a token as much as the kernels do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .._compat import cpu_flash, has_cpu_flash
from .kernels import is_one_token
from .ragged import Ragged
from .rules import wants_gradients


def attend_token(
    query: torch.Tensor, context: Ragged, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor | None:
    """Attention of one token over a ragged context and the tail behind it, or None where this is no such call.

    Args:
        query: (B, H, q, d).
        context: the kept pairs.
        key, value: (B, KV heads, n, d), the tail, all of it visible.
        scale: factor on the logits.

    Returns:
        (1, H, 1, d), or None: not one token of one request on a CPU, or a head that kept nothing.

    Source: section 8.4.1 (variable-length attention over what stays).
    Cost: with numba, for pairs in float32, one loop (compiled with the first token in some 5 s, then kept on disk); otherwise
        KV heads + 1 fused kernels and five small ones.
    """
    if takes_loop(query, key, value, context):
        return _attend_in_loop(query, context, key, value, scale)
    return _attend_fused(query, context, key, value, scale) if takes_fused(query, key, value, context) else None


def takes_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Ragged) -> bool:
    """Whether fused kernels read this call: one token on a CPU, behind heads of which each kept something."""
    if query.device.type != "cpu" or 0 in context.lengths or value.shape[3] != query.shape[3]:
        return False
    return is_one_token(query, key, value, context) and has_cpu_flash()


def _attend_fused(
    query: torch.Tensor, context: Ragged, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    # the heads of a group are rows that read their keys once
    by_head = query.reshape(1, key.shape[1], -1, query.shape[3])
    tail, tail_lse = cpu_flash(by_head, key, value, None, False, scale)
    heads = context.heads()
    found = [cpu_flash(by_head[:, at : at + 1], *pairs, None, False, scale) for at, pairs in enumerate(heads)]
    output, lse = torch.cat([one for one, _ in found], 1), torch.cat([one for _, one in found], 1)
    # softmax over two numbers is a sigmoid of their difference
    weight = torch.sigmoid(tail_lse - lse).unsqueeze(-1)
    return torch.lerp(output, tail, weight.to(tail.dtype)).reshape(query.shape)


@functools.cache
def loops() -> Any:
    """The compiled loops, or None; loaded with the first token, since numba takes half a second."""
    try:
        from . import decode_compiled
    except (ImportError, RuntimeError):  # numba is optional; it refuses to load where it has no folder to cache in
        return None
    return decode_compiled


def takes_loop(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Ragged) -> bool:
    """Whether the compiled loop reads this call: one token in float32, everything where it looks for it in memory."""
    if context.loop_lengths is None or torch.compiler.is_compiling() or wants_gradients(query, key, value):
        return False
    (batch, heads, rows, width), (key_batch, kv_heads, n, key_width) = query.shape, key.shape
    if (batch, key_batch, rows) != (1, 1, 1) or n == 0 or kv_heads != len(context.lengths) or heads % kv_heads:
        return False
    if key_width != width or context.widths != (width, width) or value.shape != key.shape:
        return False
    strides = key.stride()
    if strides != value.stride() or strides[2:] != (width, 1) or strides[1] % width:
        return False
    return all(map(_is_plain, (query, key, value))) and _by_head(query) and loops() is not None


def _attend_in_loop(
    query: torch.Tensor, context: Ragged, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    keys, values = context.opened()
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    heads, width, room = query.shape[1], query.shape[3], key.stride(1) // query.shape[3]
    before = (query.data_ptr(), keys.data_ptr(), values.data_ptr(), context.loop_lengths)
    behind = (key.data_ptr(), value.data_ptr(), room, key.shape[2])
    loops().attend(*before, *behind, heads, width, float(scale), output.data_ptr())
    return output


def append_token(room: tuple[torch.Tensor, torch.Tensor], at: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Write one token's keys and values into row `at` of a room, by the compiled loop; False where that does not take them.

    Args:
        room: keys and values (1, KV heads, room, d), contiguous.
        keys, values: (1, KV heads, 1, d).
    """
    _, kv_heads, rows, width = room[0].shape
    if keys.shape != (1, kv_heads, 1, width) or values.shape != keys.shape or torch.compiler.is_compiling():
        return False
    if not all(map(_is_plain, (*room, keys, values))) or not (_by_head(keys) and _by_head(values)) or loops() is None:
        return False
    addresses = (one.data_ptr() for one in (*room, keys, values))
    loops().append(*addresses, kv_heads, rows, at, width)
    return True


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32


def _by_head(token: torch.Tensor) -> bool:
    """Whether the heads of a token (1, H, 1, d) lie one after the other."""
    return token.stride()[1::2] == (token.shape[3], 1)
