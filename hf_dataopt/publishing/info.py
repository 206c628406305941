"""What an artifact is, how big, made from what, and the code that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..settings import check_path
from .safe_files import MAX_CARD, MAX_JSON

_SHOWN = ("rows", "classes", "dropped", "tokens", "bytes", "full_bytes", "steps", "answer")


def describe(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """What an artifact is; of a repository only the record and the card are downloaded.

    Args:
        source: folder or Hub name.
        revision, token: of the Hub.

    Returns:
        `kind`, `title`, `format_version`, `files`, `licence`, `source`, `facts`, and `usage`, Python code; `cached`: offline
        (`HF_HUB_OFFLINE=1`), what an earlier download has left in the Hub's cache is described, and nothing else is known.

    Raises:
        ValueError: no artifact of ours, or one that is refused.
        HubError: the repository cannot be read.
    """
    from .artifacts import about_of
    from .cards import first_block
    from .hub import check_hub, download, listing, offline
    from .kinds import KINDS, PLACEHOLDER, usage
    from .safe_files import CARD, files_of, read_card

    folder = check_path("source", source)
    check_hub(revision=revision, token=token)
    local = folder.is_dir()
    if not local:
        folder = download(str(source), None, revision=revision, token=token, only=_RECORDS, most=_MOST_BYTES)
    inside = files_of(folder)
    about = about_of(folder)
    kind = KINDS[about["kind"]]
    metadata, text = read_card(folder / CARD) if (folder / CARD).is_file() else ({}, "")
    code = about.get("code")
    from_cache = not local and offline()
    if local or from_cache:
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in inside}
    else:
        files = listing(str(source), kind.repo_type, revision=revision, token=token)
    name = PLACEHOLDER if local else str(source)
    licence, origin = metadata.get("license"), about.get("source")
    try:
        how = usage(about["kind"], name, **(code if isinstance(code, dict) else {}))
    except (LookupError, TypeError, ValueError, AttributeError):
        # the record lacks a value: the card's own code is the next best
        how = first_block(text)
    return {
        "kind": about["kind"],
        "title": kind.title,
        "repo_type": kind.repo_type,
        "format_version": about["format_version"],
        "files": files,
        "cached": from_cache,
        "licence": licence if licence is None else str(licence),
        "source": origin if isinstance(origin, dict) and "id" in origin else None,
        "facts": {key: about[key] for key in _SHOWN if isinstance(about.get(key), str | int | float)},
        "usage": how.replace(PLACEHOLDER, str(source)) if local else how,
    }


_RECORDS = ("hf_dataopt.json", "README.md", "adapter_config.json")
_MOST_BYTES = MAX_JSON + MAX_CARD
