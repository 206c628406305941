"""Bad rows in every room: read right, refused by their number, or left out and counted.

Invariants: more than 8 bits are scaled and never clipped; what a good row gets does not hang on the bad ones beside it;
an error names the row.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from hf_dataopt import decoding
from hf_dataopt.cli import main
from hf_dataopt.condensation.columns import read_images, resized
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.multi_formation import stack
from hf_dataopt.errors import BadRowError
from hf_dataopt.features import FeatureExtractor
from hf_dataopt.relation.cleaner import RelationCleaner
from hf_dataopt.relation.pages import write_page
from hf_dataopt.relation.report import RelationReport

from ..models import byte_tokenizer
from ..relation.data import make
from .test_checkpoints import TINY

RNG = np.random.default_rng(0)
RAMP = np.linspace(0, 1, 256).reshape(16, 16)
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 4}


def stored(image: Pillow.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    """An `Image` cell as it lies in Arrow."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(
    "image",
    [
        Pillow.fromarray((RAMP * 65535).round().astype(np.uint16)),
        Pillow.fromarray((RAMP * 65535).round().astype(np.int32)),
        Pillow.fromarray(RAMP.astype(np.float32)),
        Pillow.fromarray((RAMP * 255).astype(np.float32)),
        Pillow.fromarray((RAMP * 255).round().astype(np.uint8)),
    ],
    ids=["16 bits", "32 bits", "float to 1", "float to 255", "8 bits"],
)
def test_every_depth_keeps_its_levels(image: Pillow.Image) -> None:
    found = decoding.read_image(image)
    assert found.shape == (1, 16, 16) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], RAMP, atol=1e-4)
    assert len(np.unique(np.asarray(decoding.read_picture(image, "RGB")))) == 256
    np.testing.assert_array_equal(stack([image])[0].numpy(), found)


def test_sixteen_bit_files_and_arrays() -> None:
    deep = (RAMP * 65535).round().astype(np.uint16)
    np.testing.assert_allclose(decoding.read_image(stored(Pillow.fromarray(deep)))[0], RAMP, atol=1e-4)
    seen: list[Any] = []
    extractor = FeatureExtractor("m", lambda values, return_tensors: seen.extend(values) or {})
    extractor._inputs([deep], tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=8, **SMALL)))
    assert len(np.unique(seen[0])) == 256


def test_modes_transparency_and_orientation() -> None:
    red = Pillow.new("RGB", (4, 4), (255, 0, 0))
    clear = red.convert("RGBA")
    clear.putalpha(Pillow.fromarray(np.repeat([[0, 0, 255, 255]], 4, axis=0).astype(np.uint8)))
    white_red = np.array([[[1, 1, 1, 1]], [[1, 1, 0, 0]], [[1, 1, 0, 0]]], np.float32).repeat(4, axis=1)
    np.testing.assert_array_equal(decoding.read_image(clear), white_red)
    grey = Pillow.merge("LA", [Pillow.new("L", (4, 4), 0), clear.getchannel("A")])
    np.testing.assert_array_equal(decoding.read_image(grey), white_red[1:2])
    palette = red.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert decoding.read_image(palette).min() == 1
    for mode, channels in [("1", 1), ("L", 1), ("P", 3), ("CMYK", 3), ("YCbCr", 3), ("HSV", 3)]:
        assert decoding.read_image(red.convert(mode)).shape == (channels, 4, 4)
    exif = Pillow.Exif()
    exif[0x0112] = 6  # lies on its side
    lying = stored(Pillow.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20), exif=exif)
    assert decoding.read_image(lying).shape == (1, 4, 3) and decoding.read_picture(lying).size == (3, 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "holds no image"),
        ({"bytes": None, "path": None}, "cannot be decoded"),
        ({"bytes": b"junk", "path": None}, "cannot be decoded"),
        ({"bytes": stored(Pillow.new("L", (50, 50)))["bytes"][:60], "path": None}, "cannot be decoded"),
        ({"bytes": b"", "path": "nowhere.png"}, "cannot be decoded"),
        (Pillow.fromarray(np.full((2, 2), np.nan, np.float32)), "scale it"),
        (Pillow.fromarray(np.full((2, 2), -5, np.int32)), "scale it"),
        (Pillow.new("L", (0, 3)), "0 x 3"),
        (3, "cannot be decoded"),
    ],
)
def test_what_is_no_image_names_its_row(value: Any, message: str) -> None:
    with pytest.raises(BadRowError, match=f"row 7 .*{message}"):
        decoding.read_rows([value], decoding.read_image, rows=[7])
    found, kept, skipped = decoding.read_rows([value, Pillow.new("L", (2, 2))], decoding.read_image, on_error="skip")
    assert len(found) == 1 and kept == [1] and message.split(" ")[0] in skipped[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no sound"),
        ([], "no samples"),
        ({"array": np.zeros(0, np.float32), "sampling_rate": 16_000}, "no samples"),
        ([0.0, float("nan")], "NaN"),
        ({"array": [0.0], "sampling_rate": 8_000}, "cast_column"),
        (np.zeros((20, 20), np.float32), "no samples of one sound"),
        (["a"], "no array of numbers"),
    ],
)
def test_what_is_no_sound_names_its_row(value: Any, message: str) -> None:
    with pytest.raises(BadRowError, match=f"row 0 .*{message}"):
        decoding.read_rows([value], lambda one: decoding.read_sound(one, 16_000))


