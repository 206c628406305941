"""Matching losses for experiment trackers: accelerate's by name, or one of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..distributed import is_main_process
from ..settings import brief

_PROJECT, _LOGS = "condensation", "logs"


def check_trackers(report_to: Any, folder: Path | None) -> list[Any]:
    """Names and trackers, each of which can be had here.

    Args:
        report_to: a name (`"tensorboard"`, `"wandb"`, `"trackio"`, ...), a `GeneralTracker` of accelerate, or a list of these;
            None: none.
        folder: where those write that write files; None: nowhere.

    Raises:
        TypeError: something else.
        ValueError: a tracker that accelerate does not know, that is not installed, or that needs a folder.
    """
    if report_to is None:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

    asked = list(report_to) if isinstance(report_to, list | tuple) else [report_to]
    here = sorted(map(str, get_available_trackers()))
    for one in asked:
        if isinstance(one, GeneralTracker):
            continue
        if not isinstance(one, str):
            raise TypeError(
                f"report_to takes names of trackers and accelerate's GeneralTracker, got {type(one).__name__}: {brief(one)}"
            )
        if one not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"report_to: no tracker {brief(one)}; accelerate has {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if one not in here:
            raise ValueError(f"report_to: {one} is not installed here ({', '.join(here) or 'no tracker'} is)")
        if LOGGER_TYPE_TO_CLASS[one].requires_logging_directory and folder is None:
            raise ValueError(f"report_to: {one} writes files; give output_dir")
    return asked


@contextmanager
def reporting(
    asked: list[Any], folder: Path | None, settings: Mapping[str, Any], callback: Callable[[int, float], object] | None
) -> Iterator[Callable[[int, float], None]]:
    """A function that tells all trackers, and the callback, the matching loss of an outer iteration.

    Args:
        asked: of `check_trackers`; the main process alone tells them.
        folder: `logs/` in it is for those that write files.
        settings: what is kept beside the losses: numbers, words and truth values of it.
        callback: called in every process; None: nobody is.
    """
    started: list[Any] = []  # here; the user's own go on when a run ends

    def start(one: Any) -> Any:
        if isinstance(one, str):
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            kind: Any = LOGGER_TYPE_TO_CLASS[one]
            where = (str(folder / _LOGS),) if folder is not None and kind.requires_logging_directory else ()
            one = kind(_PROJECT, *where)
            started.append(one)
            if hasattr(one, "start"):  # later releases of accelerate
                one.start()
        one.store_init_configuration(
            {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        )
        return one

    try:
        trackers = [start(one) for one in asked] if is_main_process() else []

        def tell(outer: int, loss: float) -> None:
            for one in trackers:
                one.log({"matching_loss": loss}, step=outer)
            if callback is not None:
                callback(outer, loss)

        yield tell
    finally:
        for one in started:
            one.finish()
