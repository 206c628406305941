"""What `import hf_dataopt` promises: light, lazy, documented names."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import hf_dataopt

from .conftest import REPO


@pytest.mark.parametrize("name", [name for name in hf_dataopt.__all__ if name != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    public = getattr(hf_dataopt, name)
    assert inspect.getdoc(public)
    if inspect.isclass(public):
        for method, value in vars(public).items():
            if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod)):
                assert inspect.getdoc(value), f"{name}.{method} has no docstring"


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="KVzipCache"):
        hf_dataopt.KVZipCache  # noqa: B018


def test_import_is_light() -> None:
    code = (
        "import sys, hf_dataopt; heavy = {'torch', 'transformers', 'datasets', 'peft', 'matplotlib'} & set(sys.modules); "
        "print(sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("old", "new"), hf_dataopt._MOVED.items())
def test_moved_modules_are_found_by_their_old_names(old: str, new: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {new}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__spec__ is not None and module.__spec__.name == module.__name__ == new
