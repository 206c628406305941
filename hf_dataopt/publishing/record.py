"""`hf_dataopt.json`: kind, version, facts, and which files belong to an artifact, with their sizes and hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .kinds import KINDS
from .safe_files import read_json

ABOUT = "hf_dataopt.json"
FORMAT = 1


def read_about(folder: Path) -> dict[str, Any]:
    """`hf_dataopt.json` of a folder, checked.

    Raises:
        ValueError: none there, a newer format, or an unknown kind.
    """
    about = read_json(folder / ABOUT)
    found, number = about.get("kind"), about.get("format_version")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{folder / ABOUT} has format_version {number!r:.40}; it must be a number from 1")
    if number > FORMAT:
        raise ValueError(f"{folder} has format {number}, this version reads {FORMAT}; update hf_dataopt")
    if not isinstance(found, str) or found not in KINDS:
        raise ValueError(f"{folder} holds a {found!r:.80}, which this version does not know; update hf_dataopt")
    return about
