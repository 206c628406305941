"""How an artifact is saved: its files, then the card, then the record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import cards
from .kinds import usage
from .names import looks_like_repo
from .record import ABOUT, FORMAT
from .safe_files import CARD


def finish(
    folder: Path,
    kind: str,
    *,
    about: Mapping[str, Any],
    metadata: Mapping[str, Any],
    code: Mapping[str, Any] | None = None,
    origin: tuple[str, str] | None = None,
    **card: Any,
) -> Path:
    """Write `hf_dataopt.json` and the card beside the files of an artifact.

    Args:
        folder: where those files are.
        kind: one of `KINDS`.
        about: facts for the JSON file.
        metadata: the card's YAML.
        code: values of the card's first code block.
        origin: (`"model"` or `"dataset"`, Hub name) of what the artifact was made from; a push inherits its licence.
        card: further values of the card's template.

    Returns:
        The folder.
    """
    record = {"format_version": FORMAT, "kind": kind, "hf_dataopt": _own_version(), "code": dict(code or {}), **about}
    if origin is not None and looks_like_repo(origin[1]):
        record["source"] = {"type": origin[0], "id": origin[1]}
    tags = ["hf-dataopt", kind.replace("_", "-"), *metadata.get("tags", [])]
    text = cards.render(
        kind, {**metadata, "tags": tags}, usage=cards.block(usage(kind, **(code or {})), "python"), **card
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    (folder / ABOUT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def _own_version() -> str | None:
    try:
        return version("hf-dataopt")
    except PackageNotFoundError:
        return None