def test_sounds_become_one_channel_of_floats() -> None:
    class Decoder:  # as `datasets` decodes an Audio column
        def __getitem__(self, key: str) -> object:
            return {"array": np.ones(4, np.float32), "sampling_rate": 16_000}[key]

    assert decoding.read_sound(Decoder(), 16_000).shape == (4,)
    assert decoding.read_sound(np.array([[1, 3], [3, 5], [0, 0]], np.float32), None).tolist() == [2, 4, 0]
    assert decoding.read_sound(np.array([-32768, 16384], np.int16), None).tolist() == [-1, 0.5]
    assert decoding.read_sound(np.array([0, 192], np.uint8), None).tolist() == [-1, 0.5]


def test_a_sound_is_asked_how_long_it_is_before_it_is_decoded() -> None:
    class Decoder:
        """As `datasets` gives a cell of an Audio column: torchcodec's, which decodes when asked for the array."""

        def __init__(self, seconds: Any, channels: int = 2) -> None:
            names = {"duration_seconds_from_header": seconds, "sample_rate": 16_000, "num_channels": channels}
            self.metadata, self.decoded = SimpleNamespace(**names), False

        def __getitem__(self, key: str) -> Any:
            self.decoded |= key == "array"
            return {"array": np.ones(4, np.float32), "sampling_rate": 16_000}[key]

    most = decoding.MOST_SAMPLES / 16_000
    for seconds, channels in ((most / 2 + 1, 2), (most + 1, 1), (float("nan"), 1), (1e300, 1)):
        long = Decoder(seconds, channels)
        with pytest.raises(BadRowError, match="row 3 holds a sound of .* samples are read; cut it"):
            decoding.read_rows([long], lambda one: decoding.read_sound(one, 16_000), rows=[3])
        assert not long.decoded
    for fine in (Decoder(most / 2), Decoder(None), Decoder(most, 1)):
        assert decoding.read_sound(fine, 16_000).shape == (4,) and fine.decoded


def _wav2vec2() -> Any:
    torch.manual_seed(0)
    config = tf.Wav2Vec2Config(
        conv_dim=[16] * 2, conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, classifier_proj_size=24, feat_extract_norm="layer", **SMALL,
    )  # fmt: skip
    return tf.Wav2Vec2ForSequenceClassification(config).eval()


@pytest.mark.parametrize("mask", [False, True])
def test_ragged_sounds_get_what_they_get_alone(mask: bool) -> None:
    clips = [RNG.normal(size=n).astype(np.float32) for n in (1600, 900, 1600, 1200)]
    processor = tf.Wav2Vec2FeatureExtractor(return_attention_mask=mask)
    extractor = FeatureExtractor(_wav2vec2(), processor, column="a", modality="audio", on_error="skip")
    alone = np.concatenate([extractor({"a": [clip]})["features"] for clip in clips])
    found = extractor({"a": [clips[0], [], *clips[1:], None]}, list(range(6)))
    np.testing.assert_allclose(found["features"][[0, 2, 3, 4]], alone, atol=1e-5)
    assert np.isnan(found["features"][[1, 5]]).all() and np.isnan(found["probs"][[1, 5]]).all()
    assert extractor.skipped == {1: "holds a sound of no samples", 5: "holds no sound"}
    with pytest.raises(BadRowError, match="row 11 holds a sound of no samples"):
        FeatureExtractor(_wav2vec2(), processor, column="a", modality="audio")({"a": [clips[0], []]}, [10, 11])


