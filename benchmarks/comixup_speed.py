"""Co-Mixup: milliseconds per batch and joint objective, against a plain transcription of the reference code with gco-wrapper.

Both sides get the same images, saliency, prior draws and start; a batch is cut into the same parts. The reference has no
process pool. One thread, CPU time, medians, the sides in turn. Ours twice: with numba, and with NumPy only. Then 500 single
outputs at 4x4 and 8x8 cells, as the reference code meets them on its way: our energy against that of its alpha-beta swap.

    python benchmarks/comixup_speed.py            # about 2 minutes on one core
    python benchmarks/comixup_speed.py --smoke
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import show, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_dataopt.mixup import co_mixup_solver
from hf_dataopt.mixup.co_mixup import co_mixup
from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.co_mixup_sweeps import Parts, objective, sweep
from tests.reference import co_mixup as slow

COMPILED = co_mixup_solver.compiled
SETTINGS = {
    "100x3x32x32, 4x4 cells": (100, 32, CoMixupConfig.cifar100()),
    "100x3x32x32, 8x8 cells": (100, 32, CoMixupConfig.cifar100(grid=8)),
    "100x3x64x64, 4x4 cells": (100, 64, CoMixupConfig.tiny_imagenet()),
    "32x3x224x224, 4x4 cells": (32, 224, CoMixupConfig.imagenet()),
}


def batch_of(n: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise images, 100 classes, and saliency as of an input gradient: a few blobs times log-normal noise per pixel."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.rand(n, 1, 6, 6, generator=generator) ** 3
    saliency = torch.nn.functional.interpolate(blobs, size=(size, size), mode="bilinear")[:, 0]
    saliency = saliency * torch.exp(0.6 * torch.randn(n, size, size, generator=generator)) + 1e-4
    labels = torch.randint(100, (n,), generator=generator)
    return torch.rand(n, 3, size, size, generator=generator), torch.eye(100)[labels], saliency


def terms_of(config: CoMixupConfig) -> dict[str, Any]:
    """The transcription's names of the settings."""
    return {
        "beta": config.beta,
        "gamma": config.gamma,
        "thres": config.tau,
        "thres_type": config.tau_type,
        "niter": config.sweeps,
        "set_resolve": config.resolve,
    }


def side(config: CoMixupConfig) -> int:
    """Rows of a square grid."""
    if not isinstance(config.grid, int):
        raise ValueError(f"the reference code has square grids only, got {config.grid}")
    return config.grid


def reference(batch: tuple[torch.Tensor, ...], config: CoMixupConfig, seed: int) -> None:
    """The whole of the reference code's mixing, part by part."""
    images, targets, saliency = batch
    rng = np.random.default_rng(seed)
    grid = side(config)
    for start in range(0, len(images), config.part_size):
        part = slice(start, start + config.part_size)
        cost, a = slow.prepare(saliency[part], grid, config.alpha, config.eta, config.omega, rng)
        init = rng.integers(len(a), size=(len(a), grid, grid))
        slow.mix(slow.masks(cost, a, init, terms_of(config)), images[part], targets[part])


def objectives(batch: tuple[torch.Tensor, ...], config: CoMixupConfig, seed: int) -> tuple[float, float]:
    """Joint objective of one part from the same start: the reference's, ours."""
    rng = np.random.default_rng(seed)
    grid = side(config)
    saliency = batch[2][: config.part_size]
    cost, a = slow.prepare(saliency, grid, config.alpha, config.eta, config.omega, rng)
    init = rng.integers(len(a), size=(len(a), grid, grid))
    z = slow.masks(cost, a, init, terms_of(config))
    n = np.array([len(a)])
    start = {"first": init[None].copy(), "second": init[None].copy()}
    parts = Parts(cost=cost[None, None], compatibility=a[None], inputs=n, outputs=n, **start)
    sweep(parts, config)
    theirs = slow.joint_objective(z, cost, a, terms_of(config))["total_clipped"]
    return theirs, float(objective(parts, config).sum())


def sub_problems(grid: int, count: int, seed: int = 5000) -> list[tuple[Any, ...]]:
    """Single outputs that the reference code has solved on its way: unary, pair costs, beta, its labels; ten of a part."""
    config = CoMixupConfig.cifar100(grid=grid)
    found: list[tuple[Any, ...]] = []
    while len(found) < count:
        rng, solved = np.random.default_rng(seed), []

        def solve(unary: Any, pair: Any, beta: float, solved: list[Any] = solved) -> Any:
            labels = slow.swap(unary, pair, beta)
            solved.append((unary.astype(np.float64), pair.astype(np.float64), beta, labels))
            return labels

        saliency = batch_of(config.part_size, 32, seed)[2]
        cost, a = slow.prepare(saliency, grid, config.alpha, config.eta, config.omega, rng)
        slow.masks(cost, a, rng.integers(len(a), size=(len(a), grid, grid)), terms_of(config), solve)
        found += [solved[i] for i in rng.choice(len(solved), min(10, len(solved)), replace=False)]
        seed += 1
    return found[:count]


