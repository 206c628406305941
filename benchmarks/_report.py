"""What every benchmark writes: one JSON file with date, hardware, versions and rows, and the same rows as a table."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = HERE / ".data"  # fetched from packages, never committed
RESULTS = HERE / "results"


def hardware() -> str:
    """Processor, cores, threads in use, and the GPU if there is one."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s){gpu}"


def limit_memory(gigabytes: float | None) -> None:
    """Let this process have so much of the GPU's memory, where several share one; None: all."""
    import torch

    if gigabytes is not None and torch.cuda.is_available():
        whole = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / whole))


def write(name: str, rows: list[dict[str, Any]], quiet: bool = False, **about: Any) -> Path:
    """Write `benchmarks/results/NAME.json` and, unless `quiet`, print the rows as a table."""
    packages = ("torch", "transformers", "numpy")
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "command": " ".join(["python", *sys.argv]),
        **about,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    if quiet:
        return path
    show(name, rows)
    print(f"written to {path.relative_to(HERE.parent)}")
    return path


def resumed(
    file: Path, jobs: Iterable[tuple[str, Callable[[], dict[str, Any]]]], restart: bool = False
) -> list[dict[str, Any]]:
    """What every job found; what an earlier run had found is read from its file.

    Args:
        file: a JSON object a line, written as soon as a job is done.
        jobs: names and what is to be done, in an order that stays the same.
        restart: whether an earlier run is forgotten.
    """
    if restart:
        file.unlink(missing_ok=True)
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    jobs = list(jobs)
    for name, job in jobs[len(found) :]:
        found.append(job())
        with file.open("a") as lines:
            lines.write(json.dumps(found[-1]) + "\n")
        print(f"{name} ({len(found)}/{len(jobs)})", flush=True)
    return found[: len(jobs)]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows (all with the same keys) as a table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a bare image with torch and transformers
        print(title, *(", ".join(f"{key}: {_cell(value)}" for key, value in row.items()) for row in rows), sep="\n")
        return

    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    Console(width=140).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
