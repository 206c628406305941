"""The options that several commands take: one name and one meaning each.

`--model`, `--device`, `--dtype` say what computes; DATASET, `--split`, `--column`, `--label-column` what it works on;
`--output-dir` and `--push-to-hub` where the result goes; `--token` and `--revision` belong to what is read from the Hub.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..publishing.hub import PushOptions, check_push
from .usage import only

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

DTYPES = ("float32", "bfloat16", "float16")


def add_dataset(parser: argparse.ArgumentParser, column: str, *, optional: str = "") -> None:
    """DATASET and how to find its rows and columns.

    Args:
        parser: of the command.
        column: what `--column` holds.
        optional: what is worked on where no data set is named; by default one must be.
    """
    kinds = (
        "Hub name; folder of images, sounds, files or of save_to_disk; csv, json, jsonl or parquet file; - for stdin"
    )
    default = f"; default: {optional}" if optional else ""
    parser.add_argument("dataset", metavar="DATASET", nargs="?" if optional else None, help=kinds + default)
    parser.add_argument("--config", default=None, help="configuration of a Hub data set that has several")
    parser.add_argument("--split", default=None, help="split, or a slice of it such as 'train[:1000]' (default: train)")
    parser.add_argument("--column", default=None, help=f"{column} (default: image)")
    parser.add_argument("--label-column", default=None, help="column of labels (default: label)")


def add_device(
    parser: argparse.ArgumentParser, *, dtypes: tuple[str, ...] = (), default: str = "the first that is there"
) -> None:
    """`--device`, and `--dtype` where the command loads weights."""
    parser.add_argument("--device", default=None, help=f"cuda, mps, cpu (default: {default})")
    if dtypes:
        parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the model's weights")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """`--seed`, for a command that draws."""
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")


def add_hub(parser: argparse.ArgumentParser, revision: str) -> None:
    """`--token` and `--revision`.

    Args:
        parser: of the command.
        revision: of what, for the help.
    """
    parser.add_argument("--token", default=None, help="of the Hub (default: the one you logged in with)")
    parser.add_argument("--revision", default=None, help=f"branch, tag or commit {revision}")


def add_publishing(parser: argparse.ArgumentParser, what: str) -> None:
    """`--push-to-hub REPO` and what belongs to it.

    Args:
        parser: of the command.
        what: is uploaded, for the help.
    """
    group = parser.add_argument_group("publishing")
    group.add_argument("--push-to-hub", metavar="REPO", default=None, help=f"upload {what} under this Hub name")
    group.add_argument("--to-revision", default=None, help="branch to upload to; made if missing")
    add_commit(group)


def add_commit(parser: Any) -> None:
    """What an upload is like."""
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit-message", default=None, help="of the one commit")


def check_publishing(args: argparse.Namespace) -> None:
    """Refuse the options of an upload where there is none, and a name that is none.

    Raises:
        UsageError: one of them without `--push-to-hub`.
        ValueError: no Hub name, or an option that no upload takes.
    """
    only(args, args.push_to_hub, "needs --push-to-hub", "to_revision", "private", "create_pr", "commit_message")
    if args.push_to_hub is not None:
        try:
            check_push(args.push_to_hub, **push_options(args))
        except ValueError as error:
            raise ValueError(f"--push-to-hub: {error}") from error


def push_options(args: argparse.Namespace) -> PushOptions:
    """The options of an upload, as `publishing.artifacts.push_folder` takes them."""
    return {
        "private": args.private or None,
        "revision": args.to_revision if hasattr(args, "to_revision") else args.revision,
        "create_pr": args.create_pr,
        "commit_message": args.commit_message,
        "token": args.token,
    }


def address(made: CommitInfo) -> str:
    """Where an upload can be looked at: its pull request if one was opened, whose commit is in no branch, else the commit."""
    return made.pr_url or made.commit_url


def add_template(parser: argparse.ArgumentParser, what: str) -> None:
    """`--system` and `--template-kwargs`, for a command that renders a chat template.

    Args:
        parser: of the command.
        what: comes behind the system message, for the help.
    """
    parser.add_argument("--system", default=None, metavar="TEXT", help=f"system message before {what}")
    parser.add_argument(
        "--template-kwargs",
        default=None,
        metavar="JSON",
        help="object of arguments for the chat template, such as '{\"enable_thinking\": false}'",
    )


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """`system` and `template_kwargs`, as `ChatFormat` takes them.

    Raises:
        ValueError: `--template-kwargs` is no JSON object.
    """
    text, found = args.template_kwargs, None
    if text is not None:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--template-kwargs is no JSON ({error}): {text!r:.80}") from error
        if not isinstance(found, dict):
            raise ValueError(f"--template-kwargs must be a JSON object, got {text!r:.80}")
    return {"system": args.system, "template_kwargs": found}


def device_of(device: str | None) -> str:
    """The device that was asked for, or the first that is there.

    Raises:
        ValueError: no such device here.
    """
    import torch

    from ..settings import check_device

    if device is not None:
        return check_device("device", device, here=True)
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
