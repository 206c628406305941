"""A Hub that refuses, fails or stops: clear errors, clean retries, and never half an artifact."""

from __future__ import annotations

from typing import Any

import pytest

from ..conftest import REPO
from .conftest import process


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("failures")
    return process(["-m", "tests.hub.failures", str(folder)], REPO, HF_HOME=str(folder / "home"))


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("wrong token", "hf auth login"),
        ("no repo", "no such repository"),
        ("no revision", "no such revision"),
        ("private, no token", "a private one that your token does not see"),
    ],
)
def test_refusals_say_what_to_do(found: dict[str, Any], scenario: str, message: str) -> None:
    assert found[scenario]["error"] == "HubError" and message in found[scenario]["message"]
    assert "hf_wrong" not in found[scenario]["message"]


def test_a_wrong_token_makes_no_repository(found: dict[str, Any]) -> None:
    assert found["wrong token"]["repos"] == 0


@pytest.mark.parametrize("where", ["create", "preupload", "commit", "lfs", "load"])
def test_two_server_errors_are_waited_out(found: dict[str, Any], where: str) -> None:
    assert found[f"500 on {where}"].keys() == {"result", "waits"} and found[f"500 on {where}"]["waits"] >= 2


@pytest.mark.parametrize(
    "scenario", ["500 for ever", "stopped at once", "stopped in the tensors", "stopped in the commit"]
)
def test_a_failed_upload_leaves_the_repository_as_it_was(found: dict[str, Any], scenario: str) -> None:
    assert found[scenario]["error"] == "HubError", found[scenario]
    assert found[scenario]["holds"] == "first"
    assert found[scenario].get("stopped", True)


def test_the_same_push_works_afterwards(found: dict[str, Any]) -> None:
    assert found["afterwards"]["same"] is True


def test_branches_and_pull_requests(found: dict[str, Any]) -> None:
    assert found["branch"]["main"] and found["branch"]["dev"] and found["branch"]["titles"][-1] == "mine"
    assert found["pull request"]["branches"] == ["dev", "main", "refs/pr/1"]
    assert "discussions/1" in found["pull request"]["result"]
    assert found["private, token"]["result"] == "fine"


def test_the_shell(found: dict[str, Any]) -> None:
    assert found["shell"]["result"] == 0 and found["shell, no artifact"]["result"] == 2
    assert found["unknown"] == []


@pytest.mark.parametrize("number", range(4))
def test_names_in_a_repository_that_lead_elsewhere(found: dict[str, Any], number: int) -> None:
    assert found[f"climbs {number}"]["error"] == "ValueError"
    assert "no plain relative path" in found[f"climbs {number}"]["message"]
    assert found["asked for evil"] == []


def test_more_bytes_than_are_taken_unasked_are_not_downloaded(found: dict[str, Any]) -> None:
    assert found["too many bytes"]["error"] == "ValueError" and "hf download" in found["too many bytes"]["message"]
    assert found["too many bytes"]["downloads"] == [] and found["as many bytes"]["result"] == "fine"


def test_shards_of_an_earlier_push_go_and_nothing_else_does(found: dict[str, Any]) -> None:
    ours = ["README.md", "data/train-00000-of-00001.parquet", "hf_dataopt.json", "preview.png"]
    theirs = ["notes.md", "data/notes.txt", "raw/train-00000-of-00001.parquet"]
    assert found["fewer shards"] == sorted(ours + theirs)


def test_pickles_are_not_even_downloaded(found: dict[str, Any]) -> None:
    assert found["pickle in the repository"]["result"] == "fine" and found["asked for pickles"] == []
