"""The same rows from every container, slices of all of them, and standard input read once."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import datasets
import pytest

from hf_dataopt.shell.data import check_columns, read_dataset, read_lines, read_text

ROWS = datasets.Dataset.from_dict({"text": [f"row {k}" for k in range(20)], "label": list(range(20))})


class Pipe:
    """Standard input with bytes in it."""

    def __init__(self, text: bytes) -> None:
        self.buffer = io.BytesIO(text)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Name of the rows in every container; `-` is a pipe of lines of JSON."""
    ROWS.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=ROWS).save_to_disk(tmp_path / "dict")
    ROWS.to_csv(tmp_path / "rows.csv")
    ROWS.to_csv(tmp_path / "rows.tsv", sep="\t")
    ROWS.to_json(tmp_path / "rows.jsonl")
    ROWS.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    ROWS.to_parquet(tmp_path / "folder" / "train.parquet")
    monkeypatch.setattr(sys, "stdin", Pipe((tmp_path / "rows.jsonl").read_bytes()))
    names = ("saved", "dict", "rows.csv", "rows.tsv", "rows.jsonl", "rows.parquet", "folder")
    return {name: str(tmp_path / name) for name in names} | {"-": "-"}


PLACES = ["saved", "dict", "rows.csv", "rows.tsv", "rows.jsonl", "rows.parquet", "folder", "-"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("split", "labels"),
    [(None, range(20)), ("train[:3]", range(3)), ("train[50%:]", range(10, 20)), ("train[-2:]", range(18, 20))],
)
def test_slices(place: str, split: str | None, labels: range, places: dict[str, str]) -> None:
    found = read_dataset(places[place], split)
    assert found["label"][:] == list(labels) and found["text"][0] == f"row {labels[0]}"


@pytest.mark.parametrize("place", PLACES)
def test_splits_that_are_not_there(place: str, places: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="--split"):
        read_dataset(places[place], "test")


def test_splits_are_added(tmp_path: Path) -> None:
    datasets.DatasetDict(a=ROWS, b=ROWS.select([7])).save_to_disk(tmp_path / "two")
    assert read_dataset(str(tmp_path / "two"), "a[:1]+b")["label"][:] == [0, 7]
    assert read_dataset(str(tmp_path / "two"), "b")["label"][:] == [7]


def test_standard_input_is_csv_or_lines_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Pipe(b"text,label\na,1\nb,2\n"))
    assert read_dataset("-")["label"][:] == [1, 2]
    monkeypatch.setattr(sys, "stdin", Pipe(b'{"label": 1\n'))
    with pytest.raises(ValueError, match="lines of JSON"):
        read_dataset("-")


def test_columns_are_named_by_their_option() -> None:
    check_columns(ROWS, label_column="label", column=None)
    with pytest.raises(
        ValueError, match="^--label-column kind: there is no such column; the data set has text, label$"
    ):
        check_columns(ROWS, column="text", label_column="kind")


def test_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("ü\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\x80")
    assert read_text("--context", str(tmp_path / "a.txt")) == "ü\n"
    for name in ("b.txt", "c.txt", "."):
        with pytest.raises(ValueError, match="^--context: cannot read "):
            read_text("--context", str(tmp_path / name))
    monkeypatch.setattr(sys, "stdin", Pipe("one\n\n ü \n".encode()))
    assert read_lines("--turn", ["zero", "-", "last"]) == ["zero", "one", " ü ", "last"]
    with pytest.raises(ValueError, match="nothing came"):
        read_lines("--turn", ["-"])
    with pytest.raises(ValueError, match="twice"):
        read_lines("--turn", ["-", "-"])
