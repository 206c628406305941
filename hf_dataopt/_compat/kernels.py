"""Fused attention of torch and flash-attn that returns the log-sum-exp, as far as the installed releases have it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

# torch's CPU flash attention. The public `scaled_dot_product_attention` calls it too, but drops the log-sum-exp that is
# needed to merge the attention over two sets of keys. Same signature from torch 2.3 to 2.15. Its name in `torch` is bound
# straight to C++; by way of `torch.ops.aten`, a call costs some 10 us more, once a head for every layer and token.
_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def has_cpu_flash() -> bool:
    """Whether this torch has the CPU kernel that returns the log-sum-exp."""
    return hasattr(torch, _CPU_FLASH)


def cpu_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output (B, H, q, d) and log-sum-exp (B, H, q), float32, of one fused CPU kernel; fewer KV heads are fine."""
    return getattr(torch, _CPU_FLASH)(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)


def gpu_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `cpu_flash` on a GPU, for as many KV heads as heads: flash attention in half precision, CUTLASS's kernel otherwise.

    `scaled_dot_product_attention` calls both, and drops the log-sum-exp here too.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and torch.cuda.get_device_capability(query.device) >= (8, 0):
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        return found[0], found[1]
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )
    return found[0], found[1][..., : query.shape[2]]  # the kernel fills up to a multiple of 32


def varlen_kernel() -> Any | None:
    """torch's public variable-length attention where it can return the log-sum-exp, else None (older torch)."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return None
    if not {"return_aux", "scale"} <= set(inspect.signature(varlen_attn).parameters):
        return None
    return functools.partial(varlen_attn, return_aux=AuxRequest(lse=True))


def flash_varlen() -> Any | None:
    """flash-attn's variable-length attention (the extra `flash-attn`), else None."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def flex_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Any, change: Any, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's output and log-sum-exp; compiled on a GPU, where the plain function would hold all logits.

    Args:
        query, key, value: (1, 1, n, width).
        visible: its `mask_mod`. change: its `score_mod`, or None.
        scale: factor on the logits.
    """
    from torch.nn.attention import flex_attention as flex

    rows, keys = query.shape[2], key.shape[2]
    mask = flex.create_block_mask(visible, None, None, rows, keys, device=str(query.device))
    attention = _compiled_flex() if query.is_cuda else flex.flex_attention
    # `return_lse` became `return_aux` on the way from torch 2.8 to 2.14
    if hasattr(flex, "AuxRequest"):
        asked: dict[str, Any] = {"return_aux": flex.AuxRequest(lse=True)}
    else:
        asked = {"return_lse": True}
    output, more = attention(query, key, value, score_mod=change, block_mask=mask, scale=scale, **asked)
    return output, more if isinstance(more, torch.Tensor) else more.lse


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
