"""State of a long job on disk, and the lock of its folder.

A checkpoint is one safetensors file, written beside its place, flushed and moved in, so that a kill costs one step at most.
It carries a hash of its content and what it was made of. Damage, another job's file, other data or other settings start
that part afresh, with a warning that names the file: a checkpoint costs time when it is lost, never a result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from . import distributed
from .errors import FolderInUseError
from .progress import printable

try:
    import fcntl
except ImportError:  # not on Windows: the process number in the file decides there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
FORMAT = 2
LOCK = ".hf_dataopt.lock"
# safetensors raises its own errors, JSON ValueError, foreign content any of the others
_UNREADABLE = (
    SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError,
)  # fmt: skip


class PassCheckpoint:
    """Named vectors and a counter of one pass, saved every few seconds and found again after a kill.

    Args:
        path: file to write; None keeps nothing. Its name is part of what a file must match: files of two passes that
            changed places are both started afresh.
        key: what the numbers depend on, by name ("data", "settings", "process"); another key starts afresh.
        every_seconds: least time between two writes.
    """

    def __init__(self, path: Path | None, key: Mapping[str, str], every_seconds: float = 1.0) -> None:
        self.path, self.key, self.every_seconds = path, dict(key), every_seconds
        self._written = time.monotonic()
        self._warned = False

    def load(self, total: int, like: Mapping[str, Tensor] | None = None) -> tuple[int, dict[str, Tensor]] | None:
        """What an earlier run with the same key finished.

        Args:
            total: steps of the whole pass; a counter outside [0, total] starts afresh.
            like: tensors that must be there, with this shape and dtype.

        Returns:
            Finished steps and tensors that own their memory, or None.
        """
        if self.path is None or not os.path.lexists(self.path):
            return None
        try:
            if not self.path.is_file():
                raise ValueError("it is no regular file")
            content = self.path.read_bytes()
            about = _about(content)
            vectors = load(content)
            if about["hash"] != _digest(about, vectors):
                raise ValueError("its content does not match its hash")
            why = self._unfit(about, vectors, total, like or {})
        except _UNREADABLE as error:
            why = f"is damaged ({error!s:.200})"
        if why:
            logger.warning("checkpoint %s %s; this part is starting afresh", self.path, printable(why))
            return None
        return about["done"], {name: value.clone() for name, value in vectors.items()}

    def _unfit(
        self, about: Mapping[str, Any], vectors: Mapping[str, Tensor], total: int, like: Mapping[str, Tensor]
    ) -> str:
        """Why a whole file does not belong to this pass; empty where it does."""
        if about["format"] != FORMAT:
            return f"has format {about['format']}, this release writes {FORMAT}"
        if self.path is None or about["name"] != self.path.name:
            return f"was written as {about['name']!s:.200}, for another pass"
        differs = sorted({*self.key, *about["key"]} - {n for n, v in self.key.items() if about["key"].get(n) == v})
        if differs:
            return f"was written for other {' and '.join(differs)}"
        if not 0 <= about["done"] <= total:
            return f"has finished {about['done']} steps, {total} are asked for"
        for name, value in like.items():
            found = vectors.get(name)
            if found is None or found.shape != value.shape or found.dtype != value.dtype:
                return f"holds no {name} of shape {tuple(value.shape)}"
        return ""

    def save(self, done: int, vectors: Mapping[str, Tensor], *, force: bool = False) -> None:
        """Write the state if `every_seconds` have passed since the last write, or when forced.

        A disk that is full or gone is warned of once; the job goes on without.
        """
        if self.path is None or not (force or time.monotonic() - self._written >= self.every_seconds):
            return
        about: dict[str, Any] = {"format": FORMAT, "name": self.path.name, "key": self.key, "done": done}
        plain = {name: value.detach().cpu().contiguous() for name, value in vectors.items()}
        about["hash"] = _digest(about, plain)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, save(plain, metadata={"about": json.dumps(about, sort_keys=True)}))
        except OSError as error:
            if not self._warned:
                logger.warning("%s cannot be written (%s); a killed run would start this part again", self.path, error)
            self._warned = True
        self._written = time.monotonic()


def _about(content: bytes) -> dict[str, Any]:
    """The JSON object that `save` put into the header, its types checked."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about: dict[str, Any] = json.loads(header["__metadata__"]["about"])
    kinds = {"format": int, "name": str, "key": dict, "done": int, "hash": str}
    if set(about) != set(kinds) or any(type(about[name]) is not kind for name, kind in kinds.items()):
        raise ValueError("its header is none of ours")
    return about


