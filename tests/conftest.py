"""Shared test set-up: one thread, the golden folder, small offline models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from .counts import keep

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: our kernels are tested on a CPU then

REPO = Path(__file__).resolve().parent.parent


def golden_root() -> Path:
    """Folder of recorded reference outputs: `HF_DATAOPT_GOLDEN`, by default `../shared/golden` beside the checkout."""
    return Path(os.environ.get("HF_DATAOPT_GOLDEN", REPO.parent / "shared" / "golden"))


def golden_files(kind: str, pattern: str) -> list[Path]:
    """Every golden file of one kind; used to parametrize tests. Empty where the folder is missing."""
    return sorted((golden_root() / kind).glob(pattern))


def golden_params(kind: str, pattern: str) -> list[object]:
    """`golden_files` as pytest parameters; one placeholder that fails (CI) or skips where there are none."""
    files = golden_files(kind, pattern)
    return [pytest.param(path, id=path.stem) for path in files] or [pytest.param(None, id="golden-folder-missing")]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Path:
    """One golden file; parametrize indirectly: `@pytest.mark.parametrize("golden", golden_params(...), indirect=True)`."""
    if request.param is None:
        message = f"no golden files in {golden_root()}; set HF_DATAOPT_GOLDEN to the folder that holds them"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not hasattr(session.config, "workerinput"):  # one of several processes has but some of the rows
        keep(int(exitstatus), session.testscollected)
