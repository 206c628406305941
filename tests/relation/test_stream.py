"""A stream is cleaned partition by partition, as each would be by `fit`, and never more than one is held."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
)

from hf_dataopt import FeatureExtractor, RelationCleaner, RelationConfig, clean_stream
from hf_dataopt.relation.stream import _Partition

from .data import make
from .test_picture_copies import again, thumbnails

DATA = make(n=340).dataset()
NAMES = ["label_noise_score", "is_label_error", "outlier_score", "is_outlier", "suggested_label"]
CONFIG = RelationConfig(partition_size=120)


def written(part: Dataset, **flags: bool) -> list[dict[str, Any]]:
    """What `fit` says of a dataset, row by row."""
    report = RelationCleaner().fit(part, quiet=True)
    annotated = part.map(report.annotate, batched=True, with_indices=True)
    return report.filter(annotated, **{"label_errors": False, **flags}).to_list()


@pytest.mark.parametrize("source", ["memory", "parquet"])
def test_partitions_are_judged_as_by_a_fit(source: str, tmp_path: Path) -> None:
    stream = DATA.to_iterable_dataset()
    if source == "parquet":
        DATA.to_parquet(tmp_path / "rows.parquet")
        stream = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", streaming=True)
    cleaned = clean_stream(stream, config=CONFIG)
    assert isinstance(cleaned, IterableDataset) and cleaned.features["suggested_label"] == DATA.features["label"]
    rows = list(cleaned)
    expected = [row for start in (0, 120) for row in written(DATA.select(range(start, start + 120)))]
    assert rows[:240] == expected and any(row["is_label_error"] for row in rows)
    assert [row["label"] for row in rows] == DATA["label"][:]
    assert rows[240:] == written(DATA.select(range(240, 340)))  # not the half that is too small
    assert list(cleaned) == rows  # and again


def test_a_short_last_partition_is_judged_beside_the_first_rows() -> None:
    part = DATA.select(range(270))
    rows = list(clean_stream(part.to_iterable_dataset(), config=CONFIG))
    last = concatenate_datasets([part.select(range(240, 270)), part.select(range(120))])
    assert rows[240:] == written(last)[:30] and len(rows) == 270


def test_flagged_rows_are_dropped() -> None:
    small = thumbnails(240)
    small[110:120] = again(small[:10], 2)
    data = DATA.select(range(240)).add_column("thumbnail", list(small))
    stream = data.to_iterable_dataset()
    for kinds in (["label errors"], ["outliers"], ["near duplicates"], ["label errors", "near duplicates"]):
        rows = list(clean_stream(stream, drop=kinds, config=CONFIG))
        flags = {kind.replace(" ", "_"): True for kind in kinds}
        assert rows == [row for start in (0, 120) for row in written(data.select(range(start, start + 120)), **flags)]
        assert 0 < len(rows) < 240


def test_texts_and_rows_that_cannot_be_related(caplog: pytest.LogCaptureFixture) -> None:
    rows = DATA.select(range(240)).to_list()
    for k, row in enumerate(rows):
        row["label"] = None if k == 5 else f"class {row['label']}"
    rows[130]["features"][3] = float("nan")
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="rows 120 to 239 of the stream.*row 10 "):
        list(clean_stream(stream, config=CONFIG))
    found = list(clean_stream(stream, on_error="skip", config=CONFIG))
    assert len(found) == 239 and found[5]["suggested_label"] is None
    assert {row["suggested_label"] for row in found} == {None, *(f"class {k}" for k in range(5))}
    assert "1 rows of a partition cannot be related" in caplog.text


def test_what_cannot_be_cleaned_is_refused_at_once() -> None:
    stream = DATA.to_iterable_dataset()
    with pytest.raises(TypeError, match="RelationCleaner.fit"):
        clean_stream(DATA)
    with pytest.raises(ValueError, match=r"not \['logits'\]"):
        clean_stream(stream, probs_column="logits")
    with pytest.raises(ValueError, match="is empty"):
        clean_stream(stream.take(0))
    with pytest.raises(ValueError, match="outlier_score.*already"):
        clean_stream(DATA.add_column("outlier_score", [0.0] * 340).to_iterable_dataset())
    with pytest.raises(ValueError, match="drop"):
        clean_stream(stream, drop=["errors"])
    with pytest.raises(ValueError, match="one label"):
        clean_stream(DATA.filter(lambda row: row["label"] == 1).to_iterable_dataset())
    ordered = DATA.sort("label").to_iterable_dataset()
    with pytest.raises(ValueError, match="rows 0 to 59 of the stream.*shuffle"):
        list(clean_stream(ordered, config=RelationConfig(partition_size=60)))


def test_shards_and_workers_keep_to_themselves() -> None:
    stream = DATA.to_iterable_dataset(num_shards=2)
    clean = clean_stream(stream, config=CONFIG)
    loaded = list(torch.utils.data.DataLoader(clean.remove_columns("probs"), batch_size=None, num_workers=2))
    each = [row for k in range(2) for row in clean.shard(num_shards=2, index=k)]
    assert sorted(row["label_noise_score"] for row in loaded) == sorted(row["label_noise_score"] for row in each)
    assert len(loaded) == 340
    part = _Partition(RelationConfig(), ("label", "features", "probs"), (), "raise", DATA.select(range(50)), 3)
    again_ = pickle.loads(pickle.dumps(part))
    table = DATA.with_format("arrow")[:60]
    assert again_(table, range(60)).equals(part(table, range(60)))


def test_from_pictures_to_clean_rows_without_a_dataset(tmp_path: Path) -> None:
    """Pictures, a model in the stream, and pictures again: nothing is decoded on the way of the cleaner."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=8, num_labels=2, **sizes))
    processor = tf.ViTImageProcessor(size={"height": 16, "width": 16})
    kinds = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})

    def rows() -> Iterator[dict[str, Any]]:
        for k in range(90):
            pixels = np.random.default_rng(k).integers(0, 100, (16, 16, 3), np.uint8) + np.uint8(100 * (k % 2))
            yield {"image": PIL.Image.fromarray(pixels), "label": k % 2}

    stream = IterableDataset.from_generator(rows, features=kinds)
    floats = List(Value("float32"))
    more = Features({**kinds, "features": floats, "probs": floats, "thumbnail": List(Value("uint8"))})
    named = stream.map(FeatureExtractor(model, processor), batched=True, batch_size=16, features=more)
    found = list(clean_stream(named, config=RelationConfig(partition_size=40)))
    assert len(found) == 90 and found[3]["image"].size == (16, 16) and found[3]["label"] == 1
    assert np.isfinite([row["outlier_score"] for row in found]).all()
    bare = stream.map(FeatureExtractor(model, processor), batched=True)
    again_ = [row["label_noise_score"] for row in clean_stream(bare, config=RelationConfig(partition_size=40))]
    assert again_ == pytest.approx([row["label_noise_score"] for row in found], abs=1e-5)


def _made(count: int) -> Iterator[dict[str, Any]]:
    for start in range(0, count, 200):
        case = make(n=200, seed=start)
        for k in range(200):
            yield {"label": int(case.labels[k]), "features": case.features[k], "probs": case.probs[k]}


def test_memory_does_not_grow_with_the_stream() -> None:
    kinds = Features({"label": Value("int64"), "features": List(Value("float32")), "probs": List(Value("float32"))})
    peaks = []
    for count in (200, 400, 1200):  # the first loads and warms everything
        stream = IterableDataset.from_generator(_made, features=kinds, gen_kwargs={"count": count})
        tracemalloc.start()
        assert sum(1 for _ in clean_stream(stream, config=RelationConfig(partition_size=200))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.15 * peaks[1]
