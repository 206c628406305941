"""`hf-dataopt info`: what an artifact is, how big, made from what, and the code that uses it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..settings import check_path
from .safe_files import MAX_CARD, MAX_JSON

HELP = "say what a folder or Hub repository of ours holds, and how to use it"
EXAMPLES = [
    "hf-dataopt info me/cifar10-idc-10",
    "hf-dataopt info run1/artifact --json",
]
_LONGEST = 20_000  # signs of code that are coloured, which takes its time
_SHOWN = ("rows", "classes", "dropped", "tokens", "bytes", "full_bytes", "steps", "answer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt info`."""
    parser.add_argument("source", metavar="REPO_OR_DIR", help="folder or Hub name")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of the repository")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Describe one artifact.

    Args:
        args: the parsed command line.

    Returns:
        Kind, files, facts and code, ready for JSON.

    Raises:
        ValueError: neither a folder nor a Hub name, or no artifact of ours.
        HubError: the repository cannot be read.
    """
    return describe(args.source, revision=args.revision)


def describe(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """What an artifact is; of a repository only the record and the card are downloaded.

    Args:
        source: folder or Hub name.
        revision, token: of the Hub.

    Returns:
        `kind`, `title`, `format_version`, `files`, `licence`, `source`, `facts`, and `usage`, Python code; `cached`: offline
        (`HF_HUB_OFFLINE=1`), what an earlier download has left in the Hub's cache is described, and nothing else is known.

    Raises:
        ValueError: no artifact of ours, or one that is refused.
        HubError: the repository cannot be read.
    """
    from .artifacts import about_of
    from .cards import first_block
    from .hub import check_hub, download, listing, offline
    from .kinds import KINDS, PLACEHOLDER, usage
    from .safe_files import CARD, files_of, read_card

    folder = check_path("source", source)
    check_hub(revision=revision, token=token)
    local = folder.is_dir()
    if not local:
        folder = download(str(source), None, revision=revision, token=token, only=_RECORDS, most=_MOST_BYTES)
    inside = files_of(folder)
    about = about_of(folder)
    kind = KINDS[about["kind"]]
    metadata, text = read_card(folder / CARD) if (folder / CARD).is_file() else ({}, "")
    code = about.get("code")
    from_cache = not local and offline()
    if local or from_cache:
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in inside}
    else:
        files = listing(str(source), kind.repo_type, revision=revision, token=token)
    name = PLACEHOLDER if local else str(source)
    licence, origin = metadata.get("license"), about.get("source")
    try:
        how = usage(about["kind"], name, **(code if isinstance(code, dict) else {}))
    except (LookupError, TypeError, ValueError, AttributeError):
        # the record lacks a value: the card's own code is the next best
        how = first_block(text)
    return {
        "kind": about["kind"],
        "title": kind.title,
        "repo_type": kind.repo_type,
        "format_version": about["format_version"],
        "files": files,
        "cached": from_cache,
        "licence": licence if licence is None else str(licence),
        "source": origin if isinstance(origin, dict) and "id" in origin else None,
        "facts": {key: about[key] for key in _SHOWN if isinstance(about.get(key), str | int | float)},
        "usage": how.replace(PLACEHOLDER, str(source)) if local else how,
    }


_RECORDS = ("hf_dataopt.json", "README.md", "adapter_config.json")
_MOST_BYTES = MAX_JSON + MAX_CARD


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
