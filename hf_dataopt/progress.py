"""Progress bars that users silence the way they silence every Hugging Face bar (`HF_HUB_DISABLE_PROGRESS_BARS=1`).

Where bars are off and this module's logger lets INFO through (the command line in a pipe or a log file), the same is said in
log lines.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Self, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

_EVERY = 60.0  # seconds between two log lines of one job
_WORTH_A_LINE = 1.0  # seconds below which a job is not spoken of


def track(
    items: Iterable[T], description: str, *, total: int | None = None, unit: str = "it", disable: bool = False
) -> Iterator[T]:
    """Iterate `items` behind a progress bar on the main process.

    Args:
        items: anything iterable.
        description: what is being done, shown left of the bar.
        total: number of items, when `items` has no length.
        unit: name of one item.
        disable: show nothing.

    Returns:
        The items, unchanged.
    """
    count = total if total is not None else len(items) if isinstance(items, Sized) else None
    with bar(count, description, unit=unit, disable=disable) as progress:
        for item in items:
            yield item
            progress.update(1)


def bar(total: int | None, description: str, *, unit: str = "it", disable: bool = False) -> Any:
    """A bar that is moved by hand (`.update(n)`), for work that is not a plain loop; use it as a context manager."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, tqdm

    from .distributed import is_main_process

    disable = disable or not is_main_process()
    if not disable and are_progress_bars_disabled() and logger.isEnabledFor(logging.INFO):
        return _Lines(total, description, unit)
    return tqdm(desc=description, total=total, unit=unit, delay=0.5, disable=disable)


class _Lines:
    """A bar's words without the bar: a line a minute, and one at the end."""

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self._of = "" if total is None else f" of {total:,}"
        self._description, self._unit, self._note = description, unit, ""
        self._done, self._begun = 0, time.monotonic()
        self._told = self._begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *stopped: object) -> None:
        if time.monotonic() - self._begun >= _WORTH_A_LINE:
            self._tell("" if stopped[0] is None else ", stopped")

    def update(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._told >= _EVERY:
            self._tell()

    def set_postfix(self, **values: object) -> None:
        self._note = "".join(f", {name} {value}" for name, value in values.items())

    def _tell(self, more: str = "") -> None:
        self._told = time.monotonic()
        spent = f"{self._told - self._begun:.0f} s"
        logger.info(
            "%s: %s%s %s, %s", self._description, f"{self._done:,}", self._of, self._unit, spent + self._note + more
        )


def say(message: str) -> None:
    """One line for people before or after a long job: on stderr, main process only, silenced together with the bars."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, tqdm

    from .distributed import is_main_process

    if not is_main_process():
        return
    if are_progress_bars_disabled():
        logger.info("%s", printable(message))
    else:
        tqdm.write(printable(message), file=sys.stderr)


def printable(text: str) -> str:
    """Text for a terminal: control characters, and those that turn the direction of writing, as escapes; new lines stay."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


def told(what: object, most: int = 200) -> str:
    """What a library or a foreign file says, to be quoted in a message: one line, cut, `printable`."""
    return printable(" ".join(str(what)[: 4 * most].split()))[:most]
