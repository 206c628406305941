"""CIFAR-10 at 10 images a class with the dissertation's network (ConvNet-3 of width 128) on a GPU: the hours, then the run.

    python benchmarks/condensation_gpu.py                  # hours a run on one GPU; stops and goes on
    python benchmarks/condensation_gpu.py --hours-only     # timed outer iterations: float32, bfloat16, derivatives written out
    python benchmarks/condensation_gpu.py --seconds 400    # as many outer iterations as that allows, then scored
    python benchmarks/condensation_gpu.py --smoke          # noise, a narrow network, seconds on a CPU

Where CIFAR-10 cannot be fetched, the hours are timed on noise of its shape (what a step takes does not depend on the values)
and the run is left out. Training rows 0 to 38,999 are condensed, 39,000 to 39,999 scored on (--rows 20000: 0 to 19,999, and
the 1,000 after them). A run goes the fastest of the timed ways; with the derivatives of a ConvNet's block written out the
numbers are the same up to rounding.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import _report
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_dataopt.condensation import networks
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.evaluation import scores_as_rows

KINDS = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})


class Enough(Exception):
    """The time is up."""


def images(smoke: bool, rows: int) -> tuple[Dataset, Dataset | None]:
    """Training and test images; noise and None where there is no CIFAR-10."""
    import data as sources

    try:
        parts = [] if smoke else [sources.cifar10(0, rows), sources.cifar10(rows, rows + 1_000)]
    except (OSError, RuntimeError) as error:
        print(f"noise instead of CIFAR-10: {error}")
        parts = []
    if not parts:
        draws, count = np.random.default_rng(0), 200 if smoke else 5_000
        noise = (draws.integers(256, size=(count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10)
        parts = [noise, noise] if smoke else [noise]
    found = [Dataset.from_dict({"image": list(x), "label": y.tolist()}, features=KINDS) for x, y in parts]
    return found[0], found[1] if len(found) > 1 else None


def hours(config: IDCConfig, train: Dataset, way: tuple[str, bool], inner: int) -> dict[str, Any]:
    """What a whole run takes in one way (dtype, derivatives written out), from three outer iterations of `inner` rounds."""
    written_out(way[1])
    few = replace(config, outer_iterations=3, inner_iterations=inner, dtype=way[0])
    ends: list[float] = []
    # waits for the device: it is given losses; the first outer iteration prepares kernels
    DatasetCondenser(few).condense(train, callback=lambda *_: ends.append(time.perf_counter()))
    each = (ends[-1] - ends[0]) / (len(ends) - 1) / inner * config.inner_iterations
    return {
        "network's updates in": way[0],
        "derivatives": "written out" if way[1] else "PyTorch's",
        "inner iteration ms": round(each / config.inner_iterations * 1000, 2),
        "outer iteration s": round(each, 3),
        "whole run h": round(each * config.outer_iterations / 3600, 2),
    }


def written_out(on: bool) -> None:
    """Use the derivatives written out on this machine's device, or PyTorch's layers."""
    networks.WRITTEN_OUT = {"cpu", "cuda"} if on else set()


def condense(config: IDCConfig, train: Dataset, until: float, folder: Path) -> tuple[DatasetCondenser, Dataset, float]:
    """A run that goes on where it was stopped, or as many of its outer iterations as end before `until`."""
    clock = time.perf_counter()
    ends: list[tuple[int, float]] = []

    def note(outer: int, loss: float) -> None:
        now = time.perf_counter()
        ends.append((outer, now))
        step = now - ends[-2][1] if len(ends) > 1 else 0.0
        if outer and now + step > until:
            raise Enough  # before the checkpoint of this one is written

    condenser = DatasetCondenser(config)
    try:
        condensed = condenser.condense(train, output_dir=folder, callback=note)
    except Enough:
        condenser = DatasetCondenser(replace(config, outer_iterations=ends[-1][0]))
        condensed = condenser.condense(train, output_dir=folder)
    return condenser, condensed, time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="noise, a narrow network; nothing is kept")
    parser.add_argument("--hours-only", action="store_true", help="time a few outer iterations, do not run")
    parser.add_argument("--outer-iterations", type=int, help="of the run; default: the dissertation's 2000")
    parser.add_argument("--rows", type=int, default=39_000, help="training images, at most 39,000")
    parser.add_argument("--seeds", type=int, default=3, help="scoring runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="condense so long at most, then score")
    parser.add_argument("--gigabytes", type=float, help="most GPU memory of this process")
    parser.add_argument("--timed", action="store_true", help="do not time the ways again, if there are results of it")
    args = parser.parse_args()
    until = time.perf_counter() + args.seconds
    if not (args.smoke or torch.cuda.is_available()):
        print("skipped: no GPU; on a CPU this run takes a month (see IDCConfig(width=32) and method='mosaic')")
        return
    _report.limit_memory(args.gigabytes)
    train, test = images(args.smoke, args.rows)
    config = IDCConfig.cifar10(images_per_class=10)
    if args.smoke:
        config = replace(config, width=4, inner_iterations=2, network_images=64, real_batch=8, evaluation_epochs=2)
    ways = [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]
    path = _report.RESULTS / "condensation_gpu_hours.json"
    timed = args.timed and path.exists()
    rows = json.loads(path.read_text())["rows"] if timed else []
    for way in () if rows else ways:
        try:
            rows.append(hours(config, train, way, 2 if args.smoke else 10))
        except RuntimeError as error:
            print(f"{way} does not run here: {error}")
    _report.show("CIFAR-10, 10 a class, width 128: hours", rows)
    about: dict[str, Any] = {
        "training images": len(train),
        "data": "noise of its shape" if test is None else "CIFAR-10",
    }
    if not (args.smoke or timed):
        _report.write("condensation_gpu_hours", rows, **about)
    if args.hours_only or test is None:
        return
    best = min(rows, key=lambda one: one["inner iteration ms"])
    written_out(best["derivatives"] == "written out")
    config = replace(
        config, dtype=best["network's updates in"], outer_iterations=args.outer_iterations or config.outer_iterations
    )
    folder = _report.DATA / ("condensation_gpu_smoke" if args.smoke else "condensation_gpu")
    condenser, condensed, took = condense(config, train, until, folder)
    about |= {
        "outer iterations": len(condenser.losses),
        "of": config.outer_iterations,
        "seconds of this call": round(took, 1),
    }
    about |= {"losses": [round(loss, 3) for loss in condenser.losses], "derivatives": best["derivatives"]}
    scores: list[dict[str, Any]] = []
    for name, found in (("idc", condensed), ("mosaic (its start)", condenser.initial(train))):
        # random images once, beside the first
        named = {
            name if key == "condensed" else key: value
            for key, value in condenser.evaluate(found, test, seeds=args.seeds).items()
        }
        scores += [one for one in scores_as_rows(named) if one["trained on"] not in {s["trained on"] for s in scores}]
        if not args.smoke:
            _report.write("condensation_gpu", scores, **about, settings=config.to_json_string())
    _report.show("CIFAR-10, 10 a class, width 128", scores)


if __name__ == "__main__":
    main()
