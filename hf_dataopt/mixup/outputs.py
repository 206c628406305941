"""What a mixed training forward returns: the model's output with the mixed targets in it, and a guard over its use.

Whoever computes a loss of their own (a Trainer's `compute_loss`, a `compute_loss_func`) holds the batch's labels too, which
are those of the images before they were mixed. The guard sees, in the backward pass, a gradient that reaches the logits
although nobody has read the mixed targets, and raises instead of training on the wrong ones.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import field, is_dataclass, make_dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

_GUARDED = ("labels", "clean_loss")


class Guard:
    """What has been read of a step's output, and which parts of it a backward pass has reached."""

    def __init__(self, *, clean: bool) -> None:
        self.clean, self.read = clean, set[str]()
        self.logits_used = self.loss_used = False

    def over(self, logits: Tensor, loss: Tensor | None) -> Tensor:
        """The logits to show to the caller: the same numbers, with a view of their own in the graph."""
        shown = logits.view_as(logits)
        if logits.requires_grad:
            shown.register_hook(self._logits_reached)
            logits.register_hook(self._all_reached)  # after every way through the step's output has been followed
        if loss is not None and loss.requires_grad:
            loss.register_hook(self._loss_reached)
        return shown

    # DDP hands None, or zeros, to outputs that nobody has used; zeros are looked for only where nothing was read, as that
    # waits for the device
    def _logits_reached(self, gradient: Tensor | None) -> None:
        needed = set(_GUARDED) if self.clean else {"labels"}
        self.logits_used = gradient is not None and (self.read >= needed or bool(gradient.any()))

    def _loss_reached(self, gradient: Tensor | None) -> None:
        self.loss_used = gradient is not None and (not self.clean or bool(gradient.any()))

    def _all_reached(self, _: Tensor) -> None:
        logits, loss = self.logits_used, self.loss_used
        self.logits_used = self.loss_used = False  # a second backward pass is judged anew
        if logits and "labels" not in self.read:
            raise ValueError(
                "a loss was computed from the logits of a mixed batch without its targets: inputs['labels'], and the labels "
                "that compute_loss_func is handed, are those before mixing. Read `outputs.labels` (batch, classes) instead, "
                "or give the collator loss=. With tuple outputs there is no place for them: set config.return_dict"
            )
        if logits and self.clean and not loss and "clean_loss" not in self.read:
            raise ValueError(
                "clean_weight is set, but a loss of your own was trained without the clean term: add `outputs.clean_loss` to "
                "it (already weighted), give the collator loss= instead, or set clean_weight to 0"
            )


# where a wrapper makes the output anew (DDP does, field by field), the copy belongs to the step that has just run
_LATEST: ContextVar[Guard | None] = ContextVar("latest guard", default=None)


def with_targets(output: Any, loss: Tensor | None, targets: Tensor, clean: Tensor | None) -> Any:
    """The model's output with the step's loss and targets in place of its own.

    Args:
        output: what the model returned: a `ModelOutput`, a dict, a tuple or bare logits.
        loss: scalar for `.loss`; None keeps the model's own.
        targets: the mixed targets, for `.labels`.
        clean: weighted clean loss, which is in `loss` already, for `.clean_loss`.

    Returns:
        An output of the same kind (bare logits become a dict); tuples cannot carry targets.
    """
    guard = Guard(clean=clean is not None)
    _LATEST.set(guard)
    if isinstance(output, dict):
        own = output.get("loss") if loss is None else loss
        values = {name: value for name, value in output.items() if name != "loss"}
        values["logits"] = guard.over(output["logits"], own)
        values |= {"labels": targets} if clean is None else {"labels": targets, "clean_loss": clean}
        kind = type(output)
        return (output_class(kind) if is_dataclass(kind) else MixedDict)(loss=own, **values)
    if isinstance(output, tuple):
        return (loss, guard.over(output[0], loss), *output[1:])
    logits = guard.over(output, loss)
    return MixedDict(loss=loss, logits=logits, labels=targets, **({} if clean is None else {"clean_loss": clean}))


class _Noting:
    """Notes who reads the guarded fields."""

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)  # type: ignore[misc]

    def _note(self, key: Any) -> None:
        guard = self.__dict__.get("_guard")
        if guard is not None and isinstance(key, str) and key in _GUARDED:
            guard.read.add(key)


class MixedDict(_Noting, dict[str, Any]):
    """A plain dict with the fields of a mixed step."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.__dict__["_guard"] = _LATEST.get()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class _Field:
    """A guarded field of a dataclass: reading it as an attribute is noted."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, output: Any, _: type | None = None) -> Any:
        if output is None:  # asked of the class: the default
            return None
        output._note(self.name)
        return output.__dict__.get(self.name)

    def __set__(self, output: Any, value: Any) -> None:
        output.__dict__[self.name] = value


@lru_cache(maxsize=64)
def output_class(kind: type) -> type:
    """A subclass of a model's output class with the fields `labels` and `clean_loss`."""

    def finish(self: Any) -> None:
        kind.__post_init__(self)  # type: ignore[attr-defined]
        self.__dict__["_guard"] = _LATEST.get()

    def to_tuple(self: Any) -> tuple[Any, ...]:
        return tuple(self.values())  # transformers' own goes through [], which would count as reading

    def reduced(self: Any) -> tuple[Any, ...]:
        return _rebuilt, (kind, dict(self))

    made = make_dataclass(
        f"Mixed{kind.__name__}",
        [(name, Tensor | None, field(default=None)) for name in _GUARDED],
        bases=(_Noting, kind),
        namespace={"__post_init__": finish, "to_tuple": to_tuple, "__reduce__": reduced, "__doc__": kind.__doc__},
        eq=False,
        repr=False,
    )
    for name in _GUARDED:
        setattr(made, name, _Field(name))
    return made


def _rebuilt(kind: type, values: dict[str, Any]) -> Any:
    """A copied or pickled output is a record, with nothing left to guard."""
    output = output_class(kind)(**values)
    output.__dict__["_guard"] = None
    return output
