"""What `partition_size` costs in quality, and how time grows with rows.

    python benchmarks/relation_scale.py [--smoke] [--part quality|time|stream]

Quality: 20,000 rows of CIFAR-10 (EfficientNet-Lite0 features), confusable flips on 8 %, a probe fitted on the other half of the
rows; the same rows in partitions of several sizes. Time: made-up rows (384 features in 100 clusters, 100 probabilities), one
thread, CPU-seconds of `fit`, partitions of 5,000; `benchmarks/scale_model.py` reads rate and exponent from them. Stream:
such rows in parquet files of 10,000, through `load_dataset(..., streaming=True)` and `clean_stream`; peak resident size above
what the process held before the first row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import write
from data import DataMissingError, cifar10n, cifar_features
from datasets import load_dataset
from relation_quality import dataset_of, fit, top2_flips
from relation_speed import resident

from hf_dataopt.metrics import average_precision
from hf_dataopt.relation.cleaner import RelationCleaner
from hf_dataopt.relation.config import RelationConfig
from hf_dataopt.relation.stream import clean_stream

Array = np.ndarray
PARTITION = 5000


def halves(features: Array, labels: Array) -> Array:
    """Probabilities of each half of the rows by a probe on the other."""
    probs, even = np.empty((len(labels), int(labels.max()) + 1), np.float32), np.arange(len(labels)) % 2 == 0
    for here in (even, ~even):
        probs[here] = fit(features[~here], labels[~here], 0.003).predict_proba(features[here])
    return probs


def quality_rows(count: int) -> list[dict[str, Any]]:
    """The same rows in partitions of several sizes."""
    features = np.concatenate([cifar_features(start, start + 10_000)[: count // 2] for start in (0, 20_000)])
    names = np.asarray(cifar10n()["clean_label"], np.int64)
    clean = np.concatenate([names[start : start + count // 2] for start in (0, 20_000)])
    labels = top2_flips(features, clean, 0)
    wrong, data, rows = labels != clean, dataset_of(features, halves(features, labels), labels), []
    for size in (count // 20, count // 10, count // 4, count // 2, None):
        begun = time.process_time()
        report = RelationCleaner(outlier_reference=1000, partition_size=size).fit(data, quiet=True)
        seconds, flagged = time.process_time() - begun, report.is_label_error
        row: dict[str, Any] = {
            "n": count,
            "d": features.shape[1],
            "partition_size": size or count,
            "CPU-s": round(seconds, 1),
        }
        row["AP"] = round(average_precision(wrong, report.label_noise_score), 4)
        row["AP, score s"] = round(average_precision(wrong, report.parts["label_noise"]), 4)
        row["F1"] = round(float(2 * (flagged & wrong).sum() / (flagged.sum() + wrong.sum())), 4)
        rows.append(row)
        print(row, flush=True)
    return rows


def made_up(count: int, rng: np.random.Generator, centres: Array) -> Any:
    """Rows in clusters, 8 % of the labels drawn anew."""
    truth = rng.integers(0, 100, count)
    features = centres[truth] + 1.5 * rng.standard_normal((count, 384), np.float32)
    probs = np.full((count, 100), 0.2 / 99, np.float32)
    probs[np.arange(count), truth] = 0.8
    return dataset_of(features, probs, np.where(rng.random(count) < 0.08, rng.integers(0, 100, count), truth))


def stream_rows(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Memory and CPU-seconds of cleaned streams."""
    rng, rows, file = np.random.default_rng(0), [], counts[0]
    centres = rng.normal(size=(100, 384)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{k}.parquet" for k in range(counts[-1] // file)]
        for path in paths:
            made_up(file, rng, centres).to_parquet(path)
        for count in (file, *counts):  # the first loads and warms everything
            files = paths[: count // file]
            stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
            Path("/proc/self/clear_refs").write_text("5")
            before, begun = resident("VmRSS"), time.process_time()
            cleaned = clean_stream(stream, drop=["label errors"], config=RelationConfig(outlier_reference=1000))
            kept = sum(1 for _ in cleaned.select_columns(["label", "label_noise_score"]))
            row = {"n": count, "d": 384, "classes": 100, "partition_size": PARTITION, "kept": kept}
            row |= {"CPU-s": round(time.process_time() - begun, 1), "MB": round((resident("VmHWM") - before) / 1e6, 1)}
            print(row, flush=True)
            rows.append(row)
    return rows[1:]


def time_rows(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """CPU-seconds of whole fits."""
    rows, rng = [], np.random.default_rng(0)
    centres = rng.normal(size=(100, 384)).astype(np.float32)
    for count in counts:
        data = made_up(count, rng, centres)
        begun = time.process_time()
        report = RelationCleaner(outlier_reference=1000, partition_size=PARTITION).fit(data, quiet=True)
        row = {"n": count, "d": 384, "classes": 100, "partition_size": PARTITION}
        row |= {"CPU-s": round(time.process_time() - begun, 1), "flagged": int(report.is_label_error.sum())}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Run the parts and write `results/relation_scale_*.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="2,000 and 4,000 rows")
    parser.add_argument("--part", choices=("quality", "time", "stream"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tail = "_smoke" if args.smoke else ""
    if args.part in (None, "stream"):
        counts = (2000, 4000) if args.smoke else (10_000, 20_000, 40_000, 80_000)
        write(
            f"relation_scale_stream{tail}", stream_rows(counts), note="one thread, peak resident size above the start"
        )
    if args.part in (None, "time"):
        counts = (2000, 4000) if args.smoke else (25_000, 50_000, 100_000, 200_000)
        write(f"relation_scale_time{tail}", time_rows(counts), note="one thread, CPU-seconds of the whole fit")
    if args.part in (None, "quality"):
        try:
            write(f"relation_scale_quality{tail}", quality_rows(2000 if args.smoke else 20_000))
        except DataMissingError as error:
            print(f"skipped: {error}")


if __name__ == "__main__":
    main()
