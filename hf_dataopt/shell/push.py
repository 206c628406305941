"""`hf-dataopt push`: upload a folder that holds an artifact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_commit, address, push_options
from .usage import refusing

HELP = "upload an artifact's folder to the Hub in one commit"
EXAMPLES = [
    "hf-dataopt push run1/artifact me/cifar10-idc-10 --private",
    "hf-dataopt push cleaned me/reviews-cleaned --create-pr --commit-message 'Without 120 label errors'",
    "hf-dataopt push chat-ccm me/chat-ccm --json",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt push`."""
    parser.add_argument(
        "folder", metavar="FOLDER", help="written by --output-dir, save_pretrained or one of the save functions"
    )
    parser.add_argument("repo", metavar="REPO", help="Hub name; made if missing")
    parser.add_argument("--token", default=None, help="of the Hub (default: the one you logged in with)")
    parser.add_argument("--revision", default=None, help="branch; made if missing")
    add_commit(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Upload a folder.

    Args:
        args: the parsed command line.

    Returns:
        Kind, repository and URL, ready for JSON.

    Raises:
        UsageError: the folder holds no artifact, or no Hub name.
        HubError: the upload failed.
    """
    from ..publishing.artifacts import push_folder
    from ..publishing.info import describe

    folder = Path(args.folder)
    with refusing():
        if not folder.is_dir():
            raise ValueError(f"{args.folder} is no folder; name the one that holds the artifact")
        kind = describe(folder)["kind"]
        made = push_folder(folder, args.repo, **push_options(args))
    return {"kind": kind, "repository": args.repo, "url": address(made)}


def show(result: dict[str, Any], console: Any) -> None:
    """Where it is."""
    from rich.markup import escape

    console.print(f"{result['kind']}: {escape(result['url'])}", soft_wrap=True)
    console.print(f"hf-dataopt info {escape(result['repository'])}", soft_wrap=True)
