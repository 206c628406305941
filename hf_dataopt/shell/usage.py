"""A call that cannot work is refused before any work, in one line that names flags, with exit code 2."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


class UsageError(ValueError):
    """The call itself is wrong: what was asked for cannot be done with these options. Nothing was computed."""


@contextmanager
def refusing() -> Iterator[None]:
    """The checks of a command, before its work: what is wrong in here is wrong usage."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def flag(dest: str) -> str:
    """How an option is written, from its name in `args`."""
    return f"--{dest.replace('_', '-')}"


def only(args: argparse.Namespace, holds: object, reason: str, *dests: str) -> None:
    """Refuse options that would have no effect.

    Args:
        args: the parsed command line.
        holds: whether they have one.
        reason: what they need, as in "needs --model".
        dests: names of the options in `args`; given is what is neither None nor False.

    Raises:
        UsageError: one of them was given.
    """
    given = [flag(dest) for dest in dests if getattr(args, dest) is not None and getattr(args, dest) is not False]
    if given and not holds:
        raise UsageError(f"{', '.join(given)} {reason}")


def check_revision(revision: str | None, name: str, local: bool) -> None:
    """Refuse a revision of what is on this machine.

    Args:
        revision: as given, or None.
        name: of what is read.
        local: whether it is on this machine.

    Raises:
        UsageError: it is, and a revision is asked for.
    """
    if local and revision is not None:
        raise UsageError(f"--revision {revision}: {name} is on this machine and has no revisions")


def in_flags(message: str, actions: Iterable[argparse.Action], also: Mapping[str, str] | None = None) -> str:
    """A message of the library in the words of the command line: `keep_ratio` is `--keep-ratio` there.

    Args:
        message: names parameters.
        actions: the options of the command.
        also: flags by parameter, where the two have different names.
    """
    flags = {action.dest: max(action.option_strings, key=len) for action in actions if action.option_strings}
    for name, option in {**flags, **(also or {})}.items():
        word = re.escape(name)
        message = re.sub(rf"(?<![\w.-]){word}=(['\"]?)([\w.-]+)\1", rf"{option} \2", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w.-]){word}\b=?", option, message)
        else:
            message = re.sub(rf"^{word}(?= (?:is\b|must\b|has\b|needs\b|'))", option, message)
    return message


def check_words(dest: str, text: str) -> None:
    """Refuse a text without a word in it.

    Raises:
        UsageError: it has none.
    """
    if not text.strip():
        raise UsageError(f"{flag(dest)} is given without a word in it; say something")


def check_count(dest: str, value: int, least: int = 1) -> None:
    """Refuse a count below the least one.

    Raises:
        UsageError: it is.
    """
    if value < least:
        raise UsageError(f"{flag(dest)} must be at least {least}, got {value}")
