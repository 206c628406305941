"""Attention over two sets of keys at once: the ragged compressed context and the dense new tokens.

The parts are computed apart and merged by log-sum-exp, so neither masks nor padding nor copies of the context are needed.
A model reaches this code through an attention function registered with transformers, which is switched on for the calls
that carry one of our caches and for no other call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .._compat import causal_model_of, cpu_flash, decoder_of, has_cpu_flash, set_attention, varlen_kernel
from ..errors import DroppedTokensError

# "sdpa" in the name: transformers' support checks look for it
ATTENTION_NAME = "hf_dataopt_kvzip_sdpa"
_TAG = "_hf_dataopt_layer"
# rows x keys that the portable path holds at a time, in elements (64 MB in float32)
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class RaggedContext:
    """What one layer keeps of a context; never changed, so every fork of a cache shares it.

    Args:
        keys, values: (sum of lengths, d), the KV heads one after the other, each in order of position, keys after RoPE.
        lengths: kept pairs of each KV head, prefix included.
        n_tokens: tokens the context had (its logical length).
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: list[int]
    n_tokens: int

    @classmethod
    def evict(cls, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor) -> RaggedContext:
        """Copy the pairs that stay out of a full layer.

        Args:
            keys, values: (1, KV heads, n, d).
            keep: (KV heads, n) bool.

        Returns:
            A context that holds memory for the kept pairs only.
        """
        kept = keep.to(keys.device)
        return cls(keys[0][kept], values[0][kept], kept.sum(dim=1).tolist(), keep.shape[1])

    @cached_property
    def key_heads(self) -> list[torch.Tensor]:
        """Views of `keys` per KV head, (1, 1, length, d)."""
        return [part[None, None] for part in self.keys.split(self.lengths)]

    @cached_property
    def value_heads(self) -> list[torch.Tensor]:
        """Views of `values` per KV head, (1, 1, length, d)."""
        return [part[None, None] for part in self.values.split(self.lengths)]

    @property
    def nbytes(self) -> int:
        """Bytes of the kept keys and values."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedContext:
        return self


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with its log-sum-exp, grouped-query heads included.

    Args:
        query: (B, H, q, d), any float dtype.
        key, value: (B or 1, Hkv, n, d), H a multiple of Hkv.
        scale: factor on the logits.
        mask: (B or 1, 1, q, n) bool (True = visible) or additive float, optional.
        causal: query i sees keys up to i; only with q == n and without `mask`.

    Returns:
        Output (B, H, q, d) in the query's dtype, log-sum-exp (B, H, q) in float32 (very negative where nothing is visible).

    Cost: one fused kernel on CPU; elsewhere O(q n) time in blocks of fixed memory.
    """
    batch, heads, rows, _ = query.shape
    if key.shape[0] != batch:
        key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    if key.shape[2] == 0:
        return torch.zeros_like(query), query.new_full((batch, heads, rows), float("-inf"), dtype=torch.float32)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    with_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if query.device.type == "cpu" and has_cpu_flash() and not with_grad:
        return cpu_flash(query, key, value, mask, causal, scale)
    return _attend_in_blocks(query, key, value, scale, mask, causal)


