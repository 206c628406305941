"""Forty and more calls of the command line as users make them: exit code, one line that names a flag, nothing done before a
refusal, no bar in a file, and the same data from everywhere.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers as tf

from hf_dataopt.cli import main

from ..ccm.models import adapted
from ..models import byte_tokenizer, tiny_model
from ..relation.data import make

CONTEXT = "Anna lives in Oslo. The key of room 12 is red. " * 4


@dataclass(frozen=True)
class Call:
    """A call, and what it must come to.

    Args:
        line: words; `{here}` is a folder with everything below in it.
        code: exit code.
        says: words of stderr where the code is not 0, of stdout else.
        stdin: what is piped in.
    """

    line: str
    code: int = 0
    says: str = ""
    stdin: str = ""


GRAPH = "--features-column f --probs-column p"
MODEL = "--model {here}/bert --column text --modality text"
CONDENSE = "--images-per-class 1 --width 4 --depth 2 --evaluation-epochs 1 --method mosaic"
KVZIP = "kvzip --model {here}/llama --max-new-tokens 2 --device cpu"
CCM = "ccm --model {here}/llama --max-new-tokens 2 --device cpu --turn hello --question why"

CALLS = {
    # --- what works
    "clean a folder of save_to_disk": Call("clean {here}/saved --output-dir {out}", says="label errors"),
    "clean a slice of it": Call("clean {here}/saved --split train[:60] --output-dir {out}", says="60 rows"),
    "clean a slice of a file": Call(
        f"clean {{here}}/rows.parquet {GRAPH} --split train[:50] --output-dir {{out}}", says="50 rows"
    ),
    "clean a folder of files": Call(f"clean {{here}}/folder {GRAPH} --output-dir {{out}}", says="120 rows"),
    "clean lines of JSON from a pipe": Call(
        f"clean - {GRAPH} --output-dir {{out}}", says="120 rows", stdin="rows.jsonl"
    ),
    "clean a table with a model": Call(
        f"clean {{here}}/text.csv {MODEL} --noise-rate 0.1 --output-dir {{out}}", says="40 rows"
    ),
    "clean csv from a pipe with a model": Call(
        f"clean - {MODEL} --noise-rate 0.1 --output-dir {{out}}", says="40 rows", stdin="text.csv"
    ),
    "clean by the dissertation": Call(
        "clean {here}/saved --score label_noise --cut algorithm4 --output-dir {out}", says="kept"
    ),
    "clean at a rate": Call("clean {here}/saved --noise-rate 0.1 --output-dir {out}", says="12 label errors"),
    "clean a dictionary's split": Call("clean {here}/dict --split held --output-dir {out}", says="120 rows"),
    "condense a folder of pictures": Call(
        f"condense {{here}}/pictures {CONDENSE} --output-dir {{out}}", says="2 images"
    ),
    "condense another column": Call(
        f"condense {{here}}/photos.parquet --column photo --label-column kind {CONDENSE} --output-dir {{out}}",
        says="2 images",
    ),
    "condense and score": Call(
        f"condense {{here}}/pictures --test {{here}}/pictures --test-split train --evaluate --seeds 1 {CONDENSE} "
        "--output-dir {out}",
        says="Test accuracy",
    ),
    "mix a folder of pictures": Call(
        "mix {here}/pictures --model {here}/resnet --rows 4 --device cpu --output-dir {out}", says="mixed.png"
    ),
    "mix by Co-Mixup": Call(
        "mix {here}/pictures --model {here}/resnet --rows 4 --method co --grid 2 --output-dir {out}", says="mixed.png"
    ),
    "kvzip a file": Call(f"{KVZIP} --context {{here}}/context.txt --question why", says="compressed cache"),
    "kvzip in pieces of a budget": Call(
        f"{KVZIP} --context {{here}}/context.txt --question why --max-kv-tokens 140 --chunk-size 64 --replay exact",
        says="compressed cache",
    ),
    "kvzip a pipe": Call(f"{KVZIP} --context - --question why", says="compressed cache", stdin="context.txt"),
    "kvzip questions from a pipe": Call(
        f"{KVZIP} --context {{here}}/context.txt --question -", says="one", stdin="questions.txt"
    ),
    "kvzip kept in a folder": Call(
        f"{KVZIP} --context {{here}}/context.txt --question why --output-dir {{out}}", says="folder:"
    ),
    "ccm untrained": Call(f"{CCM} --memory merge --num-comp-tokens 1", says="(merge)"),
    "ccm trained": Call(f"{CCM} --adapter {{here}}/adapter", says="(merge)"),
    "ccm turns from a pipe": Call(
        "ccm --model {here}/llama --max-new-tokens 2 --turn - --question why --output-dir {out}",
        says="two",
        stdin="questions.txt",
    ),
    "info of what kvzip wrote": Call("info {here}/cache", says="compressed KVzip cache"),
    # --- what is refused
    "clean nothing": Call("clean {here}/nothing.csv --output-dir {out}", 2, "nothing.csv"),
    "clean no Hub name": Call("clean ../a/b/c --output-dir {out}", 2, "DATASET"),
    "clean to nowhere": Call("clean {here}/saved", 2, "--output-dir"),
    "clean over foreign files": Call("clean {here}/saved --output-dir {here}/thesis", 2, "thesis.tex"),
    "clean a split that a file has not": Call(
        "clean {here}/rows.parquet --split test --output-dir {out}", 2, "--split"
    ),
    "clean a split that a folder has not": Call("clean {here}/dict --split test --output-dir {out}", 2, "--split"),
    "clean a split of pictures that is not there": Call(
        "clean {here}/pictures --split x --output-dir {out}", 2, "--split"
    ),
    "clean a configuration of a file": Call("clean {here}/rows.parquet --config a --output-dir {out}", 2, "--config"),
    "clean a revision of a folder": Call("clean {here}/saved --revision main --output-dir {out}", 2, "--revision"),
    "clean a label column that is not there": Call(
        f"clean {{here}}/text.csv {MODEL} --label-column x --output-dir {{out}}", 2, "--label-column x"
    ),
    "clean a column that is not there": Call(
        "clean {here}/text.csv --model {here}/bert --output-dir {out}", 2, "--column image"
    ),
    "clean features that are not there": Call(
        "clean {here}/saved --features-column g --output-dir {out}", 2, "--features-column g"
    ),
    "clean with a column and no model": Call("clean {here}/saved --column text --output-dir {out}", 2, "--model"),
    "clean with a model and features": Call(
        f"clean {{here}}/text.csv {MODEL} --features-column f --output-dir {{out}}", 2, "--features-column"
    ),
    "clean with two cuts": Call("clean {here}/saved --cut algorithm4 --noise-rate 0.1 --output-dir {out}", 2, "--cut"),
    "clean at a rate above one": Call("clean {here}/saved --noise-rate 1.5 --output-dir {out}", 2, "--noise-rate"),
    "clean at a cold temperature": Call("clean {here}/saved --temperature -1 --output-dir {out}", 2, "--temperature"),
    "clean with a score that is none": Call("clean {here}/saved --score best --output-dir {out}", 2, "--score"),
    "clean on a device that is none": Call("clean {here}/saved --device abacus --output-dir {out}", 2, "--device"),
    "clean real-valued labels": Call(
        f"clean {{here}}/rows.parquet {GRAPH} --label-column real --output-dir {{out}}", 2, "real"
    ),
    "clean a pipe with nothing in it": Call("clean - --output-dir {out}", 2, "standard input", " "),
    "clean a broken table": Call("clean {here}/broken.parquet --output-dir {out}", 2, "broken.parquet"),
    "private, pushed nowhere": Call("clean {here}/saved --output-dir {out} --private", 2, "--push-to-hub"),
    "pushed to no name": Call("clean {here}/saved --output-dir {out} --push-to-hub 'a b'", 2, "--push-to-hub"),
    "condense a column that is not there": Call(
        f"condense {{here}}/pictures --column x {CONDENSE} --output-dir {{out}}", 2, "--column x"
    ),
    "condense with seeds and no scores": Call(
        f"condense {{here}}/pictures --seeds 2 {CONDENSE} --output-dir {{out}}", 2, "--evaluate"
    ),
    "condense and score on nothing": Call(
        f"condense {{here}}/photos.parquet --evaluate {CONDENSE} --output-dir {{out}}", 2, "--test"
    ),
    "condense to no images": Call(
        "condense {here}/pictures --images-per-class 0 --output-dir {out}", 2, "--images-per-class"
    ),
    "condense in a metric that is none": Call("condense {here}/pictures --metric l3 --output-dir {out}", 2, "--metric"),
    "condense pictures of several sizes": Call(
        f"condense {{here}}/sizes {CONDENSE} --output-dir {{out}}", 2, "--image-size"
    ),
    "mix one picture": Call("mix --rows 1", 2, "--rows"),
    "mix with a model of nothing": Call("mix --model {here}/resnet", 2, "DATASET"),
    "mix without a model": Call("mix {here}/pictures --output-dir {out}", 2, "--model"),
    "mix with a model that is not there": Call(
        "mix {here}/pictures --model {here}/none --output-dir {out}", 1, "--model"
    ),
    "mix into a file": Call("mix --output-dir {here}/context.txt", 2, "--output-dir"),
    "kvzip no file": Call(f"{KVZIP} --context {{here}}/none.txt --question why", 2, "--context"),
    "kvzip an empty file": Call(f"{KVZIP} --context {{here}}/empty.txt --question why", 2, "--context"),
    "kvzip at a ratio above one": Call(
        f"{KVZIP} --context {{here}}/context.txt --question why --keep-ratio 2", 2, "--keep-ratio"
    ),
    "kvzip answers of no length": Call(
        "kvzip --model {here}/llama --context {here}/context.txt --question why --max-new-tokens 0",
        2,
        "--max-new-tokens",
    ),
    "kvzip two pipes": Call(f"{KVZIP} --context - --question -", 2, "standard input", "context.txt"),
    "kvzip with no JSON": Call(
        f"{KVZIP} --context {{here}}/context.txt --question why --template-kwargs x", 2, "--template-kwargs"
    ),
    "kvzip a model that is not there": Call(
        "kvzip --model {here}/none --context {here}/context.txt --question why", 1, "--model"
    ),
    "ccm with an adapter and a memory": Call(f"{CCM} --adapter {{here}}/adapter --memory merge", 2, "--memory"),
    "ccm with an adapter that is not there": Call(f"{CCM} --adapter {{here}}/no/ne", 2, "--adapter"),
    "ccm with a system message and no chat": Call(f"{CCM} --system Brief.", 2, "--chat"),
    "info of a stranger's folder": Call("info {here}/thesis", 2, "no artifact of hf_dataopt"),
    "push of a stranger's folder": Call("push {here}/thesis me/thesis", 2, "hf_dataopt"),
    "push of nothing": Call("push {here}/none me/none", 2, "folder"),
    "demo of no method": Call("demo --section none", 2, "--section"),
    "demo with a model for a method without": Call(
        "demo --section mixup --model {here}/llama --output-dir {out}", 2, "--model"
    ),
    "condense by chosen images in a metric": Call(
        "condense {here}/pictures --method herding --metric l1 --output-dir {out}", 2, "--metric"
    ),
    "condense by chosen images in rounds": Call(
        "condense {here}/pictures --method mosaic --outer-iterations 3 --output-dir {out}", 2, "--outer-iterations"
    ),
    "condense by DSA at another rate": Call(
        "condense {here}/pictures --method dsa --learning-rate 0.5 --output-dir {out}", 2, "--learning-rate"
    ),
    "kvzip with two budgets": Call(
        f"{KVZIP} --context {{here}}/context.txt --question why --keep-ratio 0.3 --max-kv-tokens 80", 2, "--keep-ratio"
    ),
    "kvzip with a replay that no score needs": Call(
        f"{KVZIP} --context {{here}}/context.txt --question why --score snapkv --replay exact", 2, "--replay"
    ),
    "kvzip with an empty question": Call(f"{KVZIP} --context {{here}}/context.txt --question ''", 2, "--question"),
    "kvzip a revision of a folder": Call(
        f"{KVZIP} --context {{here}}/context.txt --question why --revision main", 2, "--revision"
    ),
    "ccm with an empty turn": Call(f"{CCM} --turn ''", 2, "--turn"),
    "info of a revision of a folder": Call("info {here}/cache --revision main", 2, "--revision"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data sets in every container, texts."""
    folder = tmp_path_factory.mktemp("here")
    rows = make(n=120).dataset()
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=rows.select(range(80)), held=rows).save_to_disk(folder / "dict")
    renamed = rows.rename_columns({"features": "f", "probs": "p"}).add_column("real", [k / 7 for k in range(120)])
    renamed.to_parquet(folder / "rows.parquet")
    renamed.to_json(folder / "rows.jsonl")
    (folder / "folder").mkdir()
    renamed.to_parquet(folder / "folder" / "train.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    texts = {"text": [f"text {k}" for k in range(40)], "label": ["bad", "good"] * 20}
    datasets.Dataset.from_dict(texts).to_csv(folder / "text.csv")
    (folder / "context.txt").write_text(CONTEXT)
    (folder / "questions.txt").write_text("one\n\ntwo\n")
    (folder / "empty.txt").write_text(" \n")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.tex").write_text("x")
    _pictures(folder)
    _models(folder)
    call = [word.format(here=folder) for word in KVZIP.split()]
    call += [
        "--context",
        str(folder / "context.txt"),
        "--question",
        "why",
        "--output-dir",
        str(folder / "cache"),
        "--quiet",
    ]
    assert main(call) == 0
    return folder


def _pictures(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, sizes in (("pictures", (16, 16)), ("sizes", (16, 20))):
        for kind, size in zip(("cat", "dog"), sizes, strict=True):
            (folder / name / kind).mkdir(parents=True)
            for index in range(6):
                pixels = rng.integers(0, 255, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / name / kind / f"{index}.png")
    photos = datasets.load_dataset(str(folder / "pictures"), split="train", cache_dir=str(folder / "cached"))
    photos.rename_columns({"image": "photo", "label": "kind"}).to_parquet(folder / "photos.parquet")


def _models(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    bert = tf.BertConfig(vocab_size=len(tokenizer), **small)
    torch.manual_seed(0)
    tf.BertForSequenceClassification(bert).save_pretrained(folder / "bert")
    resnet = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    tf.ResNetForImageClassification(resnet).save_pretrained(folder / "resnet")
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "resnet")
    tiny_model("llama", max_position_embeddings=4096).save_pretrained(folder / "llama")
    adapted(memory="merge", sink=True).save_pretrained(folder / "adapter")
    for name in ("bert", "llama"):
        tokenizer.save_pretrained(folder / name)


class _Pipe:
    """Standard input with bytes in it."""

    def __init__(self, text: bytes) -> None:
        self.buffer = io.BytesIO(text)


@pytest.mark.parametrize("name", CALLS)
def test_situation(
    name: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call, worked = CALLS[name], []
    out = tmp_path / "out"
    words = [word.strip("'").format(here=here, out=out) for word in call.line.replace("'a b'", "a\x00b").split()]
    words = [word.replace("\x00", " ") for word in words]
    if call.stdin:
        file = here / call.stdin
        monkeypatch.setattr(sys, "stdin", _Pipe(file.read_bytes() if file.is_file() else call.stdin.encode()))
    if call.code == 2:  # refused: no model is loaded, no pass begins
        for owner, method in ((tf.PreTrainedModel, "from_pretrained"), (datasets.Dataset, "map")):
            monkeypatch.setattr(owner, method, lambda *_, method=method, **__: worked.append(method))
        monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: worked.append("forward"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == call.code, captured.err
    assert not worked, worked
    assert call.says in (captured.err if call.code else captured.out), captured
    lines = captured.err.splitlines()
    if call.code == 1 or (call.code == 2 and not captured.err.startswith("usage:")):
        assert len(lines) == 1 and lines[0].startswith(f"hf-dataopt {words[0]}: "), captured.err
        assert not out.exists() and "Traceback" not in captured.err
    assert not any(mark in captured.err for mark in ("\r", "it/s", "%|")), captured.err


def test_there_are_enough_of_them() -> None:
    assert len(CALLS) >= 40
    for command in ("clean", "condense", "mix", "kvzip", "ccm", "info"):
        codes = {call.code for call in CALLS.values() if call.line.split()[0] == command}
        assert {0, 2} <= codes, command


def test_a_file_gets_lines_and_no_bars(here: Path, tmp_path: Path) -> None:
    """In a process of its own, where the libraries are imported while the command runs."""
    call = [sys.executable, "-m", "hf_dataopt.cli", *CALLS["clean a table with a model"].line.split()]
    words = [word.format(here=here, out=tmp_path / "out") for word in call]
    with (tmp_path / "log").open("w") as log:
        assert subprocess.run(words, stdout=log, stderr=log).returncode == 0
    text = (tmp_path / "log").read_text()
    assert "features of 40 rows" in text and "40 rows:" in text
    assert not any(mark in text for mark in ("\r", "it/s", "%|", "examples/s")), text


def test_quiet_says_nothing_but_the_result(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["clean", str(here / "saved"), "--output-dir", str(tmp_path / "out"), "--json"]
    assert main([*call, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and json.loads(captured.out)["rows"] == 120
    assert main(call) == 0
    captured = capsys.readouterr()
    assert captured.err and json.loads(captured.out)["rows"] == 120  # the estimate, as a line of the log
