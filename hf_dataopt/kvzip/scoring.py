"""How much each context pair matters: prefill once, repeat the context chunk by chunk, keep the maximum attention.

Section 8.3.2 (Eq. 8.2) and section 8.3.4 (chunked scoring, Figure 8.7).
"""

from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .._compat import decoder_of, layer_kinds, text_config
from ..errors import UnsupportedModelError
from ..progress import bar
from .attention import RoutedCache, attach, attend, merge, tag
from .config import KVzipConfig
from .prompt import KVzipPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
# logits held at a time while looking for their maximum, in elements (16 MB in float32)
_SCORE_BLOCK_ELEMENTS = 1 << 22


@dataclass
class PrefilledContext:
    """A context's full cache, before anything is evicted.

    Args:
        model: the language model that made it.
        prompt: its token sequences.
        cache: full keys and values of prefix and context, batch 1.
        scored_layers: indices of the layers that attend globally; sliding-window layers are neither scored nor evicted.
    """

    model: PreTrainedModel
    prompt: KVzipPrompt
    cache: DynamicCache
    scored_layers: list[int]

    @property
    def n_prefix(self) -> int:
        """Tokens before the context."""
        return self.prompt.prefix_ids.numel()

    @property
    def n_context(self) -> int:
        """Tokens of the context."""
        return self.prompt.context_ids.numel()


def check_supported(model: Any) -> list[int]:
    """Refuse models KVzip was not written for, before anything is computed.

    Args:
        model: a causal language model, PEFT-wrapped or not.

    Returns:
        Indices of the layers that are scored and evicted.

    Raises:
        UnsupportedModelError: unknown model type, or no layer attends globally.
    """
    config = text_config(model)
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"KVzip supports the model types {', '.join(SUPPORTED_MODEL_TYPES)}; this model is {config.model_type!r}"
        )
    kinds = layer_kinds(config)
    scored = [index for index, kind in enumerate(kinds) if kind == "full"]
    if not scored or "other" in kinds:
        raise UnsupportedModelError(
            f"KVzip evicts from layers with global attention; this {config.model_type} model has {len(scored)} of them "
            f"among {len(kinds)} ({', '.join(sorted(set(kinds)))}). Load it without a sliding window, or use a plain cache"
        )
    return scored


@torch.no_grad()
def prefill(
    model: PreTrainedModel, prompt: KVzipPrompt, config: KVzipConfig | None = None, *, progress: bool = True
) -> PrefilledContext:
    """Encode prefix and context into a full cache, in pieces, without computing logits.

    Args:
        model: a supported causal language model.
        prompt: the token sequences.
        config: gives `prefill_chunk_size`; default settings otherwise.
        progress: show a bar (contexts of more than one piece only).

    Returns:
        The full cache as a `PrefilledContext`.

    Raises:
        UnsupportedModelError: see `check_supported`.

    Cost: one forward over the context, O(n^2) attention; 2 * layers * KV heads * d values per token are stored.
    """
    config = config or KVzipConfig()
    scored_layers = check_supported(model)
    decoder = decoder_of(model)
    cache = DynamicCache(config=text_config(model))
    ids = prompt.ids.to(decoder.device)[None]
    step = config.prefill_chunk_size
    with bar(ids.shape[1], "Prefilling", unit="tok", disable=not progress or ids.shape[1] <= step) as shown:
        for piece in ids.split(step, dim=1):
            decoder(input_ids=piece, past_key_values=cache, use_cache=True)
            shown.update(piece.shape[1])
    return PrefilledContext(model, prompt, cache, scored_layers)


@torch.no_grad()
def score_context(
    prefilled: PrefilledContext, config: KVzipConfig | None = None, *, progress: bool = True
) -> torch.Tensor:
    """Maximum attention that each context pair receives while the model repeats the context (Eq. 8.2, section 8.3.4).

    Args:
        prefilled: the full cache; left exactly as it is.
        config: chunk size, overlap, replay and the key set of the softmax.
        progress: show a bar.

    Returns:
        (scored layers, KV heads, context tokens) float32 in [0, 1].

    Source: Eq. 8.2; chunks and repeat prompts of section 8.3.4.
    Differs: the softmax runs over prefix, chunk and repeat input as in the reference code (Eq. 8.2 says all keys:
        `softmax_keys="all"`), in float32 whatever the model's dtype, with the model's own logit scale.
    Cost: with m = chunk size, the linear layers of (1 + prompt / m) forwards over the context and O(n^2) attention
        (`replay="exact"`) or O(n m) (`"local"`); memory O(m) beside the cache, whatever the context length.
    """
    config = config or KVzipConfig()
    model, prompt = prefilled.model, prefilled.prompt
    decoder = decoder_of(model)
    attach(model)
    scores = torch.zeros(
        len(prefilled.scored_layers),
        text_config(model).num_key_value_heads,
        prefilled.n_context,
        device=decoder.device,
    )
    with bar(prefilled.n_context, "Scoring", unit="tok", disable=not progress) as shown:
        for start, end, ids in prompt.repeat_inputs(config.chunk_size, config.overlap):
            cache = _ReplayCache(prefilled, config, start, end, scores)
            with contextlib.suppress(_AllScored):
                decoder(input_ids=ids.to(decoder.device)[None], past_key_values=cache, use_cache=True)
            shown.update(end - start)
    return scores