def against_swap(grid: int, count: int) -> list[dict[str, Any]]:
    """Our energy less that of the reference's swap, on the same sub-problems, with numba and without."""
    problems, rows = sub_problems(grid, count), []
    for engine, compiled in (("numba", COMPILED), ("NumPy", None)):
        if engine == "numba" and compiled is None:
            continue
        co_mixup_solver.compiled = compiled
        excess = []
        for unary, pair, beta, theirs in problems:
            labels = np.stack([co_mixup_solver.minimise_grid(unary[None], pair, beta)[0], theirs])
            mine, swap = co_mixup_solver.grid_energy(np.stack([unary] * 2), pair, beta, labels)
            excess.append(mine - swap)
        co_mixup_solver.compiled = COMPILED
        rows.append(
            {
                "cells": f"{grid}x{grid}",
                "engine": engine,
                "sub-problems": count,
                "above swap": int((np.array(excess) > 1e-9).sum()),
                "below swap": int((np.array(excess) < -1e-9).sum()),
                "largest excess": max(excess),
                "mean excess": float(np.mean(excess)),
            }
        )
    return rows


def cpu_ms(function: Callable[[], Any]) -> float:
    """CPU milliseconds of one call."""
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def measure(name: str, repeats: int, starts: int) -> dict[str, Any]:
    """One setting: times of the sides in turn, then objectives over several starts."""
    n, size, config = SETTINGS[name]
    batch = batch_of(n, size, 0)

    def ours(compiled: Any, seed: int) -> float:
        co_mixup_solver.compiled = compiled
        milliseconds = cpu_ms(lambda: co_mixup(*batch, config, torch.Generator().manual_seed(seed)))
        co_mixup_solver.compiled = COMPILED
        return milliseconds

    if COMPILED is not None:
        ours(COMPILED, 0)  # compiles
    times: dict[str, list[float]] = {"reference": [], "numba": [], "numpy": []}
    for seed in range(repeats):
        times["reference"].append(cpu_ms(lambda seed=seed: reference(batch, config, seed)))
        if COMPILED is not None:
            times["numba"].append(ours(COMPILED, seed))
        times["numpy"].append(ours(None, seed))
    values = np.array([objectives(batch_of(config.part_size, size, seed), config, seed) for seed in range(starts)])
    theirs = statistics.median(times["reference"])
    numba, plain = (statistics.median(times[key]) if times[key] else None for key in ("numba", "numpy"))
    return {
        "setting": name,
        "reference ms": theirs,
        "ours ms": numba,
        "ours, no numba ms": plain,
        "speed-up": None if numba is None else theirs / numba,
        "speed-up, no numba": theirs / plain,
        "reference objective": values[:, 0].mean(),
        "our objective": values[:, 1].mean(),
        "s.e. of difference": (values[:, 1] - values[:, 0]).std() / np.sqrt(starts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one repeat of the first setting; nothing is written")
    parser.add_argument("--repeats", type=int, default=7, help="timed batches of each side and setting")
    parser.add_argument("--starts", type=int, default=24, help="starts whose objectives are compared")
    arguments = parser.parse_args()
    smoke, repeats, starts = arguments.smoke, arguments.repeats, arguments.starts
    torch.set_num_threads(1)
    rows = [
        measure(name, 1 if smoke else repeats, 2 if smoke else starts)
        for name in list(SETTINGS)[: 1 if smoke else None]
    ]
    mean: dict[str, Any] = {"setting": "mean"}
    for column in list(rows[0])[1:]:
        values = [row[column] for row in rows]
        mean[column] = None if None in values else float(np.mean(values))
    for name, column in (("speed-up", "ours ms"), ("speed-up, no numba", "ours, no numba ms")):
        mean[name] = None if mean[column] is None else mean["reference ms"] / mean[column]
    rows.append(mean)
    single = [row for grid in (4, 8) for row in against_swap(grid, 10 if smoke else 500)]
    show("one output's labelling against alpha-beta swap", single)
    if smoke:
        show("comixup_speed (smoke)", rows)
    else:
        unit = "CPU milliseconds per batch; objective: Eq. 4.1 of one part, same start; sub_problems: energies of one output"
        write("comixup_speed", rows, unit=unit, sub_problems=single)


if __name__ == "__main__":
    main()