def _attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` from plain tensor operations, for any device and dtype."""
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    key_t, value = key[:, :, None].transpose(-1, -2), value[:, :, None]
    block = max(_BLOCK_ELEMENTS // max(batch * heads * length, 1), 1)
    outputs, lses = [], []
    for start in range(0, rows, block):
        logits = (grouped[..., start : start + block, :] @ key_t).float() * scale
        if causal:
            visible = (
                torch.arange(length, device=query.device)
                <= (torch.arange(start, min(start + block, rows), device=query.device)[:, None])
            )
            logits = logits.masked_fill(~visible, torch.finfo(torch.float32).min)
        elif mask is not None:
            logits = logits + mask[:, :, None, start : start + block].float()
        lse = torch.logsumexp(logits, dim=-1)
        outputs.append(torch.exp(logits - lse[..., None]).to(value.dtype) @ value)
        lses.append(lse)
    output, lse = torch.cat(outputs, dim=-2), torch.cat(lses, dim=-1)
    return output.reshape(batch, heads, rows, -1), lse.reshape(batch, heads, rows)


def attend_ragged(query: torch.Tensor, context: RaggedContext, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over all kept pairs of its KV head, where heads keep different numbers of pairs.

    Args:
        query: (B, H, q, d). All batch rows share the one context, which is never repeated.
        context: the kept pairs.
        scale: factor on the logits.

    Returns:
        Output (B, H, q, d) and log-sum-exp (B, H, q) as `attend`.

    Source: section 8.4.1 (non-uniform head budgets with variable-length attention).
    Cost: O(B H q d * kept pairs per head), no padding; on CUDA in half precision one variable-length kernel.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = len(context.lengths)
    group = heads // kv_heads
    # a head's queries over batch and group are the rows of one problem: the context is read once for all of them
    by_head = (
        query.reshape(batch, kv_heads, group * rows, dim)
        .transpose(0, 1)
        .reshape(kv_heads, 1, batch * group * rows, dim)
    )
    half_on_cuda = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    kernel = varlen_kernel() if half_on_cuda and not torch.is_grad_enabled() else None
    if kernel is not None:
        output, lse = _varlen(kernel, by_head[:, 0], context, scale)
    else:
        parts = [
            attend(one, key, value, scale=scale)
            for one, key, value in zip(by_head.split(1), context.key_heads, context.value_heads, strict=True)
        ]
        output, lse = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    output = output.reshape(kv_heads, batch, group * rows, dim).transpose(0, 1).reshape(batch, heads, rows, dim)
    return output, lse.reshape(kv_heads, batch, group * rows).transpose(0, 1).reshape(batch, heads, rows)


def _varlen(
    kernel: Any, by_head: torch.Tensor, context: RaggedContext, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_ragged` in one variable-length kernel: a KV head plays a sequence, its queries are that sequence's tokens."""
    kv_heads, rows, dim = by_head.shape
    lengths = context.lengths
    cu_query = torch.arange(0, (kv_heads + 1) * rows, rows, dtype=torch.int32, device=by_head.device)
    cu_key = torch.tensor([0, *lengths], dtype=torch.int32, device=by_head.device).cumsum(0, dtype=torch.int32)
    output, lse = kernel(
        by_head.reshape(-1, 1, dim),
        context.keys[:, None],
        context.values[:, None],
        cu_query,
        cu_key,
        rows,
        max(lengths),
        scale=scale,
    )
    # a head without pairs: the kernel leaves its rows undefined
    empty = torch.tensor([length == 0 for length in lengths], device=by_head.device)[:, None]
    output = output.reshape(kv_heads, rows, dim).masked_fill(empty[..., None], 0)
    return output, lse.float().reshape(kv_heads, rows).masked_fill(empty, float("-inf"))


