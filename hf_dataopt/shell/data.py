"""What commands read: data sets from everywhere, texts from files, and either from standard input."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..progress import told
from ..publishing.hub import check_hub, hub_errors
from ..publishing.names import looks_like_repo
from .usage import check_revision, check_words, flag

STDIN = "-"
_FILES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_SAVED = ("state.json", "dataset_dict.json")


def read_dataset(
    name: str,
    split: str | None = None,
    config: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Any:
    """A split of a data set, wherever it is.

    Args:
        name: Hub name; folder of `save_to_disk`, of images, of sounds or of files that `load_dataset` reads; a csv, tsv, json,
            jsonl or parquet file; `-` for rows on standard input (csv, or one JSON object a line).
        split: its name or a slice such as `train[:1000]`, default `train`; a file and standard input are `train`.
        config: configuration, for a Hub data set that has several.
        revision, token: of the Hub.

    Returns:
        A `datasets.Dataset`.

    Raises:
        ValueError: nothing there, no such split, or options that such a place does not have.
        HubError: the Hub cannot be reached.
    """
    import datasets

    split = split or "train"
    if name == STDIN:
        return _piped(split, config, revision)
    path = Path(name)
    local = path.exists()
    check_revision(revision, name, local)
    if path.is_dir() and any((path / mark).exists() for mark in _SAVED):
        if config is not None:
            raise ValueError(f"--config {config}: {name} was written by save_to_disk and has no configurations")
        return _part(datasets.load_from_disk(name), split, name)
    if path.is_file():
        return _file(path, split, config)
    if not local and (path.suffix in _FILES or not looks_like_repo(name)):
        raise ValueError(f"DATASET: there is no file or folder {name}, and it is no Hub name")
    check_hub(revision=revision, token=token)
    try:
        if local:
            return datasets.load_dataset(name, config, split=split)
        with hub_errors(f"reading the data set {name}"):
            return datasets.load_dataset(name, config, split=split, revision=revision, token=token)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        where = "folder" if local else "data set"
        hint = "--split: " if "split" in str(error) else "--config: " if "onfig" in str(error) else ""
        raise ValueError(f"{hint}the {where} {name} cannot be read ({told(error)})") from error


def _file(path: Path, split: str, config: str | None) -> Any:
    import datasets

    if path.suffix.lower() not in _FILES:
        raise ValueError(
            f"DATASET: {path} is no {', '.join(_FILES)} file; save the data set with save_to_disk and name the folder"
        )
    if config is not None:
        raise ValueError(f"--config {config}: {path} is a file and has no configurations")
    _only_train(split, str(path))
    kind = _FILES[path.suffix.lower()]
    more = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    try:
        return datasets.load_dataset(kind, data_files={"train": str(path)}, split=split, **more)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        why = error.__cause__ or error
        raise ValueError(f"DATASET: {path} cannot be read as {kind} ({told(why)})") from error


def _only_train(split: str, what: str) -> None:
    if re.split(r"[\[(]", split)[0] != "train":
        raise ValueError(f"--split {split}: {what} has one split, train (a slice of it is 'train[:1000]')")


def _part(found: Any, split: str, name: str) -> Any:
    """A split, or a slice of one, of what `save_to_disk` wrote."""
    import datasets

    several = isinstance(found, datasets.DatasetDict)
    if not several:
        _only_train(split, name)
    sizes = {key: len(found[key]) for key in found} if several else {"train": len(found)}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"--split {split}: {name} has the splits {sorted(sizes)} ({told(error)})") from error
    rows = [(found[part.splitname] if several else found, part.from_ or 0, part.to) for part in parts]
    if len(rows) == 1 and rows[0][1] == 0 and rows[0][2] in (None, len(rows[0][0])):
        return rows[0][0]
    return datasets.concatenate_datasets(
        [one.select(range(begin, len(one) if end is None else end)) for one, begin, end in rows]
    )


def _piped(split: str, config: str | None, revision: str | None) -> Any:
    """Rows on standard input, read through a file that is gone afterwards; the rows stay in memory."""
    import datasets

    for option, value in (("--config", config), ("--revision", revision)):
        if value is not None:
            raise ValueError(f"{option} {value}: standard input has none")
    _only_train(split, "standard input")
    text = sys.stdin.buffer.read()
    if not text.strip():
        raise ValueError("DATASET is -, but nothing came on standard input; pipe csv or lines of JSON into it")
    suffix = ".jsonl" if text.lstrip()[:1] in (b"{", b"[") else ".csv"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"stdin{suffix}"
        path.write_bytes(text)
        try:
            return datasets.load_dataset(
                _FILES[suffix], data_files={"train": str(path)}, split=split, keep_in_memory=True, cache_dir=folder
            )
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            kind = "lines of JSON" if suffix == ".jsonl" else "csv"
            raise ValueError(
                f"DATASET: standard input cannot be read as {kind} ({told(error.__cause__ or error)})"
            ) from error


def check_columns(dataset: Any, **columns: str | None) -> None:
    """Make sure that columns are there, before any pass over the rows.

    Args:
        dataset: a `datasets.Dataset`.
        columns: name of a column by option (`label_column="label"`); None is not looked at.

    Raises:
        ValueError: one is not there.
    """
    for option, name in columns.items():
        if name is not None and name not in dataset.column_names:
            there = ", ".join(dataset.column_names)
            raise ValueError(f"{flag(option)} {name}: there is no such column; the data set has {there}")


def read_text(option: str, name: str) -> str:
    """The text of a file, or of standard input where the name is `-`.

    Args:
        option: what named it, for the message.
        name: path or `-`.

    Raises:
        ValueError: no such file, or no UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if name == STDIN else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        where = "standard input" if name == STDIN else name
        raise ValueError(f"{option}: cannot read {where} as UTF-8 text ({told(error)})") from error
    return text


def read_lines(dest: str, given: list[str]) -> list[str]:
    """Texts of an option that may be given several times; `-` stands for the lines of standard input.

    Args:
        dest: name of the option in `args`.
        given: its texts.

    Raises:
        ValueError: `-` twice, nothing on standard input, or a text without a word.
    """
    option = flag(dest)
    if given.count(STDIN) > 1:
        raise ValueError(f"{option} is - twice; standard input is read once")
    texts: list[str] = []
    for text in given:
        lines = [text] if text != STDIN else [line for line in read_text(option, STDIN).splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{option} is -, but nothing came on standard input")
        check_words(dest, text)
        texts += lines
    return texts
