"""How much each context pair matters: repeat the context chunk by chunk, keep the maximum attention.

Section 8.3.2 (Eq. 8.2) and section 8.3.4 (chunked scoring, Figure 8.7).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .._compat import cache_keyword, copied_layer, decoder_of, input_device, layer_kinds, text_config
from ..distributed import Room
from ..progress import bar
from ..routing.attach import attach
from ..routing.dispatch import maskless, tag
from ..routing.verdicts import evaluating
from ..settings import check_config, check_flag, check_kind
from ..text.positions import positions_alike
from .attention import attend, merge
from .config import KVzipConfig
from .reading import USER, OwnCache, PrefilledContext, positions
from .rules import AttentionRules, no_autocast, same_dtype

logger = logging.getLogger(__name__)

# logits held at a time while looking for their maximum, in elements (16 MB in float32)
_SCORE_BLOCK_ELEMENTS = 1 << 22
# tokens; smaller chunks than this are not repeated for the sake of positions
_LEAST_CHUNK = 64


@torch.no_grad()
def score_context(
    prefilled: PrefilledContext, config: KVzipConfig | None = None, *, user: str = USER, progress: bool = True
) -> torch.Tensor:
    """Maximum attention that each context pair receives while the model repeats the context (Eq. 8.2, section 8.3.4).

    Args:
        prefilled: the full cache; left exactly as it is.
        config: chunk size, overlap, replay and the key set of the softmax.
        user: on whose behalf the model is attached.
        progress: show a bar.

    Returns:
        (scored layers, KV heads, context tokens) float32 in [0, 1].

    Source: Eq. 8.2; chunks and repeat prompts of section 8.3.4.
    Differs: the softmax runs over prefix, chunk and repeat input as in the reference code (Eq. 8.2 says all keys:
        `softmax_keys="all"`), in float32 whatever the model's dtype, with the model's own logit scale. Images are repeated
        by the embeddings that were read, and causally, also where the model reads them in both directions (Gemma 3).
    Cost: with m = chunk size, the linear layers of (1 + prompt / m) forwards over the context and O(n^2) attention
        (`replay="exact"`) or O(n m) (`"local"`); memory O(m) beside the cache, whatever the context length. Where the device
        has no room for a repeat input, it comes in halves, quarters, ...: the same scores, up to rounding.
    """
    config, progress = check_config(config, KVzipConfig), check_flag("progress", progress)
    check_kind("prefilled", prefilled, PrefilledContext, "give what prefill returned")
    model, prompt = prefilled.model, prefilled.prompt
    decoder = decoder_of(model)
    attach(model, user)
    layers: list[Any] = prefilled.cache.layers
    first = layers[prefilled.scored_layers[0]].keys
    if first is None:
        raise ValueError("this prefilled context was used up by free=True; prefill again")
    scores = torch.zeros(len(prefilled.scored_layers), first.shape[1], prefilled.n_context, device=first.device)
    chunk, name = fitting_chunk(prefilled, config), cache_keyword(decoder.forward)
    room = Room("parts of {} tokens of a repeat input")
    shown = bar(prefilled.n_context, "Scoring", unit="tok", disable=not progress)
    with shown, maskless(), evaluating(decoder):
        for start, end, ids in prompt.repeat_inputs(chunk, config.overlap):
            ids = ids.to(input_device(model))[None]
            given, total = repeated(prefilled, start, end, ids), ids.shape[1]

            def repeat(size: int, start: int = start, end: int = end, given: Any = given, total: int = total) -> None:
                cache = _ReplayCache(prefilled, config, start, end, scores, in_parts=size < total)
                for at in range(0, total, size):
                    part = {key: value[:, at : at + size] for key, value in given.items()}
                    where = positions(decoder, prompt.ids.numel() + at, next(iter(part.values())))
                    with contextlib.suppress(_AllScored):
                        decoder(**part, use_cache=True, **{name: cache}, **where)

            room.attempt(repeat, total, ids.device)
            shown.update(end - start)
    return scores


def repeated(prefilled: PrefilledContext, start: int, end: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the decoder is given for the repeat input of one chunk.

    Args:
        prefilled: the full cache.
        start, end: the chunk, in context tokens.
        ids: (1, q) int64, its repeat input.

    Returns:
        `input_ids`; or, for a context with images, `inputs_embeds` (1, q, width), in which all that repeats the context is
        embedded as it was read.
    """
    if prefilled.embeddings is None:
        return {"input_ids": ids}
    prompt, length = prefilled.prompt, ids.shape[1]
    first = prompt.next_repeat_ids.numel() if start else 0
    overlap = length - first - prompt.suffix_ids.numel() - (end - start) if start else 0
    places = [(first, start - overlap, start), (length - (end - start), start, end)]
    words = ids.clone()
    for at, a, b in places:
        words[:, at : at + b - a] = 0  # placeholders may lie outside the vocabulary
    embedded = decoder_of(prefilled.model).get_input_embeddings()(words)
    read = prefilled.embeddings[:, prefilled.n_prefix :].to(embedded)
    for at, a, b in places:
        embedded[:, at : at + b - a] = read[:, a:b]
    return {"inputs_embeds": embedded}


