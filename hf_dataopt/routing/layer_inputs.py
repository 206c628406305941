"""What the modules of a decoder are given, for whoever asks within one call: nothing of a call is written on the model.

Every module that carries a layer's number gets one hook. It tells the listener of its own call, which stands in a ContextVar,
and does nothing where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch

_LOCK = Lock()


class LayerInputs:
    """The hidden states that a module was given last, until somebody takes them."""

    def __init__(self) -> None:
        self._latest: tuple[int, torch.Tensor] | None = None

    def tell(self, layer: int, given: torch.Tensor) -> None:
        """Remember what a module of this layer is given; the innermost one, the attention itself, is told last."""
        self._latest = layer, given

    def take(self, layer: int) -> torch.Tensor | None:
        """What the module that updates the cache of this layer was given, (B, n, width); None where none was seen."""
        latest, self._latest = self._latest, None
        return latest[1] if latest is not None and latest[0] == layer else None


_LISTENER: ContextVar[LayerInputs | None] = ContextVar("hf_dataopt_layer_inputs", default=None)


class _Tell:
    """Before a module's forward: tell the listener of this call, if there is one, what it is given."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        listener = _LISTENER.get()
        if listener is None:
            return
        given = kwargs.get("hidden_states")
        if given is None:
            given = next((one for one in args if isinstance(one, torch.Tensor)), None)
        if isinstance(given, torch.Tensor) and given.ndim == 3:
            listener.tell(module.layer_idx, given)


@contextmanager
def listening() -> Iterator[LayerInputs]:
    """Hear of every watched module's input in here, of calls in this thread alone."""
    listener = LayerInputs()
    token = _LISTENER.set(listener)
    try:
        yield listener
    finally:
        _LISTENER.reset(token)


def watch(decoder: torch.nn.Module) -> None:
    """Put the hook on every module with a `layer_idx`; calling it again changes nothing."""
    with _LOCK:
        for module in decoder.modules():
            if isinstance(getattr(module, "layer_idx", None), int) and not _hooks(module):
                module.register_forward_pre_hook(_Tell(), with_kwargs=True)


def unwatch(decoder: torch.nn.Module) -> None:
    """Undo `watch`."""
    for module in decoder.modules():
        for key in _hooks(module):
            del module._forward_pre_hooks[key]


def _hooks(module: torch.nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Tell)]
