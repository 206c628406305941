"""The README keeps its promises: its code runs as written, and the functions of its equation map are documented."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from .conftest import REPO
from .models import byte_tokenizer, tiny_model

README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MAPPED = re.findall(r"\| `(hf_dataopt\.[\w.]+)` \|", README)


def test_python_block_runs_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 1
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    names = {"name": str(tmp_path), "context": "The sky is green here.", "questions": ["What colour?", "Where?"]}
    code = BLOCKS[0].replace("max_new_tokens=64", "max_new_tokens=3")
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out.count("\n") >= 2


def test_quick_start_is_at_most_ten_lines() -> None:
    assert all(len(block.strip().splitlines()) <= 10 for block in BLOCKS)


@pytest.mark.parametrize("path", MAPPED)
def test_equation_map_names_documented_functions(path: str) -> None:
    module, name = path.rsplit(".", 1)
    assert (getattr(import_module(module), name).__doc__ or "").strip()


def test_the_two_commands_exist() -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    assert "make test" in (REPO / ".ci" / "run").read_text(encoding="utf-8")
