"""Progress bars that users silence the way they silence every Hugging Face bar (`HF_HUB_DISABLE_PROGRESS_BARS=1`)."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


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
    from huggingface_hub.utils.tqdm import tqdm

    from .distributed import is_main_process

    yield from tqdm(
        items, desc=description, total=total, unit=unit, delay=0.5, disable=disable or not is_main_process()
    )


def bar(total: int, description: str, *, unit: str = "it", disable: bool = False) -> Any:
    """A bar that is moved by hand (`.update(n)`), for work that is not a plain loop; use it as a context manager."""
    from huggingface_hub.utils.tqdm import tqdm

    from .distributed import is_main_process

    return tqdm(desc=description, total=total, unit=unit, delay=0.5, disable=disable or not is_main_process())


def say(message: str) -> None:
    """One line for people before or after a long job: on stderr, main process only, silenced together with the bars."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, tqdm

    from .distributed import is_main_process

    if is_main_process() and not are_progress_bars_disabled():
        tqdm.write(printable(message), file=sys.stderr)


def printable(text: str) -> str:
    """Text for a terminal: control characters, and those that turn the direction of writing, as escapes; new lines stay."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


def told(what: object, most: int = 200) -> str:
    """What a library or a foreign file says, to be quoted in a message: one line, cut, `printable`."""
    return printable(" ".join(str(what)[: 4 * most].split()))[:most]
