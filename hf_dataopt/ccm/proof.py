"""Whether a model class can carry a memory is shown, not listed: two compressed turns, in one pass and step by step.

Both forms of the method must give the same logits (Figure 7.3 against Eqs. 7.1 to 7.3). What differs is refused, with what
differed; the verdict is kept per class and settings for the process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from .._compat import (
    causal_model_of,
    chunked_attention,
    input_device,
    is_quantised,
    is_spread,
    layer_kinds,
    text_config,
)
from ..errors import UnsupportedModelError
from ..routing.verdicts import Verdicts
from ..seeding import generator
from .config import CCMConfig

# share of the logits' mean size that the two forms may differ by
_ALLOWED, _ALLOWED_HALF = {torch.float64: 1e-6, torch.float32: 1e-4}, 0.05
_KINDS = {"full", "sliding", "shared"}


@dataclass(frozen=True)
class Proof:
    """What the probe of one class and its settings found.

    Args:
        refusal: what differed, in words; None where nothing did.
        shapes: (KV heads, key width, value width) per layer of a memory.
    """

    refusal: str | None
    shapes: tuple[tuple[int, int, int], ...] = ()


VERDICTS = Verdicts("a compressed memory on")
_PROVING: ContextVar[bool] = ContextVar("hf_dataopt_ccm_proving", default=False)


def check_layers(model: Any) -> None:
    """Refuse, before anything is injected, models with layers that carry a state past the memory.

    Raises:
        UnsupportedModelError: layers without keys and values.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        return
    config = text_config(model)
    others = {kind for kind in layer_kinds(config) if kind not in _KINDS}
    if chunked_attention(config):
        raise UnsupportedModelError(
            f"a {config.model_type} model attends in fixed chunks of {config.attention_chunk_size} tokens, whose borders the "
            "memory would move"
        )
    if others:
        raise UnsupportedModelError(
            f"a {config.model_type} model has layers that see the whole context past the memory ({', '.join(sorted(others))}); "
            "a compressed context memory needs attention in every layer"
        )


def prove(model: Any, config: CCMConfig, memory: Callable[[Any], Any]) -> Proof | None:
    """Compress two turns in both forms and compare; once per class and settings.

    Args:
        model: with the adapter, PEFT-wrapped or not.
        config: settings of the active adapter.
        memory: makes an empty memory of a model.

    Returns:
        What was found; None from inside the probe, and while weights are still to come.

    Raises:
        UnsupportedModelError: the probe failed, or the logits differ, with by how much.

    Cost: four forwards over some 16 tokens, the first time.
    """
    base = causal_model_of(model)
    if _PROVING.get():
        return None
    if any(weight.device.type == "meta" for weight in base.parameters()) and not is_spread(base):
        return None
    settings = (config.memory, config.num_comp_tokens, config.sink, config.merge_weight, str(config.target_modules))

    def probe(base: Any, seed: int) -> Proof:
        token = _PROVING.set(True)
        try:
            return _probe(base, seed, config, memory)
        finally:
            _PROVING.reset(token)

    return VERDICTS.of(model, settings, probe)


def _probe(model: Any, seed: int, config: CCMConfig, memory: Callable[[Any], Any]) -> Proof:
    """What differs between one pass and step by step."""
    size = model.get_input_embeddings().weight.shape[0]
    drawn = torch.randint(size // 8, max(size // 2, size // 8 + 1), (12,), generator=generator(seed)).tolist()
    turns, question = (drawn[:5], drawn[5:8]), drawn[8:]
    comp = list(config.comp_token_ids or [])
    blocks = [sum(turns, [])] if config.memory == "gist" else turns
    row = torch.tensor(
        [[*(token for turn in blocks for token in [*turn, *comp]), *question]], device=input_device(model)
    )
    together = model(input_ids=row).logits[0, -len(question) :]
    steps = memory(model)
    for turn in turns:
        steps.append(turn)
    apart = steps.logits(question)[0]
    difference, scale = float((together - apart).double().abs().mean()), float(together.double().abs().mean())
    # quantised layers round, and some of them (LLM.int8) a row by what the others hold, in whatever dtype the logits are
    allowed = _ALLOWED_HALF if is_quantised(model) else _ALLOWED.get(together.dtype, _ALLOWED_HALF)
    if difference <= allowed * scale:
        return Proof(None, tuple((k.shape[1], k.shape[3], v.shape[3]) for k, v in steps.layers))
    return Proof(f"logits of {scale:.2g} on average differ by {difference:.2g} between one pass and step by step")
