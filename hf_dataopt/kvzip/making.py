"""From a context to the layers of its compressed cache: read, score, evict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..settings import check_config, check_flag, check_kind, check_tensor, check_tokenizer, optional
from .config import KVzipConfig
from .eviction import keep_mask
from .gates import KVzipGates
from .images import build_context
from .layers import compressed_layers
from .prefill import prefill
from .prompt import KVzipPrompt
from .reading import PrefilledContext, check_supported
from .scoring import score_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    context: Any,
    config: KVzipConfig,
    *,
    head_scores: torch.Tensor | None = None,
    gates: KVzipGates | None = None,
    progress: bool = True,
) -> tuple[list[Any], KVzipPrompt]:
    """Layers and token sequences of one compressed context; arguments and errors as `KVzipCache.from_context`."""
    progress = check_flag("progress", progress)
    scored = check_supported(model)
    check_tokenizer("tokenizer", tokenizer)
    optional(check_kind, "gates", gates, KVzipGates)
    if config.standing and gates is None:
        raise ValueError(
            "standing=True scores tokens as they are read, which needs gates; give gates=, or call `compress_again` between "
            "turns"
        )
    if head_scores is not None:
        if gates is not None:
            raise ValueError("head_scores and gates are two ways to score; give one of them")
        todo = "layers that attend globally, and their KV heads"
        check_tensor("head_scores", head_scores, (len(scored), "heads"), finite=True, todo=todo)
    prompt, images = build_context(tokenizer, context, config)
    if gates is not None and images is None and config.level != "head":
        return gates.read(model, prompt, config, progress=progress), prompt
    if gates is not None:
        prefilled, scores = gates.prefill(model, prompt, config, images=images, progress=progress)
        return evict(prefilled, scores, config, free=True), prompt
    prefilled = prefill(model, prompt, config, images=images, progress=progress)
    if head_scores is None:
        scores = score_context(prefilled, config, progress=progress)
    else:
        scores = head_scores[..., None].expand(*head_scores.shape, prefilled.n_context)
    return evict(prefilled, scores, config, free=True), prompt


def evict(prefilled: PrefilledContext, scores: torch.Tensor, config: KVzipConfig, *, free: bool = False) -> list[Any]:
    """Layers of a compressed cache, which remember the scores of what stays; as `KVzipCache.from_scores`."""
    check_kind("prefilled", prefilled, PrefilledContext, "give what prefill returned")
    config, free = check_config(config, KVzipConfig), check_flag("free", free)
    check_tensor("scores", scores)
    full: list[Any] = prefilled.cache.layers
    first = full[prefilled.scored_layers[0]]
    if first.keys is None:
        raise ValueError("this prefilled context was used up by an earlier free=True; prefill again")
    expected = (len(prefilled.scored_layers), first.keys.shape[1], prefilled.n_context)
    if tuple(scores.shape) != expected:
        raise ValueError(
            f"scores must be (scored layers, KV heads, context tokens) = {expected}, got {tuple(scores.shape)}"
        )
    keep = keep_mask(scores, config, prefilled.n_prefix)
    always = keep.new_ones(*keep.shape[:2], prefilled.n_prefix)
    if config.level == "head":  # what a head is worth, whatever is left of it
        scores = scores.amax(-1, keepdim=True).expand_as(scores)
    scores = torch.cat([scores.new_full(always.shape, torch.inf), scores], dim=2)
    keep = torch.cat([always, keep], dim=2)
    return compressed_layers(prefilled, keep, scores=scores, storage=config.storage, free=free)
