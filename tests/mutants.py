"""`make mutants`: how many one-point changes of the numerics, the files and the routing the tests notice (not part of CI).

A seeded sample of changes (comparison, operator, 0/1/2, and/or: cosmic-ray's operators) is made one at a time in a copy of the
tree. Once at the start every test runs under coverage, so that a change only meets the tests that reach its line, quickest
first; each change is tried in a fork of one process that has loaded what the tests import. (cosmic-ray's own runner edits the
working tree and starts a whole `pytest` for each change; mutmut rewrites every function, which spawned processes do not see.)

    python -m tests.mutants                                   # map the tests, then 200 changes
    python -m tests.mutants --modules publishing/safe_files.py --sample 20
    python -m tests.mutants --again                           # the survivors of the last run once more
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results" / "mutants.json"
EQUIVALENT = REPO / "tests" / "mutants_equivalent.json"
REACH = REPO / "build" / "mutants_reach.json"  # which test reaches which line, in how many seconds
# those of which most survived when this was measured first come first
MODULES = [
    "publishing/safe_files.py",
    "mixup/transport.py",
    "condensation/evaluation.py",
    "publishing/*.py",
    "routing/*.py",
    "metrics.py",
    "mixup/graph_cut.py",
    "mixup/cells.py",
    "mixup/co_mixup_sweeps.py",
    "mixup/co_mixup_solver.py",
    "mixup/puzzle_mix.py",
    "relation/kernel.py",
    "relation/label_noise.py",
    "relation/outlier.py",
    "relation/relation_map.py",
    "relation/baselines.py",
    "relation/combined.py",
    "condensation/matching.py",
    "condensation/multi_formation.py",
    "condensation/augment.py",
    "condensation/pooled_norm.py",
    "ccm/attention.py",
    "ccm/memory.py",
    "ccm/turns.py",
    "kvzip/attention.py",
    "kvzip/scoring.py",
    "kvzip/eviction.py",
    "kvzip/rules.py",
    "kvzip/weights.py",
    "kvzip/scores/h2o.py",
    "kvzip/scores/snapkv.py",
    "kvzip/scores/expected_attention.py",
]
TESTS = [
    "tests/publishing",
    "tests/test_metrics.py",
    "tests/mixup",
    "tests/relation",
    "tests/routing",
    "tests/condensation",
    "tests/ccm",
    "tests/kvzip",
    "tests/hub/test_hostile.py",
    "tests/hub/test_round_trip.py",
    "tests/hub/test_failures.py",
    "tests/faults/test_bad_data.py",
]
# what each operator may become: the boundary and the opposite of a comparison, the next number, the neighbouring operator
CHANGES = [
    *("ReplaceComparisonOperator_" + pair for pair in ["Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt"]),
    *("ReplaceComparisonOperator_" + pair for pair in ["Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Is_IsNot", "IsNot_Is"]),
    *(
        "ReplaceBinaryOperator_" + pair
        for pair in ["Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul"]
    ),
    *("ReplaceBinaryOperator_" + pair for pair in ["Pow_Mul", "BitOr_BitAnd", "BitAnd_BitOr"]),
    *("NumberReplacer", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
]
SLOWEST = 60.0  # seconds of tests that one change may meet, as measured without it
Test = tuple[str, float]  # node id, seconds


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change at one place."""

    module: str  # below hf_dataopt/
    line: int
    column: int
    operator: str
    occurrence: int
    text: str  # the line as it stands
    changed: str  # and as it becomes

    def code(self) -> str:
        return _changed(self.module, self.operator, self.occurrence)


def _changed(module: str, operator: str, occurrence: int) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (REPO / "hf_dataopt" / module).read_bytes()
    return mutate_code(source, get_operator(f"core/{operator}")(), occurrence)


def _left_out(tree: ast.AST) -> Iterator[tuple[int, int, int, int]]:
    """Spans that no test can notice: annotations, and what only words a message."""
    for node in ast.walk(tree):
        inner = [getattr(node, name, None) for name in ("annotation", "returns")]
        inner += [node] if isinstance(node, ast.JoinedStr) else []
        for one in filter(None, inner):
            yield one.lineno, one.col_offset, one.end_lineno, one.end_col_offset


