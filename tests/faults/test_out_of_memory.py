"""A device that runs out of memory at any tile: tiles and batches halve, a line says so, and the result is the same.

The error is raised where the kernel or the model would raise it, at a random call, or for everything above a size.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from datasets.fingerprint import Hasher

from hf_dataopt import KVzipConfig
from hf_dataopt._compat import decoder_of, layer_tensors
from hf_dataopt.condensation import loop
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.features import FeatureExtractor
from hf_dataopt.kvzip import passes, reading, streaming
from hf_dataopt.kvzip.layers import KVzipLayer
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.relation import tiles
from hf_dataopt.relation.cleaner import RelationCleaner
from hf_dataopt.saliency import SaliencyExtractor

from ..condensation.conftest import as_dataset, synthetic_images
from ..families import available
from ..kvzip.conftest import CONTEXT
from ..kvzip.test_gates import random_gates
from ..mixup.models import vit
from ..models import byte_tokenizer, tiny_model
from ..relation.data import make
from .test_checkpoints import TINY

# full, sliding and linear attention, and latents
READ_IN_PIECES = ("llama", "gemma3_text", "qwen3_next", "deepseek_v3")
CASE = make(n=500, d=16)
MESSAGES = "out of memory; going on"


def full(*args: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.LARGEST_TILE, "cpu", 256)


def fitted() -> Any:
    return RelationCleaner().fit(CASE.dataset(), quiet=True)


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


def test_saliency_batches_halve(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, sizes = vit().eval(), list[int]()
    pixels = torch.randn(11, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": pixels.numpy(), "labels": np.arange(11) % 10}
    extractor = SaliencyExtractor(model)
    expected, hashed = extractor(batch)["saliency"], Hasher.hash(extractor)
    owner = model.vit.embeddings
    forward = owner.forward

    def small(values: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(values))
        return full() if len(values) > 4 else forward(values, *args, **options)

    monkeypatch.setattr(owner, "forward", small)
    np.testing.assert_allclose(extractor(batch)["saliency"], expected, rtol=1e-4, atol=1e-7)
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1] and caplog.text.count(MESSAGES) == 2
    extractor(batch)
    assert sizes[8:] == [2, 2, 2, 2, 2, 1]  # remembered
    monkeypatch.setattr(owner, "forward", forward)
    del owner.forward  # an attribute of the instance would be hashed
    assert Hasher.hash(extractor) == hashed  # not what the device had room for
    monkeypatch.setattr(owner, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        extractor(batch)


@pytest.mark.parametrize("match", ["gradient", "feature"])
def test_condensation_groups_halve(
    match: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Classes that a failed try has drawn for are drawn for again: the same bits."""
    data = as_dataset(*synthetic_images(30))
    options = {"match": match, **({"train_network_on": "nothing"} if match == "feature" else {})}
    config = replace(TINY, outer_iterations=2, inner_iterations=2, **options)  # type: ignore[arg-type]

    def run() -> tuple[Any, list[float]]:
        condenser = DatasetCondenser(config)
        return np.asarray(condenser.condense(data)["image"]), condenser.losses

    expected, augmented, calls = run(), loop.augment_groups, [0]
    due: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        calls[0] += 1
        return full() if calls[0] in due else augmented(*args)

    monkeypatch.setattr(loop, "augment_groups", counted)
    run()
    assert calls[0] == 2 * 2 * 2  # real and synthetic images of three classes together, four times
    due += [2]  # the classes have drawn by then
    calls[0] = 0
    found = run()
    assert "groups of 1 classes" in caplog.text and caplog.text.count(MESSAGES) == 1
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


KINDS = {name: family for name, family in available().items() if name in READ_IN_PIECES}
MOST = 40  # tokens


def tight(monkeypatch: pytest.MonkeyPatch, model: Any, where: str) -> None:
    """A device that has no room for more tokens, found out late in a forward: most layers have cached theirs by then."""
    if where == "layer":
        block = decoder_of(model).layers[-1]
        forward = block.forward

        def small(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
            return full() if hidden.shape[1] > MOST else forward(hidden, *args, **options)

        monkeypatch.setattr(block, "forward", small)
        return
    for module in (reading, passes, streaming):  # a layer has cached its keys, and has not answered
        whole = module.attend

        def narrow(query: torch.Tensor, *args: Any, whole: Any = whole, **options: Any) -> Any:
            return full() if query.shape[2] > MOST else whole(query, *args, **options)

        monkeypatch.setattr(module, "attend", narrow)


def to_be_read(name: str, config: KVzipConfig) -> tuple[Any, Any, Any]:
    """A model of this kind, gates for it, and the prompt they read."""
    model = KINDS[name].model()
    return model, random_gates(model), build_prompt(byte_tokenizer(), CONTEXT, config)


@pytest.mark.parametrize("where", ["layer", "attention"])
@pytest.mark.parametrize("name", KINDS)
def test_reading_and_scoring_halve(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = KVzipConfig(chunk_size=100, prefill_chunk_size=150, overlap=8)
    model, gates, prompt = to_be_read(name, config)

    def made() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        prefilled, told = gates.prefill(model, prompt, config, progress=False)
        scores = score_context(prefilled, config, progress=False)
        return [part for layer in prefilled.cache.layers for part in layer_tensors(layer)], told, scores

    expected = made()
    tight(monkeypatch, model, where)
    found = made()
    assert "pieces of 37 tokens" in caplog.text and "of a repeat input" in caplog.text
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=2e-5)


@pytest.mark.parametrize("where", ["layer", "attention"])
@pytest.mark.parametrize("name", KINDS)
def test_reading_within_a_budget_halves(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is cut, and when, is what it would have been."""
    config = KVzipConfig(keep_ratio=0.4, prefill_chunk_size=110)
    model, gates, prompt = to_be_read(name, config)
    expected = gates.read(model, prompt, config, progress=False)
    tight(monkeypatch, model, where)
    found = gates.read(model, prompt, config, progress=False)
    assert MESSAGES in caplog.text
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, KVzipLayer):
            assert one.context.lengths == other.context.lengths
            torch.testing.assert_close(one.context.keys, other.context.keys, rtol=0, atol=2e-5)
            torch.testing.assert_close(one.context.values, other.context.values, rtol=0, atol=2e-5)


@pytest.mark.parametrize("step", ["prefill", "scoring"])
def test_kvzip_gives_up_below_one_token(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_model("llama"), KVzipConfig()
    prompt = build_prompt(byte_tokenizer(), CONTEXT, config)
    prefilled = prefill(model, prompt, config, progress=False)
    monkeypatch.setattr(reading if step == "prefill" else passes, "attend", full)
    with pytest.raises(torch.OutOfMemoryError):
        if step == "prefill":
            prefill(model, prompt, config, progress=False)
        else:
            score_context(prefilled, config, progress=False)
