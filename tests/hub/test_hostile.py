"""Artifacts that mean harm: 200 and more generated ones, refused with a reason or shown as plain text.

No pickle is opened (every unpickling function fails the test) and nothing reaches for the network (every socket does).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import struct
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from safetensors.torch import save_file

from hf_dataopt import CompressedContextMemory, KVzipCache, StreamingContextMemory
from hf_dataopt.ccm.saved import load_adapter, save_adapter
from hf_dataopt.condensation.columns import to_dataset
from hf_dataopt.condensation.multi_formation import Formation, MultiFormation, recipe_text
from hf_dataopt.condensation.saved import load_condensed, save_condensed
from hf_dataopt.kvzip.head_scores import load_head_scores, save_head_scores
from hf_dataopt.publishing import cards
from hf_dataopt.publishing.artifacts import fetch, push_folder
from hf_dataopt.publishing.dataset_files import read_parquet
from hf_dataopt.publishing.info import describe
from hf_dataopt.publishing.record import read_about
from hf_dataopt.publishing.safe_files import check_names, check_safetensors, files_of, read_card, read_json, read_yaml

from ..kvzip.conftest import CONTEXT
from ..models import byte_tokenizer, tiny_model
from .damage import without_list
from .everything import STREAM, TURNS, adapted

OPENED: list[str] = []


class _Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OPENED.append, ("a pickle was opened",)


BOMB = pickle.dumps(_Bomb())


@pytest.fixture(autouse=True)
def _no_pickle_no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(what: str) -> Any:
        def refused(*args: Any, **kwargs: Any) -> Any:
            OPENED.append(what)
            raise AssertionError(f"{what} was called")

        return refused

    for module, name in ((pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse(name))
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse(f"socket.{name}"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
    OPENED.clear()
    yield
    assert OPENED == []


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return save_head_scores(torch.ones(2, 3), tmp_path / "scores", model_id="a/model")


# -- names


NAMES = [
    *(
        "/etc/passwd",
        "../x.json",
        "a/../../x",
        "a/..",
        "..",
        ".",
        "./x",
        "a//b",
        "a/",
        "",
        "\\windows\\x",
        "..\\x",
        "C:\\x",
    ),
    *(
        "C:/x",
        "c:x",
        "a\x00b",
        "a\nb",
        "a\rb",
        "\x1b[2Jx",
        "a\u202ejson",
        "a/\u2028b",
        "//host/x",
        "~/../x/../../y",
        "a/./b",
    ),
    *(f"{'../' * n}etc/shadow" for n in range(2, 12)),
    *(f"data/{'../' * n}x.parquet" for n in range(1, 11)),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="no plain relative path"):
        check_names(["README.md", name], "the repository me/x")


def test_names_that_are_fine() -> None:
    check_names(["README.md", "data/train-00000-of-00001.parquet", "a b/ü.json", ".gitattributes", "..a", "a..b"], "x")
    with pytest.raises(ValueError, match="more than"):
        check_names((f"{n}.json" for n in range(20_000)), "x")


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside.json", "/proc/self/environ", "nowhere", "/dev/zero"])
def test_links_that_lead_elsewhere(scores: Path, target: str) -> None:
    (scores.parent / "outside.json").write_text("{}")
    (scores / "extra.json").symlink_to(target)
    with pytest.raises(ValueError, match="link"):
        load_head_scores(scores)


def test_pipes_are_not_read(scores: Path) -> None:
    os.mkfifo(scores / "pipe.json")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        load_head_scores(scores)


# -- tensors


def _safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _entry(start: Any, stop: Any, shape: Any = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"head_scores": {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}}


TENSOR_FILES = {
    **{f"pickle {n}": pickle.dumps(_Bomb(), protocol=n) for n in range(2, 6)},
    "zip": b"PK\x03\x04" + b"\x00" * 200,
    "torch zip with a pickle": b"PK\x03\x04" + b"archive/data.pkl" + BOMB,
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "text": b"#!/bin/sh\nrm -rf ~\n" * 10,
    **{f"header of 2**{n}": _safetensors({}, b"\x00" * 64, 2**n) for n in (12, 24, 25, 31, 32, 40, 62, 63)},
    "header longer than the file": _safetensors({}, length=1000),
    "no JSON": _safetensors(b"{" * 20),
    "a list": _safetensors([1, 2]),
    "a number": _safetensors(b"17"),
    "null": _safetensors(b"null"),
    "deep JSON": _safetensors(b"[" * 200_000),
    "not UTF-8": _safetensors(b'{"\xff\xfe": 1}'),
    "entry is text": _safetensors({"head_scores": "x"}, b"\x00" * 16),
    "no offsets": _safetensors({"head_scores": {"dtype": "F32", "shape": [4]}}, b"\x00" * 16),
    "huge int": _safetensors(
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, ' + b"9" * 5000 + b"]}}", b"0" * 16
    ),
    **{
        f"offsets {a} to {b}": _safetensors(_entry(a, b), b"\x00" * 16)
        for a, b in (
            (0, 17),
            (0, 15),
            (16, 0),
            (-4, 12),
            (4, 16),
            (0, 2**63),
            ("0", "16"),
            (None, 16),
            (0.5, 16),
            ([], []),
        )
    },
    **{
        f"shape {s}": _safetensors(_entry(0, 16, s), b"\x00" * 16)
        for s in ((5,), (2**62, 4), (-4,), (0,), ("4",), "4", None)
    },
    **{f"dtype {d}": _safetensors(_entry(0, 16, (4,), d), b"\x00" * 16) for d in ("F31", "", "object", "F64", "U8")},
    "overlap": _safetensors({**_entry(0, 16), "b": _entry(8, 24)["head_scores"]}, b"\x00" * 24),
    "hidden bytes": _safetensors(_entry(0, 16), b"\x00" * 16 + BOMB),
    "hidden first": _safetensors(_entry(16, 32), BOMB[:16].ljust(16) + b"\x00" * 16),
}


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_tensor_files(scores: Path, name: str) -> None:
    (scores / "head_scores.safetensors").write_bytes(TENSOR_FILES[name])
    with pytest.raises(ValueError, match=r"head_scores\.safetensors|head scores") as refused:
        load_head_scores(scores)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pkl", ".pth", ".npy", ".joblib", ".ckpt"])
def test_pickles_beside_an_artifact_are_left_alone(scores: Path, ending: str) -> None:
    (scores / f"adapter_model{ending}").write_bytes(BOMB)
    assert torch.equal(load_head_scores(scores)[0], torch.ones(2, 3))


def test_an_adapter_in_a_pickle_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    save_adapter(adapted(base), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "kept")
    (tmp_path / "adapter_model.bin").write_bytes(BOMB)
    with pytest.raises(ValueError, match=r"lacks adapter_model\.safetensors"):
        load_adapter(tiny_model("llama"), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(BOMB)
    with pytest.raises(ValueError, match="pickle under another name"):
        load_adapter(tiny_model("llama"), tmp_path)


# -- records


RECORDS = {
    "empty": "",
    "no JSON": "kind: head_scores",
    "a list": "[]",
    "text": '"head_scores"',
    "NaN": '{"kind": NaN}',
    "deep": '{"a": ' + "[" * 200_000,
    "deep objects": '{"a":' * 100_000,
    "huge int": '{"format_version": ' + "9" * 10_000 + "}",
    "no kind": '{"format_version": 1}',
    "kind is a list": '{"format_version": 1, "kind": ["head_scores"]}',
    "kind unknown": '{"format_version": 1, "kind": "os.system"}',
    "kind climbs": '{"format_version": 1, "kind": "../../etc/passwd"}',
    "kind of another": '{"format_version": 1, "kind": "kvzip_cache"}',
    "kind of tables": '{"format_version": 1, "kind": "condensed_dataset"}',
    "version is text": '{"format_version": "1", "kind": "head_scores"}',
    "version is true": '{"format_version": true, "kind": "head_scores"}',
    "version 0": '{"format_version": 0, "kind": "head_scores"}',
    "version of tomorrow": '{"format_version": 99, "kind": "head_scores"}',
    "no model": '{"format_version": 1, "kind": "head_scores"}',
    "model is text": '{"format_version": 1, "kind": "head_scores", "model": "x"}',
    "model has no name": '{"format_version": 1, "kind": "head_scores", "model": {"name": 7}}',
}


@pytest.mark.parametrize("name", RECORDS)
def test_records(scores: Path, name: str) -> None:
    (scores / "hf_dataopt.json").write_text(RECORDS[name])
    with pytest.raises(ValueError) as refused:
        load_head_scores(scores)
    assert "scores" in str(refused.value) and len(str(refused.value)) < 600


def test_records_that_are_too_large_or_no_text(scores: Path) -> None:
    with (scores / "hf_dataopt.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="at most"):
        read_about(scores)
    (scores / "hf_dataopt.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_about(scores)
    with pytest.raises(ValueError, match="missing"):
        read_json(scores / "none.json")


# -- cards


BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)
CARDS = {
    "billion laughs": BILLION,
    "aliases": "tags: &t [a]\nother: *t",
    "itself": "a: &a\n  - *a",
    "merge": "base: &b {license: mit}\nx:\n  <<: *b",
    **{
        f"tag {tag}": f"license: !!python/{tag}"
        for tag in (
            "object/apply:os.system ['true']",
            "object/new:os.system ['true']",
            "name:os.system",
            "module:os",
            "object:os.system",
            "tuple [1]",
        )
    },
    "own tag": "license: !exec true",
    "deep flow": "a: " + "[" * 5_000,
    "deep closed": "a: " + "[" * 60 + "]" * 60,
    "deep block": "\n".join(f"{' ' * n}a:" for n in range(200)),
    "deep maps": "a: " + "{a: " * 3_000,
    "a list": "- a\n- b",
    "text": "hello",
    "number": "17",
    "tabs": "a:\n\t- b",
    "unhashable": "? [a, b]\n: c",
    "unhashable map": "? {a: b}\n: c",
    "control": "a: \x01",
    "two documents": "a: 1\n--- \nb: 2",
    "too large": "a: " + "x" * 600_000,
    "open quote": 'a: "',
    "bad date": "a: 2001-99-99",
}


@pytest.mark.parametrize("name", CARDS)
def test_card_metadata(scores: Path, name: str) -> None:
    (scores / "README.md").write_text(f"---\n{CARDS[name]}\n---\n# x\n")
    if name == "two documents":  # a card's block ends at the first line of dashes
        assert read_card(scores / "README.md")[0] == {"a": 1}
        return
    for read in (lambda: load_head_scores(scores), lambda: describe(scores), lambda: push_folder(scores, "me/x")):
        with pytest.raises(ValueError, match="the metadata of"):
            read()


def test_cards_that_are_too_large(scores: Path) -> None:
    (scores / "README.md").write_text("x" * 2_000_000)
    with pytest.raises(ValueError, match="at most"):
        load_head_scores(scores)
    assert read_yaml("tags:\n- a\nn: 1", "x") == {"tags": ["a"], "n": 1}


# -- text that wants to be markup


TEXTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<iframe src='https://evil.example'></iframe>",
    "<svg/onload=alert(1)>",
    "</table><h1>owned</h1>",
    "<a href=javascript:alert(1)>x</a>",
    "<!-- comment -->",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "[click](javascript:alert(1))",
    "![pixel](https://evil.example/track.png)",
    "[x]: https://evil.example",
    "[ref][x]",
    "<https://evil.example>",
    "https://evil.example/steal?x=1",
    "www.evil.example",
    "a | b | c",
    "cat\n\n# Owned",
    "cat\n---\nlicense: mit\n---",
    "cat\r\n| x | y |",
    "```\nout of the block\n```python\nimport os; os.system('true')\n```",
    "````",
    "`code` ``more``",
    "**bold** _it_ ~~gone~~ *x*",
    "$\\href{javascript:x}{y}$",
    "{{ 7 * 7 }}",
    "{% for x in ().__class__.__mro__ %}{{ x }}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{repo!r} {0.__class__}",
    "\u202egnp.exe",
    "\x00\x07\x1b[31mred",
    "x" * 100_000,
    "me/x\"); import os; os.system('true') #",
    "'''\nimport os\n'''",
    '"""\nimport os\n"""',
    "\\",
    "\u2028line\u2029separators",
    "@everyone",
]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append(tag)


def _outside_code(card: str) -> str:
    """A card's Markdown without its YAML, code blocks and code spans."""
    body = card.split("\n---\n", 1)[1]
    body = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", body)


