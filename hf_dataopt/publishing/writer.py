"""How an artifact is saved: into a folder beside the target, its list of files last, then swapped in.

Whatever stops a save, the target holds the old copy or the new one, whole. What a killed save has left beside it is removed by
the next one. A folder with files that no save of ours has put there is refused.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..settings import check_path
from . import cards
from .kinds import KINDS, usage
from .names import looks_like_repo
from .record import ABOUT, FORMAT, MINOR, draft_of, foreign_files, is_draft, list_files
from .safe_files import CARD, check_parquet, check_safetensors, read_card, read_json

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_target(folder: str | Path, kind: str, *, besides: tuple[str, ...] = ()) -> Path:
    """Refuse a folder that cannot be replaced by an artifact; to be called before long work begins.

    Args:
        folder: where the artifact is to be saved.
        kind: one of `KINDS`.
        besides: names in it that may go, although no save has put them there.

    Returns:
        The folder, links followed.

    Raises:
        ValueError: no folder, one with files that no save of ours has put there, one that cannot be renamed, or a place where
            nothing can be written.
    """
    target = check_path("folder", folder).resolve()
    recover(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{folder} is a file; name a folder to save to")
    if Path.cwd().is_relative_to(target) or target.is_mount():
        raise ValueError(f"{folder} is the working folder or a mount point and cannot be replaced; name a folder in it")
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written in {above}; name another folder to save to")
    if target.is_dir():
        foreign = foreign_files(target, kind, besides)
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise ValueError(
                f"{folder} holds files that no save of hf_dataopt has put there ({', '.join(map(repr, foreign[:3]))}{more}); "
                "saving replaces the folder, so name another one, or move them"
            )
    return target


@contextmanager
def _heard() -> Iterator[None]:
    """A Ctrl-C ends as one, though a library's native code calls it something else, or nothing (safetensors, pyarrow)."""
    default, pressed = signal.default_int_handler, False
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not default:
        yield
        return

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        default(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, default)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def replacing(folder: str | Path, kind: str, *, besides: tuple[str, ...] = ()) -> Iterator[Path]:
    """A new folder to write an artifact into, ended by `finish`; it takes the place of `folder` when the block ends well.

    Args:
        folder: made if missing; an earlier artifact in it is replaced as a whole.
        kind, besides: see `check_target`.

    Raises:
        ValueError: see `check_target`.
        OSError: it could not be written; what was there before stays.
    """
    from safetensors import SafetensorError

    target = check_target(folder, kind, besides=besides)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target)
    draft, lock = target.with_name(draft_of(target.name, "new")), -1
    try:
        lock = _draft(draft)
        with _heard():
            yield draft
        if not (draft / ABOUT).is_file():
            raise RuntimeError(f"a save of a {kind} has written no record")
        _swap(draft, target)
    except (SafetensorError, OSError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, OSError) and number not in _NO_ROOM:
            raise
        said = f"{folder} could not be saved ({error}); what was there before is untouched. Make room, or name another folder"
        raise (OSError(number, said) if number else OSError(said)) from error
    finally:
        _remove(draft)
        if lock >= 0:
            os.close(lock)


def finish(
    folder: Path,
    kind: str,
    *,
    about: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    code: Mapping[str, Any] | None = None,
    origin: tuple[str, str] | None = None,
    **card: Any,
) -> Path:
    """Write the card and, last, `hf_dataopt.json` with the list of all files beside the files of an artifact.

    Args:
        folder: where those files are.
        kind: one of `KINDS`.
        about: facts for the JSON file.
        metadata: what the Hub reads of the card, see `cards.hub_metadata`; None for an artifact without a card.
        code: values of the card's first code block.
        origin: (`"model"` or `"dataset"`, Hub name) of what the artifact was made from; a push inherits its licence.
        card: further values of the card's template.

    Returns:
        The folder.

    Raises:
        ValueError: a card or record that our own reader would refuse; nothing else is ever published.
    """
    record = {
        "format_version": FORMAT,
        "format_minor": MINOR,
        "kind": kind,
        "hf_dataopt": _own_version(),
        "code": dict(code or {}),
        **about,
    }
    if origin is not None and looks_like_repo(origin[1]):
        record["source"] = {"type": origin[0], "id": origin[1]}
    if metadata is not None:
        tags = ["hf-dataopt", kind.replace("_", "-"), *metadata.get("tags", [])]
        known = cards.hub_metadata(KINDS[kind].repo_type, **{**metadata, "tags": tags})
        text = cards.render(kind, known, usage=cards.block(usage(kind, **(code or {})), "python"), **card)
        (folder / CARD).write_text(text, encoding="utf-8")
        read_card(folder / CARD)
    record["files"] = list_files(folder)
    for name in record["files"]:
        if name.endswith(".json"):
            read_json(folder / name)
        elif name.endswith(".safetensors"):
            check_safetensors(folder / name)
        elif name.endswith(".parquet"):
            check_parquet(folder / name)
    with (folder / ABOUT).open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    read_json(folder / ABOUT)
    return folder


def recover(target: Path) -> None:
    """Put back the old copy where a save was killed between its two renames (systems that cannot exchange folders)."""
    if target.exists() or not target.parent.is_dir():
        return
    for path in _beside(target):
        if ".old-" in path.name and _idle(path):
            with suppress(OSError):
                path.rename(target)
            return


def _beside(target: Path) -> list[Path]:
    """What saves of this target have made beside it."""
    start = f".{target.name}."
    return [path for path in target.parent.iterdir() if path.name.startswith(start) and is_draft(path.name)]


def _clear(target: Path) -> None:
    """Remove what killed saves have left; other processes that are saving right now hold a lock on theirs."""
    for path in _beside(target):
        if path.is_dir() and _idle(path):
            shutil.rmtree(path, ignore_errors=True)


def _idle(path: Path) -> bool:
    lock = _lock(path)
    if lock is None:
        return False
    os.close(lock)
    return True


def _lock(path: Path) -> int | None:
    """A lock on a folder that ends with the process, or with `os.close`; None where another one has it."""
    try:
        import fcntl
    except ImportError:  # not on Windows: whatever lies there is taken for left over
        return os.open(os.devnull, os.O_RDONLY)
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        return handle
    return handle


def _draft(draft: Path) -> int:
    """Make the folder; the lock that keeps other saves from taking it for left over."""
    while True:
        draft.mkdir(exist_ok=True)
        lock = _lock(draft)
        if lock is not None and draft.is_dir():  # else somebody took it for left over in this very moment
            return lock
        if lock is not None:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, also where Ctrl-C comes in the midst of that."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _swap(draft: Path, target: Path) -> None:
    """Put `draft` in the place of `target`; the old copy is at `draft` afterwards, or gone."""
    _sync(draft)
    if not target.is_dir() or not any(target.iterdir()):
        with suppress(FileNotFoundError):
            target.rmdir()
        draft.rename(target)
    else:
        shutil.copymode(target, draft)
        if not _exchange(draft, target):
            old = target.with_name(draft_of(target.name, "old"))
            target.rename(old)
            try:
                draft.rename(target)
            except OSError:
                old.rename(target)
                raise
            _remove(old)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _sync(folder: Path) -> None:
    """A folder's own entries onto the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _own_version() -> str | None:
    try:
        return version("hf-dataopt")
    except PackageNotFoundError:
        return None
