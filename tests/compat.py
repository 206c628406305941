"""`make compat`: the tests that lean on transformers' insides, on every release of `versions.TESTED_TRANSFORMERS`.

One environment serves all. A release lies in a folder of its own, with those of its requirements that the environment does
not meet, and is put in front by PYTHONPATH; `newest` is what the environment has. Loaded as a pytest plugin, this file makes
every process of pytest refuse another release than the one that was asked for.

    python -m tests.compat                              # the whole table
    python -m tests.compat --only floor newest          # its first and its last row
    python -m tests.compat 5.21 --tests ccm -- -n 0 -x  # any release, one group, pytest's own options
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from hf_dataopt.versions import TESTED_TRANSFORMERS

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / "build" / "compat"
NEWEST = "newest"
ASKED = "HF_DATAOPT_COMPAT"  # version that pytest's processes must find
# group of tests -> where it lies
GROUPS = {
    "routing": "tests/routing",
    "kvzip": "tests/kvzip",
    "ccm": "tests/ccm",
    "features": "tests/test_features.py",
    "saliency": "tests/test_saliency.py",
    "families": "tests/families",
    "trainer": "tests/mixup/test_trainer.py",
}
Counts = dict[str, int]  # passed, failed, skipped


@dataclass(kw_only=True)
class Row:
    """What one release did."""

    release: str
    transformers: str = "?"
    hub: str = "?"
    groups: dict[str, Counts] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def pytest_configure(config: Any) -> None:
    """Hook of pytest (`-p tests.compat`), called in its workers too."""
    import transformers

    asked = os.environ.get(ASKED)
    if asked not in (None, transformers.__version__):
        raise RuntimeError(f"asked for transformers {asked}, got {transformers.__version__} of {transformers.__file__}")


def requirement(release: str) -> Requirement:
    """`5.21` is its last patch, `5.21.1` is just that."""
    exact = release.count(".") > 1
    return Requirement(f"transformers=={release}" if exact else f"transformers~={release}.0")


def unmet(wanted: Requirement, folder: Path) -> list[str]:
    """What has to come into `folder` so that `wanted` runs there, in front of this environment."""
    there = {_name(found.name): found for found in importlib.metadata.distributions(path=[str(folder)])}
    queue, seen, missing = [wanted], set(), []
    while queue:
        one = queue.pop()
        if one in seen or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        seen.add(one)
        found = there.get(_name(one.name))
        # transformers itself must lie in the folder, even where the environment's would do
        version = found.version if found else None if one is wanted else _in_environment(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            missing.append(f"{one.name}{one.specifier}")
        elif found:
            queue += [Requirement(text) for text in found.requires or []]
    return sorted(missing)


def install(release: str, root: Path = FOLDER) -> Path:
    """Folder of a release, made by pip where it is not there or does not fit this environment any more."""
    folder, wanted = root / release, requirement(release)
    if folder.is_dir() and not unmet(wanted, folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        made, before = Path(scratch) / release, []
        while missing := unmet(wanted, made):
            if missing == before:
                raise RuntimeError(f"pip installed {missing}, and they are still missing")
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(made), *missing]
            subprocess.run(pip, check=True, stdout=sys.stderr)
            before = missing
        # a folder under its name is whole: a killed run leaves none
        made.rename(folder)
    return folder


def probe(env: dict[str, str]) -> dict[str, str]:
    """Versions as a child process sees them, and where its transformers lies."""
    code = (
        "import json, transformers as t, huggingface_hub as h; "
        "print(json.dumps({'transformers': t.__version__, 'hub': h.__version__, 'file': t.__file__}))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=REPO, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(told.stdout.splitlines()[-1])


def run(release: str, groups: Sequence[str], options: Sequence[str]) -> Row:
    """Install if need be, prove what is in use, test."""
    row = Row(release=release)
    try:
        folder = None if release == NEWEST else install(release)
        path = [str(folder)] if folder else []
        path += [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        seen = probe(env)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        row.problems.append(f"could not be set up: {error}")
        return row
    row.transformers, row.hub = seen["transformers"], seen["hub"]
    _say(f"transformers {row.transformers}, huggingface-hub {row.hub}: {seen['file']}")
    if folder and (folder not in Path(seen["file"]).parents or row.transformers not in requirement(release).specifier):
        row.problems.append(f"the release in use is {row.transformers} of {seen['file']}")
        return row
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        call = [sys.executable, "-m", "pytest", "-p", "tests.compat", "-n", "2", "--dist", "loadgroup", "-q"]
        call += [f"--junitxml={report}", *options, *(GROUPS[name] for name in groups)]
        start = time.perf_counter()
        # pytest talks on stderr: stdout is the table's or the JSON's
        code = subprocess.run(call, env={**env, ASKED: row.transformers}, cwd=REPO, stdout=sys.stderr).returncode
        row.seconds = round(time.perf_counter() - start, 1)
        row.groups = count(report.read_text(encoding="utf-8") if report.exists() else "<none/>", groups)
    row.problems += problems(row.groups, code)
    return row


def count(report: str, groups: Iterable[str]) -> dict[str, Counts]:
    """Passed, failed and skipped tests per group, out of pytest's JUnit XML; an error outside a test is a failure."""
    counts = {name: {"passed": 0, "failed": 0, "skipped": 0} for name in groups}
    for case in ET.fromstring(report).iter("testcase"):
        # a module that cannot be imported is a case without a class, under the module's name
        place = f"{case.get('classname', '')}.{case.get('name', '')}".lstrip(".")
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        for name in counts:
            if f"{place}.".startswith(GROUPS[name].removesuffix(".py").replace("/", ".") + "."):
                counts[name][outcome] += 1
    return counts