def mutants_of(module: str) -> list[list[Mutant]]:
    """Every change of one module, grouped by the place it is made at."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    path = REPO / "hf_dataopt" / module
    source = path.read_text(encoding="utf-8")
    left_out, lines = list(_left_out(ast.parse(source))), source.splitlines()
    places: dict[tuple[int, int], list[Mutant]] = {}
    for name in CHANGES:
        operator = get_operator(f"core/{name}")()
        found = [(node, place) for node in ast_nodes(get_ast(source)) for place in operator.mutation_positions(node)]
        for occurrence, (node, ((line, column), _)) in enumerate(found):
            if any((a, b) <= (line, column) < (c, d) for a, b, c, d in left_out):
                continue
            if name == "NumberReplacer" and node.value not in ("0", "1", "2"):
                continue
            if node.parent is not None and node.parent.type in ("parameters", "lambdef"):
                continue  # the lone star of a signature
            changed = _changed(module, name, occurrence)
            with contextlib.suppress(SyntaxError):
                compile(changed, module, "exec")
                places.setdefault((line, column), []).append(
                    Mutant(
                        module=module,
                        line=line,
                        column=column,
                        operator=name,
                        occurrence=occurrence,
                        text=lines[line - 1].strip(),
                        changed=changed.splitlines()[line - 1].strip(),
                    )
                )
    return [places[key] for key in sorted(places)]


def sample(modules: Sequence[str], size: int, seed: int) -> list[Mutant]:
    """`size` places drawn without return, each with one of its changes, in the order of the modules."""
    chance = random.Random(seed)
    places = [place for module in modules for place in mutants_of(module)]
    drawn = chance.sample(places, min(size, len(places)))
    one_each = [chance.choice(place) for place in drawn]
    return sorted(one_each, key=lambda mutant: (modules.index(mutant.module), mutant.line, mutant.column))


def chosen_modules(patterns: Sequence[str]) -> list[str]:
    """Module paths below hf_dataopt/, in the order of the patterns."""
    root, found = REPO / "hf_dataopt", []
    for pattern in patterns:
        found += [path.relative_to(root).as_posix() for path in sorted(root.glob(pattern))]
    return [name for name in dict.fromkeys(found) if not name.endswith("__init__.py")]


class _Reach:
    """pytest plugin: seconds of each test that passes; under coverage, each test is a context."""

    def __init__(self, coverage: Any = None) -> None:
        self.coverage, self.seconds, self.not_passed = coverage, {}, set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.coverage is not None:
            self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if not report.passed:
            self.not_passed.add(report.nodeid)


def _run_pytest(tree: Path, arguments: Sequence[str], plugins: Sequence[object] = ()) -> int:
    """pytest on a copy of the tree, in this process, which must be a fork."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("tests", "hf_dataopt"):
            del sys.modules[name]
    here = {"", str(REPO)}
    sys.path[:] = [str(tree), *(one for one in sys.path if one not in here)]
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    os.chdir(tree)
    options = [
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--hypothesis-seed=0",
        "--tb=line",
        "--rootdir",
        str(tree),
    ]
    return int(pytest.main([*options, *arguments], plugins=list(plugins)))


