"""mkdocs: every command's options, out of the parser itself."""

from __future__ import annotations

import argparse
from typing import Any

from hf_dataopt.cli import build_parser

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables where the page has its mark."""
    return markdown.replace(MARK, "\n".join(_sections())) if MARK in markdown else markdown


def _sections() -> list[str]:
    (commands,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    lines = []
    for name, parser in commands.choices.items():
        lines += [f"## hf-dataopt {name}", "", f"{parser.description}.", "", "```bash"]
        lines += [line.strip() for line in (parser.epilog or "").splitlines()[1:]]
        lines += ["```", "", "| option | default | meaning |", "| --- | --- | --- |"]
        lines += [_row(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)] + [""]
    return lines


def _row(action: argparse.Action) -> str:
    written = ", ".join(action.option_strings) or (action.metavar or action.dest).upper()
    taken = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or action.dest.upper()}"
    if action.choices is not None:
        taken = " " + " / ".join(map(str, action.choices))
    shown = action.default is not None and action.default is not False and action.default != argparse.SUPPRESS
    default = f"`{action.default}`" if shown else ""
    meaning = (action.help or "").replace("|", "\\|").replace("<", "&lt;")
    return f"| `{written}{taken}`{' (required)' if action.required and action.option_strings else ''} | {default} | {meaning} |"
