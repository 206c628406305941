"""The command line: help of every command, exit codes, errors without a traceback, light imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dataopt import __version__
from hf_dataopt.cli import COMMANDS, main
from hf_dataopt.versions import describe

HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib", "rich")


@pytest.fixture
def bad_call(tmp_path: Path) -> list[str]:
    """A call that fails inside the command, before a model is loaded."""
    return ["kvzip", "--context", str(tmp_path / "not there.txt"), "--question", "why?"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command_shows_examples_and_shared_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"hf-dataopt {command}" in text.split("examples:")[1]
    for option in ("--json", "--quiet", "--debug"):
        assert option in text


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f" {command} " in text for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines() == [f"hf-dataopt {__version__}", describe()]


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["kvzip"], ["kvzip", "--context", "a.txt"], ["demo", "--section", "none"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: hf-dataopt" in capsys.readouterr().err


def test_a_call_that_cannot_work_exits_with_2_and_one_line(
    bad_call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(bad_call) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "not there.txt" in captured.err and "--context" in captured.err and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_debug_raises_the_error_itself(bad_call: list[str]) -> None:
    with pytest.raises(ValueError, match="cannot read .*not there"):
        main([*bad_call, "--debug"])


def test_interruption_exits_with_130(bad_call: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_dataopt.kvzip.command.run", interrupted)
    assert main(bad_call) == 130


def test_json_is_all_there_is_on_stdout(
    bad_call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(args: object) -> dict[str, int]:
        args.console.print("working")  # type: ignore[attr-defined]
        return {"bytes": 3}

    monkeypatch.setattr("hf_dataopt.kvzip.command.run", chatty)
    assert main([*bad_call, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"bytes": 3}
    assert "working" in captured.err


def test_building_the_parser_imports_no_heavy_module() -> None:
    code = (
        "import sys, hf_dataopt.cli as cli; cli.build_parser(); "
        f"print(','.join(name for name in {HEAVY!r} if name in sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == ""


def test_the_installed_script_runs() -> None:
    """The same exit codes through a real process as through `main`."""
    call = [sys.executable, "-m", "hf_dataopt.cli"]
    assert subprocess.run([*call, "--version"], capture_output=True).returncode == 0
    assert subprocess.run(call, capture_output=True).returncode == 2
