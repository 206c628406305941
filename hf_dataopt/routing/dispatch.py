"""One attention function per implementation that hands on to it, unless this call's own data says otherwise.

A model that was attached has its `config._attn_implementation` set once, to a name that reads as the user's choice and is
looked up as ours (`RoutedName`). What a call carries travels with the call alone: keys that one of our cache layers handed
out are tagged with that layer, and everything else stands in a ContextVar. Nothing of a call is written on the model.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from .._compat import attention_name, attention_of, mask_of, plain_causal, set_attention

_TAG = "_hf_dataopt_layer"


class RoutedName(str):
    """`"sdpa"` to whoever reads, compares or saves it; our dispatcher to the tables of attention functions.

    transformers looks attention and mask functions up in dicts by `config._attn_implementation`, and modeling files, users
    and `set_attn_implementation` compare the same string. It equals the user's choice and has another hash: comparisons
    find the choice, dicts find the entry that has this very name for its key.
    """

    _hash: int

    def __new__(cls, plain: str) -> RoutedName:
        """The name that stands for implementation `plain`; take `routed(plain)`, which enters it."""
        self = super().__new__(cls, plain)
        self._hash = hash(("hf_dataopt", plain))
        return self

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # a process that unpickles a model needs the entry before the model's first forward
        return routed, (str(self),)


class AttentionCall(Protocol):
    """What one forward changes about attention where no cache layer answers."""

    @property
    def config(self) -> Any:
        """Of the decoder whose attention it concerns."""

    def mask(self, plain: Callable[..., Any] | None, name: str, **kwargs: Any) -> Any:
        """The mask of this call for implementation `name`; arguments as transformers gives them to mask functions."""

    def attention(self, plain: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        """Attention of this call; arguments as transformers gives them to attention functions."""


CURRENT: ContextVar[AttentionCall | None] = ContextVar("hf_dataopt_attention_call", default=None)
# (weak reference to a layer, index) whose keys a cache handed out last; reset at the start of every call
PENDING: ContextVar[tuple[weakref.ref[Any], int] | None] = ContextVar("hf_dataopt_pending_layer", default=None)
_MASKLESS: ContextVar[bool] = ContextVar("hf_dataopt_maskless", default=False)


@functools.cache
def routed(plain: str) -> RoutedName:
    """The one name under which calls of implementation `plain` pass our dispatcher, entered into transformers' tables."""
    name = RoutedName(plain)
    # a dispatcher without a mask function would be handed no mask at all; the name itself is the key: found by identity
    AttentionMaskInterface.register(name, functools.partial(_mask, plain))
    AttentionInterface.register(name, functools.partial(_attention, plain))
    return name


def route(config: Any) -> None:
    """Send the attention of every model that reads `config` through the dispatcher; later calls change nothing."""
    name = attention_name(config)
    if not isinstance(name, RoutedName):
        set_attention(config, routed(name or "eager"))


def unroute(config: Any) -> None:
    """Undo `route`: the user's choice again, as a plain string."""
    name = attention_name(config)
    if isinstance(name, RoutedName):
        set_attention(config, str(name))


def tag(key: torch.Tensor, layer: Any) -> torch.Tensor:
    """Mark the keys that a cache layer hands to the model: attention over them is the layer's to answer.

    Args:
        key: (B, KV heads, n, d).
        layer: with a method `attend(query, key, value, mask, scale, expanded, **kwargs)`; `expanded` is True where the model
            made other keys and values out of those it was handed (MLA expands latents).

    Returns:
        An alias of the tensor: the layer may hold the tensor itself, and would hold itself through a tag on it.
        `layer.waiting` is True until the dispatcher has seen the alias.
    """
    key = key.view_as(key)
    setattr(key, _TAG, layer)
    layer.waiting = True
    return key


@contextmanager
def maskless() -> Iterator[None]:
    """Build no causal masks in here: the calls within are ours, unpadded, and every global layer answers by itself."""
    token = _MASKLESS.set(True)
    try:
        yield
    finally:
        _MASKLESS.reset(token)


def _attention(
    plain: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The registered attention function: query (B, H, q, d) in, (B, q, H, d) out."""
    layer = getattr(key, _TAG, None)
    expanded = layer is None
    if expanded:
        layer = _pending(module)
    if layer is not None:
        layer.waiting = False
        scaling = kwargs.pop("scaling", None)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = layer.attend(query, key, value, attention_mask, scale, expanded, **kwargs)
        return output.transpose(1, 2).contiguous(), None
    function = attention_of(plain, module)
    call = CURRENT.get()
    if call is not None and getattr(module, "config", call.config) is call.config:
        return call.attention(function, plain, module, query, key, value, attention_mask, **kwargs)
    return function(module, query, key, value, attention_mask, **kwargs)


def _pending(module: Any) -> Any:
    """The cache layer that this attention module updated and that nobody has answered for yet."""
    pending = PENDING.get()
    if pending is None or getattr(module, "layer_idx", None) != pending[1]:
        return None
    layer = pending[0]()
    return layer if layer is not None and layer.waiting else None


def _mask(plain: str, **kwargs: Any) -> Any:
    """The registered mask function."""
    if _MASKLESS.get() and plain_causal(**kwargs):
        return None
    function, call = mask_of(plain), CURRENT.get()
    if call is not None and kwargs.get("config", call.config) is call.config:
        return call.mask(function, plain, **kwargs)
    return None if function is None else function(**kwargs)
