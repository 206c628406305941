"""Whether a model class can be compressed is shown, not listed: a probe of a few tokens on its first use.

A cache that evicts nothing must give what the plain cache gives. What differs is refused, with what differed; the verdict is
kept per class and settings for the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from .._compat import cache_keyword, input_device, linear_states, text_config
from ..routing.attach import detach
from ..routing.cache import RoutedCache
from ..routing.verdicts import Verdicts
from ..seeding import generator
from .config import KVzipConfig
from .layers import compressed_layers
from .prompt import KVzipPrompt
from .reading import PrefilledContext, check_supported, positions, read_context
from .scoring import score_context

_CONTEXT, _QUESTION = 14, 4
# share of the logits' mean size that they may move, and how much more where the model's own rounding moves them
_ALLOWED = {torch.float64: (1e-7, 1e-4), torch.float32: (1e-4, 1e-2)}
_ALLOWED_HALF = (0.02, 0.25)


@dataclass(frozen=True)
class Proof:
    """What the probe of one class and its settings found.

    Args:
        refusal: what differed, in words; None where nothing did.
        shapes: (heads, key width, value width) per layer that caches keys.
        latent: see `PrefilledContext`.
        states: shape of each state by name, per layer that keeps states instead of keys.
    """

    refusal: str | None
    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    latent: bool = False
    states: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict)


VERDICTS = Verdicts("KVzip on")
_PROBE = "kvzip probe"  # of `routing.attach`


def prove(model: Any) -> Proof:
    """Compress a few tokens without evicting any, and compare with plain attention; once per class and settings.

    Args:
        model: a causal language model.

    Returns:
        What was found.

    Raises:
        UnsupportedModelError: the model has nothing to evict, the probe failed, or logits differ, with by how much.

    Cost: eleven forwards of at most 18 tokens, the first time.
    """
    check_supported(model)
    return VERDICTS.of(model, None, _probe)


def _probe(model: Any, seed: int) -> Proof:
    """Compare logits behind a cache that evicts nothing with those of one forward over everything."""
    ids, name = _ids(model, seed), cache_keyword(model.forward)
    question = ids[:, -_QUESTION:]

    def run(part: torch.Tensor, start: int, cache: Any = None) -> torch.Tensor:
        held = {} if cache is None else {"use_cache": True, name: cache}
        return model(part, **held, **positions(model, start, part))[0]

    try:
        expected = run(ids, 0)[:, -_QUESTION:]
        plain = DynamicCache(config=text_config(model))
        run(ids[:, :-_QUESTION], 0, plain)
        # token by token, so that no mask is built for a probe
        steps = [run(one, _CONTEXT + i, plain) for i, one in enumerate(question.split(1, dim=1))]
        cache, prefilled = _compressed(model, ids)
        found = run(question, _CONTEXT, cache)
        with _rounded_otherwise(model, seed):
            moved = run(ids, 0)[:, -_QUESTION:]
    finally:
        detach(model, _PROBE)
    difference, size = _mean(found - expected), _mean(expected)
    # a GPU's kernels may give the same bits step by step; what another order of sums moves shows in the second
    noise = max(_mean(torch.cat(steps, dim=1) - expected), _mean(moved - expected))
    least, most = _ALLOWED.get(expected.dtype, _ALLOWED_HALF)
    if difference <= max(least * size, min(4 * noise, most * size)):
        return Proof(None, _shapes(prefilled), prefilled.latent, _states(prefilled))
    return Proof(
        f"logits of {size:.2g} on average move by {difference:.2g}, the model's own by {noise:.2g} from rounding"
    )


@contextmanager
def _rounded_otherwise(model: Any, seed: int) -> Iterator[None]:
    """Each number of the embedded tokens moved by one unit of its precision: every rounding behind them falls anew."""

    def moved(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        sign = 2 * torch.randint(2, output.shape, generator=generator(seed)) - 1
        return output * (1 + torch.finfo(output.dtype).eps * sign.to(output))

    hook = model.get_input_embeddings().register_forward_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def _compressed(model: Any, ids: torch.Tensor) -> tuple[RoutedCache, PrefilledContext]:
    context, words = ids[0, :-_QUESTION].cpu(), ids[0, :1].cpu()
    prompt = KVzipPrompt(context[:2], context[2:], words, words, words)
    config = KVzipConfig(prefill_chunk_size=_CONTEXT // 2, chunk_size=_CONTEXT // 2, overlap=1, replay="exact")
    prefilled = read_context(model, prompt, config, user=_PROBE, progress=False)
    scores = score_context(prefilled, config, user=_PROBE, progress=False)
    everything = torch.ones(*scores.shape[:2], _CONTEXT, dtype=torch.bool)
    return RoutedCache(compressed_layers(prefilled, everything)), prefilled


def _shapes(prefilled: PrefilledContext) -> dict[int, tuple[int, int, int]]:
    layers: list[Any] = prefilled.cache.layers
    found = {}
    for index, layer in enumerate(layers):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor):
            found[index] = (keys.shape[1], keys.shape[3], layer.values.shape[3])
    return found


def _states(prefilled: PrefilledContext) -> dict[int, dict[str, tuple[int, ...]]]:
    found = {index: linear_states(layer) for index, layer in enumerate(prefilled.cache.layers)}
    return {index: {name: tuple(one.shape) for name, one in states.items()} for index, states in found.items()}


def _ids(model: Any, seed: int) -> torch.Tensor:
    """Ordinary tokens: no image placeholders or other ids that the settings name."""
    named: set[int] = set()
    for config in (model.config, text_config(model)):
        for key, value in config.to_dict().items():
            if "token" in key and not isinstance(value, dict):
                named |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    size = model.get_input_embeddings().weight.shape[0]
    usable = torch.tensor([token for token in range(min(size, 4096)) if token not in named])
    picked = torch.randint(len(usable), (_CONTEXT + _QUESTION,), generator=generator(seed))
    return usable[picked][None].to(input_device(model))


def _mean(tensor: torch.Tensor) -> float:
    return float(tensor.double().abs().mean())
