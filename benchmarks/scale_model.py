"""What cleaning a data set of any size takes, on paper: bytes, operations, hours and cost, from the measured time table.

    python benchmarks/scale_model.py [--rows 1000000000] [--features 384] [--classes 100] [--partition 5000]
                                     [--processes 1] [--cost-per-hour 0.05]

Time per pair and per row, and the exponent of rows, are read from `results/relation_scale_time.json`
(`benchmarks/relation_scale.py`, one thread): hours are those of that processor, divided by `--processes`. The price of a core's
hour is yours to give; nothing here knows one. A model, not a measurement: no run of more than 200,000 rows was made.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from _report import write

MEASURED = Path(__file__).parent / "results" / "relation_scale_time.json"
REFERENCE = 5000  # rows of the outlier score's reference set, `outlier_reference`
NEIGHBOURS = 30
ROW_BYTES = 74  # of the report, `RelationReport`
NEAR_BYTES = 28  # a neighbour: row number and cosine of the partitions and of the whole, and a weight


def operations(rows: float, features: int, classes: int, partition: int) -> dict[str, float]:
    """Multiply-adds count as two; the products of half of a partition's pairs, and all rows against the reference set."""
    width = features + classes
    return {"pairs": rows * partition * width, "outliers": 2.0 * rows * REFERENCE * width}


def exponent(table: list[dict[str, Any]]) -> float:
    """Slope of log seconds over log rows."""
    rows, seconds = (np.log([row[name] for row in table]) for name in ("n", "CPU-s"))
    return float(np.polyfit(rows, seconds, 1)[0])


def model(rows: float, args: argparse.Namespace, table: list[dict[str, Any]]) -> dict[str, Any]:
    """One size on paper; the rate is that of the largest size measured, the growth beyond it by the measured exponent.

    An exponent below 1 is what fixed costs make of small sizes: no size is reckoned cheaper a row than the largest measured.
    """
    last = table[-1]
    measured = (
        last["n"] * (last["partition_size"] + 2 * 1000) * (last["d"] + last["classes"])
    )  # 1,000 reference rows there
    work = sum(operations(rows, args.features, args.classes, args.partition).values())
    beyond = max(1.0, rows / last["n"]) ** max(exponent(table) - 1, 0.0)
    hours = last["CPU-s"] * work / measured * beyond / 3600
    return {
        "rows": f"{rows:,.0f}",
        "features on disk, GB": rows * 4 * (args.features + args.classes) / 1e9,
        "per-row memory, GB": rows * (NEAR_BYTES * NEIGHBOURS + ROW_BYTES) / 1e9,
        "operations": work,
        "core hours": hours,
        "hours": hours / args.processes,
        "cost per million rows": hours * args.cost_per_hour / (rows / 1e6),
    }


def main() -> None:
    """Print and write `results/scale_model.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e9)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--partition", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cost-per-hour", type=float, default=0.05, help="of one core")
    args = parser.parse_args()
    table = json.loads(MEASURED.read_text())["rows"]
    sizes = [size for size in (1e6, 1e7, 1e8, 1e9) if size < args.rows] + [args.rows]
    rows = [
        {k: v if isinstance(v, str) else float(f"{v:.3g}") for k, v in model(n, args, table).items()} for n in sizes
    ]
    write(
        "scale_model",
        rows,
        exponent=round(exponent(table), 3),
        processes=args.processes,
        partition=args.partition,
        cost_per_hour=args.cost_per_hour,
    )


if __name__ == "__main__":
    main()
