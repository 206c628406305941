"""`pooled_norm` and its two derivatives as loops for numba, where it is installed: one plane of one image stays in the
first-level cache through all its passes.

Importing this module needs numba; `pooled_norm` falls back to PyTorch's operations without it.
"""

from __future__ import annotations

import numba
import numpy as np

# fastmath without "nnan" and "ninf": sums may be reordered, NaN stays NaN
_compiled = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
_QUARTER = np.float32(0.25)
_NONE = np.float32(0)
_ONE = np.float32(1)
_THREE = np.float32(3)


@_compiled
def forward(x, weight, bias, epsilon, out, mean, scale):  # type: ignore[no-untyped-def]
    """Pooled values (planes, h, w), mean and 1 / deviation (planes,) of x (planes, H, W); weight, bias per channel."""
    planes, height, width = x.shape
    count, row = np.float32(height * width), np.empty(width, x.dtype)
    for p in range(planes):
        plane = x[p].reshape(-1)
        total = squares = _NONE
        for k in range(len(plane)):
            total += plane[k]
        level = total / count
        for k in range(len(plane)):
            squares += (plane[k] - level) * (plane[k] - level)
        inverse = _ONE / np.sqrt(squares / count + epsilon[0])
        mean[p], scale[p] = level, inverse
        gain = weight[p % len(weight)] * inverse
        shift = bias[p % len(weight)] - gain * level
        for i in range(height // 2):
            upper, lower = x[p, 2 * i], x[p, 2 * i + 1]
            for j in range(width):
                row[j] = max(gain * upper[j] + shift, _NONE) + max(gain * lower[j] + shift, _NONE)
            for j in range(width // 2):
                out[p, i, j] = _QUARTER * (row[2 * j] + row[2 * j + 1])


@_compiled
def _unpool(g, x, gain, shift, wide, u):  # type: ignore[no-untyped-def]
    """Slope of the values before the ReLU of one plane: u (H, W) from g (h, w)."""
    height, width = x.shape
    for i in range(height // 2):
        for j in range(width // 2):
            wide[2 * j] = wide[2 * j + 1] = _QUARTER * g[i, j]
        for half in range(2):
            values, into = x[2 * i + half], u[2 * i + half]
            for j in range(width):
                into[j] = wide[j] if gain * values[j] + shift > _NONE else _NONE
    if height % 2:
        u[height - 1] = _NONE


@_compiled
def slope(g, x, weight, bias, mean, scale, out, level, along):  # type: ignore[no-untyped-def]
    """J u into out (planes, H, W), and mean(u), mean(u x^) (planes,)."""
    planes, height, width = x.shape
    count, wide = np.float32(height * width), np.zeros(width, x.dtype)
    for p in range(planes):
        gain = weight[p % len(weight)] * scale[p]
        _unpool(g[p], x[p], gain, bias[p % len(weight)] - gain * mean[p], wide, out[p])
        u, plane = out[p].reshape(-1), x[p].reshape(-1)
        total = product = _NONE
        for k in range(len(u)):
            total += u[k]
            product += u[k] * (plane[k] - mean[p])
        level[p], along[p] = total / count, product / count * scale[p]
        tilt = along[p] * scale[p]
        for k in range(len(u)):
            u[k] = gain * (u[k] - level[p] - tilt * (plane[k] - mean[p]))


@_compiled
def second(v, g, x, weight, bias, mean, scale, level, along, by_slope, by_images):  # type: ignore[no-untyped-def]
    """Derivatives of <v, J u> by the pooled slope g and by x."""
    planes, height, width = x.shape
    count, wide, row = np.float32(height * width), np.zeros(width, x.dtype), np.empty(width, x.dtype)
    for p in range(planes):
        gain = weight[p % len(weight)] * scale[p]
        shift = bias[p % len(weight)] - gain * mean[p]
        _unpool(g[p], x[p], gain, shift, wide, by_images[p])
        u, plane, seen = by_images[p].reshape(-1), x[p].reshape(-1), v[p].reshape(-1)
        total = product = joint = _NONE
        for k in range(len(u)):
            total += seen[k]
            product += seen[k] * (plane[k] - mean[p])
            joint += seen[k] * u[k]
        v_level, v_along = total / count, product / count * scale[p]
        tilt = v_along * scale[p]
        for i in range(height // 2):
            for j in range(width):
                row[j] = _NONE
            for half in range(2):
                values, slopes = x[p, 2 * i + half], v[p, 2 * i + half]
                for j in range(width):
                    through = gain * (slopes[j] - v_level - tilt * (values[j] - mean[p]))
                    row[j] += through if gain * values[j] + shift > _NONE else _NONE
            for j in range(width // 2):
                by_slope[p, i, j] = _QUARTER * (row[2 * j] + row[2 * j + 1])
        outer = -gain * scale[p]
        of_x = outer * scale[p] * (joint / count - v_level * level[p] - _THREE * along[p] * v_along)
        of_v, of_u = outer * along[p], outer * v_along
        rest = -(of_v * v_level + of_u * level[p])
        for k in range(len(u)):
            u[k] = of_x * (plane[k] - mean[p]) + of_v * seen[k] + of_u * u[k] + rest
