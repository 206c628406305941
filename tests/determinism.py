"""Which job gives the same bits under what, as a table: `python -m tests.determinism`.

Every cell is measured beside an undisturbed run on one process; "-" stands where a job has no such thing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_dataopt.features import FeatureExtractor
from hf_dataopt.relation import graph

from . import two_hosts
from .faults import test_checkpoints as jobs
from .mixup.test_collators import in_workers, with_maps

COLUMNS = ("other global seeds", "killed and started again", "0 and 2 workers", "two hosts")


def verdict(one: bytes, *others: bytes) -> str:
    """What the bits say."""
    return "same bits" if all(one == other for other in others) else "other bits"


def seeded(job: Callable[[], bytes]) -> str:
    """A job under two global seeds."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        found.append(job())
    return verdict(*found)


def resumed(name: str, folder: Path) -> str:
    """A job that is stopped between two writes, and started again."""
    job, writes = jobs.JOBS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graph.LARGEST_TILE, "cpu", 32)
        jobs.killed_after(writes, job, folder, patch)
        return verdict(job(None), job(folder))


def features(processes: int | None = None, stop: Path | None = None) -> bytes:
    """A feature pass over saved rows; `stop` breaks a first pass off in its midst."""
    data, extractor = two_hosts.rows(), two_hosts.extractor()
    if stop is not None:
        data.save_to_disk(stop)
        data = type(data).load_from_disk(str(stop))
        whole, calls = FeatureExtractor.__call__, iter(range(100))

        def stopped(self: FeatureExtractor, *args: object, **options: object) -> object:
            if next(calls) == 3:
                raise KeyboardInterrupt
            return whole(self, *args, **options)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(FeatureExtractor, "__call__", stopped)
            data.map(extractor, batched=True, batch_size=8)
    found = data.map(extractor, batched=True, batch_size=8, num_proc=processes).with_format("numpy")
    return b"".join(np.asarray(found[name][:]).tobytes() for name in ("features", "probs"))


def mixing(workers: int = 0) -> bytes:
    """Two epochs of batches that are mixed from a column of maps."""
    collator = in_workers()
    made = []
    for epoch in range(2):
        collator.set_epoch(epoch)
        loader = DataLoader(with_maps(32), batch_size=8, collate_fn=collator, num_workers=workers)
        made += [batch["pixel_values"].numpy().tobytes() for batch in loader]
    return b"".join(made)


def table(folder: Path) -> dict[str, dict[str, str]]:
    """Job by condition."""
    hosts = two_hosts.compare(folder)
    rows = {
        "relation fit": (
            seeded(lambda: jobs.relation(None)),
            resumed("relation", folder / "relation"),
            "-",
            hosts["relation"],
        ),
        "features": (
            seeded(features),
            verdict(features(), features(stop=folder / "features")),
            verdict(features(), features(2)),
            hosts["features"],
        ),
        "condensation": (
            seeded(lambda: jobs.condensation(None)),
            resumed("condensation", folder / "condensation"),
            "-",
            hosts["condensation"],
        ),
        "mixing from a column": (seeded(mixing), "-", verdict(mixing(), mixing(2)), "-"),
    }
    return {name: dict(zip(COLUMNS, found, strict=True)) for name, found in rows.items()} | {"hosts": hosts}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = table(Path(scratch))
    print(f"two hosts: {found.pop('hosts')['hosts']}")
    print(" | ".join(["job", *COLUMNS]))
    for name, cells in found.items():
        print(" | ".join([name, *cells.values()]))
