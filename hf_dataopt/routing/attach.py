"""`attach` and `detach`: what a prepared model has that others have not.

Its attention implementation is routed (`dispatch.RoutedName`), two hooks give each call with one of our caches a view to
write to, and `prepare_inputs_for_generation` lets the cache look at full prompts, which `generate` cuts unread. All three
are objects without a reference to the model that pickling or copying could tear apart, and none holds anything of a call.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from transformers import Cache

from .._compat import causal_model_of, decoder_of, named_arguments, takes_positions, text_config
from .cache import RoutedCache
from .dispatch import CURRENT, PENDING, route, unroute
from .layer_inputs import unwatch

_PREPARE = "prepare_inputs_for_generation"
_LOCK = threading.Lock()
# changes what was prepared for a forward: (model, full input_ids, prepared inputs)
AfterPrepare = Callable[[Any, torch.Tensor, dict[str, Any]], None]


def attach(model: Any, user: str, after_prepare: AfterPrepare | None = None) -> None:
    """Let `model` route its attention; calling it again changes nothing.

    Args:
        model: a causal language model; PEFT's and `torch.compile`'s wrappers are looked through. Calls without our caches
            and other models behave as before.
        user: who needs it, so that `detach` by one leaves it to the others.
        after_prepare: a module-level function that looks at what `generate` prepared.
    """
    base, decoder = causal_model_of(model), decoder_of(model)
    with _LOCK:
        route(decoder.config)
        for module in {id(m): m for m in (base, decoder)}.values():
            opening = _hook(module)
            if opening is None:
                opening = _Open(outermost=module is base)
                module.register_forward_pre_hook(opening, with_kwargs=True)
                module.register_forward_hook(_close, with_kwargs=True)
            opening.users.add(user)
        if hasattr(base, _PREPARE):
            checked = vars(base).get(_PREPARE)
            if not isinstance(checked, CheckedPrompts):
                checked = CheckedPrompts(base, checked)
                setattr(base, _PREPARE, checked)
            if after_prepare is not None and after_prepare not in checked.after:
                checked.after = (*checked.after, after_prepare)


def detach(model: Any, user: str, after_prepare: AfterPrepare | None = None) -> None:
    """Undo `attach` for one user; after the last one the model is as it was."""
    base, decoder = causal_model_of(model), decoder_of(model)
    checked = vars(base).get(_PREPARE)
    with _LOCK:
        if isinstance(checked, CheckedPrompts):
            checked.after = tuple(one for one in checked.after if one is not after_prepare)
        left: set[str] = set()
        for module in (base, decoder):
            opening = _hook(module)
            if opening is not None:
                opening.users.discard(user)
                left |= opening.users
        if left:
            return
        unroute(decoder.config)
        unwatch(decoder)
        for module in (base, decoder):
            for hooks, ours in (
                (module._forward_pre_hooks, lambda hook: isinstance(hook, _Open)),
                (module._forward_hooks, lambda hook: hook is _close),
            ):
                for key in [key for key, hook in hooks.items() if ours(hook)]:
                    del hooks[key]
        if isinstance(checked, CheckedPrompts):
            del vars(base)[_PREPARE]
            if checked.before is not None:
                setattr(base, _PREPARE, checked.before)


def attached(model: Any) -> bool:
    """Whether somebody attached this model."""
    return _hook(decoder_of(model)) is not None


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any], kind: type = Cache) -> Any:
    """The cache among a call's arguments, found by type: releases name the keyword differently."""
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, kind)), None)


def tokens_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Ids (B, n) int64 or embeddings (B, n, width) among a forward's arguments."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(kwargs.get(name), torch.Tensor):
            return kwargs[name]
    return args[0] if args and isinstance(args[0], torch.Tensor) else None


def replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], old: Any, new: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with `new` where `old` stands."""
    return tuple(new if a is old else a for a in args), {k: new if v is old else v for k, v in kwargs.items()}


def _hook(module: torch.nn.Module) -> _Open | None:
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Open)), None)


class _Open:
    """Before a forward: follow the user's choice of attention, and give a call with one of our caches a view of it."""

    def __init__(self, outermost: bool) -> None:
        self.users: set[str] = set()
        self._outermost = outermost

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # `set_attn_implementation` after `attach`; most configs hold no others, and the way to the text's takes 14 us
        route(text_config(module) if module.config.sub_configs else module.config)
        cache = cache_in(args, kwargs, RoutedCache)
        # whatever an interrupted call left in this thread: no layer of this one has handed out keys yet; torch.compile knows
        # no `set`, so not without need
        if PENDING.get() is not None:
            PENDING.set(None)
        if self._outermost and CURRENT.get() is not None:
            CURRENT.set(None)
        if cache is None:
            return None
        if cache.opened_by is not None:
            cache.handed_on(kwargs)
            return None
        args, kwargs = named_arguments(module, args, kwargs)
        tokens = tokens_in(args, kwargs)
        if tokens is None:
            return None
        mask, n_new = kwargs.get("attention_mask"), tokens.shape[1]
        view = cache.view(module, tokens, mask)
        if cache.counts_positions and takes_positions(module):
            positions = kwargs.get("position_ids")
            if positions is None:
                kwargs = {**kwargs, "position_ids": cache.positions(n_new, mask).to(tokens.device)}
            elif positions.shape[-1] != n_new:  # of the whole prompt
                kwargs = {**kwargs, "position_ids": positions[..., -n_new:]}
        return replaced(args, kwargs, cache, view)


def _close(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After a forward that came to its end: what was written is the cache's now."""
    view = cache_in(args, kwargs, RoutedCache)
    if view is None or view.opened_by is not module:
        return None
    origin = view.close()
    if isinstance(output, dict):
        for name in [name for name, value in output.items() if value is view]:
            output[name] = origin
        return output
    if isinstance(output, tuple):
        return tuple(origin if value is view else value for value in output)
    return output


class CheckedPrompts:
    """`prepare_inputs_for_generation` of one model, with a look by the cache at the full prompt.

    Args:
        model: whose method it stands for; held weakly, and found again by copies and unpickled models.
        before: what stood on the instance before, if anything.
    """

    def __init__(self, model: Any, before: Any = None, after: tuple[AfterPrepare, ...] = ()) -> None:
        self._model, self.before, self.after = weakref.ref(model), before, after

    @property
    def __wrapped__(self) -> Any:
        """What stood there before; transformers validates the keywords of `generate` by its signature."""
        model = self._model()
        return self.before or MethodType(getattr(type(model), _PREPARE), model)

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(args, kwargs, RoutedCache)
        if cache is not None:
            if kwargs.get("use_cache") is False:
                raise ValueError(
                    "generate(use_cache=False) would read the whole text again behind the cache at every step; leave use_cache "
                    "out, or pass no cache"
                )
            cache.prepare(input_ids, kwargs)
            if cache.counts_positions and kwargs.get("inputs_embeds") is None and takes_positions(self._model()):
                n_new = kwargs.get("next_sequence_length") or input_ids.shape[1]
                positions = cache.positions(n_new, kwargs.get("attention_mask"))
                kwargs["position_ids"] = positions.to(input_ids.device)
        inputs = self.__wrapped__(input_ids, *args, **kwargs)
        for change in self.after:
            change(self._model(), input_ids, inputs)
        return inputs

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckedPrompts:
        model = self._model()
        return CheckedPrompts(memo.get(id(model), model), copy.deepcopy(self.before, memo), self.after)

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckedPrompts, (self._model(), self.before, self.after)
