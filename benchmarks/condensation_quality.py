"""Test accuracy of networks trained on a few images per class, every method and the whole data (Tables 6.1, 6.4, 6.7).

    OMP_NUM_THREADS=1 python benchmarks/condensation_quality.py --data digits fashion cifar10 --per-class 1 10
    OMP_NUM_THREADS=1 python benchmarks/condensation_quality.py --speech --per-class 10 20   # Table 6.4 on synthetic words
    python benchmarks/condensation_quality.py --native --data cifar10 fashion       # images as they are, width 128: a GPU
    OMP_NUM_THREADS=1 python benchmarks/condensation_quality.py --smoke

ConvNet-3 of width 32 (128 in the dissertation) on images of 16 x 16, 1,000 to 2,000 training images and few outer iterations,
to fit a CPU. Every method gets the same storage and scoring recipe, and as many scoring steps (--steps), whatever it
forms. Three selections of the training images, three evaluation seeds of each: both spreads are told. "idc, random start" is
IDC from mosaics of random images (the reference's start); idc and idc-short start from the images of the row "mosaic", idc-i,
dm and dsa from those of "random". Hard-label recovery and improvement over random are DD-Ranking's, against the rows "full" and
"random". Results are written after every row, and rows that are there already are not run again. Any number of these
processes share the work: each run (a selection of a row) is a folder in `.data/condensation_quality`, which one of them locks;
--seconds ends them, and the next ones go on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _report
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from speech import speech

from hf_dataopt.checkpoint import locked
from hf_dataopt.condensation.command import digits
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.loop import formation_of
from hf_dataopt.condensation.multi_formation import to_images
from hf_dataopt.errors import FolderInUseError

Splits = tuple[Dataset, Dataset]


def fashion() -> Splits:
    """Fashion-MNIST: the first 20,000 training images to select from, the first 1,000 of the test images."""
    import gzip

    import data as sources

    folder = sources.fetch(sources.FASHION, sources.DATA / "fmnist" / "usr" / "share" / "datasets" / "fashion-mnist")

    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=offset)

    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    splits = []
    for name, most in (("train", 20_000), ("t10k", 1_000)):
        pixels = torch.from_numpy(read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[:most].copy())
        labels = read(f"{name}-labels-idx1-ubyte.gz", 8)[:most].tolist()
        splits.append(Dataset.from_dict({"image": to_images(pixels.float() / 255), "label": labels}, features=features))
    return splits[0], splits[1]


def cifar(test: int = 30_000) -> Splits:
    """CIFAR-10: training rows 0 to 19,999 to select from, 1,000 later ones as the test set."""
    import data as sources

    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    splits = []
    for start, stop in ((0, 20_000), (test, test + 1_000)):
        pixels, labels = sources.cifar10(start, stop)
        splits.append(Dataset.from_dict({"image": list(pixels), "label": labels.tolist()}, features=features))
    return splits[0], splits[1]


def settings(data: str, per_class: int, smoke: bool) -> IDCConfig:
    """CPU-sized settings: step sizes chosen on digits, 1 per class, none on the others."""
    values: dict[str, Any] = {
        "images_per_class": per_class,
        "image_size": 16,
        "width": 32,
        "outer_iterations": 1 if smoke else 8 if per_class == 1 else 4,
        "inner_iterations": 2 if smoke else 20,
        "real_batch": 32,
        "network_images": 128,
        "teacher_images": 256 if smoke else 20_000,
        "learning_rate": 0.002 * per_class,  # the reference code's rule: proportional to the storage
        "scale_learning_rate": False,
        "evaluation_augmentation": "color_crop_scale_rotate",
        "evaluation_cutmix": 0.0,
    }
    if data in ("fashion", "cifar10"):
        values |= {"evaluation_augmentation": "color_crop_flip_scale_rotate"}
    return IDCConfig(**values)


def native(data: str, per_class: int, smoke: bool) -> IDCConfig:
    """The dissertation's settings for images as they are, but few iterations, and 500 images for the network everywhere."""
    make = {"digits": IDCConfig.mnist, "fashion": IDCConfig.fashion_mnist, "cifar10": IDCConfig.cifar10}[data]
    few: dict[str, Any] = {"outer_iterations": 20, "inner_iterations": 20, "network_images": 500}
    few |= (
        {"outer_iterations": 1, "inner_iterations": 2, "network_images": 64, "width": 4, "real_batch": 8}
        if smoke
        else {}
    )
    few |= {"teacher_images": 256} if smoke else {}
    return make(images_per_class=per_class, **few)