def merge(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention over the union of two disjoint key sets, from the attention over each.

    Args:
        one, other: outputs (B, H, q, d) and log-sum-exps (B, H, q); in every row at least one of them sees a key.

    Returns:
        Output and log-sum-exp over all keys, shaped like one part.
    """
    # softmax over two numbers is a sigmoid of their difference: three small kernels per decoded token and layer
    weight = torch.sigmoid(other[1] - one[1]).unsqueeze(-1).to(one[0].dtype)
    return torch.lerp(one[0], other[0], weight), torch.logaddexp(one[1], other[1])


def tag(key: torch.Tensor, layer: Any) -> torch.Tensor:
    """Mark the keys that a cache layer hands to the model, so that the attention function finds the layer again."""
    setattr(key, _TAG, layer)
    return key


def routed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registered attention function: tagged keys go to their cache layer's `attend`, all others to sdpa.

    Args and returns as every transformers attention function: query (B, H, q, d) in, (B, q, H, d) out, no weights.

    Raises:
        ValueError: the model caps its attention logits, which this function cannot do.
    """
    layer = getattr(key, _TAG, None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError(
            "this model soft-caps its attention logits, which a compressed cache cannot do; use a plain cache"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = layer.attend(query, key, value, attention_mask, scale)
    return output.transpose(1, 2).contiguous(), None


class RoutedCache(Cache):
    """A cache whose layers compute their own attention; it works on models that `attach` has prepared.

    Raises:
        ValueError: used on a model that was not prepared; the plain attention would silently see the new tokens only.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self._routed_from: list[str | None] = []  # attention implementation to restore, one per call under way

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.update`, for a call that reached us through `attach`'s hook."""
        if not self._routed_from:
            raise ValueError("this model does not route attention to the cache; call `cache.attach(model)` first")
        return super().update(*args, **kwargs)

    def check_prompt(self, input_ids: torch.Tensor) -> None:
        """Refuse full prompts, (B, n) int64, that do not begin with the tokens the cache stands for."""

    def check_call(self, n_new: int, attention_mask: Any) -> None:
        """Refuse a forward whose tokens and mask do not continue the cache.

        Args:
            n_new: tokens of this forward.
            attention_mask: what the model was given: None or (B, cached + new).

        Raises:
            DroppedTokensError: `generate` has cut or misread the prompt.
            ValueError: a mask of another rank.
        """
        past = self.get_seq_length()
        advice = (
            "pass the full prompt ids (context first), or the new ids with a full-length attention_mask; "
            "`model.generate(**cache.inputs(question))` does it right"
        )
        if n_new == 0:
            raise DroppedTokensError(f"no token is left after the {past} cached ones: {advice}")
        if attention_mask is None:
            return
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            raise ValueError("a compressed cache takes a 2-D attention mask (batch, cached + new tokens) or none")
        if attention_mask.shape[1] != past + n_new:
            raise DroppedTokensError(
                f"the attention mask covers {attention_mask.shape[1]} tokens, the cache {past} and the call {n_new}: {advice}"
            )


def attach(model: Any) -> None:
    """Let `model` route the attention of calls that carry a `RoutedCache`; calling it again changes nothing.

    Args:
        model: a causal language model, PEFT-wrapped or not. Other calls of it, and other models, are left as they are.
    """
    AttentionInterface.register(ATTENTION_NAME, routed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    decoder = decoder_of(model)
    if _route in decoder._forward_pre_hooks.values():
        return
    decoder.register_forward_pre_hook(_route, with_kwargs=True)
    decoder.register_forward_hook(_restore, with_kwargs=True, always_call=True)
    language_model: Any = causal_model_of(model)
    if hasattr(language_model, "prepare_inputs_for_generation"):
        language_model.prepare_inputs_for_generation = _checking_prompts(language_model.prepare_inputs_for_generation)


def detach(model: Any) -> None:
    """Undo `attach`."""
    decoder = decoder_of(model)
    for hooks, function in ((decoder._forward_pre_hooks, _route), (decoder._forward_hooks, _restore)):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
    vars(causal_model_of(model)).pop("prepare_inputs_for_generation", None)


def _checking_prompts(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """`prepare_inputs_for_generation` with a look at the full prompt: `generate` cuts the cached part off unread."""

    @functools.wraps(prepare)
    def checked(input_ids: torch.Tensor, next_sequence_length: int | None = None, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        # a length to cut to means that the ids are a full prompt, not new ids beside a full-length mask
        full_prompt = next_sequence_length is not None and kwargs.get("is_first_iteration")
        if isinstance(cache, RoutedCache) and full_prompt and kwargs.get("inputs_embeds") is None:
            cache.check_prompt(input_ids)
        return prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    return checked


def _route(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, RoutedCache):
        return
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else args[0]
    cache.check_call(ids.shape[1], kwargs.get("attention_mask"))
    cache._routed_from.append(set_attention(module.config, ATTENTION_NAME))


def _restore(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, RoutedCache) and cache._routed_from:
        set_attention(module.config, cache._routed_from.pop())
