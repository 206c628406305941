"""One local Hub and two processes for all artifacts: one pushes everything, a fresh one loads everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import REPO
from ..hub_server import HubServer


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    """A Hub that lives as long as the tests."""
    with HubServer() as server:
        yield server


@pytest.fixture
def own_hub() -> Iterator[HubServer]:
    """A Hub that a test may break."""
    with HubServer() as server:
        yield server


def python(code: str, hub: HubServer, home: Path, *, token: str | None = "hf_dummy", **extra: str) -> dict[str, Any]:
    """Run code in a fresh process against a Hub; it prints one JSON object as its last line."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {**hub.env(token), "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **extra}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=home, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def digest_code() -> str:
    """Source of `digest`, a hash of tensors, arrays and bytes, shared by the two processes."""
    return """
import hashlib, json, torch, numpy as np
def digest(*values):
    found = hashlib.sha256()
    for value in values:
        value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        found.update(str((value.dtype, value.shape)).encode() + np.ascontiguousarray(value).tobytes())
    return found.hexdigest()
"""
