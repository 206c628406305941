"""Type checkers catch what users mistype, and complain of nothing that is right: mypy, and pyright (as basedpyright)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from hf_dataopt import CoMixupConfig, IDCConfig, KVzipConfig, PuzzleMixConfig, RelationConfig
from hf_dataopt.condensation.fields import IDCFields
from hf_dataopt.kvzip.fields import KVzipFields
from hf_dataopt.mixup.fields import CoMixupFields, PuzzleMixFields
from hf_dataopt.relation.fields import RelationFields

from .conftest import REPO

CASES = REPO / "tests" / "typing_cases"
Found = dict[str, set[int]]


def _mypy(folder: Path) -> Found:
    # what these would add is time: none of our own signatures depends on them
    skipped = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("transformers", "datasets", "peft", "PIL")
    )
    (folder / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n{skipped}")
    call = [sys.executable, "-m", "mypy", "--no-incremental", "--no-pretty", "--hide-error-context"]
    call += ["--config-file", "mypy.ini", "right.py", "wrong.py"]
    environment = {"MYPYPATH": str(REPO), "PATH": "", "HOME": str(folder)}
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: Found = {"right.py": set(), "wrong.py": set()}
    for line in done.stdout.splitlines():
        if ": error:" in line:
            name, number, _ = line.split(":", 2)
            found[name].add(int(number))
    return found


def _pyright(folder: Path) -> Found:
    checker = shutil.which("basedpyright", path=str(Path(sys.executable).parent))
    if checker is None:
        pytest.skip("basedpyright is not installed")
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(REPO)], "include": ["right.py", "wrong.py"]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    call = [checker, "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    found: Found = {"right.py": set(), "wrong.py": set()}
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        if one["severity"] == "error":
            found[Path(one["file"]).name].add(one["range"]["start"]["line"] + 1)
    return found


@pytest.mark.parametrize("checker", [_mypy, _pyright])
def test_mistakes_are_caught_and_nothing_else(checker: Any, tmp_path: Path) -> None:
    for name in ("right.py", "wrong.py"):
        shutil.copy(CASES / name, tmp_path)
    lines = (CASES / "wrong.py").read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if "# misuse" in line}
    assert len(marked) >= 12 and len((CASES / "right.py").read_text().splitlines()) >= 100
    found = checker(tmp_path)
    assert found["wrong.py"] == marked
    assert found["right.py"] == set()


@pytest.mark.parametrize(
    ("config", "keywords"),
    [
        (RelationConfig, RelationFields),
        (IDCConfig, IDCFields),
        (KVzipConfig, KVzipFields),
        (PuzzleMixConfig, PuzzleMixFields),
        (CoMixupConfig, CoMixupFields),
    ],
)
def test_keywords_are_the_fields_of_the_config(config: Any, keywords: Any) -> None:
    names = [field.name for field in fields(config)]
    hints = get_type_hints(config)
    assert get_type_hints(keywords) == {name: hints[name] for name in names}
