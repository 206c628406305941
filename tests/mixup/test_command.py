"""`hf-dataopt mix` and its part of the demo: pictures, JSON, a dataset and a model from folders, errors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers

from hf_dataopt.cli import main
from hf_dataopt.mixup.command import trained_network


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_digits_with_a_network_trained_on_the_spot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "mixed.png"
    result = json_of(["mix", "--rows", "8", "--output-dir", str(picture.parent)], capsys)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert result["images"] == len(result["outputs"]) == 8
    for shares in result["outputs"]:
        assert sum(share for _, share in shares) == pytest.approx(1, abs=2e-3)
    assert 0.3 < result["mixed_saliency"] < 2 and result["inputs_per_output"] > 1


def test_the_network_follows_from_its_seed_and_leaves_the_global_streams_alone() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    one = trained_network(steps=1, seed=5)
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())
    torch.rand(9)
    for mine, again in zip(one.parameters(), trained_network(steps=1, seed=5).parameters(), strict=True):
        assert torch.equal(mine, again)


@pytest.mark.parametrize("method", ["puzzle", "co"])
def test_own_dataset_and_model(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(6)]
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"photo": images, "kind": [0, 1, 2, 0, 1, 2]}, features=features)
    dataset.save_to_disk(tmp_path / "data")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    call = [
        "mix",
        str(tmp_path / "data"),
        "--output-dir",
        str(tmp_path / "p"),
        "--method",
        method,
        "--rows",
        "6",
    ]
    columns = ["--column", "photo", "--label-column", "kind"]
    result = json_of([*call, *columns, "--model", str(tmp_path / "model")], capsys)
    assert result["method"] == method and (tmp_path / "p" / "mixed.png").stat().st_size > 1000
    assert main([*call, *columns]) == 2 and "--model" in capsys.readouterr().err
    assert main([*call, "--model", str(tmp_path / "model")]) == 2
    assert "--column image" in capsys.readouterr().err
    assert main(["mix", "--rows", "1"]) == 2


def test_demo_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of(["demo", "--section", "mixup", "--smoke", "--output-dir", str(tmp_path)], capsys)["mixup"]
    for method in ("puzzle", "co"):
        assert (tmp_path / f"mixup_{method}.png").stat().st_size > 1000
    saliency, inputs, variation = result["claims"]
    for row, key in ((saliency, "mixed_saliency"), (inputs, "inputs_per_output"), (variation, "total_variation")):
        assert row["ours"] == f"Puzzle Mix {result['puzzle'][key]:.2f}; Co-Mixup {result['co'][key]:.2f}"
    # halves of two whole images show one image's saliency, of two images
    assert saliency["baseline"] == "blend in halves 1.00" and inputs["baseline"] == "blend in halves 2.00"
    assert result["puzzle"]["mixed_saliency"] > 1 and result["co"]["mixed_saliency"] > 1
    assert not any("accuracy" in row["claim"] for row in result["claims"])
