"""What a command shows besides its result: bars where somebody looks, else one stream of log lines; with `--quiet` neither."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_BARS, _DATA_BARS = "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"
_WORDS = {"1", "true", "yes", "on"}
_LEVELS = {"debug", "info", "warning", "error", "critical"}


@contextmanager
def terminal(quiet: bool) -> Iterator[None]:
    """For the length of one command: bars of ours and of every Hugging Face library, our log, and warnings in one line.

    Bars are drawn where stderr is a terminal, unless `quiet` or `HF_HUB_DISABLE_PROGRESS_BARS` says otherwise; where there are
    none, our log goes to stderr at INFO (`HF_HUB_VERBOSITY` sets another level), and at ERROR with `quiet`.
    """
    wanted = os.environ.get(_BARS, "").lower() not in _WORDS
    shown = wanted and not quiet and sys.stderr.isatty()
    kept = os.environ.get(_DATA_BARS)
    logger, handler = logging.getLogger("hf_dataopt"), _Stderr()
    before = logger.level, logger.propagate, warnings.showwarning
    switched = [] if shown else _bars_off()
    logger.addHandler(handler)
    logger.setLevel(_level(quiet, shown))
    logger.propagate = False
    warnings.showwarning = _in_one_line if not quiet else _nothing
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate, warnings.showwarning = before[1:]
        os.environ.pop(_DATA_BARS, None)
        if kept is not None:
            os.environ[_DATA_BARS] = kept
        for enable in switched:
            enable()


def _level(quiet: bool, bars: bool) -> int:
    word = os.environ.get("HF_HUB_VERBOSITY", "").lower()
    if quiet:
        return logging.ERROR
    if word in _LEVELS:
        return int(getattr(logging, word.upper()))
    return logging.WARNING if bars else logging.INFO


def _bars_off() -> list[Any]:
    """Switch bars off in the libraries, by the environment in one that is imported later.

    Returns:
        What switches on again those that were on.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    os.environ[_DATA_BARS] = "1"
    switched: list[Any] = []
    if not are_progress_bars_disabled():
        disable_progress_bars()
        switched.append(enable_progress_bars)
    if (data := sys.modules.get("datasets")) and not data.utils.are_progress_bars_disabled():
        data.disable_progress_bars()
        switched.append(data.enable_progress_bars)
    # transformers asks the Hub's client when it is imported
    if (logs := sys.modules.get("transformers.utils.logging")) and logs.is_progress_bar_enabled():
        logs.disable_progress_bar()
    switched += [_transformers_on] if switched else []
    return switched


def _transformers_on() -> None:
    if logs := sys.modules.get("transformers.utils.logging"):
        logs.enable_progress_bar()


class _Stderr(logging.Handler):
    """One line a record, to whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        from ..progress import printable

        words = printable(" ".join(record.getMessage().split()))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        sys.stderr.write(f"{level}{words}\n")


def _in_one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    from ..progress import printable

    sys.stderr.write(f"warning: {printable(' '.join(str(message).split()))}\n")


def _nothing(*_: Any, **__: Any) -> None:
    return None
