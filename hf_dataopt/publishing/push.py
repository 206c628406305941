"""`hf-dataopt push`: upload a folder that holds an artifact; and `--push-to-hub` of the other commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "upload an artifact's folder to the Hub in one commit"
EXAMPLES = [
    "hf-dataopt push run1/artifact me/cifar10-idc-10 --private",
    "hf-dataopt push cleaned me/reviews-cleaned --create-pr --commit-message 'Without 120 label errors'",
    "hf-dataopt push chat-ccm me/chat-ccm --json",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt push`."""
    parser.add_argument("folder", help="written by --out, --save, save_pretrained or one of the save functions")
    parser.add_argument("repo", metavar="REPO", help="Hub name; made if missing")
    _add_options(parser)


def add_push_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """`--push-to-hub REPO` and its options, for a command that makes something."""
    group = parser.add_argument_group("publishing")
    group.add_argument("--push-to-hub", metavar="REPO", default=None, help=f"upload {what} under this Hub name")
    _add_options(group)


def _add_options(parser: Any) -> None:
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--revision", default=None, help="branch; made if missing")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit-message", default=None, help="of the one commit")


def push_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options as `publishing.artifacts.push_folder` takes them."""
    return {
        "private": args.private or None,
        "revision": args.revision,
        "create_pr": args.create_pr,
        "commit_message": args.commit_message,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Upload a folder.

    Args:
        args: the parsed command line.

    Returns:
        Kind, repository and URL, ready for JSON.

    Raises:
        ValueError: the folder holds no artifact.
        HubError: the upload failed.
    """
    from .artifacts import push_folder
    from .info import describe

    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{args.folder} is no folder; name the one that holds the artifact")
    url = push_folder(folder, args.repo, **push_options(args))
    return {"kind": describe(folder)["kind"], "repository": args.repo, "url": url}


def show(result: dict[str, Any], console: Any) -> None:
    """Where it is."""
    from rich.markup import escape

    console.print(f"{result['kind']}: {escape(result['url'])}", soft_wrap=True)
    console.print(f"hf-dataopt info {escape(result['repository'])}", soft_wrap=True)
