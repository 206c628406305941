"""What `hf-dataopt --version` and errors tell: the releases in use, and the range that was tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from hf_dataopt import versions

from .conftest import REPO


def test_the_floor_of_the_project_is_the_first_tested_release() -> None:
    tested = [tuple(map(int, release.split("."))) for release in versions.TESTED_TRANSFORMERS]
    assert tested == sorted(set(tested)) and len(tested) >= 4
    needed = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"transformers>={versions.TESTED_TRANSFORMERS[0]}" in needed


def test_every_package_has_a_version() -> None:
    found = versions.installed()
    assert list(found) == ["torch", "transformers", "peft", "datasets", "accelerate", "huggingface-hub"]
    assert all(re.match(r"\d+\.\d+", number) for number in found.values())


def test_the_module_in_use_is_believed_before_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("transformers")
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    assert versions.installed()["transformers"] == metadata.version("transformers")  # it tells no version
    stand_in.__version__ = "9.9.9"  # type: ignore[attr-defined]
    assert versions.installed()["transformers"] == "9.9.9"
    assert "transformers 9.9.9, " in versions.describe()


def test_a_missing_package_is_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "PACKAGES", ("torch", "no-such-package"))
    assert versions.installed()["no-such-package"] == versions.NOT_INSTALLED


def test_one_line_with_the_tested_range() -> None:
    line = versions.describe()
    first, last = versions.TESTED_TRANSFORMERS[0], versions.TESTED_TRANSFORMERS[-1]
    assert "\n" not in line and line.endswith(f"tested with transformers {first} to {last}")


def test_a_folder_in_front_on_the_path_counts(tmp_path: Path) -> None:
    about = tmp_path / "transformers-1.2.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 1.2.3\n")
    code = "import sys; from hf_dataopt import versions; print(versions.describe()); print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    told = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
    assert "transformers 1.2.3, " in told and told.splitlines()[1] == "False"