def test_texts_without_tokens_and_beyond_the_model(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=20, **SMALL)
    )
    extractor = FeatureExtractor(model, tokenizer, column="t", modality="text", on_error="skip")
    found = extractor({"t": ["ab", "", "x" * 50, None, "y" * 21, "ab"]})
    assert np.isnan(found["features"]).all(axis=1).tolist() == [False, True, False, True, False, False]
    assert extractor.counts == {"skipped": 2, "truncated": 2} and "20 tokens" in caplog.text
    np.testing.assert_allclose(found["features"][0], extractor({"t": ["ab"]})["features"][0], atol=1e-6)
    np.testing.assert_allclose(found["features"][0], found["features"][5], atol=1e-6)
    with pytest.raises(BadRowError, match="row of the batch 1 holds an empty text"):
        FeatureExtractor(model, tokenizer, column="t", modality="text")({"t": ["ab", ""]})


def _photos(n: int = 24) -> list[Any]:
    """Photos of different sizes and modes, their class in their brightness."""
    found = []
    for k in range(n):
        pixels = RNG.integers(0, 60, (12 + k % 3, 14, 3), dtype=np.uint8) + np.uint8(150 * (k % 2))
        image = Pillow.fromarray(pixels)
        found.append(stored(image.convert({1: "L", 2: "RGBA"}.get(k % 5, "RGB"))))
    return found


def _folder(cells: list[Any], labels: list[Any], label: Any = None) -> Dataset:
    features = Features({"image": Image(), "label": label or ClassLabel(names=["dark", "light"])})
    return Dataset.from_dict({"image": cells, "label": labels}, features=features)


def test_a_folder_of_photos_is_condensed_at_a_size() -> None:
    data = _folder(_photos(), [k % 2 for k in range(24)])
    with pytest.raises(ValueError, match="different sizes.*--image-size"):
        DatasetCondenser(TINY).condense(data)
    config = replace(TINY, image_size=8, storage="uint8", evaluation_epochs=2)
    condenser = DatasetCondenser(config)
    condensed = condenser.condense(data)
    assert {(image.size, image.mode) for image in condensed["image"]} == {((8, 8), "RGB")}
    assert condenser.evaluate(condensed, data, seeds=1)["condensed"][0].images == 8


def test_a_column_that_asks_for_a_mode_gets_it() -> None:
    data = _folder(_photos(), [k % 2 for k in range(24)]).cast_column("image", Image(mode="L"))
    assert read_images(data, size=8).images.shape == (24, 1, 8, 8)


def test_resizing_keeps_the_middle() -> None:
    image = np.zeros((1, 20, 40), np.float32)
    image[:, :, 10:30] = 1
    assert resized(image, 10).shape == (1, 10, 10) and resized(image, 10).min() > 0.3
    np.testing.assert_array_equal(resized(image, 20), image[:, :, 10:30])
    assert resized(image[:, :5, :5], 10).shape == (1, 10, 10)


def test_condensation_names_or_skips_bad_rows() -> None:
    cells, labels = _photos(), [k % 2 for k in range(24)]
    cells[3], cells[8] = {"bytes": b"junk", "path": None}, None
    config = replace(TINY, image_size=8)
    with pytest.raises(BadRowError, match="row 3 holds an image that cannot be decoded"):
        DatasetCondenser(config).condense(_folder(cells, labels))
    numbers: list[Any] = [None if k == 10 else -1 if k == 5 else k % 2 for k in range(24)]
    with pytest.raises(BadRowError, match="row 5 has label -1, which is no class: labels must be among"):
        read_images(_folder(_photos(), numbers, Value("int64")), size=8)
    condenser = DatasetCondenser(config, on_error="skip")
    found = condenser.condense(_folder(cells, numbers, Value("int64")))
    assert sorted(condenser.skipped) == [3, 5, 8, 10]
    good = [k for k in range(24) if k not in condenser.skipped]
    clean = DatasetCondenser(config).condense(_folder(cells, numbers, Value("int64")).select(good))
    assert found["image"][:] == clean["image"][:]


def _vit() -> Any:
    torch.manual_seed(0)
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=8, **SMALL))


def test_features_of_a_folder_with_broken_pictures(tmp_path: Path) -> None:
    cells = _photos(6)
    cells[2] = {"bytes": b"junk", "path": None}
    data = _folder(cells, [0, 1] * 3)
    processor = tf.ViTImageProcessor(size={"height": 16, "width": 16})
    with pytest.raises(BadRowError, match="row 2 holds an image that cannot be decoded"):
        data.map(FeatureExtractor(_vit(), processor), batched=True, batch_size=2, with_indices=True)
    extractor = FeatureExtractor(_vit(), processor, on_error="skip")
    found = data.map(extractor, batched=True, batch_size=2, with_indices=True).with_format("numpy")
    assert np.isnan(found["features"][:]).all(axis=1).tolist() == [k == 2 for k in range(6)]
    assert list(extractor.skipped) == [2]
    alone = FeatureExtractor(_vit(), processor)({"image": [Pillow.open(io.BytesIO(cells[4]["bytes"]))]})
    np.testing.assert_allclose(found["features"][4], alone["features"][0], atol=1e-5)


