"""A picture of what stayed: the share of a context that every layer and head of a compressed cache keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import MissingExtraError
from ..settings import check_kind
from .cache import KVzipCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def retention(cache: KVzipCache) -> torch.Tensor:
    """Share of the context's pairs that stayed, (scored layers, KV heads) float32 in [0, 1]; the prompt around it not counted.

    Args:
        cache (`KVzipCache`): a compressed context.

    Returns:
        The shares; their mean is the share of all pairs.

    Source: section 8.4.1 (budgets that differ between heads).

    Example:
        ```python
        retention(cache).mean()  # keep_ratio, up to rounding
        ```
    """
    check_kind("cache", cache, KVzipCache, "give what KVzipCache.from_context returned")
    if cache.rows is not None:
        raise ValueError("this cache holds several contexts; look at a cache of each")
    kept = torch.tensor(cache.stored_lengths, dtype=torch.float32) - cache.prompt.prefix_ids.numel()
    return kept / (cache.prompt.ids.numel() - cache.prompt.prefix_ids.numel())


def plot_retention(cache: KVzipCache) -> Figure:
    """Share of the context kept by every layer and head, and by layers as a whole.

    Args:
        cache (`KVzipCache`): a compressed context.

    Returns:
        A matplotlib figure: `plot_retention(cache).savefig("retention.png")`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        TypeError: no compressed cache.

    Source: section 8.4.1 (the non-uniform budget).

    Cost: a second or so; for looking at.

    Example:
        >>> from hf_dataopt import KVzipCache
        >>> cache = KVzipCache.from_context(model, tokenizer, context, keep_ratio=0.3, progress=False)
        >>> plot_retention(cache).savefig("retention.png")
    """
    shares = retention(cache)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "plot_retention") from error
    layers, heads = shares.shape
    names = cache.scored_layers
    figure = Figure(figsize=(max(0.24 * layers, 3.2) + 1.6, max(0.24 * heads, 0.8) + 2.2), layout="constrained")
    above, grid = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, max(0.24 * heads, 0.8)])
    mean = float(shares.mean())
    above.bar(range(layers), shares.mean(dim=1), width=0.8, color="0.55")
    above.axhline(mean, color="C3", linewidth=1, linestyle="--")
    above.set(ylim=(0, 1), ylabel="kept")
    above.set_title(f"{mean:.1%} of the pairs of {cache.prompt.context_ids.numel():,} tokens kept", fontsize=9)
    shown = grid.imshow(shares.T, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    step = max(round(layers / 16), 1)
    grid.set(xlabel="layer", ylabel="KV head")
    grid.set_xticks(range(0, layers, step), [str(name) for name in names[::step]])
    grid.set_yticks(range(0, heads, max(round(heads / 16), 1)))
    figure.colorbar(shown, ax=[above, grid], label="share of the context kept", fraction=0.04)
    return figure
