"""A device that runs out of memory at any tile: tiles and batches halve, a line says so, and the result is the same.

The error is raised where the kernel or the model would raise it, at a random call, or for everything above a size.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from hf_dataopt.features import FeatureExtractor
from hf_dataopt.relation import tiles
from hf_dataopt.relation.cleaner import RelationCleaner

from ..relation.data import make

CASE = make(n=500, d=16)
MESSAGES = "out of memory; going on"


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.LARGEST_TILE, "cpu", 256)


def fitted() -> Any:
    return RelationCleaner(score="combined").fit(CASE.dataset(), quiet=True)


def check(found: Any, expected: Any) -> None:
    scale = np.abs(expected.label_noise_score).max()
    np.testing.assert_allclose(found.label_noise_score, expected.label_noise_score, atol=1e-5 * scale)
    np.testing.assert_allclose(found.outlier_score, expected.outlier_score, rtol=1e-5)
    np.testing.assert_array_equal(found.suggested_label, expected.suggested_label)
    for row in (3, 77):
        one, other = found.evidence(row), expected.evidence(row)
        np.testing.assert_array_equal(one.conflicting, other.conflicting)
        np.testing.assert_allclose(one.supporting_relations, other.supporting_relations, atol=1e-6)


@pytest.mark.parametrize("name", ["base_kernel", "sums_of"])
@pytest.mark.parametrize("seed", range(3))
def test_relation_tiles_halve(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors at random calls: before a tile has added anything, and in the midst of a stripe that has."""
    whole, calls = getattr(tiles, name), [0]
    due: list[int] = []

    def full(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] in due:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(*args, **options)

    monkeypatch.setattr(tiles, name, full)
    expected = fitted()
    due += random.Random(seed).sample(range(1, calls[0]), 2)
    calls[0] = 0
    check(fitted(), expected)
    assert caplog.text.count(MESSAGES) == 2


def test_relation_tiles_halve_until_they_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected, whole = fitted(), tiles.base_kernel

    def small(left: torch.Tensor, right: torch.Tensor, *args: Any) -> torch.Tensor:
        if len(left) * len(right) > 64 * 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(left, right, *args)

    monkeypatch.setattr(tiles, "base_kernel", small)
    check(fitted(), expected)
    assert "tiles of 128 rows" in caplog.text and "tiles of 64 rows" in caplog.text
    assert caplog.text.count(MESSAGES) <= 6  # what fits is remembered from pass to pass


def test_relation_gives_up_below_the_smallest_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(tiles, "base_kernel", never)
    with pytest.raises(torch.OutOfMemoryError):
        fitted()


def test_feature_batches_halve(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = tf.ViTForImageClassification(
        tf.ViTConfig(
            image_size=16,
            patch_size=8,
            num_labels=3,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
    )
    batch = {"image": torch.randn(23, 3, 16, 16)}
    expected = FeatureExtractor(model)(batch)
    owner, sizes = model.vit.embeddings, list[int]()
    forward = owner.forward

    def small(pixels: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(pixels))
        if len(pixels) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(pixels, *args, **options)

    monkeypatch.setattr(owner, "forward", small)
    extractor = FeatureExtractor(model)
    found = extractor(batch)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)
    assert sizes == [23, 11, 5, 5, 5, 5, 3] and caplog.text.count(MESSAGES) == 2
    extractor(batch)
    assert sizes[7:] == [5, 5, 5, 5, 3] and caplog.text.count(MESSAGES) == 2  # remembered
    monkeypatch.setattr(owner, "forward", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        extractor(batch)
