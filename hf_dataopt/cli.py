"""`hf-dataopt`: one tool, a sub-command per method.

A method's room holds a `command.py` with `HELP`, `EXAMPLES`, `add_arguments(parser)`, `run(args) -> dict` (the machine-readable
result) and `show(result, console)` (the same for people); `FLAGS` in it names options that are called otherwise in Python.
The words of the options are those of `shell/options.py`. This file adds what all commands share: `--json`, `--quiet`,
`--debug`, exit codes, and errors in one line that speaks of flags. A command that goes on when a part fails names it in
`result["failed"]` (part -> reason), and exits with 1 after its result is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from . import __version__, versions
from .progress import printable
from .shell.terminal import terminal
from .shell.usage import UsageError, in_flags

COMMANDS = {
    "demo": "hf_dataopt.demo.command",
    "mix": "hf_dataopt.mixup.command",
    "clean": "hf_dataopt.relation.command",
    "condense": "hf_dataopt.condensation.command",
    "ccm": "hf_dataopt.ccm.command",
    "kvzip": "hf_dataopt.kvzip.command",
    "push": "hf_dataopt.shell.push",
    "info": "hf_dataopt.shell.info",
}

_SHELLS = ("bash", "zsh", "tcsh")
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; no heavy module is imported here."""
    parser = argparse.ArgumentParser(
        prog="hf-dataopt",
        description="Data-optimization methods as Hugging Face objects.",
        epilog="`hf-dataopt COMMAND --help` shows examples. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the versions of this, torch, transformers, ..."
    )
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=_SHELLS,
        help="what a shell reads to complete words (needs shtab)",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, path in COMMANDS.items():
        module = import_module(path)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in module.EXAMPLES),
            formatter_class=_HelpFormatter,
        )
        module.add_arguments(command)
        shared = command.add_argument_group("shared options")
        shared.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        shared.add_argument("--quiet", action="store_true", help="no progress, no remarks: the result alone")
        shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(module=module, parser=command)
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Examples as written, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        shown = not hidden and "default" not in (action.help or "")
        return f"{action.help} (default: %(default)s)" if shown else action.help


class _Completion(argparse.Action):
    """The whole vocabulary as a shell's own script, made by shtab from the parser itself."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, values: Any, __: object = None) -> None:
        try:
            import shtab
        except ImportError as error:
            from .errors import MissingExtraError

            parser.error(str(MissingExtraError("shtab", "completion", f"completion in a shell ({error.name})")))
        print(shtab.complete(parser, values))
        parser.exit()


class _Version(argparse.Action):
    """Asked only when wanted: argparse's own action needs the text for every call, and breaks its lines anew."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"hf-dataopt {__version__}\n{versions.describe()}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name, default `sys.argv[1:]`.

    Returns:
        Exit code: 0 done, 1 failed, 2 a call that cannot work (one line on stderr says why), 130 interrupted; a word that
        `argparse` does not know exits with 2 in there.
    """
    args = build_parser().parse_args(argv)
    try:
        with terminal(args.quiet):
            failed = _run(args.module, args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the one place that turns errors into exit codes
        if args.debug:
            raise
        print(f"hf-dataopt {args.command}: {_said(error, args)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    if failed:
        print(f"hf-dataopt {args.command}: failed: {printable(', '.join(failed))}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _said(error: Exception, args: argparse.Namespace) -> str:
    """An error in one line, in the words of the command line."""
    words = in_flags(str(error), args.parser._actions, getattr(args.module, "FLAGS", None))
    text = printable(" ".join(words.split())) or "no reason was given"
    if isinstance(error, UsageError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows the traceback)"


def _console(**options: Any) -> Any:
    """A console that shows a stranger's control characters instead of obeying them, whatever they come in."""
    from rich.console import Console
    from rich.segment import Segment

    class Plain(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

    return Plain(**options)


def _run(module: ModuleType, args: argparse.Namespace) -> dict[str, str]:
    """The parts that failed, by name."""
    # with --json stdout carries the object alone, so that scripts can parse it
    console = _console(stderr=args.json)
    args.console = console
    result = module.run(args)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        module.show(result, console)
    console.file.flush()
    failed: dict[str, str] = result.get("failed", {})
    return failed


if __name__ == "__main__":
    sys.exit(main())
