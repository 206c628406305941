"""What `DatasetCondenser.estimate` says of a run before it, and what the run then takes, in CPU-seconds.

    OMP_NUM_THREADS=1 python benchmarks/condensation_estimate.py [--smoke]

Methods, sizes, widths and storages that differ; every run takes 5 to 60 s on one core of 2026. The images are read before.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import _report
import torch

from hf_dataopt.condensation.command import digits
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig

QUICK: dict[str, Any] = {"width": 32, "real_batch": 32, "network_images": 128, "images_per_class": 1}
# what is told, method, side of the images, settings
SETTINGS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("idc, 1 a class", "idc", 16, {"outer_iterations": 4, "inner_iterations": 20}),
    (
        "idc, 1 a class, 5 early epochs of every network",
        "idc",
        16,
        {"outer_iterations": 4, "inner_iterations": 10, "early_epochs": 5},
    ),
    ("dm, 10 a class", "dm", 16, {"images_per_class": 10, "outer_iterations": 5, "inner_iterations": 20}),
    ("dsa, 1 a class, width 64", "dsa", 28, {"width": 64, "outer_iterations": 1, "inner_iterations": 12}),
    ("rded, 10 a class", "rded", 28, {"images_per_class": 10, "teacher_images": 8_000}),
]


def measure(title: str, method: str, size: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One row: the estimate, then the run."""
    train = digits(size)[0]
    condenser = DatasetCondenser(IDCConfig(**{**QUICK, **changes}), method=method)
    condenser.estimate(train)  # reads
    clock = time.process_time()
    cost = condenser.estimate(train, clock=time.process_time)
    own = time.process_time() - clock
    clock = time.process_time()
    condenser.condense(train)
    seconds = time.process_time() - clock
    return {
        "setting": title,
        "images": f"{size}x{size}x1",
        "estimate CPU s": round(cost.total_seconds, 1),
        "of it networks' own epochs": round(cost.early_seconds, 1),
        "run CPU s": round(seconds, 1),
        "estimate / run": round(cost.total_seconds / seconds, 2),
        "estimating CPU s": round(own, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two rows of a second or so, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.smoke:
        tiny = {"outer_iterations": 1, "inner_iterations": 4, "width": 8, "teacher_images": 640}
        rows = [
            measure(title, method, 16, {**changes, **tiny}) for title, method, _, changes in (SETTINGS[0], SETTINGS[-1])
        ]
        _report.show("estimates of condensation (smoke)", rows)
    else:
        settings = [measure(*one) for one in SETTINGS]
        _report.write("condensation_estimate", settings, data="scikit-learn digits, 1,437 images")


if __name__ == "__main__":
    main()
