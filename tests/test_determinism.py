"""Which job gives the same bits under what: the rows of README's table that no other test holds.

Killed and started again: `faults/test_kills.py`. Two processes: `test_two_processes_equal_one` of relation and condensation.
Loader workers: `mixup/test_collators.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset

from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.features import FeatureExtractor
from hf_dataopt.mixup.collators import batch_generator
from hf_dataopt.relation.cleaner import RelationCleaner
from hf_dataopt.saliency import SaliencyExtractor

from .faults.test_checkpoints import TINY, images
from .relation.data import make


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


def test_features_over_processes_are_the_same_bits_where_the_batches_are(tmp_path: Path, rows: Dataset) -> None:
    extractor = FeatureExtractor(_model(tmp_path), column="pixel_values")
    one = rows.map(extractor, batched=True, batch_size=4)
    two = rows.map(extractor, batched=True, batch_size=4, num_proc=2, with_rank=True)
    assert one["features"][:] == two["features"][:] and one["probs"][:] == two["probs"][:]
    other = rows.map(extractor, batched=True, batch_size=7)
    np.testing.assert_allclose(one["features"][:], other["features"][:], atol=1e-5)


def test_saliency_columns_over_processes_are_the_same_bits(tmp_path: Path, rows: Dataset) -> None:
    model = tf.ViTForImageClassification.from_pretrained(_model(tmp_path))
    found = []
    for seed, processes in [(0, None), (1, 2)]:
        torch.manual_seed(seed)
        found.append(rows.map(SaliencyExtractor(model), batched=True, batch_size=4, num_proc=processes)["saliency"][:])
    assert found[0] == found[1]


def test_no_global_seed_changes_a_fit_or_a_condensed_set() -> None:
    data, found = make(n=200).dataset(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        report = RelationCleaner(score="combined", partition_size=120).fit(data, quiet=True)
        pixels = DatasetCondenser(TINY).condense(images())["image"][:]
        found.append((report.label_noise_score.tobytes(), report.outlier_score.tobytes(), pixels))
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
