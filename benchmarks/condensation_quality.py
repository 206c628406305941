"""Test accuracy of networks trained on a few images per class, every method and the whole data (Tables 6.1, 6.7).

    OMP_NUM_THREADS=1 python benchmarks/condensation_quality.py --data digits fashion cifar10 --per-class 1 10
    OMP_NUM_THREADS=1 python benchmarks/condensation_quality.py --data speech       # espeak-ng words (synthetic)
    OMP_NUM_THREADS=1 python benchmarks/condensation_quality.py --smoke

ConvNet-3 of width 32 (128 in the dissertation) on images of 16 x 16, 1,000 to 2,000 training images and few outer iterations,
to fit a CPU. Every method gets the same storage and scoring recipe, and as many scoring steps (--steps), whatever it
forms. Three selections of the training images, three evaluation seeds of each: both spreads are told. "idc, random start" is
IDC from mosaics of random images (the reference's start); idc and idc-short start from the images of the row "mosaic", idc-i,
dm and dsa from those of "random". Hard-label recovery and improvement over random are DD-Ranking's, against the rows "full" and
"random". Results are written after every row, and rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import _report
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_dataopt.condensation.command import digits
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.loop import formation_of
from hf_dataopt.condensation.multi_formation import to_images

WORDS = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
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


def speech(clips: int = 2000) -> Splits:
    """Synthetic command words by espeak-ng as log-spectrograms of 32 x 32; a quarter of the voices is held out."""
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError("espeak-ng is missing: apt-get install espeak-ng")
    draws = np.random.default_rng(0)
    voices = [
        f"en-{accent}+{kind}{number}" for accent in ("us", "gb", "029") for kind in "mf" for number in range(1, 5)
    ]
    chosen = [(i % 10, int(draws.integers(len(voices))), *draws.integers([20, 110], [80, 220])) for i in range(clips)]
    with ThreadPoolExecutor(2) as pool:
        spectra = list(pool.map(lambda one: _spectrogram(WORDS[one[0]], voices[one[1]], one[2], one[3]), chosen))
    values, voice = np.stack(spectra), np.array([one[1] for one in chosen])
    labels = np.array([one[0] for one in chosen])
    held = voice % 4 == 0
    values = (values - values[~held].mean()) / values[~held].std()
    features = {"names": WORDS}
    return tuple(  # type: ignore[return-value]
        Dataset.from_dict({"image": values[rows], "label": labels[rows]}).cast_column("label", ClassLabel(**features))
        for rows in (~held, held)
    )


def _spectrogram(word: str, voice: str, pitch: int, speed: int) -> np.ndarray:
    call = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", word]
    raw = subprocess.run(call, capture_output=True, check=True).stdout
    wave = torch.from_numpy(np.frombuffer(raw[44:], "<i2").astype(np.float32) / 32768)
    spectrum = torch.stft(wave, 512, 256, window=torch.hann_window(512), return_complex=True).abs()[None, None]
    small = torch.nn.functional.interpolate(spectrum[:, :, :128], size=(32, 32), mode="bilinear")
    return torch.log(small[0] + 1e-3).numpy()


def cifar() -> Splits:
    """CIFAR-10: training rows 0 to 19,999 to select from, 30,000 to 30,999 as the test set."""
    import data as sources

    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    splits = []
    for start, stop in ((0, 20_000), (30_000, 31_000)):
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
    if data == "speech":
        changes = {"evaluation_augmentation": "none", "network_learning_rate": 0.01, "image_size": None}
        return IDCConfig.speech(**{**values, **changes})
    return IDCConfig(**values)


def selection(train: Dataset, data: str, which: int) -> Dataset:
    """A random part of the training images."""
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(which))[: ROWS.get(data, 10**9)]
    return train.select(rows.tolist())


def row(data: str, splits: Splits, method: str, per_class: int, args: argparse.Namespace) -> dict[str, Any]:
    """Condense every selection with one method and score it."""
    means, spreads, seconds, images = [], [], [], 0
    tiny = settings(data, 1, smoke=True)
    DatasetCondenser(tiny).condense(splits[0].select(range(200)))  # what a process loads once is nobody's time
    for which in range(1 if args.smoke else args.selections):
        train = selection(splits[0], data, which)
        config = replace(settings(data, per_class, args.smoke), seed=which)
        if method == "idc, random start":
            config = replace(config, initialisation="mix")
        if method == "idc, four times the step":
            config = replace(config, learning_rate=4 * config.learning_rate)
        condenser = DatasetCondenser(config, method="random" if method == "full" else method.split(",")[0])
        clock = time.process_time()
        condensed = condenser.condense(train)
        seconds.append(time.process_time() - clock)
        images = len(train) if method == "full" else 10 * formation_of(condenser.config).count(per_class)
        epochs = max(1, round((40 if args.smoke else args.steps) / -(-images // config.evaluation_batch)))
        scoring = DatasetCondenser(replace(condenser.config, evaluation_epochs=epochs))
        seeds = 1 if args.smoke else args.seeds
        if method == "full":
            found = scoring.evaluate(condensed, splits[1], train=train, seeds=seeds, full_epochs=epochs)["full"][0]
        else:
            found = scoring.evaluate(condensed, splits[1], seeds=seeds)["condensed"][0]
        means, spreads, images = [*means, found.mean], [*spreads, found.spread], found.images
    return {
        "data": data + (" (synthetic voices)" if data == "speech" else ""),
        "per class": per_class,
        "method": method,
        "accuracy": round(statistics.mean(means), 2),
        "sd over selections": round(statistics.stdev(means), 2) if len(means) > 1 else 0.0,
        "sd over seeds": round(statistics.mean(value**2 for value in spreads) ** 0.5, 2),
        "train images": images,
        "condense CPU s": None if method == "full" else round(statistics.mean(seconds), 1),
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


def used(args: argparse.Namespace) -> dict[str, str]:
    """IDC's settings for every data set and storage; the other methods change what `method_config` says."""
    return {f"{data}, {n}": settings(data, n, False).to_json_string() for data in SOURCES for n in (1, 10)}


