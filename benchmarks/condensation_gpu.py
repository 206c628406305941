"""CIFAR-10 at 10 images a class with the dissertation's network (ConvNet-3 of width 128) on a GPU: the hours, then the run.

    python benchmarks/condensation_gpu.py                  # hours a run on one GPU; stops and goes on
    python benchmarks/condensation_gpu.py --hours-only     # two timed outer iterations in float32 and in bfloat16
    python benchmarks/condensation_gpu.py --smoke          # noise, a narrow network, seconds on a CPU

Where CIFAR-10 cannot be fetched, the hours are timed on noise of its shape (what a step takes does not depend on the values)
and the run is left out. Training rows 0 to 38,999 are condensed, 39,000 to 39,999 scored on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import _report
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.evaluation import scores_as_rows

KINDS = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})


def images(smoke: bool) -> tuple[Dataset, Dataset | None]:
    """Training and test images; noise and None where there is no CIFAR-10."""
    import data as sources

    try:
        parts = [] if smoke else [sources.cifar10(0, 39_000), sources.cifar10(39_000, 40_000)]
    except (OSError, RuntimeError) as error:
        print(f"noise instead of CIFAR-10: {error}")
        parts = []
    if not parts:
        draws, rows = np.random.default_rng(0), 200 if smoke else 5_000
        parts = [(draws.integers(256, size=(rows, 32, 32, 3), dtype=np.uint8), np.arange(rows) % 10)]
    found = [Dataset.from_dict({"image": list(x), "label": y.tolist()}, features=KINDS) for x, y in parts]
    return found[0], found[1] if len(found) > 1 else None


def hours(config: IDCConfig, train: Dataset, outer: int) -> dict[str, Any]:
    """What a whole run takes, from a few of its outer iterations and from `estimate`."""
    condenser = DatasetCondenser(replace(config, outer_iterations=outer))
    said = DatasetCondenser(config).estimate(train)
    ends: list[float] = []
    condenser.condense(
        train, callback=lambda *_: ends.append(time.perf_counter())
    )  # waits for the device: it is given losses
    each = (ends[-1] - ends[0]) / (len(ends) - 1)  # the first one prepares kernels
    return {
        "dtype": config.dtype,
        "outer iteration s": round(each, 3),
        "whole run h": round(each * config.outer_iterations / 3600, 2),
        "estimate h": round(said.total_seconds / 3600, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="noise, a narrow network; nothing is kept")
    parser.add_argument("--hours-only", action="store_true", help="time a few outer iterations, do not run")
    parser.add_argument("--outer-iterations", type=int, help="of the run; default: the dissertation's 2000")
    parser.add_argument("--seeds", type=int, default=3, help="scoring runs")
    args = parser.parse_args()
    if not (args.smoke or torch.cuda.is_available()):
        print("skipped: no GPU; on a CPU this run takes a month (see IDCConfig(width=32) and method='mosaic')")
        return
    train, test = images(args.smoke)
    config = IDCConfig.cifar10(images_per_class=10)
    if args.smoke:
        config = replace(config, width=4, inner_iterations=2, network_images=64, real_batch=8)
    kinds = [replace(config, dtype=dtype) for dtype in ("float32", "bfloat16")]
    rows = [hours(kind, train, 3) for kind in (kinds[:1] if args.smoke else kinds)]
    _report.show("CIFAR-10, 10 a class, width 128: hours", rows)
    if args.smoke:
        return
    about = {"rows": len(train), "data": "CIFAR-10" if test is not None else "noise of its shape"}
    _report.write("condensation_gpu_hours", rows, **about)
    if args.hours_only or test is None:
        return
    config = replace(config, outer_iterations=args.outer_iterations or config.outer_iterations)
    condenser, clock = DatasetCondenser(config), time.perf_counter()
    condensed = condenser.condense(train, output_dir=_report.DATA / "condensation_gpu")
    took = (time.perf_counter() - clock) / 3600  # of this call: a run that was stopped goes on
    scores = scores_as_rows(condenser.evaluate(condensed, test, seeds=args.seeds))
    _report.write("condensation_gpu", scores, hours=round(took, 2), settings=config.to_json_string())


if __name__ == "__main__":
    main()