def fitting_chunk(prefilled: PrefilledContext, config: KVzipConfig) -> int:
    """Chunk size at which replay positions stay inside those the model was made for, as far as that is possible.

    Replays stand behind the whole context. Rotary embeddings that change with the length (dynamic, longrope) would turn the
    replay's queries otherwise than the cached keys, and learned positions end.

    Returns:
        `chunk_size`, or less where the context leaves less room; a chunk of 64 tokens at least (a warning says so).
    """
    prompt = prefilled.prompt
    limit = positions_alike(text_config(prefilled.model), prompt.ids.numel())
    if limit is None:
        return config.chunk_size
    overlap = min(config.overlap, config.chunk_size, prefilled.n_context)
    words = max(prompt.first_repeat_ids.numel(), prompt.next_repeat_ids.numel() + overlap) + prompt.suffix_ids.numel()
    chunk = min(config.chunk_size, prefilled.n_context)
    room = limit - prompt.ids.numel() - words
    if chunk <= room:
        return config.chunk_size
    if room >= min(_LEAST_CHUNK, chunk):
        logger.info("chunks of %d tokens instead of %d, so that replays end before position %s", room, chunk, limit)
        return room
    warnings.warn(
        f"{prompt.ids.numel()} tokens of context leave {max(room, 0)} of the model's {limit} positions for repeating it: "
        "scores come from positions it was not trained on; use a shorter context",
        stacklevel=3,
    )
    return config.chunk_size


class _AllScored(Exception):  # noqa: N818 - not an error
    """The last scored layer has its scores; what the model would compute after it is not needed."""


class _ReplayCache(OwnCache):
    """The full cache seen by one repeat input; nothing is ever appended to it.

    Args:
        prefilled, config, start, end, scores: what is scored, and where the scores go.
        in_parts: the repeat input comes in more than one forward, and the first parts' keys are kept for the later ones.
    """

    def __init__(
        self,
        prefilled: PrefilledContext,
        config: KVzipConfig,
        start: int,
        end: int,
        scores: torch.Tensor,
        *,
        in_parts: bool = False,
    ) -> None:
        n_prefix, layers = prefilled.n_prefix, []
        # layers that share keys may read them after the layer that wrote them
        kinds = layer_kinds(text_config(prefilled.model))
        shared = "shared" in kinds or len(kinds) < text_config(prefilled.model).num_hidden_layers
        for index, layer in enumerate(prefilled.cache.layers):
            if index not in prefilled.scored_layers:
                layers.append(copied_layer(layer))
                continue
            row = prefilled.scored_layers.index(index)
            last = row == len(prefilled.scored_layers) - 1 and not shared
            target = scores[row, :, start:end]
            spans = _Spans(n_prefix, n_prefix + start, n_prefix + end, prefilled.prompt.ids.numel())
            layers.append(_ReplayLayer(layer, prefilled.latent, spans, config, target, last, in_parts))
        super().__init__(layers)


@dataclass(frozen=True)
class _Spans:
    """Where a chunk stands in the cache, in tokens."""

    prefix: int
    start: int
    end: int
    total: int

    @property
    def near(self) -> list[tuple[int, int]]:
        """Prefix and chunk; neighbours in the first chunk: one kernel instead of two."""
        return [(0, self.end)] if self.start == self.prefix else [(0, self.prefix), (self.start, self.end)]

    @property
    def far(self) -> list[tuple[int, int]]:
        """All that is neither prefix nor chunk."""
        spans = [(self.prefix, self.start), (self.end, self.total)]
        return [(start, end) for start, end in spans if end > start]


