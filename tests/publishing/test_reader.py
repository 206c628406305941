"""What is read is what was saved: sizes, hashes, headers, values, budgets; what is shown is text."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from safetensors.numpy import load_file, save_file

from hf_dataopt import MultiFormation, RelationCleaner, RelationReport
from hf_dataopt.cli import _console, main
from hf_dataopt.condensation import multi_formation
from hf_dataopt.condensation.multi_formation import Formation, recipe_text
from hf_dataopt.condensation.saved import load_condensed
from hf_dataopt.kvzip.head_scores import load_head_scores, save_head_scores
from hf_dataopt.progress import printable
from hf_dataopt.publishing.dataset_files import read_parquet
from hf_dataopt.publishing.safe_files import (
    MAX_DEPTH,
    MAX_FILES,
    check_finite,
    check_names,
    check_safetensors,
    files_of,
    parse_json,
    read_json,
    read_table,
)
from hf_dataopt.publishing.writer import finish, replacing

from ..faults.saves import SAVES
from ..hub.damage import without_list
from ..hub.everything import adapted
from ..models import tiny_model
from ..relation.data import make


def files(folder: Path) -> list[Path]:
    return [path for path in files_of(folder) if path.name not in ("README.md", "hf_dataopt.json")]


@pytest.mark.parametrize("name", [name for name in SAVES if name != "cleaned"])
def test_one_flipped_bit_anywhere_is_noticed(name: str, tmp_path: Path) -> None:
    saved = SAVES[name](tmp_path)
    saved.first(tmp_path / "it")
    draw = np.random.default_rng(0)
    for path in files(tmp_path / "it"):
        whole = path.read_bytes()
        for place in draw.integers(0, 8 * len(whole), 12):
            broken = bytearray(whole)
            broken[place // 8] ^= 1 << (place % 8)
            path.write_bytes(broken)
            with pytest.raises(ValueError):
                saved.read(tmp_path / "it")
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError):
                saved.read(tmp_path / "it")
        path.unlink()
        with pytest.raises(ValueError):
            saved.read(tmp_path / "it")
        path.write_bytes(whole)
    assert saved.read(tmp_path / "it")


@pytest.mark.parametrize(
    "files_entry",
    [[], "x", {"a": 1}, {"a": {"size": True, "sha256": ""}}, {"a": {"size": 1}}, {"../a": {"size": 1, "sha256": ""}}],
)
def test_lists_that_are_none(files_entry: Any, tmp_path: Path) -> None:
    folder = save_head_scores(torch.ones(2, 3), tmp_path / "scores", model_id="a/model")
    about = json.loads((folder / "hf_dataopt.json").read_text())
    (folder / "hf_dataopt.json").write_text(json.dumps({**about, "files": files_entry}))
    with pytest.raises(ValueError, match=r"list of files|no plain relative path"):
        load_head_scores(folder)


# -- reports, without the help of hashes


@pytest.fixture
def report(tmp_path: Path) -> Path:
    RelationCleaner().fit(make(n=60).dataset(), quiet=True).save(tmp_path / "report")
    return without_list(tmp_path / "report")


def _nan(values: Any) -> Any:
    changed = values.astype(np.float64)
    changed[0] = np.nan
    return changed


ARRAYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "NaN scores": ("label_noise_score", _nan),
    "NaN outlier scores": ("outlier_score", _nan),
    "codes beyond the labels": ("labels", lambda values: values + 1_000),
    "negative codes": ("suggested_label", lambda values: values - 1_000),
    "one row less": ("is_label_error", lambda values: values[1:]),
    "flags as numbers": ("is_outlier", lambda values: values.astype(np.int64)),
    "two axes": ("outlier_score", lambda values: values[None]),
    "NaN in the reference": ("reference.0.features", lambda v: np.full_like(v, np.nan)),
    "float64 in the reference": ("reference.0.features", lambda values: values.astype(np.float64)),
    "rows of the reference": ("reference.0.probs", lambda values: values[1:].copy()),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_reports(name: str, report: Path) -> None:
    which, change = ARRAYS[name]
    arrays = load_file(report / "report.safetensors")
    save_file({**arrays, which: np.ascontiguousarray(change(arrays[which]))}, report / "report.safetensors")
    with pytest.raises(ValueError, match="no readable relation report"):
        RelationReport.load(report)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": "1"},
        {"columns": "x"},
        {"columns": [["a"]]},
        {"label_names": [1]},
        {"label_values": []},
        {"outlier_level": None},
        {"outlier_level": True},
        {"summary": []},
        {"label_column": 3},
        {"config": []},
        {"config": {"temperature": "x"}},
    ],
    ids=str,
)
def test_settings_of_reports(change: dict[str, Any], report: Path) -> None:
    about = json.loads((report / "report.json").read_text())
    (report / "report.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(ValueError, match="no readable relation report"):
        RelationReport.load(report)


@pytest.mark.parametrize("name", ["report.json", "report.safetensors", "extra"])
def test_pipes_and_links_in_reports(name: str, report: Path) -> None:
    (report / name).unlink(missing_ok=True)
    os.mkfifo(report / name)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        RelationReport.load(report)
    (report / name).unlink()
    (report / name).symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="link that leads out"):
        RelationReport.load(report)


# -- limits


def test_json_is_as_deep_as_it_may_be() -> None:
    nested = lambda depth: '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"  # noqa: E731
    assert parse_json(nested(MAX_DEPTH), "x")
    with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} deep"):
        parse_json(nested(MAX_DEPTH + 1), "x")
    for text in ('{"a": 1e999}', '{"a": -1e999}', '{"a": NaN}', '{"a": Infinity}'):
        with pytest.raises(ValueError, match="no JSON"):
            parse_json(text, "x")


def test_json_is_as_long_as_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert read_json(tmp_path / "a.json", limit=2) == {}
    with pytest.raises(ValueError, match="has 2 bytes, at most 1 are read"):
        read_json(tmp_path / "a.json", limit=1)


def test_there_are_as_many_files_as_there_may_be() -> None:
    check_names((str(number) for number in range(MAX_FILES)), "x")
    with pytest.raises(ValueError, match="more than"):
        check_names((str(number) for number in range(MAX_FILES + 1)), "x")


def test_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--x"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for place in (repository / "blobs", repository / "refs", tmp_path / "models--me--y" / "blobs"):
        place.mkdir(parents=True)
        (place / "hash").write_text("{}")
    (snapshot / "a.json").symlink_to("../../blobs/hash")
    assert [path.name for path in files_of(snapshot)] == ["a.json"]
    for target in ("../../refs/hash", "../../../models--me--y/blobs/hash"):
        (snapshot / "b.json").unlink(missing_ok=True)
        (snapshot / "b.json").symlink_to(target)
        with pytest.raises(ValueError, match="link that leads out"):
            files_of(snapshot)
    other = tmp_path / "elsewhere" / "abc"  # not a snapshot: `blobs` beside it means nothing
    other.mkdir(parents=True)
    (other / "a.json").symlink_to(repository / "blobs" / "hash")
    with pytest.raises(ValueError, match="link that leads out"):
        files_of(other)


def test_spans_of_tensors_touch_and_fill_the_file(tmp_path: Path) -> None:
    def header(*spans: tuple[int, int], size: int) -> Path:
        entries = {str(k): {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for k, (a, b) in enumerate(spans)}
        text = json.dumps(entries).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
        return tmp_path / "x.safetensors"

    assert len(check_safetensors(header((0, 4), (4, 4), (4, 9), size=9))) == 3
    assert check_safetensors(header((4, 9), (0, 4), size=9))  # in any order
    for spans, size in (([(0, 4), (5, 9)], 9), ([(0, 5), (4, 9)], 9), ([(0, 4)], 5), ([(1, 4)], 4), ([(0, 4)], 3)):
        with pytest.raises(ValueError, match="do not fit"):
            check_safetensors(header(*spans, size=size))


def test_values_are_finite() -> None:
    check_finite({"a": torch.zeros(2), "b": torch.tensor([2**62])})
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="'b' holds NaN"):
            check_finite({"a": torch.zeros(2), "b": torch.tensor([0, value], dtype=torch.bfloat16)})


def test_tables_do_not_unpack_to_more_than_they_may(tmp_path: Path) -> None:
    """One megabyte of text, referred to 2,000 times: 2 GB out of a few kB."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"text": text.cast(pa.string())}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_table(tmp_path / "bomb.parquet")
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_recipes_form_as_many_bytes_as_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Pictures.fromarray(np.zeros((8, 8), np.uint8))
    monkeypatch.setattr(multi_formation, "_MOST_RATIO", 1)
    monkeypatch.setattr(multi_formation, "_LEAST_BYTES", 4 * 8 * 8 * 4)  # 2 x 2 cells of 8 x 8 float32
    formation = MultiFormation(Formation(factor=2))
    assert len(formation({"image": [picture]})["image"]) == 4
    with pytest.raises(ValueError, match="formed into 2,048 bytes"):
        formation({"image": [picture] * 2})


