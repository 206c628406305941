"""What the commands share: where an upload is said to be."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitInfo

from hf_dataopt.shell.options import address

COMMIT = "https://huggingface.co/me/report/commit/abc"


@pytest.mark.parametrize(
    ("pull_request", "seen"),
    [
        (None, COMMIT),
        ("https://huggingface.co/me/report/discussions/3", "https://huggingface.co/me/report/discussions/3"),
    ],
)
def test_an_upload_is_where_its_pull_request_is(pull_request: str | None, seen: str) -> None:
    made = CommitInfo(commit_url=COMMIT, commit_message="Upload", commit_description="", oid="abc", pr_url=pull_request)
    assert address(made) == seen
    assert str(made) == COMMIT  # why its text does not do