class _ReplayLayer(DynamicLayer):
    """One layer of `_ReplayCache`: attends over the full cache and the repeat input, and scores the chunk on the way."""

    def __init__(
        self,
        full: Any,
        latent: bool,
        spans: _Spans,
        config: KVzipConfig,
        target: torch.Tensor,
        last: bool,
        in_parts: bool,
    ) -> None:
        super().__init__()
        self.full, self.latent, self.spans = full, latent, spans
        self.config, self.target, self.last, self.in_parts = config, target, last, in_parts

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.in_parts:
            key_states, value_states = super().update(key_states, value_states)
        if not self.latent:
            return tag(key_states, self), value_states
        keys, values = torch.cat([self.full.keys, key_states], 2), torch.cat([self.full.values, value_states], 2)
        return tag(keys, self), values

    def get_seq_length(self) -> int:
        return self.spans.total + self._repeated

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._repeated + query_length, self.spans.total

    @property
    def _repeated(self) -> int:
        """Tokens of the repeat input in earlier parts."""
        return self.keys.shape[2] if self.is_initialized and self.keys is not None else 0

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scale: float,
        expanded: bool,
        **options: Any,
    ) -> torch.Tensor:
        """Output (1, H, q, v) of the repeat input; its scores go to `target` on the way."""
        rules, n = AttentionRules.of(scale, options), self.spans.total
        keys, values = (key[:, :, :n], value[:, :, :n]) if expanded else (self.full.keys, self.full.values)
        new = (key[:, :, n:], value[:, :, n:]) if expanded else (key, value)
        with no_autocast(query.device):
            rows, before = query.shape[2], new[0].shape[2] - query.shape[2]
            now = (part[:, :, before:] for part in new)
            result = attend(*same_dtype(query, *now), causal=rows > 1, **rules.options)
            if before:
                earlier = (part[:, :, :before] for part in new)
                result = merge(result, attend(*same_dtype(query, *earlier), **rules.options))

            def joined(spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
                found = result
                for a, b in spans:
                    found = merge(
                        found, attend(*same_dtype(query, keys[:, :, a:b], values[:, :, a:b]), **rules.options)
                    )
                return found

            chunk = keys[0, :, self.spans.start : self.spans.end]
            result = joined(self.spans.near)
            if self.config.softmax_keys == "chunk":
                self._score(query, chunk, rules.with_sinks(result)[1], rules)
                if self.last:
                    raise _AllScored
            if self.config.replay == "exact":
                result = joined(self.spans.far)
            result = rules.with_sinks(result)
            if self.config.softmax_keys == "all":
                self._score(query, chunk, result[1], rules)
                if self.last:
                    raise _AllScored
            return result[0]

    def _score(self, query: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, rules: AttentionRules) -> None:
        """Eq. 8.2 for one chunk: max over group and queries of softmax weights, as exp(max(logit - log-sum-exp))."""
        query, keys = same_dtype(query, keys)
        kv_heads, length, dim = keys.shape
        rows = query.reshape(kv_heads, -1, dim)
        offset = lse.reshape(kv_heads, -1, 1)
        keys_t = keys.transpose(1, 2)
        best = torch.full((kv_heads, length), float("-inf"), device=query.device)
        block = max(_SCORE_BLOCK_ELEMENTS // (kv_heads * length), 1)
        for start in range(0, rows.shape[1], block):
            part, shift = rows[:, start : start + block], offset[:, start : start + block]
            if rules.softcap is not None:
                capped = torch.tanh(torch.bmm(part, keys_t).float() * (rules.scale / rules.softcap))
                logits = capped.mul_(rules.softcap).sub_(shift)
            elif part.dtype == torch.float32:
                logits = torch.baddbmm(shift, part, keys_t, beta=-1, alpha=rules.scale)
            else:
                logits = torch.bmm(part, keys_t).float().mul_(rules.scale).sub_(shift)
            torch.maximum(best, logits.amax(dim=1), out=best)
        if self.latent:  # all heads read the one latent
            best = best.amax(dim=0, keepdim=True)
        # rounding may lift a weight of 1 a little above it; layers that share these keys score them together
        self.target.copy_(torch.maximum(self.target, best.clamp_(max=0).exp_().to(self.target.device)))
