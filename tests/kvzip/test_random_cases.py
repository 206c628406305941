"""Scores, levels, budgets, replays and storages drawn at random, each cache against KVzip written out on a plain one.

Invariants: the pairs that stay are those of the slow version, to the pair; the answers are those of the full cache with the
other pairs hidden, and with the numbers in it that 8 or 4 bits leave; a batch of questions is answered as its rows alone;
compressed again, a cache is the one that was compressed once, with turns what all of it may keep; beside another context in one
cache it is answered as alone. `HF_DATAOPT_FAULTS=20` is the full size, 1,000 cases.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.kvzip.eviction import budget_ratio
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.scores import NAMES
from hf_dataopt.kvzip.scoring import score_context

from ..counts import FAULTS
from ..families.plain import prefilled as plain_cache
from ..models import FAMILIES, byte_tokenizer, held, tiny_model
from ..reference.kvzip import top_share, whole_heads
from .conftest import CONTEXT
from .oracle import masked_logits

_WINDOW_SHARE = 16


@lru_cache(maxsize=16)
def model_of(family: str, kv_heads: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """One for the package, and one that it never sees."""
    return tiny_model(family, num_key_value_heads=kv_heads), tiny_model(family, num_key_value_heads=kv_heads)


def drawn(draw: random.Random, n_prefix: int, n: int) -> KVzipConfig:
    budget: dict[str, Any] = {"keep_ratio": round(draw.uniform(0.02, 1.0), 3)}
    if draw.random() < 0.3:
        budget = {"max_kv_tokens": draw.randint(n_prefix + 1, n_prefix + n + 9)}
    return KVzipConfig(
        score=draw.choice(list(NAMES)),
        level=draw.choice(["pair", "pair-uniform", "head"]),
        chunk_size=draw.choice([7, 30, 64, 2000]),
        overlap=draw.randint(0, 9),
        replay=draw.choice(["local", "exact"]),
        head_sinks=draw.choice([0, n_prefix + 2, n_prefix + 9]),
        head_recent=draw.randint(0, 5),
        prefill_chunk_size=draw.choice([50, 16_000]),
        storage=draw.choice(["model", "int8", "int4"]),
        **budget,
    )


def slow_mask(scores: torch.Tensor, config: KVzipConfig, n_prefix: int) -> torch.Tensor:
    n = scores.shape[-1]
    ratio = budget_ratio(config, n, n_prefix)
    if config.level == "pair":
        return top_share(scores, ratio)
    if config.level == "pair-uniform":
        rows = [top_share(row, ratio) for row in scores.reshape(-1, n)]
        return torch.stack(rows).reshape(scores.shape)
    most = n // _WINDOW_SHARE
    return whole_heads(scores, ratio, min(max(config.head_sinks - n_prefix, 0), most), min(config.head_recent, most))


def as_stored(full: DynamicCache, kept: dict[int, torch.Tensor], cache: KVzipCache) -> DynamicCache:
    """A plain cache whose kept pairs are what the compressed one holds, after a look at how far off these are."""
    for index, keep in kept.items():
        layer: Any = full.layers[index]
        for mine, rows in zip((layer.keys, layer.values), cache.pristine_layers[index].context.opened(), strict=True):
            step = {"model": 0, "int8": 1 / 255, "int4": 1 / 3}[cache.config.storage]
            assert (mine[0][keep] - rows).abs().max() <= step * rows.abs().max() + 1e-3
            mine[0][keep] = rows
    return full


@pytest.mark.parametrize("seed", range(50 * FAULTS))
def test_caches_equal_the_slow_version(seed: int) -> None:
    draw = random.Random(seed)
    family = draw.choice(list(FAMILIES))
    model, untouched = model_of(family, draw.choice([1, 2, 4]))
    text = "".join(draw.sample(CONTEXT, len(CONTEXT)))[: draw.randint(3, len(CONTEXT))]
    plain = build_prompt(byte_tokenizer(), text, KVzipConfig())
    n_prefix, n = plain.prefix_ids.numel(), plain.context_ids.numel()
    config = drawn(draw, n_prefix, n)

    prefilled = prefill(model, plain, config, progress=False)
    scores = score_context(prefilled, config, progress=False)
    cache = KVzipCache.from_scores(prefilled, scores, config, tokenizer=byte_tokenizer())
    keep = slow_mask(scores, config, n_prefix)
    assert torch.equal(torch.tensor(cache.stored_lengths), keep.sum(-1) + n_prefix), config

    prefix = keep.new_ones(keep.shape[1], n_prefix)
    kept = {index: torch.cat([prefix, rows], dim=1) for index, rows in zip(prefilled.scored_layers, keep, strict=True)}
    full = as_stored(plain_cache(untouched, plain.ids), kept, cache)
    ids = torch.randint(3, 200, (2, draw.randint(1, 12)), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        both = model(ids, **held(cache.fork())).logits
    for row, logits in zip(ids, both, strict=True):
        expected = masked_logits(untouched, full, row, kept)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0, msg=lambda text: f"{config}: {text}")

    ratio = budget_ratio(config, n, n_prefix) * draw.random()
    again = cache.fork()
    again.compress_again(ratio, progress=False)
    smaller = replace(config, keep_ratio=ratio, max_kv_tokens=None)
    once = KVzipCache.from_scores(prefilled, scores, smaller, tokenizer=byte_tokenizer())
    assert again.stored_lengths == once.stored_lengths, smaller
    if config.storage == "model":  # other numbers are quantised twice
        with torch.no_grad():
            assert torch.equal(model(ids, **held(again)).logits, model(ids, **held(once)).logits), smaller

    if draw.random() < 0.3:
        beside_another(model, cache, text, text[draw.randint(0, len(text) - 1) :] + "!", ids)
    if draw.random() < 0.3 and config.level != "head" and str(config.score).startswith("kv"):
        with_turns(model, again, ids[:1], draw.uniform(0.02, 1.0))


def beside_another(model: PreTrainedModel, cache: KVzipCache, text: str, other: str, ids: torch.Tensor) -> None:
    """The cache and one of another text, alone and as the rows of one cache."""
    config, tokenizer = cache.config, byte_tokenizer()
    single = KVzipCache.from_context(model, tokenizer, other, config=config, progress=False)
    rows = KVzipCache.from_contexts(model, tokenizer, [text, other], config=config, progress=False)
    longest = rows.ids.shape[1]
    mask = torch.ones(2, longest + ids.shape[1], dtype=torch.int64)
    for row, one in enumerate((cache, single)):
        mask[row, : longest - one.ids.shape[1]] = 0
    with torch.no_grad():
        both = model(ids, attention_mask=mask, **held(rows)).logits
        for row, one in enumerate((cache, single)):
            expected = model(ids[row : row + 1], **held(one.fork())).logits[0]
            torch.testing.assert_close(both[row], expected, atol=2e-4, rtol=0, msg=lambda text: f"{config}: {text}")


def with_turns(model: PreTrainedModel, cache: KVzipCache, ids: torch.Tensor, ratio: float) -> None:
    """As many pairs stay as the budget of all that was read allows, or all."""
    fork, n_prefix = cache.fork(), cache.prompt.prefix_ids.numel()
    with torch.no_grad():
        model(ids, **held(fork))
    before = torch.tensor(cache.stored_lengths) - n_prefix + ids.shape[1]
    fork.compress_again(ratio, progress=False)
    n, found = fork.get_seq_length() - n_prefix, torch.tensor(fork.stored_lengths) - n_prefix
    if cache.config.level == "pair":
        assert int(found.sum()) == min(int(before.numel() * n * ratio), int(before.sum())), fork.config
    else:
        assert torch.equal(found, before.clamp(max=int(n * ratio))), fork.config
