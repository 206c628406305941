"""Relation, features, condensation on two hosts through `accelerate launch`, beside one process: `python -m tests.two_hosts`.

The hosts are two network namespaces with a cable (a veth pair) between them, where this machine allows that; else two
launchers with different machine ranks on the loopback device. Prints one line a job: the same bits, or the largest difference.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .conftest import REPO


def relation() -> dict[str, np.ndarray]:
    """A fit of many stripes."""
    from hf_dataopt.relation.cleaner import RelationCleaner
    from hf_dataopt.relation.tiles import LARGEST_TILE

    from .relation.data import make

    LARGEST_TILE["cpu"] = 64
    report = RelationCleaner().fit(make(n=700).dataset(), quiet=True)
    names = ("label_noise_score", "outlier_score", "is_label_error", "suggested_label")
    return {name: np.asarray(getattr(report, name)) for name in names}


def rows() -> Any:
    """Rows to map."""
    from datasets import Dataset

    return Dataset.from_dict({"image": list(np.random.default_rng(0).normal(size=(64, 3, 16, 16)).astype(np.float32))})


def extractor() -> Any:
    """Of a small model, the same everywhere."""
    import torch
    import transformers as tf

    from hf_dataopt.features import FeatureExtractor

    config = tf.ViTConfig(
        image_size=16, patch_size=8, num_labels=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FeatureExtractor(tf.ViTForImageClassification(config))


def features() -> dict[str, np.ndarray]:
    """Each process maps its share of the rows; batches hold the same rows whoever maps them."""
    import torch
    from datasets import Dataset, concatenate_datasets

    from hf_dataopt import distributed

    world = distributed.world_size()
    share = rows().shard(world, distributed.rank(), contiguous=True)
    parts: list[Any] = [share.map(extractor(), batched=True, batch_size=8, remove_columns=["image"]).to_dict()]
    if world > 1:
        mine, parts = parts[0], [None] * world
        torch.distributed.all_gather_object(parts, mine)
    found = concatenate_datasets([Dataset.from_dict(part) for part in parts]).with_format("numpy")
    return {name: np.asarray(found[name][:]) for name in ("features", "probs")}


def condensation() -> dict[str, np.ndarray]:
    """A run of three outer iterations on three classes."""
    from .condensation.conftest import as_dataset, synthetic_images
    from .faults.test_checkpoints import TINY

    from hf_dataopt.condensation.condenser import DatasetCondenser  # isort: skip

    images = DatasetCondenser(TINY).condense(as_dataset(*synthetic_images(30)))
    return {"image": np.asarray(images.with_format("numpy")["image"][:])}


JOBS = {function.__name__: function for function in (relation, features, condensation)}


def work(folder: Path) -> None:
    """What every process runs."""
    import torch

    from hf_dataopt import distributed

    torch.set_num_threads(1)
    if distributed.world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=True)
    for name, job in JOBS.items():
        np.savez(folder / f"{name}-{distributed.rank()}-of-{distributed.world_size()}.npz", **job())
    if distributed.world_size() > 1:
        torch.distributed.destroy_process_group()


@contextmanager
def hosts() -> Iterator[tuple[list[list[str]], str, dict[str, str], str]]:
    """How to start a command on each host, the first one's address, variables, and what the hosts are."""
    names, cables = [[f"hfd{os.getpid()}{k}" for k in range(2)] for _ in range(2)]
    ip = lambda *words: subprocess.run(["ip", *words], capture_output=True).returncode == 0  # noqa: E731
    try:
        made = all(ip("netns", "add", name) for name in names)
        made = made and ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for k, (name, cable) in enumerate(zip(names, cables, strict=True)):
            inside = ("-n", name)
            made = made and ip("link", "set", cable, "netns", name)
            made = made and ip(*inside, "addr", "add", f"10.77.0.{k + 1}/24", "dev", cable)
            made = made and ip(*inside, "link", "set", cable, "up") and ip(*inside, "link", "set", "lo", "up")
        if made:
            starts = [
                ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}"]
                for name, cable in zip(names, cables, strict=True)
            ]
            yield starts, "10.77.0.1", {}, "two network namespaces with a veth pair"
        else:
            yield [[], []], "127.0.0.1", {"GLOO_SOCKET_IFNAME": "lo"}, "two launchers on the loopback device"
    except FileNotFoundError:  # no `ip`
        yield [[], []], "127.0.0.1", {"GLOO_SOCKET_IFNAME": "lo"}, "two launchers on the loopback device"
    finally:
        for name in names:
            ip("netns", "del", name)


def compare(folder: Path) -> dict[str, str]:
    """Run every job on one process and on two hosts; what differs, by job, and what the hosts were under "hosts"."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = [str(Path(__file__).resolve().with_name("two_hosts_job.py")), str(folder)]
    subprocess.run([sys.executable, *script], env=environment, cwd=REPO, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with hosts() as (starts, address, more, what):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
        launch += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_ip", address, "--main_process_port", str(port), "--rdzv_backend", "static"]
        both = [
            subprocess.Popen(
                [*start, *launch, "--machine_rank", str(k), *script], env={**environment, **more}, cwd=REPO
            )
            for k, start in enumerate(starts)
        ]
        codes = [process.wait(timeout=300) for process in both]
    if codes != [0, 0]:
        raise RuntimeError(f"the launchers ended with {codes}")
    found = {"hosts": what}
    for name in JOBS:
        one, *two = (dict(np.load(folder / f"{name}-{who}.npz")) for who in ("0-of-1", "0-of-2", "1-of-2"))
        largest = max(
            float(np.abs(one[key].astype(float) - other[key].astype(float)).max()) for other in two for key in one
        )
        same = all(one[key].tobytes() == other[key].tobytes() for other in two for key in one)
        found[name] = "same bits" if same else f"differs by {largest:.2g}"
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name, result in compare(Path(scratch)).items():
            print(f"{name}: {result}")