def _check_markdown(card: str) -> None:
    text = _outside_code(card)
    tags = _Tags()
    tags.feed(text)
    assert tags.found == []
    assert not re.search(r"(?<!\\)\]\((?!preview\.png\))|(?<!\\)\]\[|^\s*(?<!\\)\[[^\]]*\]:", text, re.MULTILINE)
    assert not re.search(r"(?i)https?://|www\.", text)
    assert "49" not in text.split("Software")[0] and "Owned" not in re.findall(r"^#+ (\w+)", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) < 3_000


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:30])
def test_markup_in_a_card(text: str, tmp_path: Path) -> None:
    """As label, data set name and repository name of a cleaned set; the card's code still holds one statement."""
    card = cards.render(
        "cleaned_dataset",
        {"tags": [text], "dataset_info": {"names": [text]}},
        **dict.fromkeys(("name", "source", "split", "dropped", "rows", "model"), text),
        facts=[(text, text)],
        rule=text,
        settings=json.dumps({"x": text}),
        usage=cards.block("print(1)", "python"),
    )
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    metadata, _ = read_card(tmp_path / "README.md")
    assert metadata == {"tags": [text], "dataset_info": {"names": [text]}}
    assert cards.first_block(card).strip() == "print(1)"
    _check_markdown(card)
    settings = re.findall(r"^(`{3,})json\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    assert len(settings) == 1 and json.loads(settings[0][1]) == {"x": text}


@pytest.mark.parametrize("text", TEXTS[:12] + TEXTS[17:21], ids=lambda text: ascii(text)[:30])
def test_markup_in_labels_and_names_of_a_condensed_set(text: str, tmp_path: Path) -> None:
    recipe = recipe_text(Formation(factor=2), "image", label_column="label", seed=0)
    images = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    condensed = to_dataset(images, torch.tensor([0, 1]), [text, "b"], "uint8", ("image", "label"), recipe)
    row = {"trained on": text, "network": text, "images": 1, "epochs": 1, "accuracy": 1.0, "spread": 0.0, "seeds": 1}
    folder = save_condensed(condensed, tmp_path / "c", name=text, scores=[row])
    _check_markdown((folder / "README.md").read_text(encoding="utf-8"))
    assert load_condensed(folder).features == condensed.features
    assert describe(folder)["licence"] is None


def test_markup_in_an_adapters_example_and_results(tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS[:6] + TEXTS[19:21]):
        row = {"task": text, "dataset": text, "metric": text, "value": 1.0, "baseline": text, "seeds": 1}
        folder = save_adapter(
            adapted(tiny_model("llama", max_position_embeddings=4096)),
            tmp_path / str(index),
            byte_tokenizer(),
            example=([text], text),
            results=[row],
            name=text,
        )
        card = (folder / "README.md").read_text(encoding="utf-8")
        _check_markdown(card)
        compile(cards.first_block(card), "card", "exec")
        assert json.dumps(text) in cards.first_block(card)


# -- data sets


RECIPES = [
    "",
    "x",
    "[]",
    "{}",
    "[" * 100_000,
    '{"formation": 1, "column": "image"}',
    '{"formation": {}, "column": 1}',
    '{"formation": {"factor": 1000000000, "kind": "multi"}, "column": "image"}',
    '{"formation": {"factor": -1}, "column": "image"}',
    '{"formation": {"factor": "2"}, "column": "image"}',
    '{"formation": {"kind": "__import__"}, "column": "image"}',
    '{"formation": {"bound": 1e9}, "column": "image"}',
    '{"formation": {"pad_value": 1e300}, "column": "image"}',
    '{"formation": {}, "column": "image", "mean": [1e300]}',
    '{"formation": {}, "column": "image", "mean": [1' + "0" * 400 + "]}",
    '{"formation": {}, "column": "image", "std": [1e-300]}',
]


def _recipe_set(recipe: str) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=["a"]), "formation": Value("string")})
    picture = torch.zeros(8, 8, dtype=torch.uint8).numpy()
    return Dataset.from_dict({"image": [picture], "label": [0], "formation": [recipe]}, features=features)


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_recipes(recipe: str) -> None:
    with pytest.raises(ValueError):
        MultiFormation.from_dataset(_recipe_set(recipe or " "))


