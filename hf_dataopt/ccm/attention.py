"""The block mask of parallel training and the merge inside attention, as attention functions of transformers."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from .config import CCMConfig

PREFIX = "hf_dataopt_ccm_"
BACKENDS = ("sdpa", "eager", "flex_attention")


@dataclass(frozen=True)
class Layout:
    """Who sees whom in [c(1) COMP ... c(t) COMP I O], rows of any lengths, padded or packed.

    Args:
        own: (B, T, T) bool, query and key are in the same block of the same sample.
        memory: (B, T, T) bool, keys outside the block that are visible as memory (concat) or as sink.
        weights: (B, M, T) float, merge: rows that average compression tokens into memory slots.
        slots: (B, T, M) bool, merge: memory slots a query sees.
    """

    own: torch.Tensor
    memory: torch.Tensor
    weights: torch.Tensor | None = None
    slots: torch.Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What one forward of the model needs to know below its top.

    Args:
        comp: (B, T) int64, which compression token stands here, -1 for text.
        layout: of a parallel forward; None when a memory cache is being continued.
        backend: the attention implementation the model was set to.
        adapter: name of the adapter at work.
        memory_length: slots of the cache that are memory: exempt from sliding windows.
        linked: a zero to add to the embeddings of a training batch without compression tokens.
        rows: (n,) int64, where compression tokens stand in the flattened (B * T) tokens.
    """

    comp: torch.Tensor | None
    layout: Layout | None
    backend: str
    adapter: str
    memory_length: int = 0
    linked: torch.Tensor | None = None
    rows: torch.Tensor | None = None


CURRENT: ContextVar[Call | None] = ContextVar("hf_dataopt_ccm_call", default=None)


def rows_of(comp: torch.Tensor) -> torch.Tensor:
    """Indices (n,) int64 of compression tokens in the flattened tokens of `comp` (B, T)."""
    return (comp >= 0).flatten().nonzero()[:, 0]


