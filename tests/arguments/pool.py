"""Objects that do not belong into an argument, and kinds of arguments that say which of them may pass."""

from __future__ import annotations

import datetime
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import nn

Make = Callable[[], Any]


def _recursive() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(5000):
        found = [found]
    return found


def _stream() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter([{"x": 1}]))


_PLAIN: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 10**30, 10**5000),
    *(float("nan"), float("inf"), float("-inf"), 2.5, 3.0, -0.5, 1e308, 1e-320, 1j, Decimal("NaN"), Fraction(1, 2)),
    *("", " ", "3", "nan", "nonsense", "a\0b", "\ud800", "../..", "x" * 3_000, b"3", datetime.date(2020, 1, 1)),
    *((), (1, 2), {"a": 1}, {}, frozenset({1}), range(3), int, dict, print, ValueError("x"), Path("nowhere")),
    *(np.True_, np.int64(3), np.int8(-1), np.float32(0.5), np.float64("nan"), np.str_("a"), np.datetime64("2020")),
)
_MADE: tuple[Make, ...] = (
    list,
    object,
    lambda: [1, 2],
    lambda: [-1],
    lambda: [True, False],
    lambda: ["a", "b"],
    lambda: [["a"], [1, 2]],
    lambda: [None],
    lambda: [{"role": "user"}],
    _recursive,
    _deep,
    lambda: (n for n in range(3)),
    lambda: lambda *_: None,
    lambda: np.zeros((2, 2)),
    lambda: np.zeros(0),
    lambda: np.array(["a"]),
    lambda: np.array([None, 1], dtype=object),
    lambda: np.array(3),
    lambda: torch.tensor(3),
    lambda: torch.tensor(float("nan")),
    lambda: torch.tensor(True),
    lambda: torch.zeros(0),
    lambda: torch.ones(2, 3),
    lambda: torch.full((2, 2), float("nan")),
    lambda: torch.ones(2, dtype=torch.complex64),
    lambda: torch.eye(2).to_sparse(),
    lambda: torch.ones(2, 2, device="meta"),
    lambda: torch.arange(4),
    lambda: nn.Linear(2, 2),
    torch.Generator,
    lambda: Dataset.from_dict({"x": [1, 2]}),
    _stream,
)
UNIVERSAL: tuple[Make, ...] = (*((lambda value=value: value) for value in _PLAIN), *_MADE)


@dataclass(frozen=True)
class Kind:
    """What belongs into an argument.

    Args:
        takes: True where a value may pass, False where it must be refused, None where either will do.
        bad: more values, near to good ones, that `takes` is asked about too.
        calls: False draws nothing that can be called: what somebody else's function does is not ours.
    """

    takes: Callable[[Any], bool | None]
    bad: Sequence[Make] = ()
    calls: bool = True

    def draw(self, random_: random.Random) -> Any:
        """One object, half of them from those that look nearly right."""
        pool = self.bad if self.bad and random_.random() < 0.5 else UNIVERSAL
        while callable(found := random_.choice(pool)()) and not self.calls:
            pass
        return found

    def __or__(self, other: Kind) -> Kind:
        def takes(value: Any) -> bool | None:
            found = self.takes(value), other.takes(value)
            return True if True in found else None if None in found else False

        return Kind(takes, (*self.bad, *other.bad), self.calls and other.calls)


def _item(value: Any) -> Any:
    found = isinstance(value, np.generic | np.ndarray | torch.Tensor) and value.shape == () and value.device != _META
    return value.item() if found else value


