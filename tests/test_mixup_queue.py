"""The queue of `benchmarks/mixup_gpu.py`: no run twice, rates before what uses them, nothing begun that cannot end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import REPO


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Any:
    sys.path.insert(0, str(REPO / "benchmarks"))
    yield
    sys.path.remove(str(REPO / "benchmarks"))


def queue(folder: Path, seconds: float = 1e6) -> Any:
    from mixup_gpu import Queue

    return Queue(folder, time.time() + seconds, smoke=False)


def finish(one: Any, about: dict[str, Any], accuracy: float, seconds: float = 10.0) -> None:
    one.add(one.runs, {**about, "validation_accuracy": accuracy, "accuracy": accuracy, "seconds": seconds})


def test_two_processes_share_the_plan(tmp_path: Path) -> None:
    from mixup_gpu import FIVE, TRIED

    first, second = queue(tmp_path), queue(tmp_path)
    tuning = [one.take() for _ in range(7) for one in (first, second)] + [first.take()]
    assert [(about["method"], about["rate"]) for about in tuning] == [
        (method, rate) for rate in TRIED["resnet8"] for method in FIVE
    ]
    for about in tuning:  # the second rate is best for Puzzle Mix, the last for the others
        best = 0.1 if about["method"] == "puzzle" else 1.0
        finish(second, about, 0.5 + 0.1 * (about["rate"] == best))
    table = [first.take() for _ in FIVE]
    assert [(about["seed"], about["method"], about["rate"]) for about in table] == [
        (1, method, 0.1 if method == "puzzle" else 1.0) for method in FIVE
    ]


def test_a_failed_run_chooses_nothing_and_is_not_tried_again(tmp_path: Path) -> None:
    one = queue(tmp_path)
    tuning = [one.take() for _ in range(15)]
    for about in tuning:
        if about["method"] == "plain" and about["rate"] == 1.0:
            one.add(one.failed, {**about, "error": "none"})
        else:
            finish(one, about, about["rate"])
    one.locks.joinpath("x").touch()
    for lock in one.locks.iterdir():  # as a new start does
        lock.unlink()
    plain = next(about for about in iter(one.take, None) if about["method"] == "plain")
    assert (plain["seed"], plain["rate"]) == (1, 0.3)


def test_nothing_begins_that_cannot_end(tmp_path: Path) -> None:
    from mixup_gpu import AROUND, needed

    one = queue(tmp_path, seconds=40.0)  # Co-Mixup is guessed at 83 seconds, Puzzle Mix at 50
    about = one.take()
    assert about["method"] == "plain"
    finish(one, about, 0.5, seconds=60.0)
    assert needed(about, one.read(one.runs)) == pytest.approx(AROUND + 1.1 * 60)
    assert one.take()["method"] == "input mixup"  # plain at the next rate takes longer than is left
    assert one.take()["method"] == "cutmix"


def test_a_line_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    one = queue(tmp_path)
    finish(one, one.take(), 0.25)
    with one.runs.open("a") as file:
        file.write('{"setting": ')
    assert [run["accuracy"] for run in one.read(one.runs)] == [0.25]


def test_maps_kept_for_a_row_are_mirrored_with_it_and_taken_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import mixup_rows
    import numpy as np
    import torch
    from mixup_accuracy import refreshed

    pixels = np.random.default_rng(0).integers(256, size=(8, 4, 4, 3), dtype=np.uint8)
    data = mixup_rows.Rows(pixels, np.arange(8), 4)
    kept = mixup_rows.MappedRows(data, seed=0)
    calls = []

    def maps(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(labels))
        return inputs["pixel_values"].sum(1)

    monkeypatch.setattr(mixup_rows, "input_saliency", maps)
    refresh = mixup_rows.Refresh(kept, every=2)
    for epoch in range(4):
        state = type("State", (), {"epoch": float(epoch)})
        refresh.on_epoch_begin(None, state, None, model=torch.nn.Linear(1, 1))
    assert calls == [8, 8]
    rows = [kept[i] for i in range(8)]
    mirrored = [not torch.equal(row["pixel_values"], data.images[i]) for i, row in enumerate(rows)]
    assert 0 < sum(mirrored) < 8
    for row in rows:
        torch.testing.assert_close(torch.from_numpy(row["saliency"].copy()), row["pixel_values"].sum(0))
    assert [refreshed(name) for name in ("puzzle", "puzzle, maps of every 5. epoch")] == [0, 5]


def test_only_the_methods_asked_for(tmp_path: Path) -> None:
    from mixup_gpu import Queue

    one = Queue(tmp_path, time.time() + 1e6, smoke=False, methods=("cutmix",))
    taken = [one.take() for _ in range(3)]
    assert [(about["method"], about["rate"]) for about in taken] == [("cutmix", rate) for rate in (0.3, 0.1, 1.0)]
