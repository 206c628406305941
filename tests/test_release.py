"""What a release changes before it is built: every link of the README leads somewhere from the package index."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from .conftest import REPO

HOME, TAG = "https://git.example/me/hf_dataopt", "v0.2.0"


def test_links_and_addresses_for_the_index(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text((REPO / name).read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, str(REPO / ".ci" / "for_the_index.py"), HOME, TAG], cwd=tmp_path, check=True)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    before = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", (REPO / "README.md").read_text(encoding="utf-8"))
    assert len(links) == len(before) > 20
    pictures = 0
    for (picture, target), old in zip(links, before, strict=True):
        if old.startswith("#"):
            assert target == old
            continue
        place = f"{HOME}/{'raw' if picture else 'blob'}/{TAG}/"
        assert target == place + old and (REPO / old.partition("#")[0]).is_file()
        pictures += bool(picture)
    assert pictures == 4
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project.pop("urls")["Changelog"] == f"{HOME}/blob/{TAG}/CHANGELOG.md" and project == own


def test_the_workflow_of_a_release_does_so() -> None:
    steps = (REPO / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert 0 < steps.index(".ci/for_the_index.py") < steps.index("python -m build")
