"""The source distribution is whole: who unpacks it can read, test, measure and build everything."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from .conftest import REPO

# what a checkout holds beside them is made, or fetched
WHOLE = ("hf_dataopt", "model_cards", "examples", "docs", "tests", "benchmarks", ".github", ".ci")
KINDS = (".py", ".md", ".ipynb", ".png", ".json", ".jinja", ".safetensors", ".yml", ".css", ".typed")
SINGLE = (
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    "Makefile",
    "mkdocs.yml",
)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    if find_spec("hatchling") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("hatchling is missing; it belongs to the extra `test`")
        pytest.skip("building needs hatchling")
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    done = subprocess.run(build, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as made:
        return {name.partition("/")[2] for name in made.getnames()}


def test_everything_is_in_it(names: set[str]) -> None:
    wanted = set(SINGLE) | {"pyproject.toml"}
    for folder in WHOLE:
        for path in (REPO / folder).rglob("*"):
            made = "__pycache__" in path.parts or path.name.endswith("_smoke.json") or ".data" in path.parts
            if path.is_file() and path.suffix in KINDS and not made:
                wanted.add(path.relative_to(REPO).as_posix())
    assert not wanted - names


def test_nothing_else_is_in_it(names: set[str]) -> None:
    made = (
        "__pycache__",
        ".venv",
        "build/",
        "dist/",
        ".pytest_cache",
        ".data",
        "demo_output",
        ".hypothesis",
        "_smoke.json",
    )
    assert not [name for name in names if any(word in name for word in made)]
    assert all(Path(name).parts[0] in (*WHOLE, *SINGLE, "pyproject.toml", "PKG-INFO", ".gitignore") for name in names)
