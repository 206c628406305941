"""`hf-dataopt clean` from the shell: cleaned set, page, picture, card, scores; cards and pages escape and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf
from datasets import Dataset, Features, Image

from hf_dataopt.cli import main
from hf_dataopt.publishing import cards
from hf_dataopt.publishing.dataset_files import read_parquet
from hf_dataopt.relation import pages
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
    assert 'href="report-dropped-1.html"' in page and "probability that the label is wrong" in page
    dropped = (out / "report-dropped-1.html").read_text()
    assert dropped.count("label error, ") == result["label_errors"] == dropped.count("data:image/png;base64,")
    assert (out / "worst.png").stat().st_size > 5_000
    card = (out / "README.md").read_text()
    assert (
        card.startswith("---\n") and "\n- hf-dataopt\n" in card and "license" not in card and str(tmp_path) not in card
    )


def test_pictures_that_were_encoded_again_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their features lie as far apart as any."""
    data, pictures = _with_pictures().remove_columns("image"), []
    for k in range(120):
        rough = np.random.default_rng(k % 100).integers(0, 255, (6, 6, 3), np.uint8)
        PIL.Image.fromarray(rough).resize((40, 40)).save(tmp_path / f"{k}.jpg", quality=95 if k < 100 else 80)
        pictures.append(str(tmp_path / f"{k}.jpg"))
    data = Dataset.from_dict({**data.to_dict(), "photo": pictures}, Features({**data.features, "photo": Image()}))
    data.save_to_disk(tmp_path / "d")
    options = ["--noise-rate", "0", "--drop-near-duplicates", "--output-dir", str(tmp_path / "out"), "--json"]
    assert main(["clean", str(tmp_path / "d"), *options]) == 0
    group = RelationReport.load(tmp_path / "out" / "report").group
    assert (group[100:] == group[:20]).all()  # one pair is close by features too
    assert json.loads(capsys.readouterr().out)["kept"] == len(np.unique(group)) < 101
    assert read_parquet(tmp_path / "out").column_names == data.column_names


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


def test_the_picture_says_what_it_shows() -> None:
    pytest.importorskip("matplotlib")
    data = _with_pictures()
    report = RelationCleaner().fit(data, quiet=True)
    figure = draw_worst(report, data, count=2, evidence=3)
    worst = int(report.worst(1)[0])
    assert "contradict" in figure.get_suptitle() and figure.axes[0].get_title() == report.name_of(report.labels[worst])


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