def _digest(about: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> str:
    """Hash over everything that is read back: counter, key, and every tensor's name, type, shape and bytes."""
    named = {name: about[name] for name in ("format", "name", "key", "done")}
    kinds = [[name, str(value.dtype), list(value.shape)] for name, value in sorted(vectors.items())]
    digest = hashlib.blake2b(json.dumps([named, kinds], sort_keys=True).encode(), digest_size=16)
    for _, value in sorted(vectors.items()):
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, move in: at any moment the old file or the whole new one is there."""
    draft = path.with_name(f"{path.name}.tmp")  # one name: what a killed run left is written over, not added to
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:  # a full disk, Ctrl-C
        with suppress(OSError):
            draft.unlink()
        raise
    if hasattr(os, "O_DIRECTORY"):  # the move itself survives a power cut
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


_held: dict[Path, tuple[tuple[int, int], int]] = {}  # folders locked here: (process, thread), depth
_held_guard = threading.Lock()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other jobs off an output folder while the block runs.

    The folder gets a file with this process's number and host. It is held by a lock of the operating system where there
    is one, which ends with the process: what a killed job left behind is taken over. Where there is none, the owner's
    number decides. The same thread may lock a folder again. Of a job on several processes the main one locks.

    Args:
        folder: made if missing, and gone again if nothing was put into it then.

    Raises:
        FolderInUseError: another job is writing there.
        OSError: the folder cannot be made or written to.
    """
    if not distributed.is_main_process():
        yield
        return
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    place, me = folder.resolve(), (os.getpid(), threading.get_ident())
    with _held_guard:
        owner, depth = _held.get(place, (me, 0))
        if owner[0] != me[0]:  # the parent's, copied by a fork
            owner, depth = me, 0
        if owner != me:
            raise FolderInUseError(_refusal(folder, f"another thread of this process ({me[0]})"))
        file = _take(place / LOCK) if depth == 0 else None
        _held[place] = (me, depth + 1)
    try:
        yield
    finally:
        with _held_guard:
            if file is None:
                _held[place] = (me, depth)
            else:
                del _held[place]
                with suppress(OSError):
                    os.ftruncate(file, 0)  # where an open file cannot be unlinked, an empty one is free
                    (place / LOCK).unlink()
                os.close(file)
                if new:
                    with suppress(OSError):
                        place.rmdir()


def _take(path: Path) -> int:
    """The lock file, opened and ours."""
    while True:
        file = os.open(
            path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o644
        )
        try:
            owner = os.read(file, 1000).decode(errors="replace")
            if not _is_free(file, owner):
                raise FolderInUseError(_refusal(path.parent, _named(owner)))
            if not path.exists() or os.stat(path).st_ino != os.fstat(file).st_ino:
                os.close(file)  # its owner took it away between our two looks
                continue
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except BaseException:
            os.close(file)
            raise
        return file


def _is_free(file: int, owner: str) -> bool:
    if fcntl is not None:
        try:
            # a record lock: not passed on to forked children, which may outlive a killed job
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            pass
    about = _owner(owner)
    return not about or (about.get("host") == socket.gethostname() and not _alive(about.get("pid")))


def _owner(text: str) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _alive(pid: Any) -> bool:
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _named(owner: str) -> str:
    about = _owner(owner)
    return printable(f"process {about.get('pid', '?')!s:.20} on host {about.get('host', '?')!s:.80}")


def _refusal(folder: Path, who: str) -> str:
    return (
        f"{folder} is being written by {who}; wait for it, end it, or give another output folder "
        f"(if it is gone for good, delete {folder / LOCK})"
    )
