"""The block mask of parallel training and the merge inside attention: what a call with compression tokens changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..routing.dispatch import CURRENT

if TYPE_CHECKING:
    from .config import CCMConfig
    from .rotation import Rotation


@dataclass(frozen=True)
class Layout:
    """Who sees whom in [c(1) COMP ... c(t) COMP I O], rows of any lengths, padded or packed.

    Args:
        own: (B, T, T) bool, query and key are in the same block of the same sample.
        memory: (B, T, T) bool, keys outside the block that are visible as memory (concat) or as sink.
        weights: (B, M, T) float, merge: rows that average compression tokens into memory slots.
        slots: (B, T, M) bool, merge and stream: memory slots a query sees.
        source, shift: (B, M) int64, stream: tokens whose keys and values these slots hold, and by how many positions moved.
        rotation: stream: moves keys.
    """

    own: torch.Tensor
    memory: torch.Tensor
    weights: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    source: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Call:
    """What one forward of the model needs to know below its top (a `routing.dispatch.AttentionCall`).

    Args:
        config: the decoder's, to tell its attention from another model's.
        comp: (B, T) int64, which compression token stands here, -1 for text.
        layout: of a parallel forward; None when a memory cache is being continued.
        adapter: name of the adapter at work.
        memory_length: slots of the cache that are memory: exempt from sliding windows.
        linked: a zero to add to the embeddings of a training batch without compression tokens.
        rows: (n,) int64, where compression tokens stand in the flattened (B * T) tokens.
    """

    config: Any
    comp: torch.Tensor | None
    layout: Layout | None
    adapter: str
    memory_length: int = 0
    linked: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def mask(self, plain: Any, name: str, **kwargs: Any) -> Any:
        """The model's own rules with ours on top, in the form that implementation `name` reads."""
        if self.linked is not None:
            return None if plain is None else plain(**kwargs)
        visible = self._visible(**kwargs)
        if name == "eager":
            dtype = kwargs.get("dtype") or torch.float32
            return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        return _block_mask(visible) if name == "flex_attention" else visible

    def attention(
        self, plain: Any, name: str, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        """Attention of the model's implementation, over merged memories too; sdpa where it takes no such mask (flash)."""
        if self.linked is not None:
            return plain(module, query, key, value, attention_mask, **kwargs)
        key, value = self.with_merged(key, value)
        key, value = self.with_moved(key, value, module.layer_idx)
        if name not in ("sdpa", "eager", "flex_attention"):
            if kwargs.get("s_aux") is not None:
                raise ValueError(f"{name} cannot express the memory's mask beside attention sinks; use eager attention")
            plain = sdpa_attention_forward
        return plain(module, query, key, value, attention_mask, **kwargs)

    def with_merged(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, Hkv, T, d) with the memories Mem(1), Mem(2), ... behind them (merge), else as they are.

        Source: Figure 7.3 (a); the average is taken after RoPE, as in the reference code.
        """
        if self.layout is None or self.layout.weights is None:
            return key, value
        weights = self.layout.weights[:, None].to(key.device, torch.float32)
        merged = [(weights @ states.float()).to(states.dtype) for states in (key, value)]
        return torch.cat([key, merged[0]], dim=2), torch.cat([value, merged[1]], dim=2)

    def with_moved(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, Hkv, T, d) with a stream's sink and memory behind them, once per compression; else as they are.

        Source: Figures 7.8 and 7.9; see `stream_layout`.
        """
        layout = self.layout
        if layout is None or layout.rotation is None or layout.source is None or layout.shift is None:
            return key, value
        source = layout.source.to(key.device)[:, None, :, None]
        held = [states.gather(2, source.expand(-1, states.shape[1], -1, states.shape[3])) for states in (key, value)]
        held[0] = layout.rotation(layer, held[0], layout.shift.to(key.device))
        return torch.cat([key, held[0]], dim=2), torch.cat([value, held[1]], dim=2)

    def _visible(self, **kwargs: Any) -> torch.Tensor:
        """Mask (B, 1, q, k) bool of the model's own rules (causal, padding, sliding window) with ours on top."""
        base = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        if base is None:
            raise ValueError("transformers built no mask where the compressed memory needs one; pass an attention_mask")
        if self.layout is not None:
            layout = self.layout
            base = (base & layout.own[:, None]) | layout.memory[:, None]
            base = base | torch.eye(base.shape[-1], dtype=torch.bool, device=base.device)  # padding sees itself: no NaN
            if layout.slots is not None:
                base = torch.cat([base, layout.slots[:, None]], dim=-1)
        elif self.memory_length:
            base = base.clone()
            base[..., : self.memory_length] = kwargs["attention_mask"][:, None, None, : self.memory_length].bool()
        return base


def current_call() -> Call | None:
    """The call under way in this thread, if it is one of ours."""
    call = CURRENT.get()
    return call if isinstance(call, Call) else None


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


def _block_mask(mask: torch.Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return mask[b, 0, q, k]

    return create_block_mask(visible, mask.shape[0], None, mask.shape[2], mask.shape[3], device=str(mask.device))