def spoken(data: str, per_class: int, smoke: bool) -> IDCConfig:
    """The dissertation's settings for speech (Table 6.4), but 32 x 32, width 16, and the few and large steps of `settings`."""
    small = settings(data, per_class, smoke)
    same = ("outer_iterations", "inner_iterations", "real_batch", "network_images", "teacher_images")
    same += ("learning_rate", "scale_learning_rate")
    return IDCConfig.speech(
        images_per_class=per_class,
        width=16,
        network_learning_rate=0.01,
        **{name: getattr(small, name) for name in same},
    )


def source(data: str, args: argparse.Namespace) -> Callable[[], Splits]:
    """What loads a data set."""
    if data == "speech":
        return partial(speech, 8 * 52 if args.smoke else CLIPS, SIDE)
    return partial(cifar, 20_000) if args.native and data == "cifar10" else SOURCES[data]


def selection(train: Dataset, data: str, which: int, rows: dict[str, int]) -> Dataset:
    """A random part of the training images."""
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(which))[: rows.get(data, 10**9)]
    return train.select(chosen.tolist())


def run(job: Job, splits: Splits, args: argparse.Namespace) -> dict[str, Any]:
    """Condense one selection with one method and score it."""
    data, per_class, method, which = job
    train = selection(splits[0], data, which, args.rows)
    config = replace(args.settings(data, per_class, args.smoke), seed=which)
    if method == "idc, random start":
        config = replace(config, initialisation="mix")
    if method == "idc, four times the step":
        config = replace(config, learning_rate=4 * config.learning_rate)
    condenser = DatasetCondenser(config, method="random" if method == "full" else method.split(",")[0])
    clock, cpu = time.perf_counter(), time.process_time()
    condensed = condenser.condense(train)
    took, cpu = time.perf_counter() - clock, time.process_time() - cpu
    classes = train.features["label"].num_classes
    images = len(train) if method == "full" else classes * formation_of(condenser.config).count(per_class)
    epochs = max(1, round(args.steps / -(-images // config.evaluation_batch)))
    scoring = DatasetCondenser(replace(condenser.config, evaluation_epochs=epochs))
    if method == "full":
        scores = scoring.evaluate(condensed, splits[1], train=train, seeds=args.seeds, full_epochs=epochs)["full"]
    else:
        scores = scoring.evaluate(condensed, splits[1], seeds=args.seeds)["condensed"]
    about = {
        "images": scores[0].images,
        "CPU s": cpu,
        "s": took,
        "rounds": len(condenser.losses),
        "losses": condenser.losses[-1:],
    }
    return {"job": list(job), "accuracies": list(scores[0].accuracies), **about, "hardware": _report.hardware()}


def row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All selections of one row."""
    data, per_class, method, _ = runs[0]["job"]
    means = [statistics.mean(one["accuracies"]) for one in runs]
    spreads = [statistics.stdev(one["accuracies"]) if len(one["accuracies"]) > 1 else 0.0 for one in runs]
    seconds = {"condense CPU s": "CPU s"}
    if "NVIDIA" in runs[0]["hardware"]:
        seconds["condense s"] = "s"
    return {
        "data": data + (" (synthetic voices)" if data == "speech" else ""),
        "per class": per_class,
        "method": method,
        "accuracy": round(statistics.mean(means), 2),
        "sd over selections": round(statistics.stdev(means), 2) if len(means) > 1 else 0.0,
        "sd over seeds": round(statistics.mean(value**2 for value in spreads) ** 0.5, 2),
        "train images": runs[0]["images"],
        **{
            name: None if method == "full" else round(statistics.mean(one[key] for one in runs), 1)
            for name, key in seconds.items()
        },
        "of each selection": [round(value, 2) for value in means],
    }


def with_figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """DD-Ranking's figures, from the rows of the same data and storage."""
    known = {(one["data"], one["per class"], one["method"]): one["accuracy"] for one in rows}
    for one in rows:
        full, random = (known.get((one["data"], one["per class"], name)) for name in ("full", "random"))
        condensed = one["method"] not in ("full", "random")
        one["hard-label recovery"] = round(full - one["accuracy"], 2) if full and condensed else None
        one["improvement over random"] = round(one["accuracy"] - random, 2) if random and condensed else None
    return rows


def used(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, str]:
    """IDC's settings for every data set and storage; the other methods change what `method_config` says."""
    found = sorted({(one["data"].split()[0], one["per class"]) for one in rows})
    return {f"{data}, {n}": args.settings(data, n, False).to_json_string() for data, n in found}


def results_of(jobs: list[Job], args: argparse.Namespace) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """Finished runs by row."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for job in jobs:
        if (path := place(job, args) / "run.json").exists():
            found.setdefault(job[:3], []).append(json.loads(path.read_text()))
    return found


def place(job: Job, args: argparse.Namespace) -> Path:
    """Folder of a run; other settings, another folder."""
    about = (args.settings(*job[:2], args.smoke).to_json_string(), args.rows, args.steps, args.seeds)
    name = "_".join(map(str, job)).replace(", ", "-").replace(" ", "-")
    return args.folder / f"{args.name}_{name}_{hashlib.sha256(repr(about).encode()).hexdigest()[:8]}"


def finish(job: Job, splits: Splits, args: argparse.Namespace) -> bool:
    """Do a run, unless it is done or another process is at it; whether it was done here."""
    own = place(job, args)
    own.mkdir(parents=True, exist_ok=True)
    try:
        with locked(own):
            if (own / "run.json").exists():
                return False
            text = json.dumps(run(job, splits, args))
            (own / "part").write_text(text)
            (own / "part").rename(own / "run.json")
            return True
    except FolderInUseError:
        return False


def report(jobs: list[Job], rows: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows known before and those whose selections are all there by now, written down."""
    known = {(one["data"].split()[0], one["per class"], one["method"]) for one in rows}
    whole = {key: runs for key, runs in results_of(jobs, args).items() if len(runs) == args.selections}
    rows = with_figures([*rows, *(row(runs) for key, runs in whole.items() if key not in known)])
    if rows and not args.smoke:
        about = {
            "selections": args.selections,
            "seeds": args.seeds,
            "scoring steps": args.steps,
            "training images": args.rows,
        }
        about |= {"network": f"ConvNet-{4 if args.speech else 3}, width {args.width}", "settings": used(args, rows)}
        _report.write(args.name, rows, quiet=True, **about)
    return rows


Job = tuple[str, int, str, int]
CLIPS, SIDE = 2_080, 32  # of speech: a quarter is for testing
ROWS = {"digits": 1_000, "fashion": 2_000, "cifar10": 2_000}
NATIVE_ROWS = {"digits": 1_000, "fashion": 5_000, "cifar10": 5_000}
SPEECH_ROWS = {"speech": 1_200}
ROW_NAMES = ("random", "herding", "mosaic", "rded", "full", "dm", "idc-short", "idc") + (
    "idc, four times the step", "idc, random start", "idc-i", "dsa",
)  # fmt: skip
SOURCES: dict[str, Callable[[], Splits]] = {"digits": digits, "fashion": fashion, "cifar10": cifar}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SOURCES, default=["digits", "fashion"])
    parser.add_argument("--per-class", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--methods", nargs="+", choices=ROW_NAMES, default=list(ROW_NAMES))
    parser.add_argument("--selections", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="scoring steps, about")
    parser.add_argument("--smoke", action="store_true", help="digits, tiny, nothing written")
    parser.add_argument("--native", action="store_true", help="images as they are, width 128; a file of its own")
    parser.add_argument("--speech", action="store_true", help="words said by espeak-ng; a file of its own")
    parser.add_argument(
        "--folder", type=Path, default=_report.DATA / "condensation_quality", help="where runs are kept"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--gigabytes", type=float, help="most GPU memory of this process")
    args = parser.parse_args()
    began = time.monotonic()
    _report.limit_memory(args.gigabytes)
    torch.set_num_threads(1)
    if args.smoke:
        args.data, args.per_class, args.selections, args.seeds, args.steps = args.data[:1], args.per_class[:1], 1, 1, 40
    args.settings, args.rows, args.name, args.width = settings, ROWS, "condensation_quality", 32
    if args.native:
        args.settings, args.rows, args.name, args.width = native, NATIVE_ROWS, "condensation_quality_native", 128
    if args.speech:
        args.data, args.settings, args.rows = ["speech"], spoken, SPEECH_ROWS
        args.name, args.width = "condensation_speech", 16
    path = _report.RESULTS / f"{args.name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and not args.smoke else []
    known = {(one["data"].split()[0], one["per class"], one["method"]) for one in rows}
    order = [(data, n) for data in args.data for n in args.per_class]
    jobs: list[Job] = [
        (*one, method, which) for one in order for method in args.methods for which in range(args.selections)
    ]
    jobs = [job for job in jobs if job[:3] not in known]
    splits: dict[str, Splits] = {}
    for job in jobs:
        if time.monotonic() - began > args.seconds:
            break
        try:
            if job[0] not in splits:
                splits = {job[0]: source(job[0], args)()}
                # what a process loads once is nobody's time
                tiny = DatasetCondenser(args.settings(job[0], 1, smoke=True))
                tiny.condense(splits[job[0]][0].select(range(200)))
        except (OSError, RuntimeError) as error:
            print(f"{job} skipped: {error}")
            continue
        if finish(job, splits[job[0]], args):
            print(job, f"{time.monotonic() - began:.0f} s", flush=True)
            report(jobs, rows, args)
    if rows := report(jobs, rows, args):
        _report.show("condensation quality", rows)


if __name__ == "__main__":
    main()
