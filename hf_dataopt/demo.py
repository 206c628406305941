"""`hf-dataopt demo`: one section per method, each on real input, each in its own room's `command.demo`."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

HELP = "run the methods on real input and show what happened"
EXAMPLES = ["hf-dataopt demo", "hf-dataopt demo --section kvzip", "hf-dataopt demo --smoke --json"]

SECTIONS = {
    "kvzip": "hf_dataopt.kvzip.command",
    "relation": "hf_dataopt.relation.command",
    "mixup": "hf_dataopt.mixup.command",
    "condensation": "hf_dataopt.condensation.command",
    "ccm": "hf_dataopt.ccm.command",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt demo`."""
    parser.add_argument("--section", choices=[*SECTIONS, "all"], default="all", help="which part to run")
    parser.add_argument("--output-dir", default="demo_output", help="folder for pictures and reports")
    parser.add_argument("--model", default=None, help="language model (Hub name or folder) instead of the packaged one")
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few minutes: to see that it runs")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sections; each shows its own tables as it goes."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in SECTIONS if args.section == "all" else [args.section]:
        args.console.rule(f"[bold]{name}")
        results[name] = import_module(SECTIONS[name]).demo(args, output_dir)
    return results


def show(result: dict[str, Any], console: Any) -> None:
    """The sections have shown their results already."""
    console.print(f"demo finished: {', '.join(result)}")
