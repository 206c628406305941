"""Test accuracy of networks trained on a few images per class: random, herding, DSA, DM, IDC-I and IDC (Tables 6.1, 6.7).

    OMP_NUM_THREADS=1 python benchmarks/condensation_quality.py                     # digits and Fashion-MNIST, 1 and 10
    OMP_NUM_THREADS=1 python benchmarks/condensation_quality.py --data speech       # espeak-ng words (synthetic)
    OMP_NUM_THREADS=1 python benchmarks/condensation_quality.py --smoke

ConvNet-3 of width 32 (128 in the dissertation) and few outer iterations, so that it fits a CPU; every method gets the same
scoring recipe, storage and seeds. "before" is the score of the images a method starts from: much of IDC's gain is the
mosaic itself. Results are written after every row, and rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import _report
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_dataopt.condensation.baselines import METHODS
from hf_dataopt.condensation.command import digits
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.multi_formation import to_images

WORDS = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
Splits = tuple[Dataset, Dataset]


def fashion() -> Splits:
    """Fashion-MNIST: all 60,000 training images, the first 2,000 of the test images."""
    import gzip

    import data as sources

    folder = sources.fetch(sources.FASHION, sources.DATA / "fmnist" / "usr" / "share" / "datasets" / "fashion-mnist")

    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=offset)

    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    splits = []
    for name, most in (("train", 60_000), ("t10k", 2_000)):
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


def settings(data: str, per_class: int, smoke: bool) -> IDCConfig:
    """CPU-sized settings: step sizes chosen on digits, 1 per class, none on the others."""
    values: dict[str, Any] = {
        "images_per_class": per_class,
        "width": 32,
        "outer_iterations": 1 if smoke else 8,
        "inner_iterations": 2 if smoke else 20,
        "network_images": 256,
        "learning_rate": 0.002 * per_class,  # the reference code's rule: proportional to the storage
        "scale_learning_rate": False,
        "evaluation_epochs": 5 if smoke else 300 if per_class == 1 else 120,
        "evaluation_augmentation": "color_crop_scale_rotate",
        "evaluation_cutmix": 0.0,
    }
    if data == "fashion":
        values |= {"evaluation_augmentation": "color_crop_flip_scale_rotate"}
    if data == "speech":
        return IDCConfig.speech(**{**values, "evaluation_augmentation": "none", "network_learning_rate": 0.01})
    return IDCConfig(**values)


def row(data: str, splits: Splits, method: str, per_class: int, args: argparse.Namespace) -> dict[str, Any]:
    """Condense with one method and score it."""
    condenser = DatasetCondenser(settings(data, per_class, args.smoke), method=method)
    clock = time.process_time()
    condensed = condenser.condense(splits[0])
    seconds = time.process_time() - clock
    seeds = 1 if args.smoke else 3
    found = condenser.evaluate(condensed, splits[1], seeds=seeds)["condensed"][0]
    before = None
    if condenser.config.outer_iterations:
        before = condenser.evaluate(condenser.initial(splits[0]), splits[1], seeds=seeds)["condensed"][0].mean
    return {
        "data": data + (" (synthetic voices)" if data == "speech" else ""),
        "per class": per_class,
        "method": method,
        "accuracy": found.mean,
        "spread": found.spread,
        "before": before,
        "train images": found.images,
        "condense CPU s": round(seconds, 1),
        "seeds": seeds,
    }


def used(args: argparse.Namespace) -> dict[str, str]:
    """IDC's settings for every data set and storage; the other methods change what `method_config` says."""
    return {f"{data}, {n}": settings(data, n, False).to_json_string() for data in args.data for n in args.per_class}


SOURCES: dict[str, Callable[[], Splits]] = {"digits": digits, "fashion": fashion, "speech": speech}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SOURCES, default=["digits", "fashion"])
    parser.add_argument("--per-class", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
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
                    _report.write("condensation_quality", rows, network="ConvNet-3, width 32", settings=used(args))
    _report.show("condensation quality", rows)


if __name__ == "__main__":
    main()
