"""Which job gives the same bits under what: docs/reliability.md, by `determinism.py`, and what has no column there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset

from hf_dataopt.features import FeatureExtractor
from hf_dataopt.mixup.batches import batch_generator
from hf_dataopt.saliency import SaliencyExtractor

from .determinism import table


def _model(folder: Path) -> str:
    config = tf.ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows() -> Dataset:
    images = np.random.default_rng(0).normal(size=(24, 3, 16, 16)).astype(np.float32)
    return Dataset.from_dict({"pixel_values": list(images), "labels": [k % 4 for k in range(24)]})


def test_every_cell_of_the_table_is_the_same_bits(tmp_path: Path) -> None:
    found = table(tmp_path)
    print(f"\n{found}")
    assert found.pop("hosts")["hosts"]
    cells = {f"{job}, {column}": cell for job, row in found.items() for column, cell in row.items() if cell != "-"}
    assert len(cells) == 12 and {*cells.values()} == {"same bits"}, cells


def test_features_of_other_batches_agree_to_rounding(tmp_path: Path, rows: Dataset) -> None:
    extractor = FeatureExtractor(_model(tmp_path), column="pixel_values")
    one, other = (rows.map(extractor, batched=True, batch_size=size)["features"][:] for size in (4, 7))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_saliency_columns_over_processes_are_the_same_bits(tmp_path: Path, rows: Dataset) -> None:
    model = tf.ViTForImageClassification.from_pretrained(_model(tmp_path))
    found = []
    for seed, processes in [(0, None), (1, 2)]:
        torch.manual_seed(seed)
        found.append(rows.map(SaliencyExtractor(model), batched=True, batch_size=4, num_proc=processes)["saliency"][:])
    assert found[0] == found[1]


def test_the_stream_of_a_batch_follows_from_the_batch() -> None:
    maps = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)

    def first(seed: int, epoch: int, labels: torch.Tensor, maps: torch.Tensor) -> float:
        return float(torch.rand((), generator=batch_generator(seed, epoch, labels, maps), dtype=torch.float64))

    same = first(0, 0, labels, maps)
    assert same == first(0, 0, labels.clone(), maps.clone())
    others = [(1, 0, labels, maps), (0, 1, labels, maps), (0, 0, labels.flip(0), maps), (0, 0, labels, maps.flip(0))]
    assert same not in [first(*other) for other in others]
