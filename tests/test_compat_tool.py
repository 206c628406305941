"""The tool behind `make compat`: releases, what pip has to bring, counts, table, exit code. Nothing is installed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from hf_dataopt.versions import TESTED_TRANSFORMERS

from . import compat
from .conftest import REPO

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.kvzip.test_cache" name="test_a" time="0.1"/>
<testcase classname="tests.kvzip.test_cache.TestMore" name="test_b[1.5]"><failure message="no">...</failure></testcase>
<testcase classname="tests.kvzip.test_golden" name="test_c"><skipped type="pytest.skip"/></testcase>
<testcase classname="tests.ccm.test_tuner" name="test_d"/>
<testcase classname="" name="tests.ccm.test_memory"><error message="collection failure">...</error></testcase>
<testcase classname="tests.test_features" name="test_e"/>
<testcase classname="tests.test_features_of_others" name="test_f"/>
</testsuite></testsuites>"""


def put(folder: Path, name: str, version: str, *needs: str) -> None:
    """An installed package, as far as its metadata goes."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    (about / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines]) + "\n")


def row(**fields: Any) -> compat.Row:
    good = {name: {"passed": 3, "failed": 0, "skipped": 1} for name in compat.GROUPS}
    return compat.Row(**{"release": "5.17", "transformers": "5.17.0", "hub": "1.33.0", "groups": good, **fields})


def test_the_releases_are_those_of_versions() -> None:
    *older, _ = TESTED_TRANSFORMERS
    assert compat.chosen([]) == [*older, "newest"]
    assert compat.chosen(["floor", "newest"]) == [TESTED_TRANSFORMERS[0], "newest"]
    assert compat.chosen(["5.21.1", "floor", TESTED_TRANSFORMERS[-1]]) == ["5.21.1", TESTED_TRANSFORMERS[0], "newest"]
    for file in ["Makefile", ".ci/run", "tests/compat.py"]:
        named = re.findall(r"\b\d+\.\d+\b", (REPO / file).read_text(encoding="utf-8"))
        assert not set(named) & set(TESTED_TRANSFORMERS), file  # one list of them is enough


def test_a_release_is_its_last_patch_unless_the_patch_is_named() -> None:
    assert "5.17.3" in compat.requirement("5.17").specifier and "5.18.0" not in compat.requirement("5.17").specifier
    assert str(compat.requirement("5.17.1")) == "transformers==5.17.1"


def test_only_what_the_environment_does_not_meet_is_brought(tmp_path: Path) -> None:
    wanted = Requirement("transformers~=5.17.0")
    assert compat.unmet(wanted, tmp_path) == ["transformers~=5.17.0"]  # whatever the environment has
    put(tmp_path, "transformers", "5.17.0", "huggingface-hub<0.5,>=0.4", "numpy>=1", "no-such; extra == 'dev'")
    assert compat.unmet(wanted, tmp_path) == ["huggingface-hub<0.5,>=0.4"]
    put(tmp_path, "huggingface_hub", "0.4.2", "no-such-client>=3", "numpy", "tomli; python_version < '3'")
    assert compat.unmet(wanted, tmp_path) == ["no-such-client>=3"]
    put(tmp_path, "no.such.client", "3.1", "transformers>=5")  # a circle
    assert compat.unmet(wanted, tmp_path) == []


def test_install_brings_it_in_rounds_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[list[str]] = []

    def pip(call: list[str], **_: Any) -> None:
        target, asked = call[call.index("--target") + 1], call[call.index("--target") + 2 :]
        rounds.append(asked)
        if asked[0].startswith("transformers"):
            put(Path(target), "transformers", "5.17.4", "no-such-hub<2")
        else:
            put(Path(target), "no-such-hub", "1.9")

    monkeypatch.setattr(subprocess, "run", pip)
    folder = compat.install("5.17", tmp_path)
    assert rounds == [["transformers~=5.17.0"], ["no-such-hub<2"]]
    assert folder == tmp_path / "5.17" and list(tmp_path.iterdir()) == [folder]
    assert compat.install("5.17", tmp_path) == folder and len(rounds) == 2


def test_install_does_not_go_round_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="still missing"):
        compat.install("5.17", tmp_path)
    assert not list(tmp_path.iterdir())


def test_counts_per_group() -> None:
    counts = compat.count(REPORT, ["kvzip", "ccm", "features", "trainer"])
    assert counts["kvzip"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert counts["ccm"] == {"passed": 1, "failed": 1, "skipped": 0}  # the module that could not be imported
    assert counts["features"]["passed"] == 1
    assert counts["trainer"] == {"passed": 0, "failed": 0, "skipped": 0}


@pytest.mark.parametrize(
    ("counts", "code", "expected"),
    [
        ((3, 0, 1), 0, []),
        ((3, 2, 0), 1, ["ccm: 2 failed"]),
        ((0, 0, 4), 0, ["ccm: no test ran"]),
        ((0, 0, 0), 5, ["pytest ended with code 5", "ccm: no test ran"]),
        ((3, 0, 0), 2, ["pytest ended with code 2"]),
    ],
)
def test_problems(counts: tuple[int, int, int], code: int, expected: list[str]) -> None:
    group = dict(zip(("passed", "failed", "skipped"), counts, strict=True))
    assert compat.problems({"ccm": group}, code) == expected


def test_table_has_a_line_per_release_and_the_problems_below() -> None:
    lost = compat.Row(release="5.20", problems=["could not be set up: no network"])
    first, good, bad, *rest = compat.table([row(seconds=61.4), lost]).splitlines()
    assert first.split() == ["release", "transformers", "hub", *compat.GROUPS, "seconds"]
    assert good.split()[:3] == ["5.17", "5.17.0", "1.33.0"] and good.count("  3 / 0 / 1") == len(compat.GROUPS)
    assert good.endswith(" 61")
    assert bad.split()[:4] == ["5.20", "?", "?", "-"]
    assert rest == ["(passed / failed / skipped)", "5.20: could not be set up: no network"]


def test_exit_code_and_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, list[str], list[str]]] = []
    found: dict[str, list[str]] = {}

    def fake(release: str, groups: list[str], options: list[str]) -> compat.Row:
        calls.append((release, groups, options))
        return row(release=release, transformers="9.9.9", problems=found.get(release, []))

    monkeypatch.setattr(compat, "run", fake)
    assert compat.main(["5.21", "--only", "newest", "--tests", "ccm", "--", "-n", "0", "--json"]) == 0
    assert calls == [("5.21", ["ccm"], ["-n", "0", "--json"]), ("newest", ["ccm"], ["-n", "0", "--json"])]
    assert "9.9.9 is not the last" in capsys.readouterr().err
    found["newest"] = ["ccm: 1 failed"]
    assert compat.main(["--json"]) == 1
    assert [one["problems"] for one in json.loads(capsys.readouterr().out)][-1] == ["ccm: 1 failed"]


def test_a_release_that_cannot_be_set_up_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(release: str) -> Path:
        raise subprocess.CalledProcessError(1, ["pip"])

    monkeypatch.setattr(compat, "install", failing)
    assert "could not be set up" in compat.run("5.17", ["ccm"], []).problems[0]


def test_pytest_refuses_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setenv(compat.ASKED, "1.0.0")
    with pytest.raises(RuntimeError, match=f"asked for transformers 1.0.0, got {transformers.__version__}"):
        compat.pytest_configure(None)
    monkeypatch.setenv(compat.ASKED, transformers.__version__)
    compat.pytest_configure(None)
