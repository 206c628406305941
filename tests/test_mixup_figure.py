"""`benchmarks/mixup_figure.py`: differences of the same seed, at the best rate, and nothing where nothing was run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from .conftest import REPO


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Any:
    sys.path.insert(0, str(REPO / "benchmarks"))
    yield
    sys.path.remove(str(REPO / "benchmarks"))


def run(setting: Any, method: str, seed: int, rate: float, accuracy: float) -> dict[str, Any]:
    found = {"method": method, "seed": seed, "rate": rate, "accuracy": accuracy, "validation_accuracy": accuracy}
    return {"setting": asdict(setting), **found}


def test_gains_are_those_of_the_same_seed_at_the_best_rate() -> None:
    from mixup_figure import CURVE, Setting, points

    base, wide = Setting(), CURVE["width 32"]
    runs = [run(base, "plain", 0, rate, accuracy) for rate, accuracy in ((0.3, 0.4), (0.1, 0.5), (1.0, 0.3))]
    runs += [run(base, "plain", 1, 0.1, 0.52), run(base, "puzzle", 0, 0.3, 0.55), run(base, "puzzle", 0, 0.1, 0.45)]
    runs += [run(base, "puzzle", 1, 0.3, 0.54), run(base, "puzzle", 2, 0.3, 0.9)]  # no plain run of seed 2
    runs += [run(wide, "plain", 0, 0.3, 0.6), run(wide, "cutmix", 0, 0.3, 0.7), run(wide, "cutmix", 0, 0.1, 0.1)][:2]
    found = points(runs, base)
    assert found is not None and found[0] == pytest.approx(51)
    assert found[1]["puzzle"] == pytest.approx([5, 2]) and found[1]["cutmix"] == []
    assert points(runs, wide) == (pytest.approx(60), {**dict.fromkeys(found[1], []), "cutmix": [pytest.approx(10)]})
    assert points(runs, CURVE["width 8"]) is None


def test_the_picture_is_drawn_from_what_is_kept(tmp_path: Path) -> None:
    from mixup_figure import PANELS, PICTURE, draw, points
    from PIL import Image

    runs, full = (
        json.loads((REPO / "benchmarks" / "results" / f"{name}.json").read_text())["runs"]
        for name in ("mixup_accuracy", "mixup_gpu")
    )
    for title, settings in PANELS.items():
        known = [points(full if title.startswith("32") else runs, setting) for setting in settings.values()]
        assert sum(one is not None for one in known) > 1, title
    draw(runs, full, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as drawn, Image.open(PICTURE) as committed:
        assert drawn.size == committed.size
