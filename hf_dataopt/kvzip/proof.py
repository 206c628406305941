"""Whether a model class can be compressed is shown, not listed: a probe of a few tokens on its first use.

A cache that evicts nothing must give what the plain cache gives. What differs is refused, with what differed; the verdict is
kept per class and settings for the process.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import DynamicCache

from .._compat import cache_keyword, causal_model_of, input_device, text_config
from ..errors import UnsupportedModelError
from ..routing.attach import attached, detach
from ..seeding import generator
from ..versions import describe
from .config import KVzipConfig
from .prompt import KVzipPrompt
from .scoring import USER, check_supported, read_context, score_context

_CONTEXT, _QUESTION = 14, 4
# share of the logits' mean size that rounding may move them; half precision rounds at 1/256
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.02

_VERDICTS: dict[Any, str | None] = {}
_LOCK = threading.RLock()


def prove(model: Any) -> None:
    """Compress a few tokens without evicting any, and compare with the plain cache; once per class and settings.

    Args:
        model: a causal language model.

    Raises:
        UnsupportedModelError: the model has nothing to evict, or its logits differ, with by how much.

    Cost: six forwards of at most 18 tokens, the first time.
    """
    check_supported(model)
    base = causal_model_of(model)
    key = (type(base), base.config.to_json_string(use_diff=False), str(base.config._attn_implementation), base.dtype)
    with _LOCK:
        if key not in _VERDICTS:
            _VERDICTS[key] = probe(base)
        verdict = _VERDICTS[key]
    if verdict is not None:
        raise UnsupportedModelError(
            f"KVzip on {type(base).__name__} ({text_config(base).model_type}) is not exact here: {verdict}. Use a plain cache "
            f"({describe()})"
        )


@torch.no_grad()
def probe(model: Any) -> str | None:
    """What differs between a cache that evicts nothing and the plain cache, in words; None where nothing does."""
    was_attached = attached(model)
    ids = _ids(model)
    name = cache_keyword(model.forward)
    question = ids[:, -_QUESTION:]
    try:
        whole = model(ids)[0][:, -_QUESTION:]
        plain = DynamicCache(config=text_config(model))
        model(ids[:, :-_QUESTION], use_cache=True, **{name: plain})
        expected = model(question, use_cache=True, **{name: plain})[0]
        found = model(question, use_cache=True, **{name: _compressed(model, ids)})[0]
    except torch.OutOfMemoryError:
        raise  # says nothing about the model
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        if not was_attached:
            detach(model, USER)
        return f"{type(error).__name__}: {error}"
    difference, noise, size = _mean(found - expected), _mean(whole - expected), _mean(expected)
    allowed = max(_TOLERANCE.get(expected.dtype, _HALF_TOLERANCE) * size, 4 * noise)
    if difference <= allowed:
        return None
    if not was_attached:
        detach(model, USER)
    return f"logits of {size:.2g} on average move by {difference:.2g} (rounding explains {allowed:.1g})"


def _compressed(model: Any, ids: torch.Tensor) -> Any:
    from .cache import KVzipCache

    context, words = ids[0, :-_QUESTION].cpu(), ids[0, :1].cpu()
    prompt = KVzipPrompt(context[:2], context[2:], words, words, words)
    config = KVzipConfig(keep_ratio=1.0, prefill_chunk_size=_CONTEXT // 2, chunk_size=_CONTEXT // 2, overlap=1)
    prefilled = read_context(model, prompt, config, progress=False)
    return KVzipCache.from_scores(prefilled, score_context(prefilled, config, progress=False), config)


def _ids(model: Any) -> torch.Tensor:
    """Ordinary tokens: no image placeholders or other ids that the settings name."""
    named: set[int] = set()
    for config in (model.config, text_config(model)):
        for key, value in config.to_dict().items():
            if "token" in key and not isinstance(value, dict):
                named |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    size = model.get_input_embeddings().weight.shape[0]
    usable = torch.tensor([token for token in range(min(size, 4096)) if token not in named])
    picked = torch.randint(len(usable), (_CONTEXT + _QUESTION,), generator=generator(0))
    return usable[picked][None].to(input_device(model))


def _mean(tensor: torch.Tensor) -> float:
    return float(tensor.double().abs().mean())