def skip_positions(comp: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Positions where compression tokens take no room: COMP k stands k + 1 after the last text token, text goes on there.

    Args:
        comp: (B, T) int64, index of the compression token, -1 for text.
        real: (B, T) bool, False for padding.

    Returns:
        (B, T) int64; padding has position 1.

    Source: the reference code; the text names no positions.
    """
    text = ((comp < 0) & real).long().cumsum(1)
    return torch.where(comp >= 0, text + comp, text - 1).masked_fill(~real, 1).clamp(min=0)


def build_layout(comp: torch.Tensor, real: torch.Tensor, position_ids: torch.Tensor, config: CCMConfig) -> Layout:
    """The visibility rules of Figure 7.3 (b) and the averages of Figure 7.3 (a).

    Args:
        comp: (B, T) int64, index of the compression token, -1 for text.
        real: (B, T) bool, False for padding.
        position_ids: (B, T) int64; a text token at position 0 starts another sample of a packed row.
        config: memory mode, sink, group length.

    Returns:
        The layout.

    Source: section 7.3.1, Figure 7.3. Cost: O(B T^2) bools.
    """
    is_comp = comp >= 0
    last = comp == config.num_comp_tokens - 1
    start = (position_ids == 0) & real & ~is_comp
    first = real & (real.long().cumsum(1) == 1)
    start = torch.where(start.any(1, keepdim=True), start, first)
    sample = start.long().cumsum(1)
    groups = last.long().cumsum(1) - last.long()  # groups finished before this token, over the whole row
    step = groups - torch.where(start, groups, 0).cummax(1).values  # the same, within the sample
    same = sample[:, :, None] == sample[:, None, :]
    total = torch.where(same, (step + last.long())[:, None, :], 0).amax(-1)
    answering = step == total  # the input and output behind all groups
    own = same & (step[:, :, None] == step[:, None, :])
    memory = torch.zeros_like(own)
    sees = torch.ones_like(answering) if config.recurrent else answering
    weights = slots = None
    if config.merges:
        weights, slots = _merge_slots(comp, groups, step, sample, config)
        slots = slots & sees[:, :, None]
    else:
        memory = same & is_comp[:, None, :] & (step[:, None, :] < step[:, :, None]) & sees[:, :, None]
    if config.sink:
        memory = memory | (same & start[:, None, :] & (step > 0)[:, :, None])
    n = comp.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=comp.device).tril()
    return Layout(own, memory & causal & real[:, None, :], weights, slots)


def _merge_slots(
    comp: torch.Tensor, groups: torch.Tensor, step: torch.Tensor, sample: torch.Tensor, config: CCMConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (B, M, T) of Mem(1), Mem(2), ... of a row, and which query reads which, (B, T, M)."""
    n_tok = config.num_comp_tokens
    last = comp == n_tok - 1
    count = int(last.sum(1).max())
    # slot s holds the memory after the row's group s; where that group ends, its sample and step are known
    slot = torch.arange(1, count + 1, device=comp.device)
    ends = last[:, None, :] & (groups[:, None, :] + 1 == slot[:, None])
    slot_step = torch.where(ends, step[:, None, :] + 1, 0).amax(-1)
    slot_sample = torch.where(ends, sample[:, None, :], -1).amax(-1)
    j, s = (step + 1)[:, None, :], slot_step[:, :, None]
    part = (comp >= 0)[:, None, :] & (sample[:, None, :] == slot_sample[:, :, None]) & (j <= s)
    if config.merge_weight is None:
        share = 1.0 / s.clamp(min=1).float().expand_as(part)
    else:
        first = torch.where(j == 1, 1.0, config.merge_weight)
        share = first * (1.0 - config.merge_weight) ** (s - j).clamp(min=0).float()
    share = torch.where(part, share, 0.0)
    token = torch.arange(n_tok, device=comp.device)
    weights = share[:, :, None, :] * (comp[:, None, None, :] == token[:, None]).float()
    reads = (groups[:, :, None] == slot) & (step > 0)[:, :, None]
    return weights.flatten(1, 2), reads.repeat_interleave(n_tok, dim=2)


def _visible(**kwargs: Any) -> torch.Tensor:
    """Mask (B, 1, q, k) bool of the model's own rules (causal, padding, sliding window) with ours on top."""
    call = CURRENT.get()
    base = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    if base is None:
        raise ValueError("transformers built no mask where the compressed memory needs one; pass an attention_mask")
    if call is not None and call.layout is not None:
        layout = call.layout
        base = (base & layout.own[:, None]) | layout.memory[:, None]
        base = base | torch.eye(base.shape[-1], dtype=torch.bool, device=base.device)  # padding sees itself: no NaN
        if layout.slots is not None:
            base = torch.cat([base, layout.slots[:, None]], dim=-1)
    elif call is not None and call.memory_length:
        held = kwargs["attention_mask"][:, None, None, : call.memory_length].bool()
        base = base.clone()
        base[..., : call.memory_length] = held
    return base


def _additive(**kwargs: Any) -> torch.Tensor:
    mask, dtype = _visible(**kwargs), kwargs.get("dtype") or torch.float32
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _block_mask(**kwargs: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = _visible(**kwargs)

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return mask[b, 0, q, k]

    return create_block_mask(visible, mask.shape[0], None, mask.shape[2], mask.shape[3], device=str(mask.device))


def with_merged(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, Hkv, T, d) with the memories Mem(1), Mem(2), ... behind them (merge), else as they are.

    Source: Figure 7.3 (a); the average is taken after RoPE, as in the reference code.
    """
    call = CURRENT.get()
    if call is None or call.layout is None or call.layout.weights is None:
        return key, value
    weights = call.layout.weights[:, None].float()
    merged = [(weights @ states.float()).to(states.dtype) for states in (key, value)]
    return torch.cat([key, merged[0]], dim=2), torch.cat([value, merged[1]], dim=2)


def _sdpa(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    key, value = with_merged(key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _eager(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: Any = None,
    dropout: float = 0.0,
    **kw: Any,
) -> Any:
    key, value = with_merged(key, value)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if kw.get("softcap") is not None:
        scores = torch.tanh(scores / kw["softcap"]) * kw["softcap"]
    weights = functional.softmax(scores + attention_mask, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _flex(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    from transformers.integrations.flex_attention import flex_attention_forward

    key, value = with_merged(key, value)
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


def register() -> None:
    """Make our attention functions known to transformers; they run only in calls that the hooks route to them."""
    functions = {"sdpa": (_sdpa, _visible), "eager": (_eager, _additive), "flex_attention": (_flex, _block_mask)}
    for name, (attention, mask) in functions.items():
        AttentionInterface.register(PREFIX + name, attention)
        AttentionMaskInterface.register(PREFIX + name, mask)