def in_fork(work: Callable[[], int], log: Path, limit: float) -> int | None:
    """Exit status of `work` in a forked process, None if it had to be stopped after `limit` seconds."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                status = work()
        finally:
            os._exit(status)
    end, found, status = time.monotonic() + limit, 0, 0
    while not found and time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the test left behind, too
    if not found:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def measure(tree: Path, tests: Sequence[str], modules: Sequence[str]) -> dict[str, Any]:
    """Run every test once: which lines of which module it reaches, its seconds, what it imports."""

    def work(target: str) -> int:
        import coverage

        watched = [str(tree / "hf_dataopt" / name) for name in modules]
        cover = coverage.Coverage(data_file=None, include=watched)
        plugin = _Reach(cover)
        cover.start()
        status = _run_pytest(tree, [target, "--maxfail=1000"], [plugin])
        cover.stop()
        data, lines = cover.get_data(), {}
        for name, path in zip(modules, watched, strict=True):
            by_line = data.contexts_by_lineno(path)
            lines[name] = {line: [one for one in tests if one] for line, tests in by_line.items()}
        seconds = {name: round(took, 2) for name, took in plugin.seconds.items() if name not in plugin.not_passed}
        loaded = [name for name in sys.modules if name.split(".")[0] not in ("tests", "hf_dataopt", "conftest")]
        (tree / "reach.json").write_text(json.dumps({"lines": lines, "seconds": seconds, "loaded": loaded}))
        return status

    reach: dict[str, Any] = {"lines": {name: {} for name in modules}, "seconds": {}, "loaded": []}
    for target in tests:
        began = time.monotonic()
        status = in_fork(lambda target=target: work(target), tree / "log.txt", 3600)  # type: ignore[misc]
        if status not in (0, 1):
            raise SystemExit(f"{target} ended with {status}:\n{(tree / 'log.txt').read_text()[-3000:]}")
        part = json.loads((tree / "reach.json").read_text())
        reach["seconds"] |= part["seconds"]
        reach["loaded"] = list(dict.fromkeys([*reach["loaded"], *part["loaded"]]))
        for name, lines in part["lines"].items():
            for line, found in lines.items():
                reach["lines"][name].setdefault(line, []).extend(found)
        print(f"{target}: {len(part['seconds'])} tests in {time.monotonic() - began:.0f} s", flush=True)
    return reach


def merged(known: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """What was known of other tests, and what is now known of those that were run."""
    if known is None:
        return new
    again = {name.partition("::")[0] for name in new["seconds"]}
    both: dict[str, Any] = {"loaded": list(dict.fromkeys([*known["loaded"], *new["loaded"]])), "lines": new["lines"]}
    both["seconds"] = {name: took for name, took in known["seconds"].items() if name.partition("::")[0] not in again}
    both["seconds"] |= new["seconds"]
    for module, lines in known["lines"].items():
        for line, tests in lines.items():
            kept = [name for name in tests if name.partition("::")[0] not in again]
            both["lines"].setdefault(module, {}).setdefault(line, []).extend(kept)
    return both


def tests_for(mutant: Mutant, reach: dict[str, Any], most: float = SLOWEST) -> list[Test]:
    """Tests that reach the line, quickest first; for a line that runs at import, those that reach the module."""
    lines, seconds = reach["lines"].get(mutant.module, {}), reach["seconds"]
    found = set(lines.get(str(mutant.line), [])) or {name for tests in lines.values() for name in tests}
    chosen, total = [], 0.0
    for name in sorted(found & set(seconds), key=lambda name: (seconds[name], name)):
        total += seconds[name]
        if total > most and chosen:
            break
        chosen.append((name, seconds[name]))
    return chosen


def try_mutant(mutant: Mutant, tree: Path, tests: Sequence[Test]) -> str:
    """`killed`, `killed (stopped)` or `survived`."""
    if not tests:
        return "survived"
    path = tree / "hf_dataopt" / mutant.module
    before = path.read_bytes()
    path.write_text(mutant.code(), encoding="utf-8")
    try:
        limit = 60 + 10 * sum(seconds for _, seconds in tests)
        status = in_fork(lambda: _run_pytest(tree, [name for name, _ in tests]), tree / "log.txt", limit)
    finally:
        path.write_bytes(before)
    return "killed (stopped)" if status is None else "survived" if status == 0 else "killed"


def _copy(folder: Path) -> Path:
    """The tree without what git ignores, for changes to be made in."""
    skip = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "build", "dist", ".*_cache", ".hypothesis", ".data")
    shutil.copytree(REPO, folder / "tree", ignore=skip, symlinks=True)
    return folder / "tree"


def _load(names: Sequence[str]) -> None:
    """Import what the tests import, so that forks have it; what cannot be imported by name is left to them."""
    for name in names:
        if name in sys.modules or name.startswith(("coverage", "_", "__")):
            continue
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def equivalents() -> dict[tuple[str, str, str], str]:
    """Reason by module, line and changed line, for changes that cannot be noticed."""
    rows = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else []
    return {(row["module"], row["line"], row["changed"]): row["reason"] for row in rows}


def report(outcomes: Sequence[tuple[Mutant, str]], seed: int) -> dict[str, Any]:
    """What is kept of a run: counts by module, and each survivor by name."""
    reasons, modules, survivors = equivalents(), {}, []
    for mutant, outcome in outcomes:
        row = modules.setdefault(mutant.module, {"killed": 0, "survived": 0, "equivalent": 0})
        reason = reasons.get((mutant.module, mutant.text, mutant.changed))
        if outcome.startswith("killed"):
            row["killed"] += 1
            continue
        row["survived" if reason is None else "equivalent"] += 1
        survivors.append(asdict(mutant) | {"equivalent_because": reason})
    total = {name: sum(row[name] for row in modules.values()) for name in ("killed", "survived", "equivalent")}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "cosmic-ray", "coverage")}
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": sys.version.split()[0]} | versions,
        "seed": seed,
        "mutants": len(outcomes),
        "stopped": sum(outcome == "killed (stopped)" for _, outcome in outcomes),
        "total": total,
        "modules": modules,
        "survivors": survivors,
    }


def _work(asked: argparse.Namespace, modules: Sequence[str], tree: Path) -> int:
    known = json.loads(asked.reach.read_text()) if asked.reach.exists() else None
    if asked.measure or known is None:
        known = merged(known, measure(tree, asked.tests, chosen_modules(MODULES)))
        asked.reach.parent.mkdir(parents=True, exist_ok=True)
        asked.reach.write_text(json.dumps(known))
    if asked.measure:
        return 0
    before = json.loads(asked.output.read_text()) if asked.again else {}
    seed = before.get("seed", asked.seed)
    chosen = sample(modules, before.get("mutants", asked.sample), seed)
    left = {(row["module"], row["line"], row["column"], row["operator"]) for row in before.get("survivors", [])}
    if not left <= {(one.module, one.line, one.column, one.operator) for one in chosen}:
        raise SystemExit(f"other --modules than those of {asked.output}, or they changed since; run without --again")
    _load(known["loaded"])
    outcomes: list[tuple[Mutant, str]] = []
    for mutant in chosen:
        if asked.again and (mutant.module, mutant.line, mutant.column, mutant.operator) not in left:
            outcomes.append((mutant, "killed"))
            continue
        tests, began = tests_for(mutant, known), time.monotonic()
        outcome = try_mutant(mutant, tree, tests)
        outcomes.append((mutant, outcome))
        print(
            f"{outcome:9} {mutant.module}:{mutant.line}  {mutant.text}  ->  {mutant.changed}  "
            f"({len(tests)} tests, {time.monotonic() - began:.1f} s)",
            flush=True,
        )
        if not asked.again:  # what was found is kept if the run is stopped
            asked.output.write_text(json.dumps(report(outcomes, seed), indent=2) + "\n")
    found = report(outcomes, seed)
    found["stopped"] += before.get("stopped", 0)
    asked.output.write_text(json.dumps(found, indent=2) + "\n")
    for name, row in found["modules"].items():
        print(f"{name:40} {row['killed']:4} killed {row['survived']:4} survived {row['equivalent']:4} equivalent")
    total = found["total"]
    noticeable = total["killed"] + total["survived"]
    print(f"{total['killed']} of {noticeable} killed, {total['equivalent']} more that nothing can notice")
    return 0 if total["killed"] >= 0.9 * noticeable else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--modules", nargs="+", default=MODULES, help="below hf_dataopt/, patterns allowed")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what to run once under coverage")
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reach", type=Path, default=REACH, help="the tests' lines and seconds; measured if missing")
    parser.add_argument(
        "--measure", action="store_true", help="measure --tests (again), keep what others reach, and stop"
    )
    parser.add_argument("--again", action="store_true", help="only the survivors of --output, against the tests of now")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    os.environ.setdefault("HF_DATAOPT_GOLDEN", str(REPO.parent / "shared" / "golden"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    modules = chosen_modules(asked.modules)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = _copy(Path(folder))
        return _work(asked, modules, tree)


if __name__ == "__main__":
    sys.exit(main())