def problems(groups: dict[str, Counts], code: int) -> list[str]:
    """Why these counts, with pytest's exit code, are no success; empty where they are."""
    found = [f"{name}: {counts['failed']} failed" for name, counts in groups.items() if counts["failed"]]
    if code and not found:
        found.append(f"pytest ended with code {code}")
    idle = [name for name, counts in groups.items() if not counts["passed"] + counts["failed"]]
    return found + [f"{name}: no test ran" for name in idle]


def table(rows: Sequence[Row]) -> str:
    """One line per release; passed / failed / skipped per group; the problems below."""
    groups = list(dict.fromkeys(name for row in rows for name in row.groups))
    lines = [["release", "transformers", "hub", *groups, "seconds"]]
    for row in rows:
        cells = [" / ".join(map(str, row.groups[name].values())) if name in row.groups else "-" for name in groups]
        lines.append([row.release, row.transformers, row.hub, *cells, f"{row.seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.append("(passed / failed / skipped)")
    return "\n".join(text + [f"{row.release}: {problem}" for row in rows for problem in row.problems])


def chosen(names: Sequence[str]) -> list[str]:
    """Releases to run: the named ones, `floor` and `newest` by their place in the list; by default all of it."""
    places = {"floor": TESTED_TRANSFORMERS[0], TESTED_TRANSFORMERS[-1]: NEWEST}
    return list(dict.fromkeys(places.get(name, name) for name in names or TESTED_TRANSFORMERS))


def main(argv: Sequence[str] | None = None) -> int:
    """0: everything passed and every group ran; 1: not so."""
    words = list(sys.argv[1:] if argv is None else argv)
    ours, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        prog="python -m tests.compat",
        description="Run the tests that lean on transformers on several of its releases.",
        epilog=f"By default {', '.join(TESTED_TRANSFORMERS)}, the last as installed. Options of pytest go behind --.",
    )
    parser.add_argument("releases", nargs="*", help="such as 5.21 (its last patch), 5.21.1, floor, newest")
    parser.add_argument("--only", nargs="+", choices=["floor", NEWEST], default=[], help="these rows of the table")
    parser.add_argument("--tests", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="groups of tests")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    args = parser.parse_args(ours)
    rows = [run(release, args.tests, options) for release in chosen([*args.releases, *args.only])]
    print(json.dumps([asdict(row) for row in rows], indent=2) if args.json else table(rows))
    for row in rows:
        if row.release == NEWEST and not row.transformers.startswith(f"{TESTED_TRANSFORMERS[-1]}."):
            _say(f"{row.transformers} is not the last of versions.TESTED_TRANSFORMERS: change it when this passes")
    return 1 if any(row.problems for row in rows) else 0


def _name(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _in_environment(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _say(text: str) -> None:
    print(f"compat: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
