"""Draws bad sets for a callable and judges what it makes of them."""

from __future__ import annotations

import ast
import contextlib
import os
import random
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import hf_dataopt

from .pool import Case

PACKAGE = str(Path(hf_dataopt.__file__).parent)
SECONDS = 60
FIRST = 600  # of the good call, which compiles on first use, however busy the machine
OURS = ("hf_dataopt", "builtins")


class Hang(BaseException):
    """A call that did not come back."""


@dataclass
class Tally:
    """What became of the sets of one callable."""

    sets: int = 0
    refused: int = 0
    accepted: int = 0
    other: list[str] = field(default_factory=list)


@cache
def _raises(path: str) -> list[tuple[int, int]]:
    """First and last lines of all raise statements of a file."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return [(node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)]


def fault(error: Exception, case: Case) -> str | None:
    """Why an error is not one of ours; None where it is."""
    if isinstance(error, case.allowed):
        return None
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename.removeprefix(PACKAGE)}:{last.lineno}"
    if not isinstance(error, ValueError | TypeError) or not type(error).__module__.startswith(OURS):
        return f"{type(error).__name__} from {where}: {error!s:.160}"
    if not last.filename.startswith(PACKAGE):
        return f"raised at {where}: {error!s:.160}"
    if "unexpected keyword argument" in str(error):  # Python's own words, which name it
        return None
    if not any(first <= (last.lineno or 0) <= end for first, end in _raises(last.filename)):
        return f"{type(error).__name__} by chance at {where}: {error!s:.160}"
    return None if len(str(error)) >= 12 else f"says too little: {error}"


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """An empty working folder, no Hub, no warnings."""

    def ring(*_: Any) -> None:
        raise Hang("no answer in the time it was given")

    before, home = signal.signal(signal.SIGALRM, ring), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        os.chdir(folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            signal.signal(signal.SIGALRM, before)
            os.chdir(home)


@contextlib.contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """A clock around one call; the working folder is empty again afterwards."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for entry in os.scandir("."):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def good(case: Case) -> None:
    """The good arguments are taken, so that a refusal is one of what was put in their place."""
    with apart(), bounded(FIRST), contextlib.suppress(*case.allowed):
        case.call(**{name: argument.make() for name, argument in case.arguments.items()})


def run(name: str, case: Case, sets: int, seed: int = 0) -> Tally:
    """Draw sets with one or two bad arguments and call."""
    drawn, tally = random.Random(f"{name} {seed}"), Tally()
    with apart():
        _draw(case, sets, drawn, tally)
    return tally


def _draw(case: Case, sets: int, drawn: random.Random, tally: Tally) -> None:
    seen: Counter[str] = Counter()
    for _ in range(sets):
        names = drawn.sample(list(case.arguments), min(len(case.arguments), 1 if drawn.random() < 0.7 else 2))
        values = {one: argument.make() for one, argument in case.arguments.items()}
        values |= {one: case.arguments[one].kind.draw(drawn) for one in names}
        verdicts = [case.arguments[one].kind.takes(values[one]) for one in names]
        why = _call(case, values, tally, must_refuse=False in verdicts)
        tally.sets += 1
        if why is not None:
            said = f"{why} <- " + ", ".join(f"{one}={_short(values[one])}" for one in names)
            seen[why] += 1
            if seen[why] == 1:
                tally.other.append(said)


def _call(case: Case, values: dict[str, Any], tally: Tally, *, must_refuse: bool) -> str | None:
    try:
        with bounded():
            case.call(**values)
    except Hang as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - what it is, is the question
        tally.refused += 1
        return fault(error, case)
    except BaseException as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error!s:.160}"
    tally.accepted += 1
    return "accepted" if must_refuse else None


def _short(value: Any) -> str:
    try:
        return f"{value!r:.70}".replace("\n", " ")
    except Exception:  # noqa: BLE001 - 10**5000 has no repr
        return type(value).__name__
