"""Verdicts of probes: whether a method is exact on a model class, found once per class and settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from .._compat import attention_name, causal_model_of, input_device, text_config
from ..errors import UnsupportedModelError
from ..versions import describe

# precisions in which rounding alone moves little; in others one mixture of experts may route another way by chance
EXACT = (torch.float32, torch.float64)
_TRIES_HALF = 4
# what a model that a method was not made for raises; running out of memory says nothing about the model
_FAILURES = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    IndexError,
    KeyError,
    AssertionError,
    ZeroDivisionError,
)


class Verdict(Protocol):
    """What a probe found."""

    @property
    def refusal(self) -> str | None:
        """What differed, in words; None where nothing did."""


Found = TypeVar("Found", bound=Verdict)


class Verdicts:
    """The verdicts of one method in this process.

    Args:
        what: the method refuses to do, for its message: `"KVzip on"`.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._kept: dict[Hashable, Any] = {}
        self._lock = threading.RLock()

    def of(self, model: Any, settings: Hashable, probe: Callable[[Any, int], Found]) -> Found:
        """The verdict on a model's class and settings; probes where there is none.

        Args:
            model: PEFT-wrapped or not.
            settings: of the method, where they matter.
            probe: (model, seed) to what was found. Run without gradients and dropout, in half precision with up to four
                seeds: what is wrong is wrong every time.

        Returns:
            What was found.

        Raises:
            UnsupportedModelError: the probe failed, or found a difference. It may lie in these weights or this moment, not in
                the class: what is remembered is that a class passed, and the next model is probed again.
        """
        base = causal_model_of(model)
        name, kind = str(attention_name(base.config)), input_device(base).type
        key = (type(base), base.config.to_json_string(use_diff=False), name, base.dtype, kind, settings)
        with self._lock:
            if key in self._kept:
                return self._kept[key]
            with evaluating(base), torch.no_grad():
                found = self._probe(base, probe)
            if found.refusal is None:
                self._kept[key] = found
                return found
        raise UnsupportedModelError(
            f"{self._on(base)} would not be exact: {found.refusal}. Use a plain cache ({describe()})"
        )

    def _on(self, base: Any) -> str:
        return f"{self.what} {type(base).__name__} ({text_config(base).model_type})"

    def _probe(self, base: Any, probe: Callable[[Any, int], Found]) -> Found:
        for seed in range(1 if base.dtype in EXACT else _TRIES_HALF):
            try:
                found = probe(base, seed)
            except torch.OutOfMemoryError:
                raise
            except _FAILURES as error:
                raise UnsupportedModelError(
                    f"{self._on(base)} failed on a probe of a few tokens: {type(error).__name__}: {error}. Use a plain cache "
                    f"({describe()})"
                ) from error
            if found.refusal is None:
                break
        return found

    def forget(self) -> None:
        """Forget every verdict."""
        self._kept.clear()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout in here; every module's mode is afterwards what it was. Modules in evaluation mode are not touched."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