@pytest.mark.parametrize("content", [BOMB, b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", b"", b"\x00" * 1000])
def test_parquet_files(tmp_path: Path, content: bytes) -> None:
    recipe = recipe_text(Formation(factor=2), "image", label_column="label")
    folder = save_condensed(_recipe_set(recipe), tmp_path / "c")
    next((folder / "data").glob("*.parquet")).write_bytes(content)
    with pytest.raises(ValueError, match="no whole condensed set"):
        load_condensed(folder)
    with pytest.raises(ValueError, match="no parquet file"):
        load_condensed(without_list(folder))


# -- memories and caches


def test_memories_and_caches_with_tensors_of_the_wrong_kind(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted(tiny_model("llama"))
    memory = CompressedContextMemory(model, byte_tokenizer())
    for turn in TURNS:
        memory.append(turn)
    memory.save_pretrained(tmp_path)
    without_list(tmp_path)
    tensors = load_file(tmp_path / "memory.safetensors")
    keys = "memory.0.keys"
    for name, value in (
        (keys, tensors[keys][:, :1]),
        (keys, tensors[keys][:, :, :1]),
        (keys, tensors[keys].long()),
        ("memory.7.keys", tensors[keys]),
        ("memory.x.keys", tensors[keys]),
        ("held", tensors["held"][:, :1]),
        ("held", tensors["held"].float()),
        ("steps", tensors["steps"].float()),
        ("steps", torch.zeros(3, dtype=torch.int64)),
        ("steps", torch.zeros(1, dtype=torch.int64)),
        ("text", torch.full((1,), -1)),
        ("surplus", torch.zeros(1)),
    ):
        save_file({**tensors, name: value.clone()}, tmp_path / "memory.safetensors")
        with pytest.raises(ValueError, match="no whole memory"):
            CompressedContextMemory.from_pretrained(model, tmp_path)
    states = {name: value for name, value in tensors.items() if name.startswith("memory.")}
    sink = {name.replace("memory", "sink"): value[:, :, :1].clone() for name, value in states.items()}
    for others, words in (
        ({name: tensors[name] for name in ("steps", "text", "held")}, "no whole memory"),
        ({**tensors, **sink}, "1 sink slots"),
        ({**tensors, **{name: value.double() for name, value in sink.items()}}, "several dtypes"),
        (
            {**tensors, **{name.replace("memory", "other"): value.clone() for name, value in states.items()}},
            "no whole memory",
        ),
    ):
        save_file(others, tmp_path / "memory.safetensors")
        with pytest.raises(ValueError, match=words):
            CompressedContextMemory.from_pretrained(model, tmp_path)
    save_file(tensors, tmp_path / "memory.safetensors")
    settings = json.loads((tmp_path / "memory.json").read_text())
    sizes = [{name: value} for name in ("layers", "peak_kv_bytes", "peak_slots") for value in (None, -1, True, "1", [])]
    wrong = (
        {"history": [["x"]]},
        {"history": 1},
        {"history": []},
        {"written_by": 1},
        {"written_by": {}},
        {"layers": 0},
    )
    for change in (*wrong, *sizes):
        (tmp_path / "memory.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match="no whole memory|who wrote"):
            CompressedContextMemory.from_pretrained(model, tmp_path)


def test_streams_with_sizes_of_the_wrong_kind(tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"))
    stream = StreamingContextMemory(model, max_kv=40, compress_tokens=16, memory_size=6)
    stream.feed(STREAM)
    stream.save_pretrained(tmp_path)
    without_list(tmp_path)
    settings = json.loads((tmp_path / "memory.json").read_text())
    for change in (
        {"max_kv": "40"},
        {"max_kv": 2},
        {"max_kv": None},
        {"memory_slots": 10**9},
        {"memory_slots": -1},
        {"compress": 1},
        {"tokens_seen": True},
    ):
        (tmp_path / "memory.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError):
            StreamingContextMemory.from_pretrained(model, tmp_path)


SOURCES = ["../x", "/etc", "a/b/c", "me/x y", "me/..", "me/--x", "https://evil.example/x", "me/x\n", "-x/y", ""]

# -- what is well meant needs no network


def test_saving_loading_and_describing_folders_makes_no_network_call(tmp_path: Path) -> None:
    """The sockets of this process fail; every kind goes through a folder once."""
    model, tokenizer = tiny_model("llama", max_position_embeddings=4096), byte_tokenizer()
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, progress=False)
    cache.save_pretrained(tmp_path / "cache")
    KVzipCache.from_pretrained(tmp_path / "cache", model)
    tuned = adapted(model)
    save_adapter(tuned, tmp_path / "adapter", tokenizer, example=(TURNS, "What?"))
    load_adapter(tiny_model("llama", max_position_embeddings=4096), tmp_path / "adapter")
    memory = CompressedContextMemory(tuned, tokenizer)
    memory.append(TURNS[0])
    memory.save_pretrained(tmp_path / "memory")
    CompressedContextMemory.from_pretrained(tuned, tmp_path / "memory")
    for name in ("cache", "adapter", "memory"):
        assert describe(tmp_path / name)["usage"]
        check_safetensors(next((tmp_path / name).glob("*.safetensors")))
        assert files_of(tmp_path / name)
    with pytest.raises(ValueError, match="load it as that"):
        fetch(tmp_path / "cache", "context_memory")
    with pytest.raises(ValueError, match="no parquet files"):
        read_parquet(tmp_path / "cache")


@pytest.mark.parametrize("name", SOURCES, ids=ascii)
def test_sources_that_are_neither_folders_nor_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError):
        load_head_scores(name)


def test_there_are_200_of_them() -> None:
    assert sum(map(len, (NAMES, TENSOR_FILES, RECORDS, CARDS, TEXTS, RECIPES, SOURCES))) >= 200