_META = torch.device("meta")


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Kind:
    """A finite number of a range."""

    def takes(value: Any) -> bool:
        value = _item(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return False
        return not (above and value == low) and not (below and value == high)

    near = [low - 1e-3, low - 1, high + 1e-3 if abs(high) < 1e9 else float("inf"), float("nan"), str(high)]
    return Kind(takes, [*((lambda v=v: v) for v in near), lambda: np.float64(low - 1), lambda: torch.tensor(low - 1.0)])


def count(least: int, most: int = 2**31 - 1) -> Kind:
    """A whole number of a range."""

    def takes(value: Any) -> bool:
        value = _item(value)
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    near = [least - 1, float(least), str(least), most + 1, least + 0.5, np.float32(least), np.int64(least - 1)]
    return Kind(takes, [lambda v=v: v for v in near])


FLAG = Kind(lambda value: isinstance(_item(value), bool), [lambda: 0, lambda: 1, lambda: "True", lambda: "False"])
NONE = Kind(lambda value: value is None)
ANY = Kind(lambda value: None)
NEVER = Kind(lambda value: False)
TEXT = Kind(lambda value: isinstance(value, str))
WORDS = Kind(lambda value: None if isinstance(value, str) else False)  # a text that may be refused for what it says


def choice(*words: str) -> Kind:
    """One of a few words."""
    near: list[Any] = [words[0].upper(), words[0] + " ", words[0].encode(), [words[0]], np.array(words[0]), None]
    return Kind(lambda value: isinstance(value, str) and value in words, [lambda v=v: v for v in near])


PATH = Kind(lambda value: None if isinstance(value, str | Path) else False, [lambda: b"folder", lambda: ["folder"]])


UNCALLED = Kind(lambda value: False, calls=False)
CALLABLE = Kind(lambda value: None if callable(value) else False)


def instance(*kinds: type, near: Sequence[Make] = ()) -> Kind:
    """An object of a class; another one of it may pass or not."""
    return Kind(lambda value: None if isinstance(value, kinds) else False, near)


def like(
    make: Callable[[], torch.Tensor], *, more: Sequence[Make] = (), loose: bool = False, whole: bool = False
) -> Kind:
    """A tensor like a good one: its shape and kind of numbers; where `loose` other sizes too, where `whole` integers too."""
    good = make()

    def takes(value: Any) -> bool | None:
        if not isinstance(value, torch.Tensor) or value.is_sparse or value.device == _META:
            return False
        if value.is_complex() or value.dtype == torch.bool:
            return False
        same = whole or value.is_floating_point() == good.is_floating_point()
        if not same or value.ndim != good.ndim or 0 in value.shape:
            return False
        return None if loose or value.shape == good.shape else False

    odd = [
        lambda: make()[None],
        lambda: make()[0],
        lambda: make()[:0],
        lambda: make().numpy(),
        lambda: make().tolist(),
        lambda: make().to(torch.complex64),
        lambda: make() > 0,
        lambda: make().to_sparse(),
        lambda: make().to("meta"),
        lambda: make().long() if good.is_floating_point() else make().float(),
    ]
    if not loose:
        odd += [lambda: make().repeat(2, *[1] * (good.ndim - 1)), lambda: make().repeat(*[1] * (good.ndim - 1), 2)]
    return Kind(takes, [*odd, *more])


def spoiled(make: Callable[[], torch.Tensor], *values: float) -> list[Make]:
    """Copies of a tensor with one entry that must not be there."""

    def copy(value: float) -> torch.Tensor:
        found = make().clone()
        found.view(-1)[0] = value
        return found

    return [lambda value=value: copy(value) for value in values]


@dataclass
class Argument:
    """A good value, made anew, and what else may stand in its place."""

    make: Make
    kind: Kind


@dataclass
class Case:
    """A public callable with good arguments.

    Args:
        call: with the arguments by name.
        arguments: by name.
        allowed: documented exceptions beside ValueError and TypeError.
    """

    call: Callable[..., Any]
    arguments: dict[str, Argument]
    allowed: tuple[type[Exception], ...] = ()


_KEPT: dict[str, tempfile.TemporaryDirectory[str]] = {}


def saved(name: str, save: Callable[[Path], Any]) -> None:
    """A folder `saved` in the working folder, as `save` writes it; it is written once."""
    if name not in _KEPT:
        _KEPT[name] = tempfile.TemporaryDirectory()
        save(Path(_KEPT[name].name) / "saved")
    shutil.copytree(Path(_KEPT[name].name) / "saved", "saved")
