"""Damaged checkpoints and shared folders: never another result, never a crash, and a warning that names the file.

Invariants: a job that resumes from a folder with one damaged file ends in the bits of an undisturbed run, whatever the
damage; what was damaged is named; a folder has one writer at a time, and a dead one's place is taken.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_dataopt import checkpoint as module
from hf_dataopt.checkpoint import LOCK, PassCheckpoint, locked
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.errors import FolderInUseError
from hf_dataopt.relation import graph
from hf_dataopt.relation.cleaner import RelationCleaner
from hf_dataopt.relation.saved import ARRAYS

from ..condensation.conftest import as_dataset, synthetic_images
from ..conftest import REPO
from ..counts import tell
from ..relation.data import make

DAMAGES = 56
TINY = IDCConfig(
    images_per_class=1, width=4, depth=2, outer_iterations=3, inner_iterations=1, real_batch=4, network_images=8,
    network_batch=8, learning_rate=0.05, scale_learning_rate=False, storage="float32", reinitialise_every=3,
)  # fmt: skip


@cache  # not at import: threads that torch starts before a test says how many break the forks of other tests
def images(seed: int = 0) -> Dataset:
    return as_dataset(*synthetic_images(30, seed=seed))


@cache
def rows(seed: int = 0) -> Dataset:
    return make(n=220, d=8, rate=0.2, seed=seed).dataset()


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several stripes a pass."""
    monkeypatch.setitem(graph.LARGEST_TILE, "cpu", 32)


class Killed(BaseException):
    """Stands for a kill between two writes."""


def relation(folder: Path | None, *, other: bool = False, **settings: Any) -> bytes:
    """Every number of a fit."""
    report = RelationCleaner(**settings).fit(rows(int(other)), output_dir=folder, quiet=True)
    arrays = [getattr(report, name) for name in ARRAYS] + list(report.parts.values())
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def dissertation(folder: Path | None, *, other: bool = False) -> bytes:
    """The same of the dissertation's score and set, whose passes depend on one another."""
    return relation(folder, other=other, score="label_noise", cut="algorithm4")


def condensation(folder: Path | None, *, other: bool = False) -> bytes:
    """Every pixel and loss of a run."""
    condenser = DatasetCondenser(TINY)
    found = condenser.condense(images(int(other)), output_dir=folder).with_format("numpy")["image"][:]
    return np.asarray(found).tobytes() + np.asarray(condenser.losses).tobytes()


JOBS: dict[str, tuple[Callable[..., bytes], int]] = {  # the job, and after which write it is killed
    "relation": (relation, 5),  # in the middle of its third pass
    "relation dissertation": (dissertation, 5),
    "condensation": (condensation, 2),
}


