"""Clean a large dataset on several devices: features with one worker a GPU, then the graph split over processes.

python examples/clean_multi_gpu.py --extract --dataset imagenet-1k --model facebook/deit-base-patch16-224   # one worker a GPU
accelerate launch --multi_gpu --num_processes 4 examples/clean_multi_gpu.py                                 # one process a GPU
accelerate launch --multi_gpu --num_processes 2 examples/clean_multi_gpu.py --smoke        # two CPU processes, gloo
python examples/clean_multi_gpu.py --smoke                                                # one process: the same scores

A killed run goes on where it stopped: finished stripes of the graph lie in --output-dir. (`accelerate launch --cpu
--num_processes 2` starts one process only; use --multi_gpu or torchrun.)
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import multiprocess
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset, load_from_disk

from hf_dataopt import FeatureExtractor, RelationCleaner


def made_up(folder: Path) -> None:
    """2,000 rows of clustered features with 8 % flipped labels, as an extractor would leave them."""
    rng = np.random.default_rng(0)
    centres, labels = rng.standard_normal((10, 64)), rng.integers(0, 10, 2_000)
    features = (centres[labels] + rng.standard_normal((2_000, 64))).astype(np.float32)
    logits = features @ centres.T / 4
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    labels = np.where(rng.random(2_000) < 0.08, rng.integers(0, 10, 2_000), labels)
    Dataset.from_dict({"label": labels, "features": features, "probs": probs}).save_to_disk(folder)


def extract(args: argparse.Namespace, folder: Path) -> None:
    """Features and probabilities of every row, before any process group exists."""
    gpus = torch.cuda.device_count()
    if gpus > 1:
        multiprocess.set_start_method("spawn", force=True)  # CUDA cannot be used in forked workers
    extractor = FeatureExtractor(args.model, column=args.column, dtype="bfloat16" if gpus else "float32")
    rows = load_dataset(args.dataset, split="train")
    rows = rows.map(extractor, batched=True, batch_size=256, num_proc=gpus if gpus > 1 else None, with_rank=True)
    rows.save_to_disk(folder)


def main() -> None:
    """Every process runs this; the main one writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extract", action="store_true", help="first step: features of --dataset by --model")
    parser.add_argument("--dataset", help="Hub name")
    parser.add_argument("--model", help="classifier that was trained on it")
    parser.add_argument("--column", default="image")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--partition-size", type=int, default=None, help="rows of a partition: O(n k) work")
    parser.add_argument("--output-dir", default="clean_output")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    out = Path(args.output_dir)
    if args.extract:
        extract(args, out / "rows")
        return
    state = PartialState(cpu=not torch.cuda.is_available())
    if args.smoke and state.is_main_process:
        made_up(out / "rows")
    state.wait_for_everyone()
    dataset = load_from_disk(str(out / "rows"))

    cleaner = RelationCleaner(
        temperature=4,
        partition_size=args.partition_size,
        device=str(state.device) if state.device.type == "cuda" else None,
        max_memory_gb=8 if state.device.type == "cuda" else 0.06,
    )
    report = cleaner.fit(dataset, label_column=args.label_column, output_dir=out / "report")
    if state.is_main_process:
        report.filter(dataset).save_to_disk(out / "clean")
        print(
            f"{os.environ.get('WORLD_SIZE', '1')} processes: {int(report.is_label_error.sum())} of {len(report)} flagged"
        )
        print(f"checksum of the scores: {report.label_noise_score.sum():.6g}")


if __name__ == "__main__":
    main()
