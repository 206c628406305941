"""SIGKILL at random moments of every job and every save: the old copy or the new one, whole; done again, the same result.

`HF_DATAOPT_FAULTS` says how often each is killed (2; 20 is the full size). The counts are printed: `pytest -s`.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from hf_dataopt.checkpoint import LOCK

from ..counts import FAULTS, tell
from .killable import VICTIMS, Victims


def leftovers(folder: Path) -> list[Path]:
    """What no finished job or save leaves: drafts, old copies and locks, inside and beside."""
    inside = [one for one in folder.rglob("*") if one.suffix == ".tmp" or one.name in (LOCK, "unfinished")]
    return inside + [one for one in folder.parent.iterdir() if one != folder]


@pytest.mark.parametrize("name", VICTIMS)
def test_killed_jobs_and_saves(name: str, victims: Victims, tmp_path: Path) -> None:
    place = tmp_path / "straight" / "folder"
    place.parent.mkdir()
    assert victims.call(name, "start", place).status == 0
    old = victims.read(name, place)
    ended = victims.call(name, "run", place)
    assert ended.status == 0, ended.error
    new, seconds = victims.read(name, place), ended.seconds
    assert old != new
    draw, counts = random.Random(name), Counter[str]()
    for number in range(20 * FAULTS):
        folder = tmp_path / str(number) / "folder"
        folder.parent.mkdir()
        assert victims.call(name, "start", folder).status == 0
        ended = victims.call(name, "run", folder, after=draw.uniform(0.02, 1.0) * seconds)
        if ended.status == 0:  # done before: the machine is faster than it was
            seconds *= 0.95
            continue
        assert ended.status == -signal.SIGKILL, ended.error
        counts["killed"] += 1
        counts["lock or draft left behind"] += bool(leftovers(folder))
        counts[{old: "old copy", new: "new copy"}.get(victims.read(name, folder), "neither")] += 1
        ended = victims.call(name, "run", folder)
        assert ended.status == 0, ended.error
        counts["right in the end"] += victims.read(name, folder) == new
        counts["leftovers"] += len(leftovers(folder))
        if counts["killed"] == FAULTS:
            break
    tell("SIGKILL", name, {"within seconds": round(seconds, 2), **counts})
    assert counts["killed"] == counts["right in the end"] == counts["old copy"] + counts["new copy"] == FAULTS
    assert counts["leftovers"] == 0
