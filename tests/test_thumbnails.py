"""Thumbnails: what is left of a picture is left of it in another file or size too, by either way that makes them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from hf_dataopt import FeatureExtractor, Thumbnails
from hf_dataopt.errors import BadRowError
from hf_dataopt.thumbnails import thumbnail

RNG = np.random.default_rng(0)


def picture(seed: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(
        np.clip(np.asarray(smooth) + rng.normal(scale=5, size=(size[1], size[0], 3)), 0, 255).astype("u1")
    )


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def apart(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.sqrt(((left.astype(float) - right.astype(float)) ** 2).mean()))


def test_another_file_or_size_of_a_picture_is_nearly_the_same() -> None:
    image, other = picture(), thumbnail(picture(1))
    small = thumbnail(image)
    assert small.shape == (192,) and small.dtype == np.uint8
    np.testing.assert_array_equal(thumbnail(encoded(image, "PNG")), small)
    np.testing.assert_array_equal(thumbnail({"bytes": encoded(image, "PNG"), "path": None}), small)
    again = [
        encoded(image, "JPEG", quality=75),
        image.resize((40, 27)),
        image.resize((96, 64), Image.Resampling.BICUBIC),
    ]
    assert max(apart(thumbnail(one), small) for one in again) < 3 < 15 < apart(other, small)
    left = np.asarray(image).astype(float)[:, :6].mean(axis=(0, 1))
    assert apart(small.reshape(8, 8, 3)[:, 0].mean(axis=0), left) < 8  # rows, columns, colours


def test_arrays_are_pictures_of_bytes_or_black() -> None:
    image = picture()
    np.testing.assert_array_equal(thumbnail(np.asarray(image)), thumbnail(image))
    grey = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(thumbnail(grey), thumbnail(image.convert("L")))
    np.testing.assert_array_equal(thumbnail(grey[..., None]), thumbnail(grey))
    for array in (np.ones((3, 32, 32), np.float32), np.zeros((32, 32, 7), np.uint8)):
        assert not thumbnail(array).any()


def test_a_dataset_is_mapped_and_bad_rows_are_named_or_black() -> None:
    cells = [{"bytes": encoded(picture(k), "PNG"), "path": None} for k in range(3)]
    cells[1] = {"bytes": b"no picture", "path": None}
    data = datasets.Dataset.from_dict({"photo": cells}, features=datasets.Features({"photo": datasets.Image()}))
    with pytest.raises(BadRowError, match="row 1"):
        data.map(Thumbnails("photo"), batched=True, with_indices=True, batch_size=2)
    mapped = data.map(Thumbnails("photo", on_error="skip"), batched=True, batch_size=2)
    small = np.asarray(mapped.with_format("numpy")["thumbnail"][:])
    np.testing.assert_array_equal(small[[0, 2]], [thumbnail(picture(0)), thumbnail(picture(2))])
    assert not small[1].any() and mapped.features["thumbnail"].feature.dtype == "uint8"
    with pytest.raises(ValueError, match="set column="):
        Thumbnails()({"photo": cells})


def test_features_come_with_thumbnails_of_pictures_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    model, processor = tf.ViTForImageClassification(config), tf.ViTImageProcessor(size={"height": 16, "width": 16})
    cells: list[Any] = [picture(0), None, picture(2)]
    got = FeatureExtractor(model, processor, on_error="skip", suffix="_a")({"image": cells})
    assert set(got) == {"features_a", "probs_a", "thumbnail"}
    np.testing.assert_array_equal(got["thumbnail"], Thumbnails(on_error="skip")({"image": cells})["thumbnail"])
    bare = FeatureExtractor(model)({"image": RNG.normal(size=(2, 3, 16, 16)).astype(np.float32)})
    assert set(bare) == {"features", "probs"}


def test_a_model_of_several_labels_has_a_sigmoid_a_label() -> None:
    torch.manual_seed(0)
    config = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3, layer_type="basic")
    config.problem_type = "multi_label_classification"
    model = tf.ResNetForImageClassification(config).eval()
    pixels = RNG.normal(size=(2, 3, 16, 16)).astype(np.float32)
    got = FeatureExtractor(model)({"image": pixels})["probs"]
    with torch.no_grad():
        np.testing.assert_allclose(got, model(torch.from_numpy(pixels)).logits.sigmoid(), rtol=1e-5)
