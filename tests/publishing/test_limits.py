"""Budgets are kept before anything is decoded, writers keep what readers ask for, and later formats are read."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from safetensors.numpy import load_file, save_file

from hf_dataopt import (
    CompressedContextMemory,
    KVzipCache,
    MultiFormation,
    RelationCleaner,
    RelationConfig,
    RelationReport,
)
from hf_dataopt.ccm.saved import load_adapter, save_adapter
from hf_dataopt.cli import _console
from hf_dataopt.condensation.columns import to_dataset
from hf_dataopt.condensation.multi_formation import Formation, recipe_text
from hf_dataopt.condensation.saved import save_condensed
from hf_dataopt.decoding import read_image
from hf_dataopt.kvzip.head_scores import load_head_scores, save_head_scores
from hf_dataopt.publishing import hub, safe_files, tables
from hf_dataopt.publishing.cards import first_block
from hf_dataopt.publishing.dataset_files import read_parquet, write_parquet
from hf_dataopt.publishing.info import describe
from hf_dataopt.publishing.record import FORMAT, MINOR
from hf_dataopt.publishing.safe_files import (
    MAX_DEPTH,
    check_safetensors,
    files_of,
    parse_json,
    read_card,
    read_table,
    read_yaml,
)
from hf_dataopt.publishing.writer import finish, replacing
from hf_dataopt.shell.info import show

from ..families import FAMILIES
from ..faults.saves import SAVES
from ..hub.damage import without_list
from ..hub.everything import adapted
from ..kvzip.conftest import CONTEXT
from ..models import byte_tokenizer, tiny_model
from ..relation.data import make

# -- text


@pytest.mark.parametrize("limit", [1_000, 10**6])
def test_json_too_deep_reaches_no_parser(limit: int) -> None:
    """Where somebody has raised Python's own limit, a parser would take the process with it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        for text in ('{"a": ' + "[" * 300_000, '{"a": ' + "[" * 300_000 + "]" * 300_000 + "}", '{"a":' * 300_000):
            with pytest.raises(ValueError, match=f"nested more than {MAX_DEPTH} deep"):
                parse_json(text, "x")
    finally:
        sys.setrecursionlimit(before)
    brackets = json.dumps({"a": "[" * 100, "b": '\\"[[{', "c": "]}" * 50, "d": ["["] * 100})
    assert parse_json(brackets, "x")["d"] == ["["] * 100


def test_json_of_very_many_lists_is_not_parsed() -> None:
    with pytest.raises(ValueError, match="lists and objects"):
        parse_json('{"a": [' + "[]," * 2_000_000 + "[]]}", "x")


@pytest.mark.parametrize(
    "text",
    ["a: !!bool x", "a: !!timestamp x", "a: !!int ''", "a: !!float x", "a: !!binary x", "a: !!set {b, c}", "<<: 1",
     "a: 2001-01-01 00:00:00 +99:99", f"a: 0x{'f' * 50_000}", f"a: {'1:' * 100_000}1", f"a: !!int '{'1:' * 100_000}1'"],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_yaml_that_breaks_or_stops_its_parser(text: str) -> None:
    with pytest.raises(ValueError, match="the metadata of x was refused") as refused:
        read_yaml(text, "x")
    assert len(str(refused.value)) < 400


def test_yaml_of_very_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: [" + ", ".join("x" * 100) + "]"
    assert read_yaml(text, "x") == {"a": ["x"] * 100}
    monkeypatch.setattr(safe_files, "_MAX_PARTS", 100)
    with pytest.raises(ValueError, match="more than 100 parts"):
        read_yaml(text, "x")


# -- folders and headers


def test_links_to_themselves_and_folders_without_end(tmp_path: Path) -> None:
    folder = save_head_scores(torch.ones(2, 3), tmp_path / "scores", model_id="a/model")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="link to nothing"):
        load_head_scores(folder)
    (folder / "loop").unlink()
    (folder / "again").symlink_to(".")  # back into the folder: harmless, and not followed
    assert load_head_scores(folder)[0].shape == (2, 3)
    deep = folder.joinpath(*("d" for _ in range(MAX_DEPTH + 1)))
    deep.mkdir(parents=True)
    with pytest.raises(ValueError, match="folders more than"):
        files_of(folder)


def test_shapes_that_would_be_multiplied_for_minutes(tmp_path: Path) -> None:
    for shape in ([int("9" * 4_000)] * 800, [1] * 17, [2**49, 0], [True, 4]):
        text = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 4]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
        with pytest.raises(ValueError, match=r"broken safetensors header|do not fit"):
            check_safetensors(tmp_path / "x.safetensors")


# -- tables and pictures


def _repeated(value: bytes, times: int) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))