def test_every_dropped_row_is_on_a_page_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGE", 7)
    features = CASE.features.tolist()
    features[3] = [float("nan")] * len(features[0])
    columns = {
        "label": CASE.labels,
        "features": features,
        "probs": CASE.probs.tolist(),
        "n": [f"text {k}" for k in range(120)],
    }
    data = Dataset.from_dict(columns).select([*range(120), *range(100, 110)])
    report = RelationCleaner(outlier_share=0.05).fit(data, on_error="skip", quiet=True)
    gone = report.dropped(outliers=True, near_duplicates=True)
    write_page(report, report.fitted(data), tmp_path / "page.html", count=2, dropped=gone, quiet=True)
    names = [f"page-dropped-{k + 1}.html" for k in range(-(-len(gone) // 7))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "page.html"]) and len(names) > 2
    text = "".join((tmp_path / name).read_text() for name in names)
    shown = [int(row) for row in re.findall(r'<span class="soft">row (\d+)</span>', text)]
    assert shown == report.rows[list(gone)].tolist()
    for kind in ("label error", "outlier", "near duplicate"):
        assert text.count(f'<p class="soft">{kind}') == sum(why.startswith(kind) for why in gone.values()) > 0
    copy, other = next((row, int(why.split()[-1])) for row, why in gone.items() if why.startswith("near"))
    assert report.rows[copy] != copy and f"near duplicate of row {report.rows[other]}, " in text
    error = next(row for row, why in gone.items() if why == "label error")
    assert f"<br>likely <b>{report.name_of(report.other_label[error])}</b>" in text
    assert (tmp_path / names[1]).read_text().count("<b>2</b>") == 1 and f"all {len(gone)} dropped rows" in text
    noise = RelationCleaner(score="label_noise", cut="algorithm4").fit(data.select(range(4, 120)), quiet=True)
    other_page = write_page(noise, data.select(range(4, 120)), tmp_path / "noise.html", quiet=True).read_text()
    assert "noisiness s" in other_page and "the set that Algorithm 4 found" in other_page


def test_a_relation_that_rounds_to_nothing_supports_nothing(tmp_path: Path) -> None:
    report = RelationCleaner(temperature=16).fit(CASE.dataset(), quiet=True)
    page = write_page(report, CASE.dataset(), tmp_path / "p.html", count=120, quiet=True).read_text()
    assert "0.00<" not in page and "+0." in page and "-0." in page
    weak = [row for row in range(120) if len(pages.above_zero(report.evidence(row, 4)).supporting) < 4]
    kept = pages.above_zero(report.evidence(weak[0], 4))
    assert len(kept.supporting_labels) == len(kept.supporting_relations) == len(kept.supporting) < 4
    assert (kept.supporting_relations >= 0.005).all() and (kept.conflicting_relations <= -0.005).all()


def test_a_folder_of_pictures_is_cleaned_with_a_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(12):
            pixels = rng.normal(level if k else 250 - level, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{k}.png")
    config = tf.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.num_labels = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tf.ViTForImageClassification(config).save_pretrained(tmp_path / "m")
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "m")
    arguments = [
        "clean",
        str(tmp_path / "photos"),
        "--model",
        str(tmp_path / "m"),
        "--folds",
        "3",
        "--drop-near-duplicates",
    ]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    report = RelationReport.load(tmp_path / "out" / "report")
    assert len(report) == 24 and report.label_names == ["dark", "light"] and set(report.worst(2)) == {0, 12}
    cleaned = read_parquet(tmp_path / "out")
    assert isinstance(cleaned.features["image"], Image) and len(cleaned) == 24 - len(
        report.dropped(near_duplicates=True)
    )


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_tables_with_columns_are_cleaned_alike(kind: str, tmp_path: Path) -> None:
    data = CASE.dataset()
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        frame = data.with_format(None).to_pandas()
        for name in ("features", "probs"):
            frame[name] = [json.dumps([float(one) for one in row]) for row in frame[name]]
        frame.to_csv(path, index=False)
    else:
        (data.to_parquet if kind == "parquet" else data.to_json)(path)
    assert main(["clean", str(path), "--output-dir", str(tmp_path / "out")]) == 0
    report = RelationReport.load(tmp_path / "out" / "report")
    expected = RelationCleaner().fit(data, quiet=True)
    np.testing.assert_allclose(report.label_noise_score, expected.label_noise_score, atol=1e-5)
    assert read_parquet(tmp_path / "out").column_names == data.column_names


def test_lists_in_a_csv_file_are_numbers_or_name_their_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"[{a:.4f} {b:.4f}]" for a, b in CASE.features[:, :2]]  # as numpy writes them
    texts[5] = "[0.1 ... 0.2]"
    Dataset.from_dict({"label": CASE.labels, "features": texts}).to_csv(tmp_path / "rows.csv")
    arguments = ["clean", str(tmp_path / "rows.csv"), "--folds", "2", "--output-dir", str(tmp_path / "out")]
    assert (
        main(arguments) == 1 and "row 5: features holds '[0.1 ... 0.2]', no list of numbers" in capsys.readouterr().err
    )
    assert main([*arguments, "--on-error", "skip"]) == 0
    report = RelationReport.load(tmp_path / "out" / "report")
    assert report.about["skipped"]["rows"] == [5] and report.reference[0].features.shape == (119, 2)
    np.testing.assert_allclose(report.reference[0].features[0], CASE.features[0, :2], atol=1e-4)


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
