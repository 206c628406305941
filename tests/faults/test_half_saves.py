"""Saves that stop at a given step: the old copy or the new one, whole, and nothing left over. At random: `test_kills.py`."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dataopt.publishing import writer

from ..counts import FAULTS
from .saves import SAVES, Saved

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def in_a_fork(job: Callable[[], Any], seconds: float | None = None) -> int:
    """Run a small job in a fork of this process, killed after some seconds; returns how it ended (9: killed)."""
    pid = os.fork()
    if pid == 0:
        try:
            job()
        except BaseException:  # noqa: BLE001 - a child of pytest must not go on as pytest
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def others(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


def test_a_killed_first_save_leaves_nothing_or_all(tmp_path: Path) -> None:
    saved: Saved = SAVES["heads"](tmp_path)
    for number in range(2 * FAULTS):
        folder = tmp_path / "place" / str(number)
        in_a_fork(lambda at=folder: saved.first(at), random.Random(number).uniform(0, 0.02))  # type: ignore[misc]
        if folder.exists():
            saved.read(folder)
        saved.first(folder)
        assert saved.read(folder) and not [one for one in others(folder) if not one.isdecimal()]


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_between_two_renames_is_mended(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where folders cannot be exchanged in one step, the target is away for a moment: reading and saving put it back."""
    saved: Saved = SAVES["heads"](tmp_path)
    folder = tmp_path / "place" / "artifact"
    saved.second(folder)
    new = saved.read(folder)
    saved.first(folder)
    old = saved.read(folder)
    monkeypatch.setattr(writer, "_exchange", lambda one, other: False)
    rename, calls = Path.rename, iter(range(1, 10))

    def killed(self: Path, target: Any) -> Any:
        done = rename(self, target)
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def job() -> None:
        Path.rename = killed  # type: ignore[method-assign, assignment]
        saved.second(folder)

    assert in_a_fork(job) == signal.SIGKILL
    assert folder.exists() == (step == 2) and others(folder)
    assert saved.read(folder) == (old if step == 1 else new)
    saved.second(folder)
    assert others(folder) == [] and saved.read(folder) == new


def test_a_save_that_fails_leaves_the_old_copy_and_nothing_else(tmp_path: Path) -> None:
    saved: Saved = SAVES["heads"](tmp_path)
    folder = tmp_path / "place" / "artifact"
    saved.first(folder)
    old = saved.read(folder)
    for stop in (KeyboardInterrupt, OSError):
        with pytest.raises(stop), writer.replacing(folder, "head_scores") as draft:
            (draft / "half.json").write_text("{")
            raise stop("no space left on device")
        assert saved.read(folder) == old and others(folder) == []


def test_what_another_process_is_saving_is_not_taken_for_left_over(tmp_path: Path) -> None:
    saved: Saved = SAVES["heads"](tmp_path)
    folder = tmp_path / "place" / "artifact"
    saved.first(folder)
    with writer.replacing(folder, "head_scores") as draft:
        assert in_a_fork(lambda: saved.second(folder)) == 0
        assert draft.is_dir()
        saved_by_other = saved.read(folder)
        (draft / "head_scores.safetensors").write_bytes((folder / "head_scores.safetensors").read_bytes())
        writer.finish(draft, "head_scores", about={"model": {"name": "a/model"}})
    assert saved.read(folder) == saved_by_other and others(folder) == []
