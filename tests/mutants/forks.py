"""pytest on a copy of the tree, in a fork that is stopped by its CPU seconds."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from . import REPO

_MEMORY = 12 << 30  # bytes that a fork may take beyond what it starts with
_OPTIONS = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0", "--tb=line"]


def copy_tree(folder: Path) -> Path:
    """The tree for changes to be made in, without what git ignores but for compiled code, which takes minutes to make."""
    skip = shutil.ignore_patterns(".git", ".venv*", "build", "dist", ".*_cache", ".hypothesis", ".data")
    shutil.copytree(REPO, folder / "tree", ignore=skip, symlinks=True)
    return folder / "tree"


def run_pytest(tree: Path, arguments: Sequence[str], plugins: Sequence[object] = ()) -> int:
    """pytest on a copy of the tree, in this process, which must be a fork."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("tests", "hf_dataopt", "conftest"):
            del sys.modules[name]
    here = {"", str(REPO)}
    sys.path[:] = [str(tree), *(one for one in sys.path if one not in here)]
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    os.chdir(tree)
    return int(pytest.main([*_OPTIONS, "--rootdir", str(tree), *arguments], plugins=list(plugins)))


def in_fork(work: Callable[[], int], log: Path, seconds: float) -> int | None:
    """Exit status of `work` in a forked process, None if it had to be stopped after so many CPU seconds.

    Wall time says nothing on a busy machine; twenty times as much of it only ends what waits for ever.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 10))
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                status = work()
        finally:
            os._exit(status)
    end, found, status = time.monotonic() + 20 * seconds, 0, 0
    while not found and time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the test left behind, too
    if not found:
        os.waitpid(child, 0)
        return None
    ended = os.waitstatus_to_exitcode(status)
    return None if ended in (-signal.SIGXCPU, -signal.SIGKILL) else ended
