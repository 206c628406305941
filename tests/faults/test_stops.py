"""Ctrl-C, full disks and read-only ones, for every job and every save: the old copy stays whole and nothing is left over.

Counts are printed: `pytest -s`. `HF_DATAOPT_FAULTS` says how often each is interrupted.
"""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ..counts import FAULTS, tell
from .disks import REFUSED
from .killable import JOBS, VICTIMS, Victims
from .test_kills import leftovers


@pytest.mark.parametrize("name", VICTIMS)
def test_ctrl_c(name: str, victims: Victims, tmp_path: Path) -> None:
    place = tmp_path / "straight" / "folder"
    place.parent.mkdir()
    victims.call(name, "start", place)
    old = victims.read(name, place)
    ended = victims.call(name, "run", place)
    new, seconds = victims.read(name, place), ended.seconds
    draw, counts = random.Random(name), Counter[str]()
    for number in range(20 * FAULTS):
        folder = tmp_path / str(number) / "folder"
        folder.parent.mkdir()
        victims.call(name, "start", folder)
        ended = victims.call(name, "run", folder, after=draw.uniform(0.02, 1.0) * seconds, how=signal.SIGINT)
        if ended.status == 0:
            seconds *= 0.95
            continue
        assert ended.status == 130, ended.error
        counts["interrupted"] += 1
        counts["leftovers"] += len([one for one in leftovers(folder) if not one.name.endswith("unfinished")])
        counts[{old: "old copy", new: "new copy"}.get(victims.read(name, folder), "neither")] += 1
        ended = victims.call(name, "run", folder)
        counts["right in the end"] += victims.read(name, folder) == new
        if counts["interrupted"] == FAULTS:
            break
    tell("SIGINT", name, {"within seconds": round(seconds, 2), **counts})
    assert counts["interrupted"] == counts["right in the end"] == counts["old copy"] + counts["new copy"] == FAULTS
    assert counts["leftovers"] == 0


def told(victims: Victims, name: str, step: str, folder: Path) -> dict[str, Any]:
    folder.parent.mkdir()
    ended = victims.call(name, step, folder)
    assert ended.status == 0, ended.error
    if ended.value == REFUSED:
        pytest.skip(REFUSED)
    return json.loads(ended.value)


@pytest.mark.parametrize("name", VICTIMS)
def test_a_full_disk(name: str, victims: Victims, tmp_path: Path) -> None:
    found = told(victims, name, "full", tmp_path / "disk" / "folder")
    said = Counter(one.split(":")[0] for one in found["said"])
    tell("full disk", name, {"free sizes": len(found["said"]), **said})
    assert found["said"][0] != "done" and found["said"][-1] == "done"
    assert not [one for one in found["said"] if one.startswith("wrong error")]
    assert all(
        one == ("new" if said == "done" else "old") for one, said in zip(found["held"], found["said"], strict=True)
    )
    if name not in JOBS:  # a job's folder holds its data and checkpoints besides
        assert not any(found["left"])
    assert found["after"] != found["old"]


@pytest.mark.parametrize("name", VICTIMS)
def test_a_read_only_disk(name: str, victims: Victims, tmp_path: Path) -> None:
    found = told(victims, name, "read only", tmp_path / "disk" / "folder")
    tell("read-only disk", name, {found["said"].split(":")[0]: 1, "old copy kept": int(found["kept"])})
    assert (
        found["said"].startswith(("OSError", "ValueError", "PermissionError")) and found["kept"] and not found["left"]
    )
    assert found["after"] != found["old"]
