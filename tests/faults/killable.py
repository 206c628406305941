"""Jobs and saves in forked children of one warm process: `python -m tests.faults.killable`, see `Victims`.

A victim has up to two states of a folder: `start` puts the old one there (nothing, for a job), `run` makes the new one, `read`
says which is there. Every call runs in a fork, and is killed (SIGKILL) or interrupted (SIGINT) after some seconds if asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm

from hf_dataopt.checkpoint import PassCheckpoint, write_atomically
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.features import FeatureExtractor
from hf_dataopt.relation import graph
from hf_dataopt.relation.cleaner import RelationCleaner

from ..condensation.conftest import as_dataset, synthetic_images
from ..conftest import REPO
from ..relation.data import make
from .disks import full, read_only
from .saves import SAVES, Saved

CONFIG = IDCConfig(
    images_per_class=1, width=4, depth=2, outer_iterations=6, inner_iterations=2, real_batch=4, network_images=16,
    network_batch=8, learning_rate=0.05, scale_learning_rate=False, storage="float32", reinitialise_every=3,
)  # fmt: skip


def relation(folder: Path) -> bytes:
    """A fit that writes after every stripe."""
    data = make(n=500, d=16).dataset()
    report = RelationCleaner().fit(data, output_dir=folder / "out", quiet=True)
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


def job(function: Callable[[Path], bytes]) -> Callable[[Path], Saved]:
    """A job as a victim: it leaves its result in FOLDER/result as the last thing."""

    def run(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        result = function(folder)
        write_atomically(folder / "result", result)

    def read(folder: Path) -> str:
        result = folder / "result"
        return hashlib.sha256(result.read_bytes()).hexdigest() if result.exists() else "nothing"

    def make(scratch: Path) -> Saved:
        run(scratch)  # what is imported on first use, here instead of in every child
        return Saved(lambda folder: None, run, read)

    return make


JOBS = {function.__name__: job(function) for function in (relation, features, condensation)}
VICTIMS = {**JOBS, **SAVES}
_SECONDS = 300  # for one step: what hangs is an error


@dataclass
class Ended:
    """How a call ended: exit status (minus the signal), what it returned, whether a traceback of ours was seen."""

    status: int
    seconds: float
    value: str
    error: str


class Victims:
    """The warm process; `call` runs one step of one victim in a fork of it."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.killable"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            text=True,
            env={**environment, "PYTHONPATH": str(REPO)},
            cwd=REPO,
        )

    def call(self, name: str, step: str, folder: Path, after: float = 0, how: int = signal.SIGKILL) -> Ended:
        """One step ("start", "run", "read"; "full" and "read only" disks of `disks.py`) in a fork.

        It gets the signal `how` after so many seconds, if it is not done by then.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        line = {"name": name, "step": step, "folder": str(folder), "after": after, "how": int(how)}
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.errors.read_text()[-3000:]
        return Ended(**json.loads(answer))

    def read(self, name: str, folder: Path) -> str:
        """What a folder holds."""
        ended = self.call(name, "read", folder)
        assert ended.status == 0, ended.error
        return ended.value

    def close(self) -> None:
        """End it."""
        self.process.communicate("", timeout=60)


def _child(saved: Saved, step: str, folder: Path, out: int) -> None:
    code, value, error = 1, "", ""
    disk = {"full": full, "read only": read_only}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit another one
    signal.alarm(_SECONDS)
    try:
        if step in disk:
            value = disk[step](saved, folder)
        else:
            value = str({"start": saved.first, "run": saved.second, "read": saved.read}[step](folder))
        code = 0
    except KeyboardInterrupt as caught:
        code, error = 130, repr(caught)
    except BaseException:  # noqa: BLE001 - told by the exit code
        error = traceback.format_exc()[-3000:]
    finally:
        os.write(out, json.dumps({"value": value, "error": error}).encode())
        os._exit(code)


def _one(saved: Saved, asked: dict[str, Any]) -> dict[str, Any]:
    """One step in a fork of this process."""
    reading, writing = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(saved, asked["step"], Path(asked["folder"]), writing)
    os.close(writing)
    if asked["after"]:
        time.sleep(asked["after"])
        os.kill(pid, asked["how"])  # a child that is done already waits for us: the number is still its own
    with os.fdopen(reading, "rb") as pipe:
        told = json.loads(pipe.read() or b'{"value": "", "error": ""}')
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"status": status, "seconds": time.monotonic() - start, **told}


def _keeper(name: str, scratch: Path) -> tuple[Any, Any, int]:
    """A fork that makes one victim and forks its steps: threads that a victim starts are lost in no other one's forks."""
    (asking, ask), (answering, answer) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        os.close(asking)
        os.close(answer)
        return os.fdopen(ask, "w"), os.fdopen(answering), pid
    try:
        os.close(ask)
        saved = VICTIMS[name](Path(tempfile.mkdtemp(dir=scratch)))
        with os.fdopen(asking) as lines, os.fdopen(answer, "w") as out:
            for line in lines:
                out.write(json.dumps(_one(saved, json.loads(line))) + "\n")
                out.flush()
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
    finally:
        os._exit(0)


def _serve(answers: Any) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    tqdm.set_lock(threading.RLock())  # not its semaphore, which a killed fork would keep from all others
    PassCheckpoint.__init__.__defaults__ = (0.0,)
    graph.LARGEST_TILE["cpu"] = 32
    keepers: dict[str, tuple[Any, Any, int]] = {}

    def end(name: str) -> None:
        """Waited for, so that its time is counted as ours."""
        ask, _, pid = keepers.pop(name)
        ask.close()
        os.waitpid(pid, 0)

    with tempfile.TemporaryDirectory() as scratch:
        for line in sys.stdin:
            name = json.loads(line)["name"]
            for other in set(keepers) - {name}:
                end(other)
            keeper = keepers[name] if name in keepers else keepers.setdefault(name, _keeper(name, Path(scratch)))
            keeper[0].write(line)
            keeper[0].flush()
            answer = keeper[1].readline()
            if not answer:
                raise RuntimeError(f"the victim {name} could not be made")
            answers.write(answer)
            answers.flush()
        for name in set(keepers):
            end(name)


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a job prints is no answer
    _serve(channel)
