"""One decoded token over ragged heads and the tail behind them as a loop for numba, where it is installed: one call a layer,
that reads every pair once for all queries of its head.

Tensors come by address, and `decode_cpu` vouches for how they lie in memory: after a layer's weights have been through the
processor's caches, making views and arrays of them took as long as reading 400 pairs. Importing this module needs numba;
without it `decode_cpu` takes torch's fused kernels, one a head.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import carray  # type: ignore[attr-defined]
from numba.extending import intrinsic

# fastmath without "nnan" and "ninf": sums may be reordered, NaN stays NaN
_compiled = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
_BLOCK = 64  # pairs at a time, which stay in the first-level cache
_LOG2_E = np.float32(1.4426950408889634)
_LEAST = np.float32(-126)  # the smallest normal float32 is 2 to it
_NONE, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_NOTHING = np.float32(-np.inf)
# 2**f for 0 <= f < 1, least largest error
_2_POWERS = tuple(map(np.float32, (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1)))


@_compiled
def _exp2(x, bits, n):  # type: ignore[no-untyped-def]
    """2**x in place for the first n of x <= 0, of which `bits` is the same memory as int32; within 3e-7 of it."""
    e, d, c, b, a, one = _2_POWERS
    for i in range(n):
        power = _LEAST if x[i] < _LEAST else x[i]  # a NaN stays
        whole = np.floor(power)
        f = power - whole
        x[i] = ((((e * f + d) * f + c) * f + b) * f + a) * f + one
        bits[i] += np.int32(whole) << np.int32(23)


@_compiled
def _read(asked, keys, values, sums, best, total, logits, bits):  # type: ignore[no-untyped-def]
    """Softmax of rows (R, d), in powers of 2, over further pairs (n, d): what they add to sums (R, d), best and total (R,)."""
    width = asked.shape[1]
    for start in range(0, len(keys), _BLOCK):
        n = min(_BLOCK, len(keys) - start)
        for r in range(len(asked)):
            query, weights, into, highest = asked[r], logits[r], sums[r], best[r]
            for i in range(n):
                key, found = keys[start + i], _NONE
                for j in range(width):
                    found += query[j] * key[j]
                weights[i] = found
            for i in range(n):
                highest = max(highest, weights[i])
            shrink = _NONE if best[r] == _NOTHING else _TWO ** (best[r] - highest)
            for i in range(n):
                weights[i] -= highest
            _exp2(weights, bits[r], n)
            new = _NONE
            for i in range(n):
                new += weights[i]
            total[r], best[r] = total[r] * shrink + new, highest
            for j in range(width):
                into[j] *= shrink
            whole = n - n % 4
            for i in range(start, start + whole, 4):  # sums are loaded and stored once for four pairs
                a, b, c, d = weights[i - start], weights[i - start + 1], weights[i - start + 2], weights[i - start + 3]
                first, second, third, fourth = values[i], values[i + 1], values[i + 2], values[i + 3]
                for j in range(width):
                    into[j] += a * first[j] + b * second[j] + c * third[j] + d * fourth[j]
            for i in range(whole, n):
                a, first = weights[i], values[start + i]
                for j in range(width):
                    into[j] += a * first[j]


def _pointer(context: Any, address: Any) -> Any:
    """To the float32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(numba.float32)(address), generate


_at: Any = intrinsic(_pointer)


@_compiled
def attend(query, keys, values, lengths, tail_keys, tail_values, room, n_tail, heads, width, scale, output):  # type: ignore[no-untyped-def]
    """Attention of one token, float32: six addresses of contiguous memory, read as follows.

    Args: query, output: (heads, width). keys, values: (sum of lengths, width), one KV head after the other. lengths: an array
    (KV heads,) int64. tail_keys, tail_values: KV head h has `n_tail` rows from row h * room on. scale: on the logits.
    """
    kv_heads, total = len(lengths), lengths.sum()
    asking, into = carray(_at(query), (heads, width)), carray(_at(output), (heads, width))
    keys, values = carray(_at(keys), (total, width)), carray(_at(values), (total, width))
    behind = (kv_heads - 1) * room + n_tail
    tail_keys = carray(_at(tail_keys), (behind, width))
    tail_values = carray(_at(tail_values), (behind, width))
    rows = heads // kv_heads
    asked, logits = np.empty((rows, width), np.float32), np.empty((rows, _BLOCK), np.float32)
    best, total_weight, bits = np.empty(rows, np.float32), np.empty(rows, np.float32), logits.view(np.int32)
    factor, at = np.float32(scale) * _LOG2_E, 0
    for h in range(kv_heads):
        sums, end = into[h * rows : (h + 1) * rows], at + lengths[h]
        for r in range(rows):
            best[r], total_weight[r] = _NOTHING, _NONE
            for j in range(width):
                asked[r, j], sums[r, j] = asking[h * rows + r, j] * factor, _NONE
        _read(asked, keys[at:end], values[at:end], sums, best, total_weight, logits, bits)
        tail = slice(h * room, h * room + n_tail)
        _read(asked, tail_keys[tail], tail_values[tail], sums, best, total_weight, logits, bits)
        for r in range(rows):
            share = _ONE / total_weight[r]
            for j in range(width):
                sums[r, j] *= share
        at = end


@_compiled
def append(room_keys, room_values, keys, values, kv_heads, room, at, width):  # type: ignore[no-untyped-def]
    """Write one token's keys and values (KV heads, width) into row `at` of rooms (KV heads, room, width); all by address."""
    for into, new in ((room_keys, keys), (room_values, values)):
        rows, token = carray(_at(into), (kv_heads, room, width)), carray(_at(new), (kv_heads, width))
        for h in range(kv_heads):
            for j in range(width):
                rows[h, at, j] = token[h, j]
