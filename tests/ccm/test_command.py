"""`hf-dataopt ccm` and its part of the demo, on a tiny model saved in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dataopt import CompressedContextMemory
from hf_dataopt.ccm import command
from hf_dataopt.ccm.saved import load_adapter, save_adapter
from hf_dataopt.cli import main

from ..models import byte_tokenizer, tiny_model
from .models import adapted

TURNS = ["my cat is otto. ", "he is grey. "]
SLOT = 2 * 3 * 2 * 8 * 4  # keys and values, layers, KV heads, head dim, bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ccm")
    tiny_model("llama").save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for memory in ("merge", "gist"):
        adapted(memory=memory, sink=True).save_pretrained(folder / memory)
    return folder


def call(folder: Path, *more: str) -> list[str]:
    turns = [word for turn in TURNS for word in ("--turn", turn)]
    return ["ccm", "--model", str(folder / "base"), *turns, "--question", "its name?", "--max-new-tokens", "3", *more]


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_untrained_memory_shows_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of(call(folder, "--num-comp-tokens", "3"), capsys)
    lengths = [len(TURNS[0]), len("".join(TURNS))]  # the tokenizer adds nothing in front of text
    assert [row["tokens_seen"] for row in result["turns"]] == lengths
    assert [row["full_bytes"] for row in result["turns"]] == [n * SLOT for n in lengths]
    assert [row["memory_bytes"] for row in result["turns"]] == [3 * SLOT, 6 * SLOT]
    assert result["one_pass_difference"] < 1e-4 < result["largest_logit"] and not result["trained"]


@pytest.mark.parametrize("memory", ["merge", "gist"])
def test_a_trained_one_answers(folder: Path, memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of(call(folder, "--adapter", str(folder / memory), "--chat"), capsys)
    assert result["trained"] and result["memory"] == memory and isinstance(result["answer"], str)
    assert [row["turn"] for row in result["turns"]] == TURNS and result["question"] == "its name?"
    assert result["turns"][-1]["tokens_seen"] == len(f"B[user]{TURNS[0]}E[assistant]{TURNS[1]}E")
    assert result["turns"][-1]["memory_bytes"] == 3 * SLOT  # two slots and the sink
    assert result["one_pass_difference"] < 1e-4


def test_the_template_is_told(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = str(tmp_path / "kept")
    told = ["--chat", "--system", "Be brief.", "--template-kwargs", '{"enable_thinking": false}', "--output-dir", kept]
    result = json_of(call(folder, *told), capsys)
    assert result["turns"][0]["tokens_seen"] == len(f"B[system]Be brief.E[user]{TURNS[0]}E")
    saved = json.loads(Path(kept, "memory.json").read_text())
    assert saved["system"] == "Be brief." and saved["template_kwargs"] == {"enable_thinking": False}
    assert main(call(folder, "--system", "Be brief.")) != 0 and "--chat" in capsys.readouterr().err


def test_tables_and_demo(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(call(folder, "--adapter", str(folder / "merge"))) == 0
    shown = capsys.readouterr().out
    assert "Memory after each turn (merge)" in shown and "its name?" in shown and "untrained" not in shown
    demo = ["demo", "--section", "ccm", "--smoke", "--model", str(folder / "base"), "--output-dir", str(tmp_path)]
    assert main(demo) == 0
    shown = capsys.readouterr().out
    assert "untrained" in shown and "one parallel forward" in shown
    result = json_of(demo, capsys)["ccm"]
    held, peak, equal = result["claims"]
    assert (
        held["ours"] == f"{result['turns'][-1]['memory_bytes'] / 1024:,.0f} KiB"
        and held["baseline"] == peak["baseline"]
    )
    assert equal["ours"].split("e-")[1] >= "05" and "largest logit" in equal["baseline"]


def test_the_demo_asks_the_packaged_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "facts"
    save_adapter(adapted(sink=True), kept)
    monkeypatch.setattr(command, "_PACKAGED", kept)
    monkeypatch.setattr(
        "hf_dataopt.demo.command.load_language_model",
        lambda name, **_: (tiny_model("llama", num_hidden_layers=3), byte_tokenizer()),
    )
    result = json_of(["demo", "--section", "ccm", "--output-dir", str(tmp_path / "out")], capsys)["ccm"]
    assert result["trained"] and len(result["turns"]) == 8
    rows = result["questions"]
    assert {row["question"]: row["needed"] for row in rows} == command.DEMO_QUESTIONS
    model = load_adapter(tiny_model("llama", num_hidden_layers=3), kept)
    memory = CompressedContextMemory(model, byte_tokenizer())
    for turn in command.DEMO_TURNS:
        memory.append({"role": "user", "content": turn})
    asked = {"role": "user", "content": rows[2]["question"]}
    assert rows[2]["memory"] == str(memory.generate(asked, max_new_tokens=16, do_sample=False)).strip()
    right = result["claims"][0]
    assert right["claim"].startswith("right answers of 8") and right["ours"] == str(
        sum(row["needed"].lower() in row["memory"].lower() for row in rows)
    )
    assert main(["demo", "--section", "ccm", "--smoke", "--output-dir", str(tmp_path / "out")]) == 0
    assert "full context" in capsys.readouterr().out


def test_words_that_the_demo_asks_for_are_told_in_its_turns() -> None:
    told = " ".join(command.DEMO_TURNS)
    assert all(word in told for word in command.DEMO_QUESTIONS.values()) and len(command.DEMO_QUESTIONS) == 8


def test_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(call(folder, "--adapter", str(folder / "nothing"))) == 2
    assert "neither a folder nor a Hub name" in capsys.readouterr().err
    assert main(call(folder, "--num-comp-tokens", "0")) == 2
    assert "at least 1" in capsys.readouterr().err
