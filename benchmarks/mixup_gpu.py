"""What mixing is worth on a GPU: full CIFAR-10 images, 2,000 and 10,000 of them, ResNet-8 and PreActResNet18 of width 32.

    python benchmarks/mixup_gpu.py --workers 6 --seconds 500   # as many of the runs as fit; started again, it goes on
    python benchmarks/mixup_gpu.py --report                    # the table of what is there
    python benchmarks/mixup_gpu.py --cpu --workers 1 --seconds 4000 --methods "puzzle;cutmix"   # some 5 minutes a run
    python benchmarks/mixup_gpu.py --smoke                     # tiny networks and images, on a CPU too

Rows, recipe, methods and measures are those of `mixup_accuracy.py`, at 32 x 32 pixels, with a stock Trainer; convolutions in
TF32. Each method's learning rate is the best of those tried at 2,000 images and seed 0 on rows of their own, for each
network; its run is the first of the table. Small networks are bound by the core that launches them and solves the masks, so
that several processes share the GPU: each takes the first run of the plan that nobody has, and none that cannot end in time.
Runs are appended to `.data/mixup_gpu/runs.jsonl` as they end, each with where it ran, and come to `results/mixup_gpu.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import data as packages
import torch
from _report import DATA, RESULTS, show, write
from mixup_accuracy import EVERY, SHOWN, Setting, best_rates, figures, rate_of, table

NAME = "mixup_gpu"
SMALL = Setting(side=32, epochs=60)
DEEP = Setting(side=32, epochs=60, width=32, network="preactresnet18")
TRIED = {"resnet8": (0.3, 0.1, 1.0), "preactresnet18": (0.1, 0.3)}
FIVE = ("comixup + clean", "puzzle", "plain", "input mixup", "cutmix")  # the longest first
CLEAN = ("comixup", "puzzle + clean", "input mixup + clean", "cutmix + clean")
CHEAPER = ("puzzle, 0.7-size saliency", EVERY.format(2))
OTHERS = ("puzzle, half-size saliency", EVERY.format(5), "puzzle, half of the steps cutmix")
STEP = {"comixup": 0.06, "puzzle": 0.035}  # seconds at first, until there are measured ones
LIGHT_STEP, AROUND = 0.013, 4.0  # a step without saliency; data and measures of a run


@dataclass(frozen=True)
class Job:
    """A run; without a rate it takes its method's best."""

    setting: Setting
    method: str
    seed: int
    rate: float | None = None


def tuned_at(setting: Setting) -> Setting:
    """Where the rates for a setting were chosen."""
    return replace(setting, images=SMALL.images, epochs=SMALL.epochs)


def plan() -> Iterator[Job]:
    """All runs, the most decisive ones first."""

    def block(setting: Setting, methods: tuple[str, ...], *seeds: int) -> Iterator[Job]:
        yield from (Job(setting, method, seed) for seed in seeds for method in methods)

    def tune(setting: Setting) -> Iterator[Job]:
        yield from (Job(setting, method, 0, rate) for rate in TRIED[setting.network] for method in FIVE)

    many = replace(SMALL, images=10_000, epochs=20)
    yield from tune(SMALL)
    yield from block(SMALL, FIVE, 1, 2)
    yield from tune(DEEP)
    yield from block(many, FIVE, 0)
    yield from block(DEEP, FIVE, 1, 2)
    yield from block(SMALL, CHEAPER, 0, 1, 2)
    yield from block(many, FIVE, 1, 2)
    yield from block(SMALL, CLEAN, 0, 1, 2)
    yield from block(replace(SMALL, epochs=120), FIVE, 0, 1, 2)
    yield from block(SMALL, FIVE, 3, 4)
    yield from block(SMALL, OTHERS, 0, 1, 2)
    yield from block(DEEP, FIVE, 3, 4)
    yield from block(replace(DEEP, images=10_000, epochs=15), FIVE, 0, 1, 2)