class _AllScored(Exception):  # noqa: N818 - not an error
    """The last scored layer has its scores; what the model would compute after it is not needed."""


class _ReplayCache(RoutedCache):
    """The full cache seen by one repeat input; nothing is ever appended to it."""

    def __init__(
        self, prefilled: PrefilledContext, config: KVzipConfig, start: int, end: int, scores: torch.Tensor
    ) -> None:
        n_prefix = prefilled.n_prefix
        layers: list[Any] = []
        for index, layer in enumerate(prefilled.cache.layers):
            if index not in prefilled.scored_layers:
                layers.append(copy.copy(layer))  # its update makes new tensors, the original keeps the old ones
                continue
            row = prefilled.scored_layers.index(index)
            last = row == len(prefilled.scored_layers) - 1
            target = scores[row, :, start:end]
            layers.append(_ReplayLayer(layer, n_prefix, n_prefix + start, n_prefix + end, config, target, last))
        super().__init__(layers)


class _ReplayLayer(DynamicLayer):
    """One layer of `_ReplayCache`: attends over the full cache and the repeat input, and scores the chunk on the way."""

    def __init__(
        self,
        full: Any,
        n_prefix: int,
        start: int,
        end: int,
        config: KVzipConfig,
        target: torch.Tensor,
        last: bool,
    ) -> None:
        super().__init__()
        self.full, self.n_prefix, self.start, self.end = full, n_prefix, start, end
        self.config, self.target, self.last = config, target, last

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return tag(key_states, self), value_states

    def get_seq_length(self) -> int:
        return self.full.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.get_seq_length()

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Output (1, H, q, d) of the repeat input; its scores go to `target` on the way."""
        result = attend(query, key, value, scale=scale, causal=True)
        # prefix and chunk are neighbours in the first chunk: one kernel instead of two
        near = [(0, self.end)] if self.start == self.n_prefix else [(0, self.n_prefix), (self.start, self.end)]
        for span in near:
            result = merge(result, self._attend_cached(query, scale, *span))
        if self.config.softmax_keys == "chunk":
            self._score(query, result[1], scale)
            if self.last:
                raise _AllScored
        if self.config.replay == "exact":
            # all that is neither prefix nor chunk
            for span in self._far():
                result = merge(result, self._attend_cached(query, scale, *span))
        if self.config.softmax_keys == "all":
            self._score(query, result[1], scale)
            if self.last:
                raise _AllScored
        return result[0]

    def _far(self) -> list[tuple[int, int]]:
        spans = [(self.n_prefix, self.start), (self.end, self.get_seq_length())]
        return [(start, end) for start, end in spans if end > start]

    def _attend_cached(
        self, query: torch.Tensor, scale: float, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attend(query, self.full.keys[:, :, start:end], self.full.values[:, :, start:end], scale=scale)

    def _score(self, query: torch.Tensor, lse: torch.Tensor, scale: float) -> None:
        """Eq. 8.2 for one chunk: max over group and queries of softmax weights, as exp(max(logit - log-sum-exp))."""
        keys = self.full.keys[0, :, self.start : self.end]
        kv_heads, length, dim = keys.shape
        rows = query.reshape(kv_heads, -1, dim)
        offset = lse.reshape(kv_heads, -1, 1)
        keys_t = keys.transpose(1, 2)
        best = torch.full((kv_heads, length), float("-inf"), device=query.device)
        block = max(_SCORE_BLOCK_ELEMENTS // (kv_heads * length), 1)
        for start in range(0, rows.shape[1], block):
            part, shift = rows[:, start : start + block], offset[:, start : start + block]
            if part.dtype == torch.float32:
                logits = torch.baddbmm(shift, part, keys_t, beta=-1, alpha=scale)
            else:
                logits = torch.bmm(part, keys_t).float().mul_(scale).sub_(shift)
            torch.maximum(best, logits.amax(dim=1), out=best)
        # rounding may lift a weight of 1 a little above it
        self.target.copy_(best.clamp_(max=0).exp_())
