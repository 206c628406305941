"""What fault tests count: printed (`pytest -s`), and at full size kept in `benchmarks/results/faults.json`, row by row.

A run of a part renews its own rows; a failing test has told its row before it fails.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# kills, and interrupts, of each job and save; 20 is the full size of every fault test
FAULTS = int(os.environ.get("HF_DATAOPT_FAULTS", "2"))
FULL = 20
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "faults.json"
_STARTED = time.monotonic()
_TOLD: list[dict[str, Any]] = []


def tell(fault: str, what: str, counts: Mapping[str, Any]) -> None:
    """One row: what was done to what, and how it ended how often."""
    print(f"\n{fault}, {what}: {dict(counts)}")
    _TOLD.append({"fault": fault, "of": what, **counts})


def keep(exit_status: int, tests: int) -> None:
    """Write the rows of this process, which has ended its tests, in the place of the same rows of earlier runs."""
    if FAULTS < FULL or not _TOLD:
        return
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    run = {
        "date": datetime.now(UTC).date().isoformat(),
        "rows": len(_TOLD),
        "tests": tests,
        "exit_status": exit_status,
        "cpu_minutes": round(sum(one.ru_utime + one.ru_stime for one in used) / 60, 1),
        "wall_minutes": round((time.monotonic() - _STARTED) / 60, 1),
    }
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": [], "rows": []}
    rows = {(row["fault"], row["of"]): row for row in (*before["rows"], *_TOLD)}
    found = {
        "command": f"HF_DATAOPT_FAULTS={FAULTS} python -m pytest -s -n 0 tests/faults tests/hub/test_interruptions.py",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "transformers", "datasets")},
        "runs": [*before["runs"], run],
        "rows": list(rows.values()),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