ROWS = {"digits": 1_000, "fashion": 2_000, "cifar10": 2_000}
ROW_NAMES = ("random", "herding", "mosaic", "rded", "full", "dm", "idc-short", "idc") + (
    "idc, four times the step", "idc, random start", "idc-i", "dsa",
)  # fmt: skip
SOURCES: dict[str, Callable[[], Splits]] = {"digits": digits, "fashion": fashion, "cifar10": cifar, "speech": speech}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SOURCES, default=["digits", "fashion"])
    parser.add_argument("--per-class", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--methods", nargs="+", choices=ROW_NAMES, default=list(ROW_NAMES))
    parser.add_argument("--selections", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="scoring steps, about")
    parser.add_argument("--smoke", action="store_true", help="digits, tiny, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.smoke:
        args.data, args.per_class = ["digits"], [1]
    path = _report.RESULTS / "condensation_quality.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and not args.smoke else []
    for data in args.data:
        try:
            splits = SOURCES[data]()
        except (OSError, RuntimeError) as error:
            print(f"{data} skipped: {error}")
            continue
        for per_class in args.per_class:
            for method in args.methods:
                if any((r["data"].split()[0], r["per class"], r["method"]) == (data, per_class, method) for r in rows):
                    continue
                rows.append(row(data, splits, method, per_class, args))
                if not args.smoke:
                    about = {"selections": args.selections, "seeds": args.seeds, "scoring steps": args.steps}
                    about |= {"training images": ROWS, "network": "ConvNet-3, width 32", "settings": used(args)}
                    _report.write("condensation_quality", with_figures(rows), **about)
    _report.show("condensation quality", with_figures(rows))


if __name__ == "__main__":
    main()
