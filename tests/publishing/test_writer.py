"""What a save may replace, what it lists, and what is pushed of it."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value

from hf_dataopt import RelationCleaner, RelationReport
from hf_dataopt.cli import main
from hf_dataopt.condensation.saved import load_condensed, save_condensed
from hf_dataopt.kvzip.head_scores import load_head_scores, save_head_scores
from hf_dataopt.publishing import artifacts, dataset_files
from hf_dataopt.publishing.dataset_files import read_parquet, write_parquet
from hf_dataopt.publishing.record import read_about
from hf_dataopt.publishing.safe_files import read_card
from hf_dataopt.publishing.writer import _exchange, check_target, finish, replacing

from ..hub.damage import without_list
from ..relation.data import make
from .made import condensed


def save(folder: Path, value: float = 1.0) -> Path:
    return save_head_scores(torch.full((2, 3), value), folder, model_id="a/model")


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no save of hf_dataopt has put there \('notes.txt'\)"):
        save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    folder = save(tmp_path / "scores")
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / "more" / "deep" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"more/deep/mine\.txt"):
        save(folder, 2.0)
    assert load_head_scores(folder)[0][0, 0] == 1


@pytest.mark.parametrize("how", ["file", "working folder", "above it", "no place"])
def test_targets_that_cannot_be_replaced(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "a" / "b")
    places = {"file": tmp_path / "file", "working folder": Path(), "above it": tmp_path / "a"}
    with pytest.raises(ValueError, match="name a"):
        check_target(places.get(how, tmp_path / "file" / "below"), "head_scores")


@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_is_one_whatever_a_library_makes_of_it(
    swallowed: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, before = save(tmp_path / "scores"), signal.default_int_handler
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, before)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt), replacing(folder, "head_scores") as draft:
        assert draft.is_dir()
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if not swallowed:
                raise ValueError("could not determine the shape") from None
    assert signal.getsignal(signal.SIGINT) is before and load_head_scores(folder)[0][0, 0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    with pytest.raises(ValueError, match="its own"), replacing(folder, "head_scores"):
        raise ValueError("its own")
    assert signal.getsignal(signal.SIGINT) is before


def test_long_work_does_not_begin_for_a_folder_that_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    (tmp_path / "context.txt").write_text("text")
    taken, never = str(tmp_path / "taken"), "me/model-that-is-never-loaded"
    (tmp_path / "run" / "artifact").mkdir(parents=True)
    (tmp_path / "run" / "artifact" / "thesis.tex").write_text("x")
    for call in (
        [
            "kvzip",
            "--context",
            str(tmp_path / "context.txt"),
            "--question",
            "?",
            "--model",
            never,
            "--output-dir",
            taken,
        ],
        ["ccm", "--turn", "a", "--question", "?", "--model", never, "--output-dir", taken],
        ["clean", never, "--output-dir", taken],
        ["condense", never, "--output-dir", str(tmp_path / "run")],
    ):
        assert main(call) == 2
        assert "thesis.tex" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        RelationCleaner().fit(make(n=60).dataset(), output_dir=taken, quiet=True)


def test_artifacts_of_the_first_releases_are_read_and_replaced(tmp_path: Path) -> None:
    folder = without_list(save(tmp_path / "scores"))
    assert load_head_scores(folder)[0][0, 0] == 1
    assert load_head_scores(save(folder, 2.0))[0][0, 0] == 2
    report = RelationCleaner().fit(make(n=60).dataset(), quiet=True)
    report.save(tmp_path / "report")
    (tmp_path / "report" / "hf_dataopt.json").unlink()
    assert len(RelationReport.load(tmp_path / "report")) == 60
    report.save(tmp_path / "report")
    assert (tmp_path / "report" / "hf_dataopt.json").is_file()


def test_a_smaller_save_leaves_no_shard_of_a_larger_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_files, "_SHARD_BYTES", 4000)
    folder = save_condensed(condensed(20), tmp_path / "set")
    many = sorted((folder / "data").iterdir())
    stranger = many[0].read_bytes()
    assert len(many) > 1
    save_condensed(condensed(2), folder)
    assert len(load_condensed(folder)) == 4 and len(list((folder / "data").iterdir())) == 1
    (folder / "data" / "train-00007-of-00009.parquet").write_bytes(stranger)  # somebody copies one back
    assert len(load_condensed(folder)) == 4
    about = read_about(folder)
    assert not any("00007" in name for name in artifacts._contents(folder, about))
    with pytest.raises(ValueError, match="00007"):
        save_condensed(condensed(2), folder)


def test_what_is_listed_is_there_and_what_is_not_is_not_pushed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path / "scores")
    assert set(read_about(folder)["files"]) == {"head_scores.safetensors"}
    (folder / ".env").write_text("TOKEN=secret")
    contents = artifacts._contents(folder, read_about(folder))
    assert set(contents) == {"hf_dataopt.json", "README.md", "head_scores.safetensors"}
    assert ".env" in caplog.text and "secret" not in caplog.text
    (folder / "README.md").write_text("# a card that was edited\n")
    assert load_head_scores(folder)[0].shape == (2, 3)


def test_a_report_goes_along_with_its_cleaned_set_and_may_change(tmp_path: Path) -> None:
    make(n=120).dataset().save_to_disk(tmp_path / "rows")
    out = tmp_path / "out"
    call = ["clean", str(tmp_path / "rows"), "--rows", "1", "--output-dir", str(out)]
    assert main(call) == 0 and main(call) == 0  # again, over itself
    assert not any(name.startswith("report/") for name in read_about(out)["files"])
    RelationReport.load(out / "report").rethreshold(noise_rate=0.5).save(out / "report")
    contents = artifacts._contents(out, read_about(out))
    assert {"report/report.json", "report/hf_dataopt.json", "report.html"} <= set(contents)
    with pytest.raises(ValueError, match="not pushed alone"):
        artifacts.push_folder(out / "report", "me/report")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".") or "unfinished" in path.name] == []


def test_the_mode_of_a_folder_stays_and_links_are_followed(tmp_path: Path) -> None:
    folder = save(tmp_path / "scores")
    folder.chmod(0o750)
    (tmp_path / "link").symlink_to(folder)
    save(tmp_path / "link", 2.0)
    assert folder.stat().st_mode & 0o777 == 0o750 and (tmp_path / "link").is_symlink()
    assert load_head_scores(folder)[0][0, 0] == 2
    umask = os.umask(0)
    os.umask(umask)
    assert save(tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_card_of_very_many_classes_is_written_and_read(tmp_path: Path) -> None:
    """Those of ImageNet, twice over: two label columns share one list of names."""
    names = [f"n{number:08d} a class with a name of ordinary length, or two" for number in range(21_841)]
    features = Features({"label": ClassLabel(names=names), "coarse": ClassLabel(names=names), "x": Value("float32")})
    dataset = Dataset.from_dict({"label": [0, 21_840], "coarse": [1, 2], "x": [0.0, 1.0]}, features=features)
    with replacing(tmp_path / "set", "cleaned_dataset") as draft:
        metadata = write_parquet(dataset, draft)
        shown = dict.fromkeys(("name", "source", "split", "dropped", "rows", "settings", "model"), "x")
        finish(
            draft,
            "cleaned_dataset",
            about={},
            metadata=metadata,
            code={"split": "train"},
            facts=[("a", "b")],
            rule="r",
            **shown,
        )
    folder, _ = artifacts.fetch(tmp_path / "set", "cleaned_dataset")
    assert read_parquet(folder).features["label"].names[-1] == names[-1]
    assert read_card(folder / "README.md")[0]["dataset_info"]["features"][1]["name"] == "coarse"


def test_a_card_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    save(tmp_path / "scores")
    with pytest.raises(ValueError, match="one value has"):
        save_head_scores(torch.zeros(2, 3), tmp_path / "scores", model_id="a/model", license="x" * 600_000)
    assert load_head_scores(tmp_path / "scores")[0][0, 0] == 1


def test_records_of_a_later_release(tmp_path: Path) -> None:
    """More entries are no obstacle, a higher format is one."""
    folder = save(tmp_path / "scores")
    about = json.loads((folder / "hf_dataopt.json").read_text())
    (folder / "hf_dataopt.json").write_text(json.dumps({**about, "colour": "blue"}))
    assert load_head_scores(folder)[1] == "a/model"
    (folder / "hf_dataopt.json").write_text(json.dumps({**about, "format_version": 2}))
    with pytest.raises(ValueError, match="format 2, this version reads 1; update hf_dataopt"):
        load_head_scores(folder)


def test_metadata_is_written_without_aliases() -> None:
    from hf_dataopt.publishing.cards import with_metadata

    shared = ["a", "b"]
    text = with_metadata("# x\n", {"one": shared, "two": shared})
    assert (
        "&" not in text and "*" not in text and yaml.safe_load(text.split("---")[1]) == {"one": shared, "two": shared}
    )


def test_shards_are_as_many_as_their_bytes_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is chosen of a table, not of the table behind it; one for no bytes at all."""
    rows = Dataset.from_dict({"x": list(range(100))})
    assert rows.data.nbytes == 800
    half = rows.select(range(0, 100, 2))
    for dataset, most, shards in (
        (rows, 300, 3),
        (rows, 400, 2),
        (rows, 399, 3),
        (rows, 800, 1),
        (half, 300, 2),
        (half, 400, 1),
    ):
        monkeypatch.setattr(dataset_files, "_SHARD_BYTES", most)
        folder = tmp_path / f"{len(dataset)}-{most}"
        about = write_parquet(dataset, folder, "train")
        names = sorted(path.name for path in (folder / "data").iterdir())
        assert names == [f"train-{i:05d}-of-{shards:05d}.parquet" for i in range(shards)]
        assert about["dataset_info"]["splits"][0]["num_examples"] == len(dataset)
    nothing = Dataset.from_dict({"x": [None, None]})
    write_parquet(nothing, tmp_path / "nothing", "a.b_c1")
    assert [path.name for path in (tmp_path / "nothing" / "data").iterdir()] == ["a.b_c1-00000-of-00001.parquet"]
    for split in ("", "__", "a-b", "a b", "é"):
        with pytest.raises(ValueError, match="no name of a split"):
            write_parquet(nothing, tmp_path / "bad", split)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="one rename for two folders is Linux's")
def test_two_folders_change_places_in_one_step(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    assert not _exchange(one, two)
    two.mkdir()
    (one / "a").touch()
    assert _exchange(one, two)
    assert not (one / "a").exists() and (two / "a").exists()


def test_a_record_names_its_format(tmp_path: Path) -> None:
    about = read_about(save(tmp_path / "x"))
    assert (about["format_version"], about["format_minor"]) == (1, 0)
    text = (tmp_path / "x" / "hf_dataopt.json").read_text()
    assert text == json.dumps(about, indent=2) + "\n"
