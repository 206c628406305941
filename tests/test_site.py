"""The documentation site: built strictly, with every public name and option on it, and a search index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_dataopt
from hf_dataopt.cli import COMMANDS

from .conftest import REPO


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None or find_spec("material") is None:
        message = "no mkdocs here: pip install '.[docs]'"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(REPO), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, capture_output=True, text=True, cwd=REPO, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_public_name_has_its_place(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    for name, module in hf_dataopt._PUBLIC.items():
        assert f'id="{module}.{name}"' in pages, name


def test_docstrings_are_read_by_their_headings(site: Path) -> None:
    page = (site / "api" / "kvzip.html").read_text(encoding="utf-8")
    assert "<strong>Source:</strong> " in page and "<strong>Cost:</strong>" in page
    assert '<span class="gp">&gt;&gt;&gt; </span>' in page  # an example is code, not a quotation
    assert "<code>`list`</code>" not in page


def test_commands_are_written_out(site: Path) -> None:
    page = (site / "command_line.html").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f'id="hf-dataopt-{name}"' in page
    assert "--keep-ratio" in page and "--label-column" in page and "<!-- commands -->" not in page


def test_files_of_the_repository_come_along(site: Path) -> None:
    page = (site / "methods" / "kvzip.html").read_text(encoding="utf-8")
    assert 'href="../figures.html#scores"' in page
    example = site / "repository" / "examples" / "dataset_doctor.py"
    assert example.read_bytes() == (REPO / "examples" / "dataset_doctor.py").read_bytes()
    assert 'href="../repository/examples/dataset_doctor.py"' in (site / "methods" / "relation.html").read_text()


def test_search_finds_words_of_pages_and_docstrings(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    for words in ("near duplicates", "max_kv_tokens", "Reporting"):
        assert any(words in entry["text"] or words in entry["title"] for entry in index), words


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in page and '<script src="http' not in page