def _with_bad_rows() -> tuple[Any, Dataset, dict[int, str]]:
    case = make(n=150)
    columns: dict[str, list[Any]] = {
        "features": [row.tolist() for row in case.features],
        "probs": [row.tolist() for row in case.probs],
        "label": case.labels.tolist(),
    }
    columns["features"][3] = [float("nan")] * 12
    columns["features"][10] = [0.0] * 12
    columns["features"][20] = columns["features"][20][:-1]
    columns["features"][30] = None
    columns["probs"][40] = [3.0, -1.0, 2.0, 0.0, 0.0]
    columns["probs"][50][2] = None
    columns["label"][60], columns["label"][70] = -2, -3
    reasons = {3: "NaN", 10: "all zero", 20: "another number", 30: "missing values", 40: "no probabilities"}
    return case, Dataset.from_dict(columns), {**reasons, 50: "missing values", 60: "label -2", 70: "label -3"}


def test_relation_leaves_bad_rows_out_and_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case, data, reasons = _with_bad_rows()
    with pytest.raises(ValueError, match=r"row 3 .*on_error='skip' leaves such rows out, 8 of 150"):
        RelationCleaner().fit(data, quiet=True)
    report = RelationCleaner().fit(data, on_error="skip", output_dir=tmp_path, quiet=True)
    assert report.about["skipped"]["rows"] == list(reasons) and "8 of 150 rows" in caplog.text
    assert sum(report.about["skipped"]["reasons"].values()) == 8
    good = np.setdiff1d(np.arange(150), list(reasons))
    clean = RelationCleaner().fit(case.dataset().select(good), quiet=True)
    np.testing.assert_allclose(report.label_noise_score, clean.label_noise_score, rtol=1e-5)
    fitted = report.fitted(data)
    assert report.rows.tolist() == good.tolist() and fitted["label"][:] == [data["label"][k] for k in good.tolist()]
    worst = int(report.worst(1)[0])
    page = write_page(report, fitted, tmp_path / "page.html", count=1).read_text()
    assert f"row {good[worst]}" in page and "rows left out" in page
    annotated = fitted.map(report.annotate, batched=True, with_indices=True)
    assert annotated["is_label_error"][:] == report.is_label_error.tolist()
    again = RelationReport.load(tmp_path, fitted)
    kept = again.filter(data)
    assert len(kept) == len(good) - int(report.is_label_error.sum()) == len(report.filter(fitted))


@pytest.mark.parametrize("row", [3, 10, 20, 30, 40, 50, 60, 70])
def test_relation_errors_name_the_row(row: int) -> None:
    _, data, reasons = _with_bad_rows()
    chosen = data.select([k for k in range(150) if k == row or k not in reasons])
    place = row - sum(other < row for other in reasons)
    with pytest.raises(ValueError, match=f"row {place} "):
        RelationCleaner().fit(chosen, quiet=True)


def test_clean_skips_broken_pictures_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = _photos(30)
    cells[4] = {"bytes": b"junk", "path": None}
    _folder(cells, [k % 2 for k in range(30)]).save_to_disk(tmp_path / "d")
    config = tf.ViTConfig(image_size=16, patch_size=8, **{**SMALL, "num_labels": 2})
    tf.ViTForImageClassification(config).save_pretrained(tmp_path / "m")
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "m")
    call = [
        "clean",
        str(tmp_path / "d"),
        "--model",
        str(tmp_path / "m"),
        "--output-dir",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main(call) == 1
    assert "row 4 holds an image that cannot be decoded" in capsys.readouterr().err
    assert main([*call, "--on-error", "skip"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == 29 and result["summary"]["skipped"]["rows"] == [4]


def test_negative_numbers_are_no_classes_unless_they_are_texts() -> None:
    case = make(n=100, classes=2)
    data = case.dataset().remove_columns("label").add_column("label", np.where(case.labels, 1, -1))
    with pytest.raises(ValueError, match="-1 stands for unlabelled rows"):
        RelationCleaner().fit(data, quiet=True)
    assert RelationCleaner().fit(data.cast_column("label", Value("string")), quiet=True).label_names == ["-1", "1"]