def test_recipes_do_not_blow_up(tmp_path: Path) -> None:
    formation = MultiFormation(Formation(factor=128))
    picture = Pictures.fromarray(np.zeros((256, 256), np.uint8))
    with pytest.raises(ValueError, match="if you trust the recipe"):
        formation({"image": [picture]})
    large = Pictures.new("L", (5_000, 5_000))
    with pytest.raises(ValueError, match="5000 x 5000 pixels"):
        MultiFormation(Formation(factor=2))({"image": [large]})
    assert len(MultiFormation(Formation(factor=5))({"image": [picture] * 3})["image"]) == 75


def _with_pictures(folder: Path, cells: list[dict[str, Any]]) -> Path:
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    table = Dataset.from_dict({"image": [None] * len(cells), "label": [0] * len(cells)}, features=features)
    (folder / "data").mkdir(parents=True)
    schema = pa.schema(
        [("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})), ("label", pa.int64())],
        metadata=features.arrow_schema.metadata,
    )
    rows = pa.table({"image": cells, "label": [0] * len(table)}, schema=schema)
    pq.write_table(rows, folder / "data" / "train-0.parquet")
    return folder


def test_pictures_are_in_the_file_and_not_too_large(tmp_path: Path) -> None:
    def png(size: int) -> bytes:
        buffer = io.BytesIO()
        Pictures.new("1", (size, size)).save(buffer, "PNG")
        return buffer.getvalue()

    fine = {"bytes": png(8), "path": None}
    assert read_parquet(_with_pictures(tmp_path / "fine", [fine]))[0]["image"].size == (8, 8)
    for name, cell, words in (
        ("path", {"bytes": None, "path": "/etc/passwd"}, "names a file"),
        ("none", {"bytes": b"GIF89a", "path": None}, "no picture"),
        ("large", {"bytes": png(9_000), "path": None}, "9000 x 9000 pixels"),
    ):
        with pytest.raises(ValueError, match=f"row 1 of 'image'.*{words}"):
            read_parquet(_with_pictures(tmp_path / name, [fine, cell]))
    # white pages of a few bytes: 2^28 pixels in all, whatever the size of the file, and not one more
    pages = [{"bytes": png(8_192), "path": None}] * 4
    assert len(read_parquet(_with_pictures(tmp_path / "pages", pages))) == 4
    with pytest.raises(ValueError, match="up to row 4 of 'image' have 268,435,520 pixels, at most 268,435,456"):
        read_parquet(_with_pictures(tmp_path / "more", [*pages, fine]))


def test_adapters_with_nan_or_of_other_sizes(tmp_path: Path) -> None:
    from hf_dataopt.ccm.saved import load_adapter, save_adapter

    folder = without_list(save_adapter(adapted(tiny_model("llama")), tmp_path / "adapter"))
    whole = load_file(folder / "adapter_model.safetensors")
    name = next(iter(whole))
    for changed, words in (
        ({**whole, name: np.full_like(whole[name], np.nan)}, "NaN"),
        ({**whole, name: np.zeros((3, 3), np.float32)}, "no adapter that fits"),
    ):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=words):
            load_adapter(tiny_model("llama"), folder)


def test_condensed_sets_with_nan_or_labels_of_no_class(tmp_path: Path) -> None:
    def stored(value: float, label: int) -> Path:
        features = Features({"image": Array3D((1, 8, 8), "float32"), "label": Value("int64")})
        features["formation"], recipe = Value("string"), recipe_text(Formation(), "image", label_column="label")
        images = np.full((2, 1, 8, 8), value, np.float32)
        rows = Dataset.from_dict({"image": images, "label": [0, label], "formation": [recipe] * 2}, features=features)
        shown = dict.fromkeys(("name", "rows", "classes", "source", "method", "recipe", "seed", "settings"), "x")
        shown |= dict.fromkeys(("teacher", "soft_bytes", "plain_code", "start", "real", "correlation"))
        with replacing(tmp_path / f"{value} {label}", "condensed_dataset") as draft:
            features["label"] = ClassLabel(names=["a", "b"])
            table = rows.data.table.replace_schema_metadata(features.arrow_schema.metadata)
            (draft / "data").mkdir()
            pq.write_table(table, draft / "data" / "train-0.parquet")
            finish(draft, "condensed_dataset", about={}, metadata={}, scores=[], **shown)
        return tmp_path / f"{value} {label}"

    assert len(load_condensed(stored(0.5, 1))) == 2
    with pytest.raises(ValueError, match="NaN"):
        load_condensed(stored(float("nan"), 1))
    for label in (-1, 2):
        with pytest.raises(ValueError, match="none of its 2 classes"):
            load_condensed(stored(0.5, label))


# -- what a terminal gets to see

EVIL = "\x1b[2J\x1b]0;owned\x07\u202eabc\x9b31m\r"


def test_control_characters_do_not_reach_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_head_scores(torch.ones(2, 3), tmp_path / "scores", model_id="a/model")
    about = json.loads((folder / "hf_dataopt.json").read_text())
    code = {"model": EVIL, "dtype": EVIL}
    (folder / "hf_dataopt.json").write_text(json.dumps({**about, "answer": EVIL, "code": code, "tokens": 3}))
    (folder / "README.md").write_text(f"---\nlicense: {json.dumps(EVIL)}\n---\n```python\n{EVIL}\n```\n")
    assert main(["info", str(folder)]) == 0
    (folder / "hf_dataopt.json").write_text(json.dumps({**about, "kind": EVIL}))
    assert main(["info", str(folder)]) == 2
    assert main(["info", f"me/{EVIL}"]) == 2
    _console(stderr=True).print(EVIL, markup=False)
    shown = "".join(capsys.readouterr())
    assert not {one for one in shown if not one.isprintable()} - {"\n"}
    assert "owned" in shown


def test_printable_keeps_what_people_write() -> None:
    assert printable("Zürich, 東京, 🎉\n\tx") == "Zürich, 東京, 🎉\n\tx"
    assert printable("a\x1bb\u202ec\x00") == "a\\x1bb\\u202ec\\x00"
