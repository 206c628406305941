"""The tables in which transformers looks attention and mask functions up."""

from __future__ import annotations

import functools
import sys
from typing import Any


def set_attention(config: Any, name: str | None) -> None:
    """Set one config's attention implementation.

    `set_attn_implementation` is the public way, but it validates names and touches every sub-model, and so does the property
    `_attn_implementation`; this is what it stores, and what modeling files read at every call.
    """
    config._attn_implementation_internal = name


def attention_name(config: Any) -> Any:
    """One config's attention implementation; None where a model chooses. There is no public way to read it."""
    return config._attn_implementation


def attention_of(name: str, module: Any) -> Any:
    """transformers' attention function of an implementation for one attention module.

    Eager attention stands in no table: every modeling file has its own and passes it as the default of a look-up.
    """
    # the tables behind `ALL_ATTENTION_FUNCTIONS.get`, which takes three times as long, in every layer of every token
    local, shared = _attention_tables()
    kind: Any = type(module)
    found = local.get(name) or shared.get(name) or (_eager_of(kind) if name == "eager" else None)
    if found is None:
        raise ValueError(
            f"no attention function {name!r} for {type(module).__name__}; use set_attn_implementation('sdpa')"
        )
    return found


def _attention_tables() -> tuple[dict[str, Any], dict[str, Any]]:
    tables = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS  # an import takes 20 microseconds
    return tables._local_mapping, tables._global_mapping


@functools.cache
def _eager_of(kind: Any) -> Any:
    files = (sys.modules.get(parent.__module__) for parent in kind.__mro__)
    return next((found for file in files if (found := getattr(file, "eager_attention_forward", None))), None)


def mask_of(name: str) -> Any | None:
    """transformers' mask function of an implementation, None where it wants no masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS.get(name)


def plain_causal(mask_function: Any = None, local_size: int | None = None, **kwargs: Any) -> bool:
    """Whether mask arguments ask for causality alone: no window, no blocks, no bidirectional image tokens."""
    from transformers.masking_utils import causal_mask_function

    return local_size is None and mask_function is causal_mask_function
