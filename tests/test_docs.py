"""README and docs keep their promises: blocks run as they stand, commands and links exist, equations are where they say."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_dataopt
from hf_dataopt.cli import build_parser
from hf_dataopt.text import demo_model

from .conftest import REPO
from .pages import (
    DOCS,
    MAPPED,
    NOTEBOOKS,
    README,
    anchors,
    blocks,
    cells,
    needs_hub,
    run,
    scripts,
    small_adapter,
    small_demo_model,
    text_of,
)

SCRIPTS = scripts()
OFFLINE = {name: script for name, script in SCRIPTS.items() if not needs_hub(script)}
PAGES = [README, *DOCS, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md"]
SHELL = [(page, line) for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
EXTRAS = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", OFFLINE)
def test_python_runs_as_it_stands(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_model, "load_demo_model", small_demo_model)
    if "examples/adapters/facts" in OFFLINE[name]:
        small_adapter(tmp_path / "examples" / "adapters" / "facts")
    run(name, OFFLINE[name])
    assert capsys.readouterr().out.count("\n") >= 1


def test_a_block_that_errs_is_noticed() -> None:
    with pytest.raises(NameError):
        run("a page", "print(nowhere)")


def test_notebooks_are_kept_as_they_ran() -> None:
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        made = [output for cell in cells(notebook) for output in cell["outputs"]]
        assert [cell["execution_count"] for cell in cells(notebook)] == list(range(1, len(cells(notebook)) + 1))
        assert any("image/png" in output.get("data", {}) for output in made), f"{notebook} has no picture"
        assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in made), notebook
        said = " ".join("".join(output.get("text", [])) for output in made)
        assert said and not re.search(r"(?<!\w)/(tmp|home|root|work|usr)/", said), (
            f"{notebook} names a path of a machine"
        )
        assert notebook.rpartition("/")[2] in text_of("docs/index.md"), f"no page leads to {notebook}"


def test_every_job_has_a_block_a_picture_or_table_a_figure_and_a_warning() -> None:
    jobs = text_of(README).split("\n## ")[1:-1]
    assert len(jobs) == len(blocks(README)) == 5
    for job in jobs:
        assert job.count("```python") == 1 and ("![" in job or "| --- |" in job)
        assert "**How good**" in job and "benchmarks/README.md#" in job and "**When not**" in job
        title = job.splitlines()[0]
        assert f"](#{title.lower().replace(' ', '-')})" in text_of(README).split("\n## ")[0], (
            f"no line leads to {title}"
        )


def test_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 200
    assert all(sum(map(bool, block.splitlines())) <= 14 for block in blocks(README))


def test_the_two_commands_come_first() -> None:
    assert [line.split("  ")[0] for line in blocks(README, "bash")[0].splitlines()] == ["make demo", "make test"]
    assert "make test" in (REPO / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MAPPED)
def test_equation_map_names_documented_functions(path: str) -> None:
    module, name = path.rsplit(".", 1)
    assert (getattr(import_module(module), name).__doc__ or "").strip()


def test_equation_map_is_whole() -> None:
    claimed = text_of("docs/equations.md")
    numbered = [*(f"3.{n}" for n in range(1, 6)), "4.1", "4.2", *(f"5.{n}" for n in range(1, 6)), "6.1", "8.1", "8.2"]
    for equation in [*numbered, "7.1", "7.4"]:
        assert re.search(rf"\b{re.escape(equation)}\b", claimed), f"equation {equation} is claimed by nothing"
    for algorithm in range(1, 7):
        assert f"Algorithm {algorithm}" in claimed


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    plain = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE))
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if re.match(r"\w+:", target):
            continue
        place, _, anchor = target.partition("#")
        found = (REPO / page).parent / place if place else REPO / page
        assert found.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(found), f"{page}: no heading for {target}"


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in SHELL if line.strip()])
def test_shell_lines_can_be_typed(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)  # keeps ; & < > | apart, drops remarks
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&<>|"):
            parts.append([word])
        else:
            parts[-1].append(word)
    for before, *words in [["", *parts[0]], *parts[1:]]:
        if words and not set(before) & set("<>"):  # behind < and > stands a file
            _check(words)


def _check(words: list[str]) -> None:
    """One command: its name, its options, and the files and targets that it names."""
    command, *rest = words
    if command == "hf-dataopt":
        try:
            build_parser().parse_args(rest)
        except SystemExit as error:
            assert error.code == 0, words
    elif command == "make":
        assert re.search(rf"^{rest[0]}:", text_of("Makefile"), re.MULTILINE), words
    elif command == "python" and rest[0] == "-m":
        assert find_spec(rest[1]) is not None, words
    elif command == "python":
        script = text_of(rest[0])
        assert all(f'"{word}"' in script for word in rest if word.startswith("--")), words
    elif command == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", " ".join(rest))
        assert rest[0] == "install" and all(one in EXTRAS for extra in extras for one in extra.split(",")), words
    else:
        assert command in ("hf", "sleep", "source", "pytest", "for"), words


def test_flags_in_prose_exist() -> None:
    commands = next(one for one in build_parser()._actions if one.dest == "command")
    assert isinstance(commands.choices, dict)
    known = {flag for parser in commands.choices.values() for one in parser._actions for flag in one.option_strings}
    known |= {flag for one in build_parser()._actions for flag in one.option_strings}
    elsewhere = {"--multi_gpu", "--no-deps", "--strict"}  # of accelerate, pip and mkdocs
    for page in [README, *DOCS]:
        for span in re.findall(r"`([^`\n]+)`", text_of(page)):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
                script = re.search(r"(examples|benchmarks)/\w+\.py", span)
                own = script is not None and f'"{flag}"' in text_of(script[0])
                assert flag in known | elsewhere or own, f"{page}: {flag}"


def test_api_pages_have_every_public_name() -> None:
    written = {
        path for page in DOCS if page.startswith("docs/api/") for path in re.findall(r"^::: (\S+)", text_of(page), re.M)
    }
    lacking = {f"{module}.{name}" for name, module in hf_dataopt._PUBLIC.items()} - written
    assert not lacking
    for path in written:
        module, _, name = path.rpartition(".")
        assert (
            find_spec(path) is not None if name.islower() and _is_module(path) else hasattr(import_module(module), name)
        )


def _is_module(path: str) -> bool:
    place = REPO / path.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def test_every_page_is_in_the_navigation() -> None:
    navigation = text_of("mkdocs.yml")
    assert all(f" {page.removeprefix('docs/')}\n" in navigation for page in DOCS)
