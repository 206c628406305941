"""`hf-dataopt clean` from the shell: cleaned set, page, picture, card, scores; cards and pages escape and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from datasets import Dataset, Features, Image

from hf_dataopt.cli import main
from hf_dataopt.publishing import cards
from hf_dataopt.publishing.dataset_files import read_parquet
from hf_dataopt.relation.cleaner import RelationCleaner
from hf_dataopt.relation.demo import claims, clean_digits
from hf_dataopt.relation.pages import draw_worst, write_page
from hf_dataopt.relation.report import RelationReport

from ..models import byte_tokenizer
from .data import make

CASE = make(n=120)


def _with_pictures() -> Dataset:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (12, 10), np.uint8) for _ in range(120)]
    features = Features({**CASE.dataset().features, "image": Image()})
    return Dataset.from_dict({**CASE.dataset().to_dict(), "image": pictures}, features=features)


def test_clean_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _with_pictures().save_to_disk(tmp_path / "d")
    out = tmp_path / "out"
    assert main(["clean", str(tmp_path / "d"), "--output-dir", str(out), "--rows", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    cleaned = read_parquet(out)
    assert len(cleaned) == result["kept"] == 120 - result["label_errors"] and result["label_errors"] > 0
    assert RelationReport.load(out / "report").is_label_error.sum() == result["label_errors"]
    page = (out / "report.html").read_text()
    assert page.count("<article>") == 4 and "data:image/png;base64," in page
    assert (out / "worst.png").stat().st_size > 5_000
    card = (out / "README.md").read_text()
    assert (
        card.startswith("---\n") and "\n- hf-dataopt\n" in card and "license" not in card and str(tmp_path) not in card
    )


def test_clean_reads_a_table_and_a_text_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    config = tf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    config.num_labels = 2
    tf.BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = {"text": [f"<b>text</b> {k} & more" for k in range(40)], "label": ["bad", "good"] * 20}
    Dataset.from_dict(rows).to_csv(tmp_path / "rows.csv")
    arguments = ["clean", str(tmp_path / "rows.csv"), "--model", str(tmp_path / "m"), "--column", "text"]
    arguments += ["--modality", "text", "--noise-rate", "0.1", "--output-dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "labels to look at first" in capsys.readouterr().out.lower()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;text&lt;/b&gt;" in page and "<b>text</b>" not in page
    assert "features" not in read_parquet(tmp_path / "out").column_names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["d"], "--push-to-hub"),
        (["d", "--output-dir", "o", "--split", "test"], "--split"),
        (["notes.txt", "--output-dir", "o"], "save_to_disk"),
        (["d", "--output-dir", "o", "--split", "train", "--label-column", "x"], "--label-column x"),
    ],
)
def test_usage_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from datasets import DatasetDict

    monkeypatch.chdir(tmp_path)
    DatasetDict(train=CASE.dataset()).save_to_disk("d")
    Path("notes.txt").write_text("hello")
    assert main(["clean", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_pages_refuse_what_they_cannot_show(tmp_path: Path) -> None:
    data = CASE.dataset()
    report = RelationCleaner().fit(data, quiet=True)
    with pytest.raises(ValueError, match="no image column"):
        draw_worst(report, data)
    with pytest.raises(ValueError, match="to show"):
        write_page(report, data, tmp_path / "p.html", column="x")
    with pytest.raises(ValueError, match="120"):
        write_page(report, data.select(range(5)), tmp_path / "p.html")
    assert "row 7" in write_page(report, data, tmp_path / "p.html", count=120).read_text()


def test_cards_never_guess() -> None:
    with pytest.raises(ValueError, match="no card template"):
        cards.template("missing")
    with pytest.raises(Exception, match="undefined"):
        cards.render("cleaned_dataset", {})


def test_demo_section_finds_the_flips(tmp_path: Path) -> None:
    result = clean_digits(tmp_path, 0)
    ranking, dropped, accuracy = claims(result)
    assert ranking["baseline"] == f"loss {result['loss_ap']:.3f}" and 0.5 < result["loss_ap"] <= 1
    assert 0 < result["loss_flagged_and_flipped"] <= result["flagged"] and str(result["flagged"]) in dropped["claim"]
    assert accuracy["ours"] == f"on what stays {result['accuracy_cleaned']:.1%}"
    assert result["ap"] > 0.8 and result["flagged_and_flipped"] > 0.8 * result["flagged"] > 10
    assert all(Path(path).stat().st_size > 5_000 for path in result["paths"].values())
