"""`hf-dataopt demo` with sections of our own: one that fails does not stop the others, and one table closes it.

What the real sections claim is tested where each of them runs: `tests/<room>/test_command.py` or `test_demo.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_dataopt.cli import main
from hf_dataopt.demo import command as demo

ROWS = [
    {"claim": "bytes [of] it", "baseline": "full 10", "ours": "3"},
    {"claim": "seconds", "baseline": "none 1.5", "ours": "2.5"},
]


def good(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    args.console.print("good at work")
    return {"bytes": 3, "claims": ROWS}


def bad(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    raise TypeError("no such\nkeyword [bold]'cache'")


def interrupted(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    raise KeyboardInterrupt


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the demo with these sections, in this order."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*sections: Any, options: tuple[str, ...] = ()) -> int:
        names = {}
        for number, section in enumerate(sections):
            module = ModuleType(f"section_{number}")
            module.demo = section  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
            names[section.__name__] = module.__name__
        monkeypatch.setattr(demo, "SECTIONS", names)
        return main(["demo", "--output-dir", str(tmp_path / "out"), *options])

    return run


def test_all_good(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(good) == 0
    captured = capsys.readouterr()
    table = captured.out.split("What this run measured")[1]
    for cells in (["method", "claim", "baseline", "ours"], ["good", *ROWS[0].values()], ["", *ROWS[1].values()]):
        assert any(
            [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] == cells for line in table.splitlines()
        )
    assert captured.err == ""


def test_a_failing_section_is_told_and_the_next_one_runs(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(bad, good) == 1
    captured = capsys.readouterr()
    before, table = captured.out.split("What this run measured")
    assert "bad failed: TypeError: no such keyword [bold]'cache'\n" in before and "good at work" in before
    assert "Traceback" not in captured.out + captured.err
    assert "failed: TypeError: no such keyword [bold]'cache'" in " ".join(table.split())
    assert all(row["ours"] in table for row in ROWS)
    assert captured.err == "hf-dataopt demo: failed: bad\n"


def test_debug_shows_the_traceback_and_goes_on(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(bad, good, options=("--debug",)) == 1
    shown = capsys.readouterr().out
    assert "Traceback" in shown and "raise TypeError" in shown and "good at work" in shown


def test_json_carries_claims_and_failures(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(bad, good, options=("--json",)) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["good"]["claims"] == ROWS
    assert result["failed"] == {"bad": "TypeError: no such keyword [bold]'cache'"} and "bad" not in result


def test_one_section_alone(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(bad, good, options=("--section", "good")) == 0
    assert "failed" not in capsys.readouterr().out


def test_a_section_that_cannot_be_imported_has_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "SECTIONS", {"lost": "hf_dataopt.no_such_room"})
    assert main(["demo", "--output-dir", str(tmp_path)]) == 1


def test_ctrl_c_stops_at_once(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(interrupted, good) == 130
    assert "good at work" not in capsys.readouterr().out
