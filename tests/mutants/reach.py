"""Which test reaches which line in how many CPU seconds: measured once for each test file, carried over when lines move."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from . import REPO
from .changes import Mutant
from .forks import in_fork, run_pytest

_SLOWEST = 60.0  # CPU seconds of tests that one change may meet, as measured without it
_BESIDE = 15.0  # and of those of them that reach only other lines of the module
# run everything in fresh processes, which coverage does not follow, for one fixture that all tests of the file share
_BY_PROCESS = {"publishing/": ("tests/hub/test_failures.py", "tests/hub/test_round_trip.py")}
_SETUP = "|setup"  # the context of a test's fixtures: what they make may be looked at by any test of the file
Test = tuple[str, float]  # node id, seconds


class _Reach:
    """pytest plugin: CPU seconds of each test, those of processes it waits for included; each test is a coverage context."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.not_passed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        began = sum(os.times()[:4])
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = round(sum(os.times()[:4]) - began, 2)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid + _SETUP)
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.not_passed.add(report.nodeid)


def _measured(tree: Path, test_file: str, modules: Sequence[str]) -> dict[str, Any]:
    """Lines by module and test, seconds by test, and the modules that were loaded, for one test file."""

    def work() -> int:
        import coverage

        watched = [str(tree / "hf_dataopt" / name) for name in modules]
        cover = coverage.Coverage(data_file=None, include=watched, config_file=False)
        plugin = _Reach(cover)
        cover.start()
        status = run_pytest(tree, [test_file, "--maxfail=1000"], [plugin])
        cover.stop()
        data = cover.get_data()
        lines = {name: data.contexts_by_lineno(path) for name, path in zip(modules, watched, strict=True)}
        found = {
            "seconds": {name: took for name, took in plugin.seconds.items() if name not in plugin.not_passed},
            "lines": {
                name: {line: sorted(filter(None, found)) for line, found in by.items()} for name, by in lines.items()
            },
            "loaded": [name for name in sys.modules if name.split(".")[0] not in ("tests", "hf_dataopt", "conftest")],
        }
        (tree / "reach.json").write_text(json.dumps(found))
        return status

    status = in_fork(work, tree / "log.txt", 1800)
    if status not in (0, 1, 5):
        raise SystemExit(f"{test_file} ended with {status}:\n{(tree / 'log.txt').read_text()[-3000:]}")
    return json.loads((tree / "reach.json").read_text())


def load_modules(names: Sequence[str]) -> None:
    """Import what the tests import, so that forks have it; what cannot be imported by name is left to them."""
    for name in names:
        if name in sys.modules or name.startswith(("coverage", "_", "__")):
            continue
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _moved(lines: dict[str, list[str]], before: str, now: str) -> dict[str, list[str]]:
    """What reached each line of a module that has changed since, under the line's new number."""
    moved: dict[str, list[str]] = {}
    blocks = difflib.SequenceMatcher(None, before.splitlines(), now.splitlines(), autojunk=False).get_matching_blocks()
    for block in blocks:
        for i in range(block.size):
            if str(block.a + i + 1) in lines:
                moved[str(block.b + i + 1)] = lines[str(block.a + i + 1)]
    return moved


def measure(store: Path, tree: Path, tests: Sequence[str], modules: Sequence[str]) -> dict[str, Any]:
    """What `store` knows, after measuring the test files that are new or were edited; written after each of them."""
    known = json.loads(store.read_text()) if store.exists() else {"sources": {}, "files": {}}
    files: dict[str, Any] = {name: found for name, found in known["files"].items() if (tree / name).is_file()}
    known["files"] = files
    for name in modules:
        now = (REPO / "hf_dataopt" / name).read_text(encoding="utf-8")
        before = known["sources"].setdefault(name, now)
        if now != before:
            for file in files.values():
                file["lines"][name] = _moved(file["lines"].get(name, {}), before, now)
            known["sources"][name] = now
    store.parent.mkdir(parents=True, exist_ok=True)
    for target in tests:
        for path in [tree / target] if target.endswith(".py") else sorted((tree / target).rglob("test_*.py")):
            name, digest = path.relative_to(tree).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()
            if files.get(name, {}).get("digest") == digest:
                continue
            load_modules([one for file in files.values() for one in file["loaded"]])
            files[name] = _measured(tree, name, modules) | {"digest": digest}
            store.write_text(json.dumps(known))
            took = files[name]["seconds"].values()
            print(f"{name}: {len(took)} tests, {sum(took):.0f} CPU seconds", flush=True)
    return known


def tests_for(mutant: Mutant, reach: dict[str, Any], slowest: float = _SLOWEST, beside: float = _BESIDE) -> list[Test]:
    """Tests that reach the line, quickest first, then tests that reach other lines of the module.

    The latter for what is computed once and kept (a cache, a constant) and for lines that run at import. Last, whatever the
    seconds, files that are known to reach the module in processes of their own (`_BY_PROCESS`).
    """
    seconds: dict[str, float] = {}
    direct: set[str] = set()
    others: set[str] = set()
    for file in reach["files"].values():
        lines = file["lines"].get(mutant.module, {})
        seconds |= file["seconds"]
        here = lines.get(str(mutant.line), [])
        direct |= set(here)
        others |= {name for found in lines.values() for name in found}
        if any(name.endswith(_SETUP) for name in here):
            others |= set(file["seconds"])
    chosen, total = [], 0.0
    for found, most in ((direct, slowest), (others - direct, beside if direct else slowest)):
        spent = 0.0
        for name in sorted(found & set(seconds), key=lambda name: (seconds[name], name)):
            spent, total = spent + seconds[name], total + seconds[name]
            if chosen and (spent > most or total > slowest):
                break
            chosen.append((name, seconds[name]))
    apart = [file for room, files in _BY_PROCESS.items() if mutant.module.startswith(room) for file in files]
    found = {name for file in apart for name in reach["files"].get(file, {"seconds": {}})["seconds"]}
    return chosen + [(name, seconds[name]) for name in sorted(found - {name for name, _ in chosen})]
