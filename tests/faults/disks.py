"""A real disk that is full or read-only: a small tmpfs in a mount namespace of a forked process's own, gone with it."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from pathlib import Path

from .saves import Saved

_NEWNS, _PRIVATE, _REMOUNT, _READ_ONLY = 0x20000, 0x44000, 0x20, 0x1
REFUSED = "no mounts of our own on this machine"


def _mount(folder: Path, flags: int = 0, options: str = "") -> bool:
    return ctypes.CDLL(None, use_errno=True).mount(b"none", os.fsencode(folder), b"tmpfs", flags, options.encode()) == 0


def _own_disk(folder: Path, megabytes: int) -> bool:
    """Put an empty disk at a folder, for this process only."""
    folder.mkdir(parents=True, exist_ok=True)
    if ctypes.CDLL(None, use_errno=True).unshare(_NEWNS) != 0:
        return False
    _mount(Path("/"), _PRIVATE)
    return _mount(folder, 0, f"size={megabytes}m")


def _tried(saved: Saved, folder: Path) -> str:
    try:
        saved.second(folder)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    except BaseException as error:  # noqa: BLE001 - what must not be
        return f"wrong error {type(error).__name__}: {error}"
    return "done"


def _inside(disk: Path) -> int:
    return len([one for one in disk.iterdir() if not one.name.endswith("unfinished")])  # checkpoints stay


def _fill(path: Path) -> None:
    """A file that takes all the room there is."""
    with path.open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC


def full(saved: Saved, folder: Path) -> str:
    """Save again and again on a disk with 0, 1, 2, 4, 8 ... free pages, until it has room: what was said, and what is there."""
    disk = folder.parent
    if not _own_disk(disk, 16):
        return REFUSED
    saved.first(folder)
    old, said, held, left = saved.read(folder), [], [], []
    before, filler, pages = _inside(disk), disk / "filler", 0
    while not said or said[-1] != "done":
        _fill(filler)
        os.truncate(filler, max(0, filler.stat().st_size - 4096 * pages))
        said.append(_tried(saved, folder))
        filler.unlink()
        held.append("old" if saved.read(folder) == old else "new")
        left.append(_inside(disk) - max(before, folder.exists()))
        pages = max(1, 2 * pages)
    saved.second(folder)
    return json.dumps({"said": said, "held": held, "left": left, "old": old, "after": saved.read(folder)})


def read_only(saved: Saved, folder: Path) -> str:
    """Save on a disk that has become read-only, then on one that is not any more."""
    if not _own_disk(folder.parent, 16):
        return REFUSED
    saved.first(folder)
    old = saved.read(folder)
    _mount(folder.parent, _REMOUNT | _READ_ONLY)
    said, held = _tried(saved, folder), saved.read(folder)
    _mount(folder.parent, _REMOUNT)
    left = _inside(folder.parent) - folder.exists()
    saved.second(folder)
    return json.dumps({"said": said, "kept": held == old, "left": left, "old": old, "after": saved.read(folder)})
