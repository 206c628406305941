"""What the modules of a decoder are given, for whoever asks within one call: nothing of a call is written on the model.

Every module that carries a layer's number gets one hook, and one more behind it where outputs are asked for. It tells the
listener of its own call, which stands in a ContextVar, and does nothing where there is none.
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
        self._latest: tuple[Any, torch.Tensor] | None = None
        self.module: Any = None  # the one whose input was taken last
        self.outputs: dict[Any, torch.Tensor] | None = None  # by module, once somebody puts a dict here

    def tell(self, module: Any, given: torch.Tensor) -> None:
        """Remember what a module is given; the innermost one of a layer, the attention itself, is told last."""
        self._latest = module, given

    def take(self, layer: int) -> torch.Tensor | None:
        """What the module that updates the cache of this layer was given, (B, n, width); None where none was seen."""
        latest, self._latest = self._latest, None
        if latest is None or latest[0].layer_idx != layer:
            return None
        self.module = latest[0]
        return latest[1]


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
            listener.tell(module, given)


class _TellOutput:
    """After a module's forward: keep what it gives for the listener of this call, if that one keeps outputs."""

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        listener = _LISTENER.get()
        if listener is None or listener.outputs is None:
            return
        given = output[0] if isinstance(output, tuple) else output
        if isinstance(given, torch.Tensor):
            listener.outputs[module] = given


@contextmanager
def listening() -> Iterator[LayerInputs]:
    """Hear of every watched module's input in here, of calls in this thread alone."""
    listener = LayerInputs()
    token = _LISTENER.set(listener)
    try:
        yield listener
    finally:
        _LISTENER.reset(token)


def listen() -> LayerInputs:
    """Hear of every watched module's input from now on, in this thread, until `deaf`."""
    listener = LayerInputs()
    _LISTENER.set(listener)
    return listener


def deaf() -> None:
    """Hear nothing any more, whoever listened in this thread."""
    if _LISTENER.get() is not None:
        _LISTENER.set(None)


def watch(decoder: torch.nn.Module, *more: torch.nn.Module, outputs: bool = False) -> None:
    """Put the hook on every module with a `layer_idx`; calling it again changes nothing.

    Args:
        decoder: whose modules are watched.
        more: modules without a number whose outputs are asked for.
        outputs: put the hook for outputs on too.
    """
    with _LOCK:
        numbered = [one for one in decoder.modules() if isinstance(getattr(one, "layer_idx", None), int)]
        for module in numbered:
            if not _hooks(module._forward_pre_hooks):
                module.register_forward_pre_hook(_Tell(), with_kwargs=True)
        for module in (*numbered, *more) if outputs else ():
            if not _hooks(module._forward_hooks):
                module.register_forward_hook(_TellOutput())


def unwatch(decoder: torch.nn.Module) -> None:
    """Undo `watch`."""
    for module in decoder.modules():
        hooked: tuple[Any, ...] = (module._forward_pre_hooks, module._forward_hooks)
        for hooks in hooked:
            for key in _hooks(hooks):
                del hooks[key]


def _hooks(hooks: Any) -> list[int]:
    return [key for key, hook in hooks.items() if isinstance(hook, _Tell | _TellOutput)]
