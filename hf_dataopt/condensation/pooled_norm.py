"""Instance norm, ReLU and 2x2 average pool as one step with its first and second derivative written out.

Matching gradients differentiates a network twice. PyTorch takes the second derivative of a norm layer from a composition
of two dozen elementwise passes; written out it is three sums and three passes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

loops: Any
try:
    from . import pooled_norm_compiled as loops
except (ImportError, RuntimeError):  # numba is optional; it refuses to load where it has no folder to cache in
    loops = None

# the compiled loops use one thread and need a third to a fourth of the time of PyTorch's passes, which use all threads
_FEW_THREADS = 4


def pooled_norm(images: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """`avg_pool2d(relu(instance_norm(images)), 2)`.

    Args:
        images: (n, C, H, W); an odd last row or column is dropped by the pool.
        weight, bias: (C,) of the norm.
        epsilon: added to the variance.

    Returns:
        (n, C, H // 2, W // 2).

    Source: the block of ConvNet-3 (section 6.5).
    Cost: with numba a pass over `images` each way, about a tenth of PyTorch's layers; without it, two sums and three passes
        backward, three sums and five passes for the second derivative.
    """
    compiled = loops is not None and images.device.type == "cpu" and torch.get_num_threads() <= _FEW_THREADS
    function = _CompiledNorm if compiled else _PooledNorm
    result: Tensor = function.apply(images, weight, bias, epsilon)
    return result


def _pairs(width: int, like: Tensor) -> Tensor:
    """(2 W, W // 2) matrix: adds neighbouring columns of two rows that lie end to end, times 1/4."""
    pairs = torch.eye(width // 2, dtype=like.dtype, device=like.device).mul_(0.25).repeat_interleave(2, 0)
    return F.pad(pairs, (0, 0, 0, width % 2)).repeat(2, 1)


def _pool(values: Tensor, pairs: Tensor) -> Tensor:
    """2x2 average pool as a sum of row pairs and a product with a thin matrix: PyTorch's CPU kernel takes many times as
    long."""
    even = values[:, :, : values.shape[2] // 2 * 2]
    return (even[:, :, 0::2] + even[:, :, 1::2]) @ pairs[: values.shape[3]]


def _spread(pooled: Tensor, shown: Tensor, pairs: Tensor) -> Tensor:
    """Adjoint of `_pool`, where the ReLU let values through (`shown`: 1 or 0)."""
    n, channels, height, width = shown.shape
    spread = (pooled @ pairs.T).view(n, channels, height // 2 * 2, width)
    if height % 2:
        spread = F.pad(spread, (0, 0, 0, 1))
    return spread * shown if torch.is_grad_enabled() else spread.mul_(shown)


def _mean(a: Tensor) -> Tensor:
    return a.mean((2, 3), keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the pixels of a product, (n, C, 1, 1)."""
    return torch.linalg.vecdot(a.flatten(2), b.flatten(2))[..., None, None] / (a.shape[2] * a.shape[3])


def _planes(*tensors: Tensor) -> list[Any]:
    """(n, C, ...) tensors as arrays (n * C, ...) for the compiled loops."""
    return [tensor.detach().contiguous().flatten(0, 1).numpy() for tensor in tensors]


class _CompiledNorm(torch.autograd.Function):
    """As `_PooledNorm`, in compiled loops; the ReLU's mask is computed again where it is needed."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        images = images.contiguous()
        n, channels, height, width = images.shape
        out = images.new_empty(n, channels, height // 2, width // 2)
        mean, scale = images.new_empty(2, n, channels).unbind()
        own = (weight.detach().numpy(), bias.detach().numpy(), np.full(1, epsilon, images.detach().numpy().dtype))
        loops.forward(*_planes(images), *own, *_planes(out, mean, scale))
        ctx.save_for_backward(images, weight, bias, mean, scale)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, bias, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled() and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            with torch.no_grad():
                parts = (scale * weight)[..., None, None]
                shown = ((images - mean[..., None, None]) * parts + bias.view(1, -1, 1, 1) > 0).to(images.dtype)
            return _plain_slopes(slope, images, weight, shown, _pairs(images.shape[3], images), scale)
        found, level, along = _CompiledSlope.apply(slope, images, weight, bias, mean, scale)
        area = images.shape[2] * images.shape[3]
        return found, along.sum(0) * area, level.sum(0) * area, None


class _CompiledSlope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, slope: Tensor, images: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, (level, along) = torch.empty_like(images), torch.empty_like(mean).new_empty(2, *mean.shape).unbind()
        own = (weight.detach().numpy(), bias.detach().numpy())
        loops.slope(*_planes(slope, images), *own, *_planes(mean, scale, out, level, along))
        ctx.save_for_backward(slope, images, weight, bias, mean, scale, level, along)
        ctx.mark_non_differentiable(level, along)
        return out, level, along

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, seen: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        slope, images, weight, bias, *numbers = ctx.saved_tensors
        by_slope, by_images = (torch.empty_like(one, memory_format=torch.contiguous_format) for one in (slope, images))
        own = (weight.detach().numpy(), bias.detach().numpy())
        loops.second(*_planes(seen, slope, images), *own, *_planes(*numbers, by_slope, by_images))
        return by_slope, by_images, None, None, None, None


class _PooledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        images = images.contiguous()
        n, channels, height, width = images.shape
        pairs = _pairs(width, images)
        normed, mean, scale = torch.native_group_norm(
            images, weight, bias, n, channels, height * width, channels, epsilon
        )
        out = _pool(normed.relu_(), pairs)
        ctx.save_for_backward(images, weight, normed.sign_(), mean, scale, pairs)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, shown, mean, scale, pairs = ctx.saved_tensors
        if not torch.is_grad_enabled():
            n, channels, height, width = images.shape
            spread, wanted = _spread(slope, shown, pairs), list(ctx.needs_input_grad[:3])
            sizes = (n, channels, height * width, channels)
            return *torch.ops.aten.native_group_norm_backward(spread, images, mean, scale, weight, *sizes, wanted), None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            return _plain_slopes(slope, images, weight, shown, pairs, scale)
        return _Slope.apply(slope, images, weight, shown, mean, scale, pairs), None, None, None


def _plain_slopes(
    slope: Tensor, images: Tensor, weight: Tensor, shown: Tensor, pairs: Tensor, scale: Tensor
) -> tuple[Tensor | None, ...]:
    """The slopes as ordinary differentiable operations, for matching the norm's own parameters."""
    centred = images - _mean(images)
    variance = _mean(centred.square())
    # the saved scale knows epsilon
    inverse = (variance + (scale[..., None, None] ** -2 - variance).detach()).rsqrt()
    normed, spread = centred * inverse, _spread(slope, shown, pairs)
    through = spread * weight.view(1, -1, 1, 1)
    by_images = inverse * (through - _mean(through) - normed * _mean(through * normed))
    return by_images, (spread * normed).sum((0, 2, 3)), spread.sum((0, 2, 3)), None


class _Slope(torch.autograd.Function):
    """Derivative of `pooled_norm` by its input, J u: u the spread slope, J = a (1 - mean - x^ mean(x^ .)), symmetric."""

    @staticmethod
    def forward(
        ctx: Any,
        slope: Tensor,
        images: Tensor,
        weight: Tensor,
        shown: Tensor,
        mean: Tensor,
        scale: Tensor,
        pairs: Tensor,
    ) -> Tensor:
        mean, scale = mean[..., None, None], scale[..., None, None]
        spread, gain = _spread(slope, shown, pairs), weight.view(1, -1, 1, 1) * scale
        level = _mean(spread)
        along = (_dot(spread, images) - mean * level) * scale
        ctx.save_for_backward(images, gain, shown, mean, scale, pairs, spread, level, along)
        return _project(spread, images, gain, level, along * scale, mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, seen: Tensor) -> tuple[Tensor | None, ...]:
        images, gain, shown, mean, scale, pairs, spread, level, along = ctx.saved_tensors
        seen_level = _mean(seen)
        seen_along = (_dot(seen, images) - mean * seen_level) * scale
        joint = _dot(seen, spread) - seen_level * level
        by_spread = _project(seen, images, gain, seen_level, seen_along * scale, mean)
        # -(a s) [(cov(u, v) - 3 u^ v^) x^ + u^ (v - mean v) + v^ (u - mean u)], u^ = mean(u x^)
        outer = -gain * scale
        tilt, by_seen, by_u = outer * scale * (joint - 3 * along * seen_along), outer * along, outer * seen_along
        rest = -(tilt * mean + by_seen * seen_level + by_u * level)
        by_images = torch.mul(images, tilt).addcmul_(seen, by_seen).addcmul_(spread, by_u).add_(rest)
        return _pool(by_spread.mul_(shown), pairs), by_images, None, None, None, None, None


def _project(u: Tensor, x: Tensor, gain: Tensor, level: Tensor, slant: Tensor, mean: Tensor) -> Tensor:
    """J u = gain (u - level - slant (x - mean))."""
    tilt = -gain * slant
    return torch.mul(u, gain).addcmul_(x, tilt).sub_(gain * level + tilt * mean)
