"""What a model asks of its attention beside the product: scale, soft cap, sinks, and masks of every shape."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class AttentionRules:
    """How logits become weights in one attention layer.

    Args:
        scale: factor on the logits.
        softcap: logits are `softcap * tanh(logits / softcap)` (Gemma 2), or None.
        sinks: (H,) logits that take their share of every softmax and give nothing (GPT-OSS), or None.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @classmethod
    def of(cls, scale: float, options: dict[str, Any]) -> AttentionRules:
        """The rules among the keywords that a model hands to its attention function.

        Raises:
            ValueError: a rule that cannot be kept where pairs are evicted.
        """
        if options.get("position_bias") is not None:
            raise ValueError(
                "this model adds a bias by position to its logits, and evicted pairs have left no positions"
            )
        if options.get("is_causal") is False:
            raise ValueError("this layer attends in both directions, which a cache of evicted pairs cannot do")
        return cls(scale, options.get("softcap"), options.get("s_aux"))

    @property
    def usual(self) -> bool:
        """Whether logits become weights by their scale alone."""
        return self.softcap is None and self.sinks is None

    @property
    def options(self) -> dict[str, Any]:
        """What every part of one attention is given."""
        return {"scale": self.scale, "softcap": self.softcap}

    def with_sinks(self, result: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (B, H, q, d) and log-sum-exp (B, H, q) once the sinks have taken their share."""
        if self.sinks is None:
            return result
        output, lse = result
        sink = self.sinks.float().reshape(1, -1, 1)
        return output * torch.sigmoid(lse - sink)[..., None].to(output.dtype), torch.logaddexp(lse, sink.expand_as(lse))


def wants_gradients(*tensors: torch.Tensor) -> bool:
    """Whether gradients are to go back through one of these."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


def same_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors in one dtype: under autocast, queries, keys and values come in several."""
    if all(tensor.dtype == tensors[0].dtype for tensor in tensors):
        return tensors
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def no_autocast(device: torch.device) -> Any:
    """A context in which our own arithmetic keeps the dtypes it was given."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def tail_mask(mask: Any, rows: int, length: int, hidden: int, device: torch.device) -> tuple[torch.Tensor | None, bool]:
    """What a mask says about the dense tail behind a compressed context.

    Args:
        mask: as the model's attention implementation has it: None, bool or additive (B, 1, q, n), a (B, n) padding mask
            (flash attention), or a flex `BlockMask`; n is the tail, or the context's tokens and the tail.
        rows: q, new tokens.
        length: tokens of the tail, the new ones included.
        hidden: tokens of the context.
        device: of the queries.

    Returns:
        A bool or additive mask (B, 1, q, length), or None, and whether plain causality (q == length) holds instead.

    Raises:
        ValueError: a mask of another size, or one that hides tokens of the compressed context.
    """
    if mask is not None and not isinstance(mask, torch.Tensor):
        mask = _dense(mask, rows)
    if mask is None and rows in (1, length):
        return None, rows > 1
    if mask is None or mask.ndim == 2:  # flash attention, which is causal by itself, aligned to the end
        visible = torch.ones(1, 1, rows, length, dtype=torch.bool, device=device).tril(length - rows)
        return visible if mask is None else visible & _tail_columns(mask.bool()[:, None, None], length, hidden), False
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, rows):
        raise ValueError(f"a compressed cache takes one mask for all heads, (B, 1, {rows}, n), got {tuple(mask.shape)}")
    return _tail_columns(mask, length, hidden), False


def _tail_columns(mask: torch.Tensor, length: int, hidden: int) -> torch.Tensor:
    if mask.shape[-1] == length:
        return mask
    if mask.shape[-1] != hidden + length:
        raise ValueError(f"the mask covers {mask.shape[-1]} tokens, the context has {hidden} and {length} follow it")
    seen = mask[..., :hidden]
    if not bool((seen if mask.dtype == torch.bool else seen == 0).all()):
        raise ValueError("the mask hides tokens of the compressed context, whose pairs are no longer apart")
    return mask[..., hidden:]


def _dense(mask: Any, rows: int) -> torch.Tensor:
    """A flex `BlockMask` as (B, 1, q, n) bool."""
    from torch.nn.attention.flex_attention import create_mask

    batch, _, _, length = mask.shape
    return create_mask(mask.mask_mod, batch, 1, rows, length, device=str(mask.kv_num_blocks.device))
