"""Options of the command line that say how messages become text."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_template_arguments(parser: argparse.ArgumentParser, what: str) -> None:
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
