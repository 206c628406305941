"""Pairs that are held with their scores, cut to a budget again: no pair's score changes with what comes after it.

The best of all that was ever read are among the best of what was held before: cutting twice is cutting once (section 8.4.1).
"""

from __future__ import annotations

import torch

from .config import KVzipConfig
from .eviction import budget_ratio, first, windows
from .ragged import Ragged, RaggedContext

# by layer and head, one of each for every pair that is held, in order of position
Scores = list[list[torch.Tensor]]
Keep = list[list[torch.Tensor]]


def keep_live(scores: Scores, config: KVzipConfig, n_context: int, n_prefix: int) -> Keep:
    """What stays of pairs of which some are gone already, counted as `eviction.keep_mask` counts them.

    Args:
        scores: by scored layer and head (pairs,) float, higher stays; inf for the prefix, which always stays.
        config: the budget, level and ties.
        n_context: tokens ever read behind the prefix, whatever is held of them: the budget is a share of these.
        n_prefix: tokens of the prefix.

    Returns:
        As `scores`, bool, True = stays: no more than the budget, and all that is held where that is less.

    Source: section 8.4.1; head level: section 8.4.2, a dropped head keeps the first and the last of what it holds.
    Cost: one sort of all scores.
    """
    if config.level == "head":
        return _whole_heads(scores, config, n_context, n_prefix)
    budget = Budget.of(config, n_context, n_prefix, sum(map(len, scores)))
    keep = budget.keep(scores)
    if config.ties != "reference" or budget.uniform or budget.everything:
        return keep
    if sum(len(row) for layer in scores for row in layer) < budget.count:
        return keep
    held = [[row[kept] for row, kept in zip(*pair, strict=True)] for pair in zip(scores, keep, strict=True)]
    lowest = lowest_of(held)
    return [[(row > lowest) | row.isinf() for row in layer] for layer in scores]


def lowest_of(scores: Scores) -> float:
    """The lowest score of all; inf where nothing is held."""
    return min((float(row.min()) for layer in scores for row in layer if len(row)), default=torch.inf)


class Budget:
    """How many pairs stay and which: the best of all layers and heads together, or of each head.

    Args:
        count: pairs that stay, prefix included.
        uniform: of each head.
        everything: no pair is ever evicted.
    """

    def __init__(self, count: int, uniform: bool, everything: bool) -> None:
        self.count, self.uniform, self.everything = count, uniform, everything

    @classmethod
    def of(cls, config: KVzipConfig, n_context: int, n_prefix: int, heads: int) -> Budget:
        """As `eviction.keep_mask` counts them, of `heads` heads in all layers."""
        ratio, uniform = budget_ratio(config, n_context, n_prefix), config.level == "pair-uniform"
        rows = 1 if uniform else heads
        return cls(int(rows * n_context * ratio) + rows * n_prefix, uniform, ratio >= 1)

    def keep(self, scores: Scores) -> Keep:
        """True for the best, earlier positions first among equals."""
        rows = [row for layer in scores for row in layer]
        if self.uniform:
            keep = [first(row[None], self.count)[0] for row in rows]
        else:
            joined = torch.cat([row.to(rows[0].device) for row in rows])
            keep = list(first(joined[None], self.count)[0].split([len(row) for row in rows]))
        return _by_layer(keep, scores)


def _by_layer(rows: list[torch.Tensor], scores: Scores) -> Keep:
    left = iter(rows)
    return [[next(left) for _ in layer] for layer in scores]


def _whole_heads(scores: Scores, config: KVzipConfig, n: int, n_prefix: int) -> Keep:
    """As `eviction.keep_mask` drops heads; what a head is worth does not change with what it keeps."""
    rows = [row[n_prefix:] for layer in scores for row in layer]
    ratio = budget_ratio(config, n, n_prefix)
    if ratio >= 1:
        return [[torch.ones_like(row, dtype=torch.bool) for row in layer] for layer in scores]
    worth = torch.stack([row.max() if len(row) else row.new_tensor(float("-inf")) for row in rows])
    budget = int(len(rows) * n * ratio)
    sinks, recent = windows(config, budget // len(rows), n, n_prefix)
    if config.ties == "reference":
        whole = worth > worth.sort(descending=True).values[max(budget - 1, 0) // n]
    else:
        whole = first(worth[None], (budget - len(rows) * (sinks + recent)) // (n - sinks - recent))[0]
    keep = []
    for row, stays in zip(rows, whole.tolist(), strict=True):
        places = torch.arange(len(row), device=row.device)
        kept = (places < sinks) | (places >= len(row) - recent) | stays
        keep.append(torch.cat([kept.new_ones(n_prefix), kept]))
    return _by_layer(keep, scores)


def folded(
    context: Ragged, tail: tuple[torch.Tensor, torch.Tensor] | None, keep: list[torch.Tensor], n_tokens: int
) -> RaggedContext:
    """What stays of a context and of the dense tokens behind it.

    Args:
        context: what is held of earlier tokens.
        tail: keys and values (1, KV heads, n, d), or None.
        keep: by head, (pairs held + n,) bool, in order of position.
        n_tokens: tokens ever read, these included.
    """
    lengths, keep = [int(kept.sum()) for kept in keep], [kept.to(context.device) for kept in keep]
    pieces = (None, None) if tail is None else tail
    made = [
        kept_rows(old, context.lengths, piece, keep, lengths)
        for old, piece in zip(context.opened(), pieces, strict=True)
    ]
    return RaggedContext(made[0], made[1], lengths, n_tokens)


def kept_rows(
    old: torch.Tensor, before: list[int], piece: torch.Tensor | None, keep: list[torch.Tensor], lengths: list[int]
) -> torch.Tensor:
    """What stays of ragged pairs (sum of `before`, d) and of a piece (1, heads, n, d) or None: (sum of `lengths`, d)."""
    made = old.new_empty(sum(lengths), old.shape[1])
    new = old.new_empty(len(before), 0, old.shape[1]) if piece is None else piece[0]
    for target, one, more, kept in zip(made.split(lengths), old.split(before), new, keep, strict=True):
        stays, joins = kept[: len(one)].nonzero()[:, 0], kept[len(one) :].nonzero()[:, 0]
        torch.index_select(one, 0, stays, out=target[: len(stays)])
        torch.index_select(more, 0, joins, out=target[len(stays) :])
    return made
