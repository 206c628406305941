"""`hf-dataopt info`: what an artifact is, how big, made from what, and the code that uses it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_hub
from .usage import check_revision, refusing

HELP = "say what a folder or Hub repository of ours holds, and how to use it"
EXAMPLES = [
    "hf-dataopt info me/cifar10-idc-10",
    "hf-dataopt info run1/artifact --json",
]
_LONGEST = 20_000  # signs of code that are coloured, which takes its time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt info`."""
    parser.add_argument("source", metavar="REPO_OR_DIR", help="folder or Hub name")
    add_hub(parser, "of the repository")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Describe one artifact.

    Args:
        args: the parsed command line.

    Returns:
        Kind, files, facts and code, ready for JSON.

    Raises:
        UsageError: neither a folder nor a Hub name, or no artifact of ours.
        HubError: the repository cannot be read.
    """
    from ..publishing.info import describe

    with refusing():
        check_revision(args.revision, args.source, Path(args.source).is_dir())
        return describe(args.source, revision=args.revision, token=args.token)


def show(result: dict[str, Any], console: Any) -> None:
    """A small table, then the code."""
    from rich.syntax import Syntax
    from rich.table import Table
    from rich.text import Text

    table = Table(title=result["title"], show_header=False)
    rows = {
        **({"read from": "the Hub's cache: HF_HUB_OFFLINE is set"} if result["cached"] else {}),
        "licence": result["licence"] or "not given",
        **({"made from": result["source"]["id"]} if result["source"] else {}),
        **{key.replace("_", " "): value for key, value in result["facts"].items()},
        "files": "\n".join(f"{name}  {size:,} bytes" for name, size in list(result["files"].items())[:20]),
    }
    for key, value in rows.items():
        # Text, not markup: what a stranger wrote is shown as it stands
        table.add_row(key, Text(f"{value:,}" if isinstance(value, int) else str(value)[:500]))
    console.print(table)
    code = result["usage"].rstrip()[:_LONGEST]
    console.print(Syntax(code, "python", background_color="default"))
