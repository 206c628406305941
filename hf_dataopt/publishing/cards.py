"""Dataset and model cards: one template per kind of artifact, filled with what was measured and nothing else.

Every value is escaped as it enters a template: a label or a name may come from anybody. A value inside a code block or a
code span goes through the filter of that name.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("hf-dataopt", "torch", "transformers", "datasets", "peft")
_SPECIAL = re.compile(r"([\\`*_\[\]!|~$@])")
_LONGEST = 400


class Ready(str):
    """Text that is Markdown already."""

    __slots__ = ()


def template(name: str) -> str:
    """Text of `model_cards/NAME.md.jinja`, from the installed package or from the source tree of an editable install.

    Raises:
        ValueError: no such template.
    """
    here = Path(__file__).resolve().parent.parent
    for folder in (here / "model_cards", here.parent / "model_cards"):
        path = folder / f"{name}.md.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ValueError(f"there is no card template {name!r}")


def render(card: str, metadata: Mapping[str, Any], /, **values: Any) -> str:
    """A card.

    Args:
        card: name of the template.
        metadata: the YAML block that the Hub reads; entries that are None are left out (a licence is never guessed).
        **values: what the template asks for, escaped as it enters; a missing one is an error.

    Returns:
        Markdown with a YAML block.

    Raises:
        ValueError: no such template.
        jinja2.UndefinedError: a value is missing.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_enter,
    )
    environment.filters |= {"code": code, "block": block}
    known = {"versions": versions(), "hardware": hardware()}
    text = environment.from_string(template(card)).render(**{**known, **values})
    return with_metadata(text, metadata)


def hub_metadata(repo_type: str, **fields: Any) -> dict[str, Any]:
    """What the Hub reads of a card, as its own card classes write it.

    Args:
        repo_type: `"model"` or `"dataset"`.
        **fields: of `ModelCardData` (with `model_name` and `eval_results`, which become its model index) or
            `DatasetCardData`; what is None is left out.

    Returns:
        The card's metadata; `library_name` is ours unless it is given.

    Raises:
        ValueError: results that the Hub does not take.
    """
    from huggingface_hub import DatasetCardData, ModelCardData

    data: Any = ModelCardData if repo_type == "model" else DatasetCardData
    return dict(data(**{"library_name": "hf-dataopt", **fields}).to_dict())


def size_category(rows: int) -> str:
    """The Hub's word for the size of a data set, such as `1K<n<10K`."""
    words = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = next((index for index in range(len(words)) if rows < 10 ** (index + 3)), None)
    if place is None:
        return "n>1T"
    return "n<1K" if place == 0 else f"{words[place - 1]}<n<{words[place]}"


def with_metadata(text: str, metadata: Mapping[str, Any]) -> str:
    """A card's text (without a YAML block) behind its metadata."""
    import yaml

    class Plain(yaml.SafeDumper):
        """The same list in two places is written out twice: our own reader, for one, refuses aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    kept = {key: value for key, value in metadata.items() if value is not None}
    block = yaml.dump(kept, Dumper=Plain, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{block}\n---\n\n{text.lstrip()}"


def _enter(value: Any) -> Any:
    return value if isinstance(value, Ready) else escape(str(value))


def escape(text: str) -> Ready:
    """Text as it is, in Markdown and HTML: no tags, links, images, tables or new lines; cut after 400 characters."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(plain) > _LONGEST:
        plain = f"{plain[:_LONGEST]} …"
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = re.sub(r"(?i)\b(https?|ftp|mailto|javascript|data):", lambda found: f"{found[1]}&#58;", plain)
    plain = re.sub(r"(?i)\bwww\.", "www&#46;", plain)
    return Ready(_SPECIAL.sub(r"\\\1", plain))


def code(text: Any) -> Ready:
    """A code span that its content cannot leave."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:_LONGEST].replace("|", "¦")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    pad = " " if "`" in plain else ""
    return Ready(f"{ticks}{pad}{plain}{pad}{ticks}" if plain else "")


def block(text: Any, language: str = "") -> Ready:
    """A code block that its content cannot leave."""
    plain = str(text).replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    return Ready(f"{fence}{language}\n{plain}\n{fence}")


def first_block(text: str) -> str:
    """The first Python block of a card, empty where there is none, or where it is not closed."""
    opened = re.search(r"^(`{3,})python\n", text, re.MULTILINE)
    if opened is None:
        return ""
    closed = re.compile(rf"^{opened[1]}$", re.MULTILINE).search(text, opened.end())
    return text[opened.end() : closed.start()] if closed else ""


def versions() -> str:
    """Versions of the packages that a result depends on."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def hardware() -> str:
    """Processor, cores, and the GPU if torch was used on one."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() and torch.cuda.is_initialized() else ""
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores{gpu}"
