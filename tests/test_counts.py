"""A run of a part of the fault tests renews its own rows of the table, at full size only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import counts


def test_rows_are_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "RESULTS", tmp_path / "faults.json")
    told: list[dict[str, object]] = []
    monkeypatch.setattr(counts, "_TOLD", told)
    monkeypatch.setattr(counts, "FAULTS", counts.FULL - 1)
    counts.tell("kill", "a", {"killed": 1})
    counts.keep(0, 1)
    assert not counts.RESULTS.exists()
    monkeypatch.setattr(counts, "FAULTS", counts.FULL)
    for name, killed in (("b", 2), ("a", 3)):
        counts.keep(0, 1)
        told[:] = []
        counts.tell("kill", name, {"killed": killed})
    counts.keep(1, 1)
    found = json.loads(counts.RESULTS.read_text())
    assert found["rows"] == [{"fault": "kill", "of": "a", "killed": 3}, {"fault": "kill", "of": "b", "killed": 2}]
    assert [run["exit_status"] for run in found["runs"]] == [0, 0, 1]
