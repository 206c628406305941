"""SIGKILL at random moments: the job that is started again ends in the bits of an undisturbed one, and leaves nothing over.

`HF_DATAOPT_KILLS` says how often each job is killed (5; 20 for the bar).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_dataopt.checkpoint import LOCK

from ..conftest import REPO

KILLS = int(os.environ.get("HF_DATAOPT_KILLS", "5"))


class Jobs:
    """A warm process that forks jobs."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPO),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.killable"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            text=True,
            env=environment,
            cwd=REPO,
        )

    def run(self, name: str, folder: Path, kill_after: float = 0) -> tuple[int, float]:
        """Exit status and seconds of one job; killed after so many seconds if it is not done by then."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{name} {kill_after} {folder}\n")
        self.process.stdin.flush()
        status, seconds = self.process.stdout.readline().split()
        return int(status), float(seconds)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    found = Jobs(tmp_path_factory.mktemp("jobs") / "errors")
    yield found
    found.process.communicate("", timeout=60)


@pytest.mark.parametrize("name", ["relation", "features", "condensation"])
def test_killed_jobs_end_in_the_same_bits(name: str, jobs: Jobs, tmp_path: Path) -> None:
    status, seconds = jobs.run(name, tmp_path / "straight")
    assert status == 0, jobs.errors.read_text()[-2000:]
    expected = (tmp_path / "straight" / "result").read_bytes()
    rng, counts = random.Random(0), Counter[str]()
    for number in range(10 * KILLS):
        folder = tmp_path / str(number)
        status, _ = jobs.run(name, folder, kill_after=rng.uniform(0.05, 0.95) * seconds)
        if status == 0:  # done before: the machine is faster than it was
            seconds *= 0.9
            continue
        counts["killed"] += status == -signal.SIGKILL
        counts["lock left behind and taken over"] += bool(list(folder.rglob(LOCK)))
        status, _ = jobs.run(name, folder)
        assert status == 0, jobs.errors.read_text()[-2000:]
        counts["same bits"] += (folder / "result").read_bytes() == expected
        counts["leftovers"] += len([one for one in folder.glob("out/**/*") if one.suffix == ".tmp" or one.name == LOCK])
        if counts["killed"] == KILLS:
            break
    print(f"\n{name}: {KILLS} kills within {seconds:.2f} s: {dict(counts)}")
    assert counts["killed"] == counts["same bits"] == KILLS and not counts["leftovers"]