def shrunk(job: Job) -> Job | None:
    """The same run at a size for a CPU; None: one seed is enough there."""
    if job.seed:
        return None
    setting = replace(
        job.setting, images=min(job.setting.images // 20, 120), width=4, epochs=-(-job.setting.epochs // 60)
    )
    return replace(job, setting=setting)


class Queue:
    """Runs that are done, begun and to do, in files that several processes share."""

    def __init__(self, folder: Path, deadline: float, smoke: bool, methods: tuple[str, ...] = ()) -> None:
        self.methods = methods  # these only; none: all
        self.runs, self.failed, self.locks = folder / "runs.jsonl", folder / "failed.jsonl", folder / "locks"
        self.deadline, self.smoke = deadline, smoke
        self.locks.mkdir(parents=True, exist_ok=True)

    def read(self, path: Path) -> list[dict[str, Any]]:
        """The whole lines of a file."""
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines if line]

    def add(self, path: Path, run: dict[str, Any]) -> None:
        """One more line, in one write."""
        short = {name: round(value, 5) if isinstance(value, float) else value for name, value in run.items()}
        with path.open("a") as file:
            file.write(json.dumps(short) + "\n")

    def rate(self, job: Job, done: list[dict[str, Any]], failed: list[dict[str, Any]]) -> float | None:
        """The job's rate; None: its method's is not chosen yet."""
        if job.rate is not None:
            return job.rate
        where = self._tuned_at(job.setting)
        rates = best_rates(done, where)
        base = next(method for method in FIVE if method.split()[0] == job.method.split()[0].rstrip(","))
        for tried in TRIED[where.network]:
            about = about_of(Job(where, base, 0), tried)
            if not any(about.items() <= run.items() for run in [*done, *failed]):
                return None
        return rate_of(job.method, rates)

    def _tuned_at(self, setting: Setting) -> Setting:
        if not self.smoke:
            return tuned_at(setting)
        return replace(setting, images=SMALL.images // 20, epochs=1)

    def take(self) -> dict[str, Any] | None:
        """The first run that nobody has and that can end in time; None: there is no more."""
        while True:
            done, failed = self.read(self.runs), self.read(self.failed)
            undecided = False
            for job in filter(None, map(shrunk, plan())) if self.smoke else plan():
                if self.methods and job.method not in self.methods:
                    continue
                rate = self.rate(job, done, failed)
                if rate is None:
                    undecided = True
                    continue
                about = about_of(job, rate)
                if any(about.items() <= run.items() for run in [*done, *failed]):
                    continue
                if time.time() + needed(about, done) < self.deadline and self._lock(about):
                    return about
            if not undecided or time.time() > self.deadline - AROUND:
                return None
            time.sleep(0.5)  # others are choosing a rate

    def _lock(self, about: dict[str, Any]) -> bool:
        name = "_".join(map(str, [*about["setting"].values(), *(about[key] for key in ("method", "seed", "rate"))]))
        try:
            os.close(os.open(self.locks / name.replace("/", " of "), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def about_of(job: Job, rate: float) -> dict[str, Any]:
    """What names a run."""
    return {"setting": asdict(job.setting), "method": job.method, "seed": job.seed, "rate": rate}


def needed(about: dict[str, Any], done: list[dict[str, Any]]) -> float:
    """Seconds that a run takes, by those of its network and kind that ended last."""
    setting, kind = about["setting"], about["method"].split()[0].rstrip(",")
    steps = setting["epochs"] * -(-setting["images"] // 100)
    alike = [run for run in done if run["setting"]["network"] == setting["network"] and run["method"].startswith(kind)]
    each = [run["seconds"] / (run["setting"]["epochs"] * -(-run["setting"]["images"] // 100)) for run in alike[-5:]]
    deeper = 1.5 if setting["network"] == DEEP.network else 1.0
    return AROUND + 1.1 * steps * (statistics.median(each) if each else deeper * STEP.get(kind, LIGHT_STEP))


def place() -> str:
    """Device, versions and precision of a run."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()}-core {platform.machine()}, one thread"
    return f"{device}; torch {version('torch')}, transformers {version('transformers')}, {'TF32' if gpu else 'float32'}"


def work(queue: Queue) -> None:
    """One process: run after run."""
    torch.set_num_threads(1)
    while (about := queue.take()) is not None:
        setting = Setting(**about["setting"])
        begun = time.time()
        try:
            found = figures(setting, about["method"], about["seed"], about["rate"], 100 if queue.smoke else 5_000)
        except Exception:  # noqa: BLE001 - the other runs go on; the traceback is kept
            queue.add(queue.failed, {**about, "error": traceback.format_exc()})
            traceback.print_exc()
            continue
        found |= {"on": place(), "whole_seconds": time.time() - begun}
        queue.add(queue.runs, {**about, **found})
        print(round(time.time() - begun, 1), about, found["accuracy"], flush=True)


def report(queue: Queue, name: str, quiet: bool) -> None:
    """Write the results' file."""
    runs = queue.read(queue.runs)
    if not runs:
        return

    def rates(setting: Setting) -> dict[str, float]:
        return best_rates(runs, queue._tuned_at(setting))

    lines = table(runs, rates)
    ran = ", and ".join(f"{many} runs on {where}" for where, many in Counter(run["on"] for run in runs).items())
    write(name, lines, quiet=True, hardware=ran, runs=runs, failed=queue.read(queue.failed))
    if not quiet:
        keys = (*SHOWN[:1], "network", *SHOWN[1:-2], "over plain", "over input mixup", "over cutmix")
        show(name, [{key: line[key] for key in keys} for line in lines])


def main() -> None:
    """Start the workers, collect what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=6, help="processes on the GPU")
    parser.add_argument("--seconds", type=float, default=500, help="wall time; no run begins that cannot end in it")
    parser.add_argument("--folder", type=Path, help="where runs are kept, by default .data/mixup_gpu")
    parser.add_argument("--packages", type=Path, default=DATA, help="where the images lie")
    parser.add_argument("--smoke", action="store_true", help="tiny runs on whatever device there is")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU")
    parser.add_argument("--methods", default="", help="these only; semicolons between")
    parser.add_argument("--report", action="store_true", help="only show what is there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    packages.DATA = args.packages
    deadline = args.deadline or time.time() + args.seconds
    name = f"{NAME}_smoke" if args.smoke else NAME
    args.folder = args.folder or DATA / name
    queue = Queue(args.folder, deadline, args.smoke, tuple(filter(None, args.methods.split(";"))))
    if args.worker:
        work(queue)
        return
    if args.smoke:
        queue.runs.unlink(missing_ok=True)
    kept = RESULTS / f"{name}.json"
    if kept.exists() and not queue.runs.exists() and not args.smoke:
        for run in json.loads(kept.read_text())["runs"]:
            queue.add(queue.runs, run)
    if not (args.report or args.smoke or args.cpu or torch.cuda.is_available()):
        print("skipped: no GPU; `mixup_accuracy.py` is what a CPU can do")
        return
    if not args.report:
        supervise(queue, name, args)
    report(queue, name, quiet=False)


def supervise(queue: Queue, name: str, args: argparse.Namespace) -> None:
    """Workers as processes of their own, until the last has ended; what they found is written every 20 seconds."""
    for lock in queue.locks.iterdir():  # of an earlier start
        lock.unlink()
    started = []
    command = [sys.executable, __file__, "--folder", str(args.folder), "--packages", str(args.packages)]
    command += ["--deadline", str(queue.deadline), "--methods", args.methods, *(["--smoke"] if args.smoke else [])]
    for number in range(args.workers):
        with (args.folder / f"log_{number}").open("a") as log:
            started.append(subprocess.Popen([*command, "--worker"], stdout=log, stderr=log))
    while any(worker.poll() is None for worker in started):
        time.sleep(1 if args.smoke else 5)
        report(queue, name, quiet=True)
        if time.time() > queue.deadline + 20:
            for worker in started:
                worker.terminate()


if __name__ == "__main__":
    main()
