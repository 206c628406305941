"""Matching losses in trackers: names of accelerate, and trackers that the user has already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from datasets import Dataset

from hf_dataopt.cli import main
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.tracking import check_trackers

from .test_loop import SMALL


class Notes(tracking.GeneralTracker):
    """Writes down what it is told."""

    name = "notes"
    requires_logging_directory = True
    made: list[Notes] = []

    def __init__(self, run_name: str = "", logging_dir: str = "", **_: Any) -> None:
        super().__init__()
        self.told: list[Any] = [("made", run_name, logging_dir)]
        Notes.made.append(self)

    @property
    def tracker(self) -> list[Any]:
        return self.told

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("settings", values))

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append(("finish",))


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Notes` as a tracker that is installed."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["notes"])
    monkeypatch.setattr(Notes, "made", [])


def losses_of(notes: Notes) -> list[Any]:
    return [one for one in notes.told if isinstance(one[0], int)]


@pytest.mark.usefixtures("by_name")
def test_losses_and_settings_go_to_trackers_and_to_the_callback(train: Dataset, tmp_path: Path) -> None:
    own, heard = Notes(), []
    condenser = DatasetCondenser(replace(SMALL, outer_iterations=2))
    condenser.condense(train, output_dir=tmp_path, report_to=["notes", own], callback=lambda *told: heard.append(told))
    assert heard == list(enumerate(condenser.losses)) and len(heard) == 2
    _, named = Notes.made
    assert named.told[0] == ("made", "condensation", str(tmp_path / "logs"))
    expected = [(outer, {"matching_loss": loss}) for outer, loss in heard]
    assert losses_of(named) == losses_of(own) == expected
    settings = named.told[1][1]
    assert settings["method"] == "idc" and settings["outer_iterations"] == 2
    assert all(isinstance(value, int | float | str) for value in settings.values())
    assert named.told[-1] == ("finish",) and ("finish",) not in own.told  # the user's own goes on

    more = DatasetCondenser(replace(SMALL, outer_iterations=3))
    more.condense(train, output_dir=tmp_path, report_to="notes")  # continues: only what is new is told
    assert losses_of(Notes.made[-1]) == [(2, {"matching_loss": more.losses[2]})]


@pytest.mark.usefixtures("by_name")
def test_trackers_end_with_a_run_that_fails(train: Dataset, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        DatasetCondenser(SMALL).condense(train, output_dir=tmp_path, report_to="notes", callback=fail)
    assert Notes.made[-1].told[-1] == ("finish",)


@pytest.mark.usefixtures("by_name")
def test_what_cannot_be_told_is_refused_before_the_data_is_read(train: Dataset) -> None:
    for wrong, error, says in (
        ("nots", ValueError, "accelerate has.*notes"),
        ("wandb", ValueError, "wandb is not installed here .notes is"),
        ("notes", ValueError, "notes writes files; give output_dir"),
        ([3], TypeError, "got int"),
    ):
        condenser = DatasetCondenser(SMALL)
        with pytest.raises(error, match=says):
            condenser.condense(train, report_to=wrong)
        assert condenser._data is None
    assert check_trackers(None, None) == []


@pytest.mark.usefixtures("by_name")
def test_the_command_line(train: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.parquet"
    train.to_parquet(data)
    call = ["condense", str(data), "--output-dir", str(tmp_path / "out"), "--images-per-class", "1", "--width", "4"]
    few = ["--outer-iterations", "1", "--inner-iterations", "1", "--network-images", "8", "--quiet"]
    assert main([*call, *few, "--report-to", "wandb"]) == 2
    assert "--report-to" in capsys.readouterr().err
    assert main([*call, *few, "--report-to", "notes"]) == 0
    assert len(losses_of(Notes.made[-1])) == 1
    assert main([*call, "--method", "random", "--quiet", "--report-to", "notes"]) == 2
    assert "--report-to has no effect with --method random" in capsys.readouterr().err
