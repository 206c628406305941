"""What transformers itself answers: the reference of every comparison, and how exact it is on its own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .family import Family


def cache_keyword(model: Any) -> str:
    """The forward's name for its cache, which transformers 5.24 changed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def prefilled(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    """A plain cache of ids (n,)."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(ids[None], **{cache_keyword(model): cache})
    return cache


def continued(model: PreTrainedModel, ids: torch.Tensor, n: int, positions: bool = False) -> torch.Tensor:
    """Logits (q, vocabulary) of ids[n:] behind a plain cache of ids[:n], told their positions or not."""
    where = {"position_ids": torch.arange(n, len(ids))[None]} if positions else {}
    with torch.no_grad():
        return model(ids[None, n:], **where, **{cache_keyword(model): prefilled(model, ids[:n])}).logits[0]


def own_difference(family: Family) -> float:
    """Largest difference between going on from a plain cache and one forward over everything, both by transformers."""
    model = family.model()
    ids = torch.randint(4, 250, (90,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((continued(model, ids, 60) - model(ids[None]).logits[0, 60:]).abs().max())


def logits(family: Family, model: PreTrainedModel, ids: torch.Tensor, n: int) -> torch.Tensor:
    """Logits (q, vocabulary) of ids[n:], without any cache where the model goes on from one exactly."""
    if not family.continues:
        return continued(model, ids, n, positions="position_ids" in inspect.signature(model.forward).parameters)
    with torch.no_grad():
        return model(ids[None]).logits[0, n:]


def answer(family: Family, model: PreTrainedModel, ids: torch.Tensor, n: int, tokens: int) -> Any:
    """What greedy `generate` makes of ids: `sequences` and raw `logits`."""
    cache = {} if family.continues else {cache_keyword(model): prefilled(model, ids[:n])}
    return generate(model, tokens, input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **cache)


def generate(model: PreTrainedModel, tokens: int, **inputs: Any) -> Any:
    """Greedy `generate` of exactly so many tokens, with the raw logits of each."""
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
