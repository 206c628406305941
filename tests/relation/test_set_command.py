"""`hf-dataopt clean` with several labels a row: from columns and by a model, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset

from hf_dataopt.cli import main
from hf_dataopt.publishing.dataset_files import read_parquet
from hf_dataopt.relation.multi_label import MultiLabelReport

from ..models import byte_tokenizer
from .test_multi_label import NAMES, dataset, f1, planted


def cleaned(data: Dataset, folder: Path, capsys: Any, *options: str) -> dict[str, Any]:
    data.to_parquet(folder / "rows.parquet")
    command = ["clean", str(folder / "rows.parquet"), "--label-column", "labels", "--output-dir", str(folder / "out")]
    assert main([*command, *options, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("form", ["hot", "classes", "texts"])
def test_columns_are_cleaned_and_written(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features, probs, given, wrong = planted()
    data = dataset(form, given, features=features, probs=probs)
    data = data.add_column("text", [f"<i>row {k}</i>" for k in range(len(data))])
    names = ["--label-names", *NAMES] if form == "texts" else []
    result = cleaned(data, tmp_path, capsys, *names, "--rows", "5")
    report = MultiLabelReport.load(tmp_path / "out" / "report")
    assert f1(report.is_label_error, wrong) > 0.9
    kept = read_parquet(tmp_path / "out")
    assert kept.column_names == data.column_names
    assert kept["labels"][:] == report.filter(data)["labels"][:] and len(kept) == result["kept"]
    assert result["too_many"] + result["missing"] == report.is_label_error.sum()
    assert result["label_errors"] == 400 - result["kept"] and len(result["noise_rate"]) == 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure") == 7 and "Decisions to look at first" in page and "&lt;i&gt;row" in page
    assert (tmp_path / "out" / "report-dropped-1.html").read_text().count("label error, ") == min(
        100, result["label_errors"]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "labels too many" in card and "of the decisions that are likeliest wrong" in card


def test_the_nearest_rows_alone_and_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features, _, given, _ = planted()
    result = cleaned(dataset("texts", given, features=features), tmp_path, capsys, "--noise-rate", "0.02")
    assert result["too_many"] + result["missing"] == 32 and set(result["noise_rate"]) == set(NAMES)


def test_a_model_of_several_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its sigmoids, in the order of its own names."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = tf.BertConfig(vocab_size=len(tokenizer), id2label=dict(enumerate(NAMES)), **sizes)
    config.problem_type = "multi_label_classification"
    tf.BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    data = dataset("texts", planted(n=60)[2]).add_column("text", [f"a text of {k}" for k in range(60)])
    options = ["--model", str(tmp_path / "m"), "--column", "text", "--modality", "text"]
    result = cleaned(data, tmp_path, capsys, *options)
    assert result["rows"] == 60 and list(result["noise_rate"]) == NAMES
    assert np.isfinite([one["score"] for one in result["worst"]]).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--folds", "4"], "--folds is about one label a row"),
        (["--score", "label_noise"], "--score label_noise is about one label a row"),
        (["--cut", "algorithm4"], "--cut algorithm4 is about"),
        (["--on-error", "skip"], "--on-error skip is about"),
        ([], "give --label-names"),
    ],
)
def test_options_about_one_label_are_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, probs, given, _ = planted(n=20)
    dataset("texts", given, features=features, probs=probs).to_parquet(tmp_path / "d.parquet")
    command = ["clean", str(tmp_path / "d.parquet"), "--label-column", "labels", "--output-dir", str(tmp_path / "o")]
    assert main([*command, *options]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_names_of_labels_are_for_several_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Dataset.from_dict({"label": [0, 1], "features": [[1.0], [2.0]]}).to_parquet(tmp_path / "d.parquet")
    command = ["clean", str(tmp_path / "d.parquet"), "--output-dir", str(tmp_path / "o"), "--label-names", "a", "b"]
    assert main(command) == 2 and "--label-names is about several labels" in capsys.readouterr().err
