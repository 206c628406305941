"""What a cache of transformers is called and what its layers hold."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from .models import text_config

# the keyword under which a cache is passed: 5.24 renamed it in every forward and in `generate`
CACHE_NAMES = ("past_key_values", "cache")


def cache_keyword(function: Any = None) -> str:
    """The keyword under which a forward takes its cache, read from its signature.

    Args:
        function: a model's `forward`; by default what the installed release's `generate` wants.
    """
    release = _release_cache_keyword()
    if function is None:
        return release
    names = inspect.signature(function).parameters
    return release if release in names else next((name for name in CACHE_NAMES if name in names), release)


@functools.cache
def _release_cache_keyword() -> str:
    from transformers import GenerationMixin

    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in names)


def layer_kinds(config: Any) -> list[str]:
    """`"full"`, `"sliding"`, `"linear"` or `"shared"` (keys of another layer) per layer, else the cache layer's class name.

    Asked of the cache that transformers itself would build, since configs spell layer types in several ways.
    """
    from transformers import cache_utils
    from transformers.cache_utils import DynamicCache

    kinds = {"DynamicLayer": "full", "DynamicSlidingWindowLayer": "sliding", "LinearAttentionLayer": "linear"}
    names = {getattr(cache_utils, name, None): kind for name, kind in (kinds | {"DummyLayer": "shared"}).items()}
    return [names.get(type(layer), type(layer).__name__) for layer in DynamicCache(config=config).layers]


def window_of(model: Any, index: int) -> int | None:
    """Sliding window of layer `index`, as the cache that transformers would build has it."""
    from transformers import DynamicCache

    return getattr(DynamicCache(config=text_config(model)).layers[index], "sliding_window", None)


def copied_layer(layer: Any) -> Any:
    """A cache layer of its own over the same tensors; states that transformers writes into in place are copied."""
    other = object.__new__(type(layer))
    other.__dict__.update(layer.__dict__)
    for name in ("conv_states", "recurrent_states"):  # of linear-attention layers
        states = layer.__dict__.get(name)
        if isinstance(states, dict):
            other.__dict__[name] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in states.items()}
    for name in (
        "is_conv_states_initialized",
        "is_recurrent_states_initialized",
        "has_previous_state",
        "conv_kernel_size",
    ):
        if isinstance(layer.__dict__.get(name), dict):
            other.__dict__[name] = dict(layer.__dict__[name])
    return other


def layer_tensors(layer: Any) -> list[torch.Tensor]:
    """What a cache layer holds: keys and values, or the states of a linear-attention layer; nothing for layers that share."""
    found = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        found += list(states.values()) if isinstance(states, dict) else []
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def has_states(layer: Any) -> bool:
    """Whether a cache layer carries states of linear attention, which every token changes."""
    return isinstance(getattr(layer, "conv_states", None), dict)


def expand_states(layer: Any, batch: int) -> None:
    """Repeat the states of one row for every row of a batch."""
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        for i, state in states.items():
            if isinstance(state, torch.Tensor) and state.shape[0] == 1 < batch:
                states[i] = state.repeat_interleave(batch, dim=0)


def linear_states(layer: Any) -> dict[str, torch.Tensor]:
    """States of a linear-attention layer by name, for a file; none for layers that share keys."""
    return {
        f"{kind}.{i}": state
        for kind in ("conv_states", "recurrent_states")
        for i, state in (getattr(layer, kind, None) or {}).items()
        if isinstance(state, torch.Tensor)
    }


def linear_layer(model: Any, index: int, states: dict[str, torch.Tensor]) -> Any:
    """The cache layer that transformers makes for layer `index` of a model, with `linear_states` put back.

    Raises:
        ValueError: states that such a layer does not have.
    """
    from transformers import DynamicCache

    layer: Any = DynamicCache(config=text_config(model)).layers[index]
    for name, state in states.items():
        kind, _, number = name.partition(".")
        if kind not in ("conv_states", "recurrent_states") or not number.isdecimal() or not hasattr(layer, kind):
            raise ValueError(f"layer {index} has no state {name!r:.80}")
        i = int(number)
        if i not in getattr(layer, kind):
            raise ValueError(f"layer {index} has no state {name!r:.80}")
        layer.lazy_initialization(**{kind: state, "state_idx": i})
        getattr(layer, kind)[i].copy_(state)
        layer.has_previous_state[i] = True
    return layer
