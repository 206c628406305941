"""One local Hub and two processes for all artifacts: one pushes everything, a fresh one loads everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..conftest import REPO
from ..hub_server import HubServer


def process(arguments: list[str], cwd: Path, **env: str) -> Any:
    """Run Python in a fresh process that knows of no Hub but what `env` says; it prints one JSON value as its last line."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **env}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=kept)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def python(code: str, hub: HubServer, home: Path, *, token: str | None = "hf_dummy", **extra: str) -> Any:
    """Run code in a fresh process against a Hub; it prints one JSON value as its last line."""
    return process(["-c", code], home, **{**hub.env(token), "HF_HOME": str(home), **extra})


@dataclass(frozen=True)
class Published:
    """A Hub that holds one artifact of each kind, and what the two processes found in them."""

    hub: HubServer
    pushed: dict[str, str]
    loaded: dict[str, str]
    cards: dict[str, str]
    infos: dict[str, Any]


# one card of each kind, and those that `--push-to-hub` wrote
SHELL = ["me/shell-cache", "me/shell-memory", "me/shell-idc"]
SHOWN = [
    "me/idc-uint8",
    "me/cleaned",
    "me/cache",
    "me/heads",
    "me/gates",
    "me/ccm",
    "me/plain-ccm",
    "me/memory",
    "me/stream",
    *SHELL,
]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """Everything pushed by one process and loaded by a fresh one."""
    with HubServer() as hub:
        start = "import json, sys; from pathlib import Path; from tests.hub import everything as every\n"
        push = start + "found = every.push_all(Path('.').resolve()); print(json.dumps(found))"
        pushed = python(push, hub, tmp_path_factory.mktemp("writer"))
        load = start + f"names = {SHOWN!r}; infos = every.infos(names); found = every.load_all()\n"
        load += "print(json.dumps([infos, found, every.run_cards(names)]))"
        infos, loaded, cards = python(load, hub, tmp_path_factory.mktemp("reader"))
        yield Published(hub, pushed, loaded, cards, infos)
