"""A push that loses its connection at every request in turn: never half an artifact, and the next push completes it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ..conftest import REPO
from ..counts import tell
from .conftest import process


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("interruptions")
    return process(["-m", "tests.hub.interruptions", str(folder)], REPO, HF_HOME=str(folder / "home"))


def test_every_request_of_a_push(found: dict[str, Any]) -> None:
    for what, count in found["counts"].items():
        tell("push interrupted", what, {"requests": found["requests"], **count})
    assert found["requests"] >= 8 and len(found["counts"]) == 4 and not found["unknown"]
    for count in found["counts"].values():
        assert count["old copy"] + count["new copy"] == count["loads"] == found["requests"]
        assert count["complete in the end"] == found["requests"]
        assert count.get("refused", 0) == count.get("said what to do", 0)


def test_one_lost_request_is_sent_again(found: dict[str, Any]) -> None:
    assert found["counts"]["request lost"]["went through"] == found["requests"]


def test_without_a_network(found: dict[str, Any]) -> None:
    assert found["offline, cached"] == "fine"
    assert "HF_HUB_OFFLINE" in found["offline, not cached"] and "name a folder" in found["offline, not cached"]
    about = json.loads(found["offline, info, cached"])
    assert about["cached"] and about["kind"] == "head_scores" and about["files"]["head_scores.safetensors"] > 0
    said = found["offline, info, not cached"].splitlines()
    assert said[0].startswith("hf-dataopt info: HubError: reading me/elsewhere failed: HF_HUB_OFFLINE is set")
    assert len(said) == 1 and said[0].endswith("(--debug shows the traceback)")
    for call in ("offline, push", "dead, push", "dead, load"):
        assert found[call].startswith("HubError") and "check the connection and try again" in found[call], found[call]
