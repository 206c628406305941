"""Jobs in forked children of one warm process: `python -m tests.faults.killable`.

A line "JOB SECONDS FOLDER" on stdin starts one, and kills it after SECONDS (0: never). Answers with exit status and seconds.
A child leaves its result in FOLDER/result as the last thing.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from datasets import Dataset, disable_progress_bars

from hf_dataopt.checkpoint import PassCheckpoint
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.features import FeatureExtractor
from hf_dataopt.relation import graph
from hf_dataopt.relation.cleaner import RelationCleaner

from ..condensation.conftest import as_dataset, synthetic_images
from ..relation.data import make

CONFIG = IDCConfig(
    images_per_class=1, width=4, depth=2, outer_iterations=6, inner_iterations=2, real_batch=4, network_images=16,
    network_batch=8, learning_rate=0.05, scale_learning_rate=False, storage="float32", reinitialise_every=3,
)  # fmt: skip


def relation(folder: Path) -> bytes:
    """A fit that writes after every stripe."""
    data = make(n=500, d=16).dataset()
    report = RelationCleaner(score="combined").fit(data, output_dir=folder / "out", quiet=True)
    assert not (folder / "out" / "unfinished").exists()
    arrays = (report.label_noise_score, report.outlier_score, report.suggested_label, report.is_label_error)
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def features(folder: Path) -> bytes:
    """A feature pass over a saved dataset, cached in its folder by `datasets`."""
    if not (folder / "data" / "state.json").exists():
        images = np.random.default_rng(0).normal(size=(60, 3, 16, 16)).astype(np.float32)
        Dataset.from_dict({"image": list(images)}).save_to_disk(folder / "data")
    model = tf.ViTConfig(
        image_size=16, patch_size=4, num_labels=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    extractor = FeatureExtractor(tf.ViTForImageClassification(model))
    found = Dataset.load_from_disk(str(folder / "data")).map(extractor, batched=True, batch_size=2).with_format("numpy")
    return np.asarray(found["features"][:]).tobytes() + np.asarray(found["probs"][:]).tobytes()


def condensation(folder: Path) -> bytes:
    """A run that writes after every outer iteration."""
    condenser = DatasetCondenser(CONFIG)
    images = condenser.condense(as_dataset(*synthetic_images(30)), output_dir=folder / "out")
    return np.asarray(images.with_format("numpy")["image"][:]).tobytes() + np.asarray(condenser.losses).tobytes()


JOBS: dict[str, Callable[[Path], bytes]] = {"relation": relation, "features": features, "condensation": condensation}


def _child(name: str, folder: Path) -> None:
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        folder.mkdir(parents=True, exist_ok=True)
        result = JOBS[name](folder)
        (folder / "result").write_bytes(result)
        code = 0
    finally:
        if code:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    PassCheckpoint.__init__.__defaults__ = (0.0,)
    graph.LARGEST_TILE["cpu"] = 32
    warm: set[str] = set()
    for line in sys.stdin:
        name, seconds, folder = line.rstrip("\n").split(" ", 2)
        if name not in warm:  # what is imported on first use, here instead of in every child
            warm.add(name)
            with tempfile.TemporaryDirectory() as place:
                JOBS[name](Path(place))
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            _child(name, Path(folder))
        if float(seconds):
            time.sleep(float(seconds))
            os.kill(pid, signal.SIGKILL)  # a child that is done already waits for us: the number is still its own
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, time.monotonic() - start, flush=True)


if __name__ == "__main__":
    _serve()
