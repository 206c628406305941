"""`hf-dataopt kvzip` and its part of the demo, on a tiny model saved in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dataopt import KVzipCache, KVzipGates
from hf_dataopt.cli import main
from hf_dataopt.kvzip.command import _claims
from hf_dataopt.kvzip.gate_fit import GateConfig
from hf_dataopt.text.demo_model import load_demo_model

from ..models import byte_tokenizer, tiny_model
from .conftest import CONTEXT

QUESTIONS = ["What colour is the key of room 12?", "Who has the key of room 3?"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    # byte tokens: the demo's text is longer than the 1,024 positions the other tests need; with this seed the answers
    # differ from question to question and from full to compressed cache
    tiny_model("llama", seed=2, max_position_embeddings=32_768).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


CHUNKS = ["--chunk-size", "32"]


@pytest.fixture
def call(model_folder: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "context.txt"
    text.write_text(CONTEXT, encoding="utf-8")
    asked = [word for question in QUESTIONS for word in ("--question", question)]
    fixed = ["--device", "cpu", "--max-new-tokens", "6", *CHUNKS]
    return ["kvzip", "--model", str(model_folder), "--context", str(text), *asked, *fixed]


@pytest.fixture
def gated(call: list[str]) -> list[str]:
    """A call without what gates have no use for."""
    return call[: -len(CHUNKS)]


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_result_reports_sizes_and_one_answer_per_question(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of([*call, "--keep-ratio", "0.3"], capsys)
    assert result["context_tokens"] == len(CONTEXT)
    # 3 layers, 2 heads of 8 float32 values, keys and values
    pair = 3 * 2 * 2 * 8 * 4
    assert result["full_bytes"] == pair * (result["prefix_tokens"] + len(CONTEXT))
    kept = result["prefix_tokens"] * 6 + int(0.3 * 6 * len(CONTEXT))
    assert result["compressed_bytes"] == pair // 6 * kept
    assert [row["question"] for row in result["answers"]] == QUESTIONS
    assert all("answer_full" not in row for row in result["answers"])


def test_payback_is_measured_on_the_context(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "payback" not in json_of(call, capsys)
    found = json_of([*call, "--payback"], capsys)["payback"]
    assert found["tokens"] == 6 and "of 6 tokens" in found["line"]
    assert found["questions"] is None or found["questions"] >= 0
    assert main([*call, "--payback"]) == 0
    assert "of a prefill" in capsys.readouterr().out


def test_nothing_evicted_answers_as_the_full_cache(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of([*call, "--keep-ratio", "1.0", "--compare-full"], capsys)
    assert result["compressed_bytes"] == result["full_bytes"]
    for row in result["answers"]:
        assert row["answer"] == row["answer_full"]
    assert result["answers"][0]["answer"] != result["answers"][1]["answer"]


def test_the_template_is_told(call: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = ["--system", "Be brief.", "--template-kwargs", '{"enable_thinking": false}', "--compare-full"]
    result = json_of([*call, *told, "--keep-ratio", "1.0", "--output-dir", str(tmp_path / "cache")], capsys)
    assert result["prefix_tokens"] == json_of(call, capsys)["prefix_tokens"] + len("[system]Be brief.") + 1
    assert [row["answer"] for row in result["answers"]] == [row["answer_full"] for row in result["answers"]]
    kept = json.loads((tmp_path / "cache" / "hf_dataopt.json").read_text())["config"]
    assert kept["system"] == "Be brief." and kept["template_kwargs"] == {"enable_thinking": False}
    for text, words in (("{", "no JSON"), ("[1]", "JSON object"), ('{"tokenize": true}', "cannot set tokenize")):
        assert main([*call, "--template-kwargs", text]) != 0
        assert words in capsys.readouterr().err


def test_the_full_answers_are_those_of_plain_generate(
    call: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_dataopt.kvzip.config import KVzipConfig
    from hf_dataopt.kvzip.prompt import build_prompt, question_ids

    result = json_of([*call, "--keep-ratio", "0.1", "--compare-full"], capsys)
    model, tokenizer = load_demo_model(str(model_folder))
    prompt = build_prompt(tokenizer, CONTEXT, KVzipConfig())
    for row in result["answers"]:
        ids = torch.cat([prompt.ids, question_ids(tokenizer, prompt.suffix_ids, row["question"])])[None]
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert row["answer_full"] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert row["answer"] != row["answer_full"]


def test_a_token_budget_bounds_the_bytes(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of([*call, "--max-kv-tokens", "150", "--replay", "local"], capsys)
    pair = 3 * 2 * 2 * 8 * 4
    assert result["compressed_bytes"] <= pair * 150 < result["full_bytes"]


def test_tables_show_the_questions(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*call, "--compare-full"]) == 0
    shown = capsys.readouterr().out
    assert "compressed cache" in shown and "full cache" in shown
    assert "room 12" in " ".join(shown.split())


@pytest.fixture(scope="module")
def gates_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = load_demo_model(str(model_folder))
    config = GateConfig(steps=60, hidden=8, tokens_per_step=128)
    gates = KVzipGates.fit(model, tokenizer, [CONTEXT, CONTEXT[::-1]], config, progress=False)
    return gates.save_pretrained(tmp_path_factory.mktemp("gates") / "gates")


def test_gates_rank_while_the_context_is_read(
    call: list[str], gated: list[str], model_folder: Path, gates_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_demo_model(str(model_folder))
    gates = KVzipGates.from_pretrained(gates_folder)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=0.3, gates=gates, progress=False)
    expected = []
    for question in QUESTIONS:
        inputs = cache.inputs(question)
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    by_gates = json_of([*gated, "--gates", str(gates_folder), "--payback"], capsys)
    assert [row["answer"] for row in by_gates["answers"]] == expected
    assert expected != [row["answer"] for row in json_of(call, capsys)["answers"]]  # what the repetition keeps
    assert by_gates["compressed_bytes"] == cache.nbytes and "of a prefill" in by_gates["payback"]["line"]
    # beside the full cache, which is then read as a whole
    both = json_of([*gated, "--gates", str(gates_folder), "--compare-full"], capsys)
    assert [row["answer"] for row in both["answers"]] == expected
    assert any(row["answer"] != row["answer_full"] for row in both["answers"])


def test_gates_are_there_before_a_model_is_loaded(
    gated: list[str], gates_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gated[gated.index("--model") + 1] = str(tmp_path / "no-model")
    for gates, extra, message in (
        (tmp_path, [], "hf_dataopt.json"),
        (gates_folder, ["--score", "kvgrad"], "--score and --gates are two ways"),
        (gates_folder, CHUNKS, "--chunk-size is for scores that repeat the context"),
    ):
        assert main([*gated, "--gates", str(gates), *extra]) == 2
        assert message in capsys.readouterr().err


def test_gates_of_another_model_are_refused(
    gated: list[str], gates_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama", seed=5, max_position_embeddings=32_768).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    gated[gated.index("--model") + 1] = str(tmp_path / "other")
    assert main([*gated, "--gates", str(gates_folder)]) != 0
    assert "these gates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--keep-ratio", "1.5"], "--keep-ratio must be in (0, 1]"),
        (["--chunk-size", "0"], "--chunk-size must be at least 1"),
        (["--max-kv-tokens", "0"], "--max-kv-tokens must be at least 1"),
    ],
)
def test_bad_settings_fail_with_their_reason(
    call: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*call, *extra]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_context_is_refused(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(call[call.index("--context") + 1]).write_text("")
    assert main(call) == 2
    assert "no text" in capsys.readouterr().err


def test_a_binary_context_is_refused(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(call[call.index("--context") + 1]).write_bytes(b"\xff\xfe\x00\x80")
    assert main(call) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_demo_section_runs_on_any_model(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--section", "kvzip", "--smoke", "--model", str(model_folder)]
    result = json_of([*arguments, "--output-dir", str(tmp_path / "out")], capsys)["kvzip"]
    assert 0 < result["compressed_bytes"] < 0.6 * result["full_bytes"]
    assert result["answers"] and all({"answer", "answer_full"} <= row.keys() for row in result["answers"])
    size, right, seconds = result["claims"]
    assert size["ours"] == f"{result['compressed_bytes'] / 2**20:.1f} MiB" and "full" in size["baseline"]
    assert right["baseline"] == "full 0; as small, at random 0" and right["ours"] == "0"  # random weights know nothing
    assert float(seconds["ours"]) >= float(seconds["baseline"].split()[-1])


def test_a_right_answer_has_the_expected_word() -> None:
    answers = ["It is number 36.", "Number 1936", "36"]
    rows = [{"expected": "36", "answer": text, "answer_full": "NUMBER 36", "answer_random": "3 6"} for text in answers]
    sizes = {
        "full_bytes": 2**21,
        "compressed_bytes": 2**20,
        "context_tokens": 9,
        "prefix_tokens": 4,
        "prefill_seconds": 1,
        "compress_seconds": 1,
    }
    _, right, seconds = _claims({**sizes, "answers": rows})
    assert right == {"claim": "right answers to 3 questions", "baseline": "full 3; as small, at random 0", "ours": "2"}
    assert seconds["ours"] == "2.0"
