"""Keep masks: exact budgets, monotone in the ratio, equal to the one-at-a-time oracle, ties broken by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dataopt.kvzip.config import KVzipConfig
from hf_dataopt.kvzip.eviction import budget_ratio, keep_mask

from ..reference.kvzip import top_share, whole_heads

shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12))
ratios = st.floats(0.01, 1.0)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, ratio=ratios, seed=st.integers(0, 99), levels=st.integers(2, 50))
def test_pair_level_equals_the_oracle(shape: tuple[int, int, int], ratio: float, seed: int, levels: int) -> None:
    """Scores are quantised so that ties occur."""
    scores = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * levels).floor() / levels
    mask = keep_mask(scores, KVzipConfig(keep_ratio=ratio))
    assert torch.equal(mask, top_share(scores, ratio) if ratio < 1 else torch.ones_like(mask))
    assert mask.sum() == (int(scores.numel() * ratio) if ratio < 1 else scores.numel())
    reference = keep_mask(scores, KVzipConfig(keep_ratio=ratio, ties="reference"))
    assert (reference <= mask).all(), "the strict threshold keeps a subset"


@settings(max_examples=30, deadline=None)
@given(shape=shapes, low=ratios, high=ratios, level=st.sampled_from(["pair", "pair-uniform", "head"]))
def test_a_larger_ratio_keeps_a_superset(shape: tuple[int, int, int], low: float, high: float, level: str) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    small, large = (keep_mask(scores, KVzipConfig(keep_ratio=r, level=level)) for r in sorted((low, high)))
    assert (small <= large).all()


def test_uniform_level_gives_every_head_the_same() -> None:
    mask = keep_mask(torch.rand(4, 3, 50), KVzipConfig(keep_ratio=0.3, level="pair-uniform"))
    assert (mask.sum(-1) == 15).all()


def test_head_level_keeps_or_drops_whole_heads() -> None:
    scores = torch.rand(4, 3, 50)
    mask = keep_mask(scores, KVzipConfig(keep_ratio=0.5, level="head", head_sinks=0, head_recent=0))
    kept = mask.all(-1)
    assert torch.equal(kept, mask.any(-1)) and kept.sum() == 6
    assert scores.amax(-1)[kept].min() > scores.amax(-1)[~kept].max()


def test_saturated_scores_keep_the_budget() -> None:
    """Half precision saturates at 1; the reference's strict threshold then keeps nothing (facts 1.7, item 1)."""
    scores = torch.ones(2, 2, 10)
    assert keep_mask(scores, KVzipConfig(keep_ratio=0.25)).sum() == 10
    assert keep_mask(scores, KVzipConfig(keep_ratio=0.25, ties="reference")).sum() == 0


def test_token_budget() -> None:
    assert budget_ratio(KVzipConfig(max_kv_tokens=60), n_context=100, n_prefix=10) == 0.5
    assert budget_ratio(KVzipConfig(max_kv_tokens=600), n_context=100, n_prefix=10) == 1.0
    with pytest.raises(ValueError, match="no room beside the 10 prefix tokens"):
        budget_ratio(KVzipConfig(max_kv_tokens=10), n_context=100, n_prefix=10)


@pytest.mark.parametrize("scores", [torch.rand(3, 4), torch.empty(0, 2, 3), torch.full((1, 1, 2), float("nan"))])
def test_bad_scores(scores: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="scores"):
        keep_mask(scores, KVzipConfig())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 90)),
    ratio=ratios,
    sinks=st.integers(0, 6),
    recent=st.integers(0, 6),
    n_prefix=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_head_level_equals_heads_added_one_by_one(
    shape: tuple[int, int, int], ratio: float, sinks: int, recent: int, n_prefix: int, seed: int
) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    config = KVzipConfig(keep_ratio=ratio, level="head", head_sinks=sinks, head_recent=recent)
    mask = keep_mask(scores, config, n_prefix)
    windows = (min(tokens, shape[2] // 16) for tokens in (max(sinks - n_prefix, 0), recent))
    assert torch.equal(mask, whole_heads(scores, ratio, *windows))
    assert int(mask.sum()) <= max(int(scores.numel() * ratio), scores.numel() * (ratio >= 1))


def test_head_level_in_numbers() -> None:
    """12 heads of 100 pairs, half of 1,200: 12 x (4 + 6) for the windows leave 480, in which 5 heads find 90 more."""
    scores = torch.rand(4, 3, 100)
    mask = keep_mask(scores, KVzipConfig(keep_ratio=0.5, level="head", head_sinks=7, head_recent=6), n_prefix=3)
    whole = mask.all(-1)
    assert whole.sum() == 5 and scores.amax(-1)[whole].min() > scores.amax(-1)[~whole].max()
    assert mask[..., :4].all() and mask[..., 94:].all() and not mask[~whole][:, 4:94].any()