TABLES: dict[str, Callable[[], Any]] = {
    "one long text, 256 times": lambda: _repeated(b"x" * 2**20, 256),
    "in one list": lambda: pa.ListArray.from_arrays(pa.array([0, 2_000], pa.int32()), _repeated(b"x" * 2**16, 2_000)),
    "in pictures": lambda: pa.StructArray.from_arrays([_repeated(b"x" * 2**16, 2_000)], ["bytes"]),
    "nothing, 5 million times": lambda: pa.nulls(5_000_000, pa.int8()),
    "one list of zeros": lambda: pa.ListArray.from_arrays(
        pa.array([0, 5_000_000], pa.int32()), pa.array(np.zeros(5_000_000, np.int32))
    ),
    "one value": lambda: pa.array([b"x" * 2**25]),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_counted_before_they_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LEAST", 2**24)
    pq.write_table(pa.table({"a": TABLES[name]()}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 2**16
    opened: list[Any] = []
    read = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, *a, **o: (opened.append(self), read(self, *a, **o))[1]
    )
    with pytest.raises(ValueError, match="unpacks to more than 16,777,216 bytes"):
        read_table(tmp_path / "bomb.parquet")
    # by the footer alone, or by indices into what is kept once
    assert len(opened) == (name in ("one long text, 256 times", "in one list", "in pictures"))
    assert all("dictionary" in str(file.schema_arrow) for file in opened)


def test_tables_of_exactly_their_budget_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": pa.array(range(1000), pa.int64())}), path, use_dictionary=False)
    stated = pq.ParquetFile(path).metadata.num_rows + 1000 * 8
    monkeypatch.setattr(tables, "MAX_RATIO", 0)
    for least, fits in ((stated, True), (stated - 1, False)):
        monkeypatch.setattr(tables, "LEAST", least)
        assert tables.allowed(path) == least
        if fits:
            assert tables.read(path, tables.opened(path)).num_rows == 1000
        else:
            with pytest.raises(ValueError, match=f"more than {least:,} bytes"):
                tables.opened(path)
    monkeypatch.setattr(tables, "MAX_RATIO", 3)
    monkeypatch.setattr(tables, "LEAST", 1)
    assert tables.allowed(path) == 3 * path.stat().st_size


def test_tables_of_repeated_texts_within_the_budget_are_read(tmp_path: Path) -> None:
    table = pa.table({"a": _repeated(b"x" * 2**16, 1_000), "b": pa.array([None, [{"c": b"y"}]] * 500)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet")["a"].to_pylist() == [b"x" * 2**16] * 1_000


def _png(size: int, mode: str = "1") -> bytes:
    buffer = io.BytesIO()
    Pictures.new(mode, (size, size)).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_together_are_not_too_large(tmp_path: Path) -> None:
    """Each may be read; 300 of them, 4,000 x 4,000 pixels out of 2 kB each, would take gigabytes."""
    features = Features({"image": Image()})
    rows = pa.table({"image": [{"bytes": _png(4_000), "path": None}] * 300}, schema=features.arrow_schema)
    (tmp_path / "data").mkdir()
    pq.write_table(rows, tmp_path / "data" / "train-0.parquet")
    with pytest.raises(ValueError, match="the pictures up to row"):
        read_parquet(tmp_path)
    dataset = Dataset.from_dict({"image": [{"bytes": _png(4_000), "path": None}] * 20}, features=features)
    decoded: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        decoded.append(1)
        raise AssertionError("decoded before it was counted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "decode_example", counted)
        with pytest.raises(ValueError, match="20 stored images of"):
            dataset.map(MultiFormation(Formation()), batched=True)
    assert not decoded
    with pytest.raises(ValueError, match="9000 x 9000 pixels, at most"):
        read_image({"bytes": _png(9_000), "path": None})


def test_pictures_in_lists_are_not_let_through(tmp_path: Path) -> None:
    features = Features({"images": List(Image())})
    table = pa.table({"images": [[{"bytes": None, "path": "/etc/hostname"}]]}, schema=features.arrow_schema)
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train-0.parquet")
    with pytest.raises(ValueError, match="lists of pictures"):
        read_parquet(tmp_path)


def test_what_a_table_says_of_its_columns_is_checked(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for said in (
        "[" * 100_000,
        '{"info": ' + "[" * 50 + "]" * 50 + "}",
        '{"info": {"features": {"a": {"_type": "\\u001b[2J"}}}}',
        "17",
    ):
        table = pa.table({"a": [1]}).replace_schema_metadata({"huggingface": said})
        pq.write_table(table, tmp_path / "data" / "train-0.parquet")
        with pytest.raises(ValueError, match="no parquet file that can be read") as refused:
            read_parquet(tmp_path)
        assert str(refused.value).isprintable()


def test_pictures_for_which_a_program_would_be_started(tmp_path: Path) -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with Pictures.open(io.BytesIO(content)) as picture:
        assert picture.format == "EPS"
    with pytest.raises(ValueError, match="decoded by another program"):
        read_image(content)
    features = Features({"image": Image()})
    (tmp_path / "data").mkdir()
    table = pa.table({"image": [{"bytes": content, "path": None}]}, schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "data" / "train-0.parquet")
    with pytest.raises(ValueError, match="decoded by another program"):
        read_parquet(tmp_path)


def test_as_much_of_a_repository_is_looked_at_as_a_record_and_a_card_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, only: tuple[str, ...], most: int, **__: Any) -> Path:
        assert "hf_dataopt.json" in only and "README.md" in only
        raise OSError(f"{most} bytes")

    monkeypatch.setattr(hub, "download", download)
    with pytest.raises(OSError, match=f"^{(64 + 16) * 1024 * 1024} bytes"):
        describe("me/scores")


# -- things that take forever


def test_cards_and_folders_are_read_in_one_pass(tmp_path: Path) -> None:
    """Quadratic, these would take many minutes."""
    assert first_block("```python\n" * 90_000) == ""
    assert first_block("````python\na\n```\n````\n```python\nb\n```\n") == "a\n```\n"
    folder = save_head_scores(torch.ones(2, 3), tmp_path / "scores", model_id="a/model")
    record = (folder / "hf_dataopt.json").read_bytes()
    for number in range(3_000):
        (folder / str(number)).mkdir()
        (folder / str(number) / "hf_dataopt.json").write_bytes(record)
    assert load_head_scores(folder)[0].shape == (2, 3)
    about = json.loads((folder / "3" / "hf_dataopt.json").read_text())
    shown = io.StringIO()
    _edit(folder / "hf_dataopt.json", code={**about["code"], "model": "x" * 5_000_000})
    show(describe(folder), _console(file=shown, width=80))
    assert len(shown.getvalue()) < 100_000


# -- adapters


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 10**9}, "r is 1000000000"),
        ({"rank_pattern": {"q_proj": 10**9}}, "r is 1000000000"),
        ({"lora_alpha": 1e300}, "lora_alpha is"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "lora_alpha is"),
        ({"target_modules": "(.*a+)+$"}, "take forever"),
        ({"exclude_modules": "(.*a+)+$"}, "take forever"),
        ({"rank_pattern": {"(.*a+)+$": 4}}, "take forever"),
        ({"target_modules": ".*.*.*.*x"}, "take forever"),
        ({"num_comp_tokens": 10**8}, "compression tokens"),
        ({"comp_token_ids": [264, 300]}, "ids in a row"),
        ({"task_type": "SEQ_CLS"}, "for the task"),
    ],
    ids=str,
)
def test_settings_of_adapters_that_would_fill_or_stop_a_machine(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = without_list(save_adapter(adapted(tiny_model("llama")), tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match=words):
        load_adapter(tiny_model("llama"), folder)


def test_adapters_named_by_an_expression_are_read_again(tmp_path: Path) -> None:
    from peft import get_peft_model

    from hf_dataopt import CCMConfig

    model = get_peft_model(
        tiny_model("llama"), CCMConfig(r=16, target_modules=r".*\.(q|v)_proj", rank_pattern={"q_proj": 4, "v_proj": 2})
    )
    loaded = load_adapter(tiny_model("llama"), save_adapter(model, tmp_path / "adapter"))
    assert loaded.peft_config["default"].target_modules == r".*\.(q|v)_proj"


# -- values


def test_ids_and_lengths_of_caches(tmp_path: Path) -> None:
    model = tiny_model("llama")
    KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, 0.5, progress=False).save_pretrained(tmp_path)
    without_list(tmp_path)
    whole = load_file(tmp_path / "cache.safetensors")
    lengths = whole["layer.0.lengths"]
    for change in (
        {"suffix_ids": np.array([10**6])},
        {"first_repeat_ids": np.array([-1])},
        {"layer.0.lengths": lengths.astype(np.float64)},
        {"layer.0.lengths": lengths[None]},
        {
            "layer.0.keys": np.where(
                np.arange(whole["layer.0.keys"].shape[1]) == 0, np.float32(1e38), whole["layer.0.keys"]
            )
        },
    ):
        save_file({**whole, **change}, tmp_path / "cache.safetensors")
        with pytest.raises(ValueError, match="no whole cache"):
            KVzipCache.from_pretrained(tmp_path, model)


def test_states_of_linear_layers_are_there_and_of_the_models_sizes(tmp_path: Path) -> None:
    model = FAMILIES["qwen3_next"].model()
    KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, 0.5, progress=False).save_pretrained(tmp_path)
    assert KVzipCache.from_pretrained(tmp_path, model).stored_lengths
    without_list(tmp_path)
    whole = load_file(tmp_path / "cache.safetensors")
    states = [name for name in whole if name.startswith("state.")]
    assert states
    for name in states:
        for changed in (
            {key: value for key, value in whole.items() if key != name},
            {**whole, name: whole[name][..., :1].copy()},
            {**whole, name: whole[name].astype(np.int32)},
        ):
            save_file(changed, tmp_path / "cache.safetensors")
            with pytest.raises(ValueError, match="has the states"):
                KVzipCache.from_pretrained(tmp_path, model)


@pytest.mark.parametrize("kind", ["concat", "merge", "gist"])
def test_counts_of_memories_agree(kind: str, tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"), memory=kind)
    memory = CompressedContextMemory(model, batch_size=2)
    memory.append([[5, 6, 7], [8, 9]])
    memory.append([[5, 6], [3, 4, 5] if kind == "gist" else None])
    memory.save_pretrained(tmp_path)
    assert CompressedContextMemory.from_pretrained(model, tmp_path).tokens_seen == memory.tokens_seen
    without_list(tmp_path)
    whole = load_file(tmp_path / "memory.safetensors")
    steps, text, held = whole["steps"], whole["text"], whole["held"]
    for change in (
        {"held": ~held},
        {"text": np.zeros_like(text)},
        {"text": steps - 1},
        {"text": text + 2**40},
        {"text": text[:0], "steps": steps[:0], "held": held[:0]},
        *([{"steps": steps + 1}] if kind == "concat" else []),
        *([{"text": text + 1}] if kind == "gist" else []),
    ):
        save_file({**whole, **change}, tmp_path / "memory.safetensors")
        with pytest.raises(ValueError, match="no whole memory"):
            CompressedContextMemory.from_pretrained(model, tmp_path)


def test_flags_are_true_or_false(tmp_path: Path) -> None:
    RelationCleaner().fit(make(n=60).dataset(), quiet=True).save(tmp_path)
    path = without_list(tmp_path) / "report.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    place = 8 + length + json.loads(content[8 : 8 + length])["is_outlier"]["data_offsets"][0]
    path.write_bytes(content[:place] + b"\x02" + content[place + 1 :])
    with pytest.raises(ValueError, match="neither true nor false"):
        RelationReport.load(tmp_path)


# -- what writers write, readers read


def test_as_many_classes_as_imagenet_has(tmp_path: Path) -> None:
    """21,841 names, some of them long or strange; for cards see `test_writer.py`."""
    draw = np.random.default_rng(0)
    names = [
        f"n{index:08d} sea anemone, anemone, \u201cÅctinia\u201d, type {index}: {'x' * (index % 50)}"
        for index in range(21_841)
    ]
    names[7], names[8], names[9] = "---", "a\nb: \x1b[2J", "null"
    report = RelationCleaner().fit(make(n=60).dataset(), quiet=True)
    report.label_names, report.label_values = names, list(range(len(names)))
    report.suggested_label = draw.integers(0, len(names), len(report))
    report.save(tmp_path / "report")
    loaded = RelationReport.load(tmp_path / "report")
    assert loaded.label_names == names and np.array_equal(loaded.suggested_label, report.suggested_label)


def test_an_infinite_level_is_read_again(tmp_path: Path) -> None:
    report = RelationCleaner(RelationConfig()).fit(make(n=60).dataset(), quiet=True)
    report.is_outlier, report.outlier_level = np.zeros(len(report), bool), np.inf
    report.save(tmp_path / "report")
    assert RelationReport.load(tmp_path / "report").outlier_level == np.inf


@pytest.mark.parametrize("device", ["cuda:99", "xpu", "mps", "cpu"])
def test_reports_of_another_machines_device_score_new_rows_here(device: str, tmp_path: Path) -> None:
    data = make(n=60).dataset()
    report = RelationCleaner().fit(data, quiet=True)
    report.save(tmp_path)
    about = json.loads((without_list(tmp_path) / "report.json").read_text())
    _edit(tmp_path / "report.json", config={**about["config"], "device": device})
    loaded = RelationReport.load(tmp_path)
    assert loaded.config.device == ("cpu" if device == "cpu" else None)
    assert np.array_equal(loaded.score_outliers(data, quiet=True), report.score_outliers(data, quiet=True))


@pytest.mark.parametrize("device", ["meta", "0", "nowhere"])
def test_reports_of_no_device_are_refused(device: str, tmp_path: Path) -> None:
    RelationCleaner().fit(make(n=60).dataset(), quiet=True).save(tmp_path)
    about = json.loads((without_list(tmp_path) / "report.json").read_text())
    _edit(tmp_path / "report.json", config={**about["config"], "device": device})
    with pytest.raises(ValueError, match=f"no readable relation report .*'{device}'"):
        RelationReport.load(tmp_path)


def test_writers_refuse_what_readers_would(tmp_path: Path) -> None:
    """And what was there before stays."""
    model = tiny_model("llama")
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, 0.5, progress=False)
    memory = CompressedContextMemory(adapted(tiny_model("llama")))
    memory.append([5, 6, 7])
    tuned = adapted(tiny_model("llama"))
    report = RelationCleaner().fit(make(n=60).dataset(), quiet=True)
    recipe = recipe_text(Formation(factor=2), "image", label_column="label")
    rows = to_dataset(torch.rand(4, 1, 8, 8), torch.arange(4) % 2, ["a", "b"], "float32", ("image", "label"), recipe)
    saves: dict[str, Callable[[], Any]] = {
        "cache": lambda: cache.save_pretrained(tmp_path / "cache"),
        "memory": lambda: memory.save_pretrained(tmp_path / "memory"),
        "adapter": lambda: save_adapter(tuned, tmp_path / "adapter"),
        "report": lambda: report.save(tmp_path / "report"),
        "condensed": lambda: save_condensed(rows, tmp_path / "condensed"),
    }
    before = {}
    for name, save in saves.items():
        save()
        before[name] = {path.name: path.read_bytes() for path in files_of(tmp_path / name)}
    cache.pristine_layers[0].context.keys[0, 0] = float("nan")
    memory.layers[0][0][0, 0, 0, 0] = 1e30
    next(weight for name, weight in tuned.named_parameters() if ".lora_A" in name).data[0, 0] = float("nan")
    report.label_noise_score = np.full(len(report), np.nan)
    rows = to_dataset(
        torch.full((4, 1, 8, 8), torch.nan), torch.arange(4) % 2, ["a", "b"], "float32", ("image", "label"), recipe
    )
    for name, save in saves.items():
        with pytest.raises(ValueError):
            save()
        assert {path.name: path.read_bytes() for path in files_of(tmp_path / name)} == before[name]


def test_names_and_texts_of_any_kind_are_written_and_read(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    signs = [chr(code) for code in (*range(1, 256), 0x202E, 0x2028, 0x200D, 0xFEFF, 0xFFFE, 0x1F600)]
    for round_ in range(12):
        name = "".join(draw.choice(signs, draw.integers(1, 12)))
        labels = [name, f"{name} 2"]
        features = Features({"a": Value("int64")})
        dataset = Dataset.from_dict({"a": [1]}, features=features)

        dataset = dataset.cast_column("a", ClassLabel(names=labels))
        with replacing(tmp_path / str(round_), "cleaned_dataset") as draft:
            metadata = write_parquet(dataset, draft)
            shown = dict.fromkeys(("name", "source", "split", "dropped", "rows", "model"), name)
            finish(draft, "cleaned_dataset", about={"x": name}, metadata=metadata, code={"split": name}, facts=[(name, name)],
                   rule=name,
                   settings=json.dumps({"x": name}), **shown)  # fmt: skip
        assert read_parquet(tmp_path / str(round_)).features["a"].names == labels
        found = read_card(tmp_path / str(round_) / "README.md")[0]["dataset_info"]["features"][0]["dtype"][
            "class_label"
        ]["names"]
        assert list(found.values()) == labels
        assert describe(tmp_path / str(round_))["kind"] == "cleaned_dataset"


# -- formats of later releases


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["cache", "memory", "stream", "heads", "report", "condensed", "cleaned", "adapter"])
def test_a_later_minor_format_is_read_without_what_is_new(name: str, tmp_path: Path) -> None:
    saved = SAVES[name](tmp_path)
    saved.first(tmp_path / "it")
    whole = saved.read(tmp_path / "it")
    newer: dict[str, Any] = {"format_minor": MINOR + 1, "new_entry": [1]}
    weights = next((path for path in (tmp_path / "it").glob("*.safetensors") if "adapter" not in path.name), None)
    settings = {"cache": "hf_dataopt.json", "report": "report.json"}.get(name)

    def extend() -> None:
        without_list(tmp_path / "it")
        if weights is not None:
            arrays = load_file(weights)
            save_file({**arrays, "new_tensor": np.ones(2, np.float32)}, weights)
        if settings:
            about = json.loads((tmp_path / "it" / settings).read_text())
            _edit(tmp_path / "it" / settings, config={**about["config"], "new_setting": 3})

    extend()
    if name in ("cache", "memory", "report"):  # what this release's own format does not have is damage
        with pytest.raises(ValueError):
            saved.read(tmp_path / "it")
    for file in ("hf_dataopt.json", "report.json", "memory.json"):
        if (tmp_path / "it" / file).is_file():
            _edit(tmp_path / "it" / file, **newer)
    assert saved.read(tmp_path / "it") == whole
    for number, minor in ((FORMAT + 1, 0), (FORMAT, -1), (FORMAT, "1"), (FORMAT, True)):
        _edit(tmp_path / "it" / "hf_dataopt.json", format_version=number, format_minor=minor, hf_dataopt="9.9")
        newer_words = rf"format {FORMAT + 1}, this version reads {FORMAT}; update hf_dataopt \(written by 9\.9\)"
        words = newer_words if number > FORMAT else "format_minor"
        with pytest.raises(ValueError, match=words):
            saved.read(tmp_path / "it")
