"""Bars where somebody looks, log lines elsewhere, neither with `--quiet`; everything as it was afterwards."""

from __future__ import annotations

import io
import logging
import sys
import warnings

import datasets
import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from hf_dataopt.progress import bar, say, track
from hf_dataopt.shell.terminal import terminal

LOGGER = logging.getLogger("hf_dataopt")


class Stderr(io.StringIO):
    """Standard error, on a terminal or not."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.seen = seen

    def isatty(self) -> bool:
        return self.seen


def off() -> tuple[bool, bool, bool]:
    """Whether bars are off: the Hub's client's and ours, datasets', transformers'."""
    return (
        are_progress_bars_disabled(),
        datasets.utils.are_progress_bars_disabled(),
        not transformers_logging.is_progress_bar_enabled(),
    )


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    enable_progress_bars(), datasets.enable_progress_bars(), transformers_logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("seen", "quiet", "switch", "wanted"),
    [
        (True, False, None, (False, False, False)),
        (True, True, None, (True, True, True)),
        (False, False, None, (True, True, True)),
        (True, False, "1", (True, True, True)),
        (True, False, "0", (False, False, False)),
    ],
)
def test_bars(
    seen: bool, quiet: bool, switch: str | None, wanted: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if switch is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", switch)
    monkeypatch.setattr(sys, "stderr", Stderr(seen))
    with terminal(quiet):
        assert off() == wanted
    assert off() == (False, False, False)


def test_bars_that_were_off_stay_off(monkeypatch: pytest.MonkeyPatch) -> None:
    disable_progress_bars()
    datasets.disable_progress_bars()
    monkeypatch.setattr(sys, "stderr", Stderr(False))
    with terminal(False):
        pass
    assert off()[:2] == (True, True)
    enable_progress_bars(), datasets.enable_progress_bars()


@pytest.mark.parametrize(
    ("seen", "quiet", "verbosity", "lines"),
    [
        (False, False, "", ["a job of two steps", "warning: careful", "warning: mind the gap"]),
        (False, False, "error", ["warning: mind the gap"]),
        (True, False, "", ["a job of two steps", "warning: careful", "warning: mind the gap"]),
        (True, True, "", []),
        (False, True, "debug", []),
    ],
)
def test_words(seen: bool, quiet: bool, verbosity: str, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_VERBOSITY", verbosity)
    stream = Stderr(seen)
    monkeypatch.setattr(sys, "stderr", stream)
    before = LOGGER.level, LOGGER.propagate, list(LOGGER.handlers), warnings.showwarning
    with terminal(quiet), warnings.catch_warnings():
        warnings.simplefilter("always")
        say("a job\x1b of two steps".replace("\x1b", ""))
        LOGGER.getChild("kvzip").warning("careful")
        warnings.warn("mind\nthe gap", UserWarning, stacklevel=1)
    assert stream.getvalue().splitlines() == lines
    assert (LOGGER.level, LOGGER.propagate, list(LOGGER.handlers), warnings.showwarning) == before


def test_a_job_is_told_at_its_end_and_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("hf_dataopt.progress.time.monotonic", lambda: now[0])
    stream = Stderr(False)
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal(False):
        for _ in track(range(3), "Reading", unit="row"):
            now[0] += 40
        with bar(5, "Quick", unit="step") as quick:
            quick.update(5)
        with pytest.raises(KeyboardInterrupt), bar(None, "Endless", unit="it") as endless:
            endless.set_postfix(loss="0.5")
            endless.update()
            now[0] += 2
            raise KeyboardInterrupt
    assert stream.getvalue().splitlines() == [
        "Reading: 2 of 3 row, 80 s",
        "Reading: 3 of 3 row, 120 s",
        "Endless: 1 it, 2 s, loss 0.5, stopped",
    ]
