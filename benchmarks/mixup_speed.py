"""CPU time and peak memory of mixing one batch: ours, the same with pygco's cut, and timm's CutMix, in one run.

100 images of 3 x 32 x 32 and 32 of 3 x 224 x 224; every method gets the same images and saliency (synthetic: sums of smooth
noise; the network's saliency pass is not part of the time). Grids 2, 4, 8, 16 in turn and their mean; one thread, medians,
the methods in turn. Peak memory: growth of the resident set at grid 16, each method in a process of its own.

    python benchmarks/mixup_speed.py              # about 2 minutes on one core
    python benchmarks/mixup_speed.py --smoke
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _report import show, write
from torch import Tensor

from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.graph_cut import solve_masks, solve_masks_pygco
from hf_dataopt.mixup.puzzle_mix import PuzzleDraws, mask_problem, puzzle_mix

GRIDS = (2, 4, 8, 16)
# the authors' code with transport, and pygco's cuts alone, in ms, from an earlier study on one machine
AUTHORS = {"100x3x32x32": 831.0, "32x3x224x224": 4272.0}
PYGCO_THEN = {"100x3x32x32": 18.0, "32x3x224x224": 6.0}


@dataclass(frozen=True)
class Batch:
    """One batch and the settings its size is mixed with."""

    images: Tensor
    targets: Tensor
    saliency: Tensor
    draws: PuzzleDraws
    config: PuzzleMixConfig

    @property
    def name(self) -> str:
        """`BxCxHxW`."""
        return "x".join(map(str, self.images.shape))


def make_batch(size: int, side: int, seed: int = 0) -> Batch:
    """Images and log-normal saliency with structure at every scale."""
    random = torch.Generator().manual_seed(seed)

    def smooth(channels: int, scales: tuple[int, ...], decay: float) -> Tensor:
        total = torch.zeros(size, channels, side, side)
        for k in scales:
            noise = torch.randn(size, channels, k, k, generator=random)
            total += F.interpolate(noise, size=(side, side), mode="bilinear") * k**-decay
        return total

    images = torch.sigmoid(1.5 * smooth(3, (2, 4, 8, 16, 32), 0.5))
    saliency = (0.6 * smooth(1, (4, 8, 16, 32), 0.0)[:, 0]).exp() * torch.randn(
        size, side, side, generator=random
    ).abs()
    config = PuzzleMixConfig.cifar100() if side == 32 else PuzzleMixConfig.imagenet(beta=1.2, clean_weight=0.0)
    draws = PuzzleDraws(partner=torch.randperm(size, generator=random), grid=2, lam=0.5)
    return Batch(images, torch.eye(size), saliency, draws, config)


def ours(batch: Batch) -> None:
    """Puzzle Mix as shipped."""
    puzzle_mix(batch.images, batch.targets, batch.saliency, batch.config, draws=batch.draws)


def ours_pygco(batch: Batch) -> None:
    """Puzzle Mix with the reference's cut."""
    config = replace(batch.config, solver="pygco")
    puzzle_mix(batch.images, batch.targets, batch.saliency, config, draws=batch.draws)


def ours_without_transport(batch: Batch) -> None:
    """Mask and mixing only."""
    config = replace(batch.config, transport=False)
    puzzle_mix(batch.images, batch.targets, batch.saliency, config, draws=batch.draws)


def cuts(solver: Callable[..., Any]) -> Callable[[Batch], None]:
    """Only the cut; its problem is prepared once per batch and grid."""
    prepared: dict[tuple[str, int], tuple[np.ndarray, ...]] = {}

    def run(batch: Batch) -> None:
        key = batch.name, batch.draws.grid
        if key not in prepared:
            found = mask_problem(batch.images, batch.saliency, batch.draws, batch.config)
            value = 1 - np.arange(3) / 2
            odds = np.array([0.25, 0.5, 0.25])  # lam = 1/2
            unary = found.show[..., None] * value + found.hide[..., None] * (1 - value)
            unary -= batch.config.eta / found.show[0].size * np.log(odds + 1e-8)
            prepared[key] = unary, found.beta + found.down, found.beta + found.right
        solver(*prepared[key])

    return run


def timm_cutmix() -> Callable[[Batch], None]:
    """timm's CutMix, for scale."""
    from timm.data.mixup import Mixup

    def run(batch: Batch) -> None:
        mix = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=len(batch.images))
        size = len(batch.images) // 2 * 2
        mix(batch.images[:size].clone(), torch.arange(size))

    return run


METHODS: list[tuple[str, Callable[[Batch], None]]] = [  # further methods append a row here
    ("Puzzle Mix", ours),
    ("Puzzle Mix, pygco cut", ours_pygco),
    ("Puzzle Mix without transport", ours_without_transport),
    ("exact cuts only", cuts(solve_masks)),
    ("pygco cuts only", cuts(solve_masks_pygco)),
    ("timm CutMix", timm_cutmix()),
]


def measure(batch: Batch, repeats: int) -> dict[str, list[float]]:
    """Median CPU milliseconds of every method at every grid."""
    found: dict[str, list[float]] = {name: [] for name, _ in METHODS}
    for grid in GRIDS:
        case = replace(batch, draws=replace(batch.draws, grid=grid))
        times: dict[str, list[float]] = {name: [] for name, _ in METHODS}
        for _ in range(repeats + 1):
            for name, method in METHODS:
                start = time.process_time()
                method(case)
                times[name].append(1000 * (time.process_time() - start))
        for name, values in times.items():
            found[name].append(statistics.median(values[1:]))
    return found


def resident(field: str) -> float:
    """`VmRSS` or its high-water mark `VmHWM` of this process, MiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak(place: int, size: int, side: int) -> float:
    """MiB by which one call at grid 16 raises the resident set of a fresh process, after a small call."""
    batch = make_batch(size, side)
    small = replace(make_batch(4, side), draws=PuzzleDraws(partner=torch.arange(4), grid=4, lam=0.5))
    METHODS[place][1](small)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = resident("VmRSS")
    METHODS[place][1](replace(batch, draws=replace(batch.draws, grid=16)))
    return resident("VmHWM") - before


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny run that writes nothing")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--peak", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(json.dumps(peak(*args.peak)))
        return
    rows = []
    for size, side in ((8, 32), (2, 64)) if args.smoke else ((100, 32), (32, 224)):
        batch = make_batch(size, side)
        found = measure(batch, 1 if args.smoke else args.repeats)
        for place, (name, values) in enumerate(found.items()):
            command = [sys.executable, str(Path(__file__)), "--peak", *map(str, (place, size, side))]
            tight = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back: nothing hides in the heap
            memory = None if args.smoke else json.loads(subprocess.check_output(command, env=tight))
            row: dict[str, Any] = {"batch": batch.name, "method": name}
            row.update({f"grid {grid}, ms": value for grid, value in zip(GRIDS, values, strict=True)})
            row.update({"mean, ms": statistics.mean(values), "peak, MiB": memory})
            if batch.name in AUTHORS:
                slower = statistics.mean(found["pygco cuts only"]) / PYGCO_THEN[batch.name]
                row["authors / this, at this machine's pace"] = AUTHORS[batch.name] * slower / statistics.mean(values)
            rows.append(row)
    if args.smoke:
        show("mixup_speed (smoke)", rows)
    else:
        write(
            "mixup_speed",
            rows,
            authors_ms=AUTHORS,
            pygco_cuts_ms_in_that_study=PYGCO_THEN,
            note="the authors' times are scaled by pygco's cuts here over pygco's cuts there",
        )


if __name__ == "__main__":
    main()
