"""The wheel carries the card templates: built from this checkout, unpacked elsewhere, used from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hf_dataopt.publishing.kinds import KINDS

from ..conftest import REPO

CARDS = [name for name, kind in KINDS.items() if kind.repo_type]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else."""
    if find_spec("hatchling") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("hatchling is missing; it belongs to the extra `test`")
        pytest.skip("building the wheel needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(REPO)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "site"


def test_every_kind_has_a_template(site: Path) -> None:
    shipped = {path.name.removesuffix(".md.jinja") for path in (site / "hf_dataopt" / "model_cards").iterdir()}
    assert shipped == set(CARDS) == {path.name.split(".")[0] for path in (REPO / "model_cards").iterdir()}


def test_cards_render_from_the_wheel(site: Path, tmp_path: Path) -> None:
    code = """
import json, sys, torch, hf_dataopt
from pathlib import Path
from hf_dataopt.publishing import cards
from hf_dataopt.kvzip.head_scores import load_head_scores, save_head_scores
folder = save_head_scores(torch.ones(2, 2), Path("scores"), model_id="a/model")
assert torch.equal(load_head_scores(folder)[0], torch.ones(2, 2))
print(json.dumps([hf_dataopt.__file__, (folder / "README.md").read_text(), [cards.template(n) for n in sys.argv[1:]]]))
"""
    env = {**os.environ, "PYTHONPATH": str(site)}
    call = [sys.executable, "-c", code, *CARDS]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    where, card, templates = json.loads(done.stdout)
    assert where.startswith(str(site))
    assert "# KVzip head scores" in card and all(templates)


def test_the_command_runs_from_the_wheel(site: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(site)}
    call = [sys.executable, str(site / "bin" / "hf-dataopt"), "push", "--help"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "--create-pr" in done.stdout
