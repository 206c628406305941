"""The examples of docstrings run and give what they say; every public name has one."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pytest
import torch

import hf_dataopt

from .ccm.models import adapted
from .models import byte_tokenizer, tiny_model

# scripts that `evaluate` copies away, and the command itself
_LEFT = ("hf_dataopt.evaluate_modules", "hf_dataopt.cli")
_ROOT = Path(hf_dataopt.__path__[0])
_NAMES = {
    found.name: _ROOT.joinpath(*found.name.split(".")[1:]) for found in walk_packages([str(_ROOT)], "hf_dataopt.")
}
MODULES = [
    name
    for name, path in _NAMES.items()
    if not name.startswith(_LEFT) and path.with_suffix(".py").is_file() and ">>>" in path.with_suffix(".py").read_text()
]


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """Names that examples use without making them: a language model, its tokenizer, one with a CCM adapter, a text."""
    return {
        "model": tiny_model("llama", max_position_embeddings=4096),
        "tokenizer": byte_tokenizer(),
        "adapted": adapted(),
        "context": "Anna lives in Oslo. Her cat is called Tom. The key of room 12 is red. " * 3,
        "torch": torch,
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(import_module(name), extraglobs=given, optionflags=flags).failed == 0


@pytest.mark.parametrize("name", sorted(set(hf_dataopt.__all__) - {"__version__"}))
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(hf_dataopt, name).__doc__ or "")
