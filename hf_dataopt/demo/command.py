"""`hf-dataopt demo`: one section per method, each on real input, each in its own room's `command.demo`."""

from __future__ import annotations

import argparse
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ..shell.models import load_language_model
from ..shell.options import add_device, add_seed, device_of
from ..shell.usage import only, refusing

HELP = "run the methods on real input and show what happened"
EXAMPLES = ["hf-dataopt demo", "hf-dataopt demo --section kvzip", "hf-dataopt demo --smoke --json"]

SECTIONS = {
    "kvzip": "hf_dataopt.kvzip.command",
    "relation": "hf_dataopt.relation.command",
    "mixup": "hf_dataopt.mixup.command",
    "condensation": "hf_dataopt.condensation.command",
    "ccm": "hf_dataopt.ccm.command",  # last: its adapter goes into the language model that kvzip used
}
_SPEAKING = ("kvzip", "ccm")  # with a language model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt demo`."""
    parser.add_argument("--section", choices=[*SECTIONS, "all"], default="all", help="which part to run")
    parser.add_argument("--output-dir", default="demo_output", metavar="DIR", help="folder for pictures and reports")
    parser.add_argument("--model", default=None, help="language model (Hub name or folder) instead of the packaged one")
    add_device(parser)
    add_seed(parser)
    parser.add_argument("--smoke", action="store_true", help="small sizes, under a minute: to see that it runs")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sections; each shows its own tables as it goes, and one that fails does not stop the others.

    Returns:
        The result of every section that ended well, with its `claims`: rows of claim, baseline and ours as text, all measured
        in this run; and `failed`, the reason of every section that did not.

    Raises:
        UsageError: a model for a section that needs none, or a device that is not there.
    """
    only(args, args.section in ("all", *_SPEAKING), f"is for --section {' and '.join(_SPEAKING)}", "model")
    with refusing():
        args.device = device_of(args.device)

    @cache
    def language_model() -> tuple[Any, Any]:
        args.console.print("loading the language model (a minute at most) ...")
        return load_language_model(args.model, device=args.device)

    args.language_model = language_model  # one for all sections: most of the demo's start goes into it
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name in SECTIONS if args.section == "all" else [args.section]:
        args.console.rule(f"[bold]{name}")
        try:
            results[name] = import_module(SECTIONS[name]).demo(args, output_dir)
        except Exception as error:  # noqa: BLE001 - a section is somebody's method: told, and the next one has its turn
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())
            if args.debug:
                args.console.print_exception()
            args.console.print(f"{name} failed: {failed[name]}", style="red", markup=False, soft_wrap=True)
    return {**results, "failed": failed}


def show(result: dict[str, Any], console: Any) -> None:
    """The sections have shown their own results: one table over all of them, the failed ones too."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="What this run measured")
    for title in ("method", "claim", "baseline", "ours"):
        table.add_column(title)
    for name in SECTIONS:
        if name in result["failed"]:
            table.add_row(name, f"[red]failed: {escape(result['failed'][name])}", end_section=True)
        rows = result[name]["claims"] if name in result else []
        for row in rows:
            cells = [escape(row[key]) for key in ("claim", "baseline", "ours")]
            table.add_row(name if row is rows[0] else "", *cells, end_section=row is rows[-1])
    console.print(table)
