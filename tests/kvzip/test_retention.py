"""The picture of what stayed shows the shares of the stored lengths."""

from __future__ import annotations

import sys

import pytest
import torch

from hf_dataopt import KVzipCache, KVzipConfig, plot_retention
from hf_dataopt.errors import MissingExtraError
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.retention import retention

from ..models import byte_tokenizer, tiny_model


def _cache() -> tuple[KVzipCache, torch.Tensor]:
    """A cache whose kept pairs are known: head h of layer l keeps the first l + 2 h + 1 tokens of the context."""
    model, tokenizer = tiny_model("llama", num_hidden_layers=3), byte_tokenizer()
    prefilled = prefill(model, build_prompt(tokenizer, "The key is blue and red.", KVzipConfig()), progress=False)
    heads, n = prefilled.cache.layers[0].keys.shape[1], prefilled.n_context
    kept = torch.tensor([[layer + 2 * head + 1 for head in range(heads)] for layer in range(3)])
    scores = (torch.arange(n) < kept[..., None]).float()
    ratio = (kept.sum() + 0.5) / (3 * heads * n)
    return KVzipCache.from_scores(prefilled, scores, KVzipConfig(keep_ratio=float(ratio))), kept / n


def test_shares_leave_out_the_prompt() -> None:
    cache, shares = _cache()
    torch.testing.assert_close(retention(cache), shares)


def test_picture_shows_the_shares() -> None:
    pytest.importorskip("matplotlib")
    cache, shares = _cache()
    above, grid = plot_retention(cache).axes[:2]
    torch.testing.assert_close(torch.tensor(grid.images[0].get_array().data), shares.T)
    heights = [bar.get_height() for bar in above.patches]
    torch.testing.assert_close(torch.tensor(heights, dtype=torch.float32), shares.mean(1))
    assert f"{float(shares.mean()):.1%}" in above.get_title()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="from_context"):
        plot_retention("cache")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="plots"):
        plot_retention(_cache()[0])
