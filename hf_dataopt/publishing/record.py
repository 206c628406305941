"""`hf_dataopt.json`: kind, version, facts, and which files belong to an artifact, with their sizes and hashes.

`format_version` has a higher number where older releases cannot read what is written; `format_minor` counts what was added
that they may leave unread: settings and tensors with new names are refused in a file of a minor format that this release knows
(damage, or somebody else's), and left out of one with a higher number. Artifacts of the first releases name no files: they are
read as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..progress import told
from .kinds import KINDS
from .safe_files import CARD, check_names, files_of, read_json

logger = logging.getLogger(__name__)

ABOUT = "hf_dataopt.json"
FORMAT, MINOR = 1, 0
_PIECE = 4 * 2**20
# what the Hub, its client and file managers put beside the files of an artifact
_STRANGERS = {".gitattributes", ".DS_Store", ".cache"}
# names of files in artifacts that list none
_USUAL = {name for kind in KINDS.values() for name in kind.needs}
_ENDINGS = (".parquet", ".png", ".html")
_DRAFT = re.compile(r"\..+\.(new|old)-[0-9a-f]{8}")


def read_about(folder: Path) -> dict[str, Any]:
    """`hf_dataopt.json` of a folder, checked.

    Raises:
        ValueError: none there, a newer format, an unknown kind, or a list of files that is none.
    """
    about = read_json(folder / ABOUT)
    found = about.get("kind")
    check_version(about, folder / ABOUT)
    if not isinstance(found, str) or found not in KINDS:
        raise ValueError(f"{folder} holds a {found!r:.80}, which this version does not know; update hf_dataopt")
    _check_list(folder, about.get("files"))
    return about


def check_version(about: Mapping[str, Any], path: Path, name: str = "format_version") -> bool:
    """Refuse a format that is none, or newer than what this release reads.

    Args:
        about: what the file says.
        path: names it.
        name: of the entry.

    Returns:
        Whether the minor format is newer: what has a name that this release does not know is to be left out.

    Raises:
        ValueError: it must not be read.
    """
    number, minor = about.get(name), about.get("format_minor", 0)
    if type(number) is not int or number < 1 or type(minor) is not int or minor < 0:
        raise ValueError(
            f"{path} has {name} {number!r:.40} and format_minor {minor!r:.40}; they must be numbers from 1 and from 0"
        )
    if number > FORMAT:
        by = f" (written by {told(about['hf_dataopt'], 20)})" if about.get("hf_dataopt") else ""
        raise ValueError(f"{path} has format {number}, this version reads {FORMAT}; update hf_dataopt{by}")
    if minor > MINOR:
        logger.info(
            "%s has format %d.%d, this version knows %d.%d; what is new in it is left out",
            path,
            number,
            minor,
            FORMAT,
            MINOR,
        )
    return minor > MINOR


def known_settings(settings: Any, names: Iterable[str], newer: bool) -> str:
    """Settings as JSON for a config's `from_json_string`; of a newer minor format only those with `names`."""
    if newer and isinstance(settings, dict):
        known = set(names)
        settings = {name: value for name, value in settings.items() if name in known}
    return json.dumps(settings)


def _check_list(folder: Path, files: Any) -> None:
    if files is None:
        return
    good = isinstance(files, dict) and all(
        isinstance(one, dict) and type(one.get("size")) is int and isinstance(one.get("sha256"), str)
        for one in files.values()
    )
    if not good:
        raise ValueError(f"{folder / ABOUT} has a list of files that is none; get it again")
    check_names(files, f"{folder / ABOUT}")


def list_files(folder: Path, skip: Callable[[str], bool] = lambda name: False) -> dict[str, dict[str, Any]]:
    """Name, size and SHA-256 of every file of an artifact, each of them on the disk for good.

    Left out are the record itself, the card, which may be edited, and folders that are artifacts of their own.

    Args:
        folder: of the artifact.
        skip: names to leave out, too.
    """
    found = {}
    for path in own_files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in (ABOUT, CARD) and not skip(name):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                found[name] = {"size": path.stat().st_size, "sha256": _hash(file)}
    return found


def own_files(folder: Path, besides: tuple[str, ...] = ()) -> list[Path]:
    """The files of a folder without those of artifacts inside it, and without what a killed save has left there."""
    paths = [path for path in files_of(folder, besides) if not any(map(is_draft, path.relative_to(folder).parts))]
    inner = {path.parent for path in paths if path.name == ABOUT and path.parent != folder}
    return [path for path in paths if inner.isdisjoint(path.parents)]


def inner_artifacts(folder: Path, besides: tuple[str, ...] = ()) -> list[Path]:
    """Folders inside a folder that are artifacts of their own."""
    paths = [path for path in files_of(folder, besides) if not any(map(is_draft, path.relative_to(folder).parts))]
    return [path.parent for path in paths if path.name == ABOUT and path.parent != folder]


def draft_of(name: str, what: str) -> str:
    """Name of a folder beside `name` that a save is at work in (`what`: `"new"` or `"old"`)."""
    return f".{name}.{what}-{secrets.token_hex(4)}"


def is_draft(name: str) -> bool:
    """Whether a folder has a name that only a save gives it."""
    return _DRAFT.fullmatch(name) is not None


def check_files(folder: Path, about: Mapping[str, Any]) -> None:
    """Every listed file is there, as it was when it was saved; without a list nothing is asked.

    Raises:
        ValueError: a file that is missing, or has another size or hash.

    Cost: all listed files are read once.
    """
    title = KINDS[about["kind"]].short
    for name, wanted in (about.get("files") or {}).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} lacks {name}; get the whole artifact again")
        if path.stat().st_size != wanted["size"]:
            what = f"{name} has {path.stat().st_size:,} bytes, {wanted['size']:,} were saved"
        else:
            with path.open("rb") as file:
                if _hash(file) == wanted["sha256"]:
                    continue
            what = f"{name} is not what was saved, its SHA-256 differs"
        raise ValueError(f"{folder} holds no whole {title} ({what}); get it again, or save it again")


def belongs(folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """The files of an artifact: those that its record lists, itself and the card; all that are there where none are listed."""
    paths, files = own_files(folder), about.get("files")
    if files is None:
        return paths
    known = {*files, ABOUT, CARD}
    return [path for path in paths if path.relative_to(folder).as_posix() in known]


def foreign_files(folder: Path, kind: str, besides: tuple[str, ...] = ()) -> list[str]:
    """Files in a folder that no save of ours has put there, by name; `kind` is what is to be saved in their place.

    What is at one of the names `besides` is not looked at: a job may be writing there.

    A record without a list, or a folder of this kind without a record, stands for all files with names that we give.
    """
    foreign = []
    for place in [folder, *inner_artifacts(folder, besides)]:
        files = own_files(place, besides if place == folder else ())
        names = {path: path.relative_to(place).as_posix() for path in files}
        listed: Any = None
        if (place / ABOUT).is_file():
            listed = read_about(place).get("files")
        elif not (needed := set(KINDS[kind].needs)) or not needed <= set(names.values()):
            listed = ()  # nobody's
        if listed is None:
            listed = [name for path, name in names.items() if path.name in _USUAL or path.suffix in _ENDINGS]
        known = {*listed, *((ABOUT, CARD) if listed else ())}
        for path, name in names.items():
            if name not in known and name.split("/")[0] not in _STRANGERS:
                foreign.append(path.relative_to(folder).as_posix())
    return foreign


def _hash(file: Any) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()
