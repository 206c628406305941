"""Imports point one way: commands -> methods -> shell -> text, routing, publishing -> the root; no circles.

An import inside a function counts like any other, and so does one for type checkers alone.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .conftest import REPO

PACKAGE = REPO / "hf_dataopt"
METHODS = ("mixup", "relation", "condensation", "ccm", "kvzip")
BELOW = ("text", "routing", "publishing")
SHELL = "shell"  # what the methods' commands share; it may name what is below
# files that may name any method: the lazy public names, the command line, the demo
ABOVE = ("__init__", "cli", "demo")
MOST_FILES = 14


def _name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for path in PACKAGE.rglob("*.py")}


def _module(name: str) -> str | None:
    """The file that `import name` loads last, of ours; a name out of a file is that file."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


def _imports(name: str) -> set[str]:
    """Files of ours that a file imports anywhere in it; a room's `__init__` is loaded with each of them and says nothing."""
    path, found = FILES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            steps = package.split(".")
            base = ".".join(steps[: len(steps) + 1 - node.level]) if node.level else ""
            start = ".".join(part for part in (base, node.module or "") if part)
            found |= {f"{start}.{alias.name}" for alias in node.names}
    ours = {_module(one) for one in found if one.split(".")[0] == "hf_dataopt"}
    return {one for one in ours if one is not None} - {name}


IMPORTS = {name: _imports(name) for name in FILES}


def _defined(name: str) -> set[str]:
    """Names that a file gives: functions, classes, variables, fields of `self`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


OWN = set().union(*map(_defined, FILES))


def _room(name: str) -> str:
    """The room of a file; a file of the root stands for itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _floor(name: str) -> int:
    room = _room(name)
    return 4 if room in ABOVE else 3 if room in METHODS else 2 if room == SHELL else 1 if room in BELOW else 0


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_down(name: str) -> None:
    if (
        _room(name) == "evaluate_modules"
    ):  # scripts that `evaluate.load` copies away; they name the package from outside
        return
    up = {other for other in IMPORTS[name] if _floor(other) > _floor(name)}
    assert not up, f"{name} imports {sorted(up)}, which stand above it"


@pytest.mark.parametrize("name", sorted(name for name in FILES if _room(name) in METHODS))
def test_no_method_imports_another(name: str) -> None:
    others = {other for other in IMPORTS[name] if _room(other) in METHODS and _room(other) != _room(name)}
    assert not others, f"{name} imports {sorted(others)}; what two methods need moves down"


@pytest.mark.parametrize("name", sorted(name for name in FILES if _room(name) in BELOW))
def test_rooms_below_the_methods_do_not_know_each_other(name: str) -> None:
    others = {other for other in IMPORTS[name] if _room(other) in BELOW and _room(other) != _room(name)}
    assert not others, f"{name} imports {sorted(others)}"


@pytest.mark.parametrize("name", sorted(name for name in FILES if _room(name) in ("ccm", "kvzip", "routing")))
def test_private_names_of_peft_and_transformers_live_in_compat(name: str) -> None:
    """Each has its reason there; what a file reads under a leading underscore elsewhere is ours, or torch's lists of hooks."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    foreign = {one for one in read if one.startswith("_") and not one.startswith(("__", "_hf_dataopt"))} - OWN
    calls = [
        node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    overridden = {one.attr for one in calls if ast.unparse(one.value) == "super()"}
    assert not foreign - overridden - {"_forward_hooks", "_forward_pre_hooks"}


def test_no_circle_among_files() -> None:
    left = {name: set(others) for name, others in IMPORTS.items()}
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other, or what does: {sorted(left)}"


def test_every_room_has_its_floor() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == {*METHODS, *BELOW, SHELL, "demo", "_compat"}


def test_the_root_is_small() -> None:
    found = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(found) <= MOST_FILES, found


def test_the_reader_of_imports_sees_them() -> None:
    """Of the three forms, at both depths."""
    assert "hf_dataopt.ccm.tuner" in IMPORTS["hf_dataopt.ccm.plugin"]  # inside a function
    assert "hf_dataopt.routing.dispatch" in IMPORTS["hf_dataopt.ccm.tuner"]  # from two dots
    assert "hf_dataopt.publishing.cards" in IMPORTS["hf_dataopt.publishing.writer"]  # from one dot, a module
    assert "hf_dataopt.ccm.memory" in IMPORTS["hf_dataopt.ccm.saved"]