def killed_after(
    writes: int, job: Callable[..., bytes], folder: Path, monkeypatch: pytest.MonkeyPatch, **how: bool
) -> None:
    """Run a job that writes at every step until it is killed."""
    save, left = PassCheckpoint.save, [writes]

    def counted(self: PassCheckpoint, *args: object, **options: object) -> None:
        self.every_seconds = 0
        save(self, *args, **options)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PassCheckpoint, "save", counted)
        with pytest.raises(Killed):
            job(folder, **how)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def flipped(path: Path, rng: random.Random, donors: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flipped_value(path: Path, rng: random.Random, donors: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    content[rng.randrange(start, len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random, donors: list[Path]) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def torn(path: Path, rng: random.Random, donors: list[Path]) -> None:
    """A block that never reached the disk."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) - 64)
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)


def another_counter(path: Path, rng: random.Random, donors: list[Path]) -> None:
    content = path.read_bytes()
    mark = content.index(b'\\"done\\": ') + len(b'\\"done\\": ')
    path.write_bytes(content[:mark] + str((int(content[mark : mark + 1]) + 1) % 10).encode() + content[mark + 1 :])


def swapped(path: Path, rng: random.Random, donors: list[Path]) -> None:
    """Another run's file, or that of another pass of the same run."""
    others = [one for one in donors if one.read_bytes() != path.read_bytes()]
    path.write_bytes(rng.choice(others).read_bytes())


def emptied(path: Path, rng: random.Random, donors: list[Path]) -> None:
    path.write_bytes(rng.choice([b"", b"{}", rng.randbytes(500), b"\xff" * 8 + b"x" * 50]))


def no_file(path: Path, rng: random.Random, donors: list[Path]) -> None:
    path.unlink()
    rng.choice([path.mkdir, lambda: os.mkfifo(path)])()


KINDS = [flipped] * 14 + [flipped_value] * 14 + [cut] * 10 + [torn] * 6 + [swapped] * 5 + [another_counter] * 3
KINDS += [emptied] * 3 + [no_file]


@pytest.mark.parametrize("name", JOBS)
def test_no_damage_changes_a_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(KINDS) == DAMAGES
    job, writes = JOBS[name]
    expected = job(None)
    killed_after(writes, job, tmp_path / "killed", monkeypatch)
    killed_after(writes, job, tmp_path / "other", monkeypatch, other=True)
    files = checkpoints(tmp_path / "killed")
    donors = checkpoints(tmp_path / "other") + files
    assert job(shutil.copytree(tmp_path / "killed", tmp_path / "intact")) == expected and not caplog.records
    rng, counts = random.Random(0), Counter[str]()
    for number, damage in enumerate(KINDS):
        folder = shutil.copytree(tmp_path / "killed", tmp_path / "damaged")
        chosen = files[number % len(files)]
        damage(folder / chosen.relative_to(tmp_path / "killed"), rng, donors)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = job(folder)
        named = chosen.name in caplog.text and "starting afresh" in caplog.text
        counts["started afresh, file named" if named else "nothing lost"] += 1
        counts["silently wrong"] += found != expected and not named
        counts["wrong"] += found != expected
        assert not list(folder.rglob("*.tmp")) and not list(folder.rglob(LOCK))
        shutil.rmtree(folder)
    tell("damaged checkpoint", name, {"damages": DAMAGES, "files": len(files), **counts})
    assert counts["wrong"] == 0
    # a flipped bit may hit a blank of the header, a cut may take nothing away: no harm then
    assert counts["started afresh, file named"] >= DAMAGES - 6


def test_other_data_settings_and_counters_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, sums = tmp_path / "a.safetensors", {"sums": torch.arange(4.0)}
    PassCheckpoint(path, {"data": "x", "settings": "y"}).save(3, sums, force=True)
    found = PassCheckpoint(path, {"data": "x", "settings": "y"}).load(3, sums)
    assert found is not None and found[0] == 3 and torch.equal(found[1]["sums"], sums["sums"])
    for key, total, like, message in [
        ({"data": "z", "settings": "y"}, 3, sums, "written for other data;"),
        ({"data": "z", "settings": "y", "rows": ""}, 3, sums, "written for other data and rows;"),
        ({"data": "x", "settings": "y"}, 2, sums, "finished 3 steps, 2"),
        ({"data": "x", "settings": "y"}, 3, {"sums": torch.zeros(5)}, "no sums of shape"),
        ({"data": "x", "settings": "y"}, 3, {"sums": torch.zeros(4, dtype=torch.float64)}, "no sums of shape"),
    ]:
        caplog.clear()
        assert PassCheckpoint(path, key).load(total, like) is None
        assert message in caplog.text and str(path) in caplog.text


def test_fewer_iterations_than_were_done_start_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    DatasetCondenser(TINY).condense(images(), output_dir=tmp_path)
    short = replace(TINY, outer_iterations=1)
    found = DatasetCondenser(short).condense(images(), output_dir=tmp_path)
    assert "3 steps, 1 are asked for" in caplog.text
    assert found["image"][:] == DatasetCondenser(short).condense(images())["image"][:]


def test_another_network_starts_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def wide(channels: int, classes: int, size: tuple[int, int]) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size[0] * size[1], classes))

    DatasetCondenser(replace(TINY, outer_iterations=1)).condense(images(), output_dir=tmp_path)
    DatasetCondenser(TINY, network=wide).condense(images(), output_dir=tmp_path)
    assert "other network" in caplog.text


def test_a_full_disk_costs_the_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    assert condensation(tmp_path) == condensation(None)
    assert caplog.text.count("cannot be written") == 1


HOLD = """
import sys, time
from hf_dataopt.checkpoint import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("name", "place"), [("relation", "unfinished"), ("condensation", "")])
def test_one_writer_a_folder(name: str, place: str, tmp_path: Path) -> None:
    job, lock = JOBS[name][0], tmp_path / place / LOCK
    call = [sys.executable, "-c", HOLD, str(lock.parent)]
    holder = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=f"written by process {holder.pid} on host"):
        job(tmp_path)
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == [lock]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads(lock.read_text())["pid"] == holder.pid  # left behind, and taken over
    assert job(tmp_path) == job(None)
    assert not lock.exists()


def test_refused_data_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column|not 'y'"):
        RelationCleaner().fit(rows(), "y", output_dir=tmp_path / "r" / "s", quiet=True)
    assert not (tmp_path / "r" / "s" / "unfinished").exists()


def test_a_thread_may_lock_twice_another_may_not(tmp_path: Path) -> None:
    seen: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path):
                seen.append("entered")
        except FolderInUseError as error:
            seen.append(str(error))

    with locked(tmp_path), locked(tmp_path / "." / "x" / ".."):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        pid = os.fork()
        if not pid:  # a forked child has its parent's memory, not its lock
            code = 1
            try:
                with locked(tmp_path):
                    pass
            except FolderInUseError:
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (tmp_path / LOCK).exists()
    assert len(seen) == 1 and "another thread" in seen[0]
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("content", ["", "no json", '{"pid": 1', '{"pid": "x", "host": 3}', "[]"])
def test_whatever_lies_in_a_dead_lock_is_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_without_locks_of_the_system_the_owners_number_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fcntl", None)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = module.socket.gethostname()
    for pid, place, free in [(dead.pid, host, True), (os.getppid(), host, False), (dead.pid, "elsewhere", False)]:
        (tmp_path / LOCK).write_text(json.dumps({"pid": pid, "host": place}))
        if free:
            with locked(tmp_path):
                pass
        else:
            with pytest.raises(FolderInUseError, match=f"process {pid} on host {place}"), locked(tmp_path):
                pass
