"""Draw, try and report:

    python -m tests.mutants                                   # map what is new among the tests, then 200 changes
    python -m tests.mutants --modules publishing/safe_files.py --sample 20
    python -m tests.mutants --again                           # the survivors of before are tried again, too

A run that was stopped goes on where it was: what was killed stays killed, whatever sample it was drawn for.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import REPO
from . import __doc__ as purpose
from .changes import Mutant, chosen_modules, sample
from .forks import copy_tree, in_fork, run_pytest
from .reach import Test, load_modules, measure, tests_for

RESULTS = REPO / "benchmarks" / "results" / "mutants.json"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
BUILD = REPO / "build"
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
    "mixup/co_mixup.py",
    "mixup/puzzle_mix.py",
    "mixup/loss.py",
    "relation/kernel.py",
    "relation/tiles.py",
    "relation/label_noise.py",
    "relation/outlier.py",
    "relation/relation_map.py",
    "relation/baselines.py",
    "relation/cut.py",
    "relation/nearest.py",
    "relation/posterior.py",
    "condensation/matching.py",
    "condensation/class_gradients.py",
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
    "kvzip/passes.py",
    "kvzip/weights.py",
    "kvzip/scores/h2o.py",
    "kvzip/scores/snapkv.py",
    "kvzip/scores/expected_attention.py",
    "kvzip/gate_network.py",
]
TESTS = [
    "tests/publishing",
    "tests/test_metrics.py",
    "tests/mixup",
    "tests/relation",
    "tests/routing",
    "tests/ccm",
    "tests/condensation",
    "tests/hub/test_hostile.py",
    "tests/hub/test_round_trip.py",
    "tests/hub/test_failures.py",
    "tests/faults/test_bad_data.py",
    "tests/kvzip",
]


def try_mutant(mutant: Mutant, tree: Path, tests: Sequence[Test]) -> str:
    """`killed`, `killed (stopped)` or `survived`."""
    if not tests:
        return "survived"
    path = tree / "hf_dataopt" / mutant.module
    before = path.read_bytes()
    path.write_text(mutant.code, encoding="utf-8")
    try:
        limit = 60 + 5 * sum(seconds for _, seconds in tests)
        status = in_fork(lambda: run_pytest(tree, [name for name, _ in tests]), tree / "log.txt", limit)
    finally:
        path.write_bytes(before)
    return "killed (stopped)" if status is None else "survived" if status == 0 else "killed"


def equivalents() -> dict[tuple[str, str, str], str]:
    """Reason by module, line and changed line, for changes that cannot be noticed."""
    rows = json.loads(EQUIVALENT.read_text())
    return {(row["module"], row["line"], row["changed"]): row["reason"] for row in rows}


def report(outcomes: Sequence[tuple[Mutant, str]], asked: argparse.Namespace) -> dict[str, Any]:
    """What is kept of a run: counts by module, and each survivor by name."""
    reasons, survivors = equivalents(), []
    modules: dict[str, dict[str, int]] = {}
    for mutant, outcome in outcomes:
        row = modules.setdefault(mutant.module, {"killed": 0, "survived": 0, "equivalent": 0})
        reason = reasons.get((mutant.module, mutant.text, mutant.changed))
        if outcome.startswith("killed"):
            row["killed"] += 1
            continue
        row["survived" if reason is None else "equivalent"] += 1
        named = {name: getattr(mutant, name) for name in ("module", "line", "column", "operator", "text", "changed")}
        survivors.append(named | {"equivalent_because": reason})
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "cosmic-ray", "coverage")}
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": sys.version.split()[0]} | versions,
        "seed": asked.seed,
        "sample": asked.sample,
        "tried": len(outcomes),
        "stopped": sum(outcome == "killed (stopped)" for _, outcome in outcomes),
        "total": {name: sum(row[name] for row in modules.values()) for name in ("killed", "survived", "equivalent")},
        "modules": modules,
        "survivors": survivors,
    }


def _work(asked: argparse.Namespace, tree: Path) -> int:
    reach = measure(asked.build / "mutants_reach.json", tree, TESTS, chosen_modules(MODULES))
    if asked.measure:
        return 0
    load_modules([name for file in reach["files"].values() for name in file["loaded"]])
    kept = asked.build / "mutants_outcomes.json"
    known: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    outcomes: list[tuple[Mutant, str]] = []
    for mutant in sample(chosen_modules(asked.modules), asked.sample, asked.seed):
        outcome = known.get(mutant.key)
        if outcome is None or (asked.again and outcome == "survived"):
            tests, began = tests_for(mutant, reach), time.monotonic()
            outcome = known[mutant.key] = try_mutant(mutant, tree, tests)
            print(
                f"{outcome:9} {mutant.module}:{mutant.line}  {mutant.text}  ->  {mutant.changed}  "
                f"({len(tests)} tests, {time.monotonic() - began:.1f} s)",
                flush=True,
            )
            kept.write_text(json.dumps(known, indent=1))
        outcomes.append((mutant, outcome))
        asked.output.write_text(json.dumps(report(outcomes, asked), indent=2) + "\n")
    found = report(outcomes, asked)
    for name, row in found["modules"].items():
        print(f"{name:40} {row['killed']:4} killed {row['survived']:4} survived {row['equivalent']:4} equivalent")
    total = found["total"]
    noticeable = total["killed"] + total["survived"]
    print(f"{total['killed']} of {noticeable} killed, {total['equivalent']} more that nothing can notice")
    return 0 if total["killed"] >= 0.9 * noticeable else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(purpose or "").partition("\n")[0])
    parser.add_argument("--modules", nargs="+", default=MODULES, help="below hf_dataopt/, patterns allowed")
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="map the tests that are new or edited, and stop")
    parser.add_argument("--again", action="store_true", help="try known survivors again, against the tests of now")
    parser.add_argument("--build", type=Path, default=BUILD, help="keeps the tests' lines and the outcomes so far")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    os.environ.setdefault("HF_DATAOPT_GOLDEN", str(REPO.parent / "shared" / "golden"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        return _work(asked, copy_tree(Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
