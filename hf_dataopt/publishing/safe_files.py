"""Reading files that somebody else wrote: names, sizes and headers are checked first, and nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CARD = "README.md"
MAX_JSON = 64 * 2**20
MAX_CARD = 16 * 2**20  # of it at most 1 MiB of text
_MAX_TEXT = 2**20
MAX_HEADER = 16 * 2**20
MAX_FILES = 10_000
MAX_DEPTH = 40
# a card names every class of a data set: 21,841 of ImageNet take 1 MB
_MAX_YAML, _MAX_SCALAR = 8 * 2**20, 512 * 2**10
# a table may be this many times as large as its file, and always this large
_MAX_RATIO, _LEAST_TABLE = 1_000, 256 * 2**20
_ROWS = 256  # read at a time
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "U16": 2, "I16": 2, "F32": 4, "U32": 4, "I32": 4}
_BYTES |= {"F64": 8, "U64": 8, "I64": 8, "C64": 8}
# what torch, numpy and joblib would unpickle: never downloaded, never uploaded, never opened
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".dill")
SAFE = (".safetensors", ".parquet", ".json", ".md", ".png", ".html", ".txt", ".jinja", ".model")


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse file names that could lead out of a folder.

    Args:
        names: paths relative to a repository's or folder's root.
        where: what they come from, for the message.

    Raises:
        ValueError: too many names, or one that is absolute, climbs with `..`, or holds `\\`, `:` or control characters.
    """
    for count, name in enumerate(names):
        parts = name.split("/")
        if not name or "\\" in name or ":" in name or not name.isprintable() or {"", ".", ".."} & set(parts):
            raise ValueError(
                f"{where} names a file {name!r:.120}, which is no plain relative path; nothing of it was read"
            )
        if count >= MAX_FILES:
            raise ValueError(f"{where} has more than {MAX_FILES:,} files; an artifact has a few, so this is none")


def files_of(folder: Path) -> list[Path]:
    """The regular files of a folder, subfolders included, sorted; what a Hub client's cache links to is regular too.

    Raises:
        ValueError: no such folder, a name that is refused, a link that leads elsewhere, or a device or pipe.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found = []
    own = folder.resolve()
    # the Hub client's cache: snapshots/COMMIT/file -> blobs/HASH of the same repository
    blobs = own.parent.parent / "blobs" if own.parent.name == "snapshots" else own
    there = list(islice(folder.rglob("*"), 2 * MAX_FILES + 1))  # of a whole disk no more is looked at
    if len(there) > 2 * MAX_FILES:
        raise ValueError(f"{folder} has more than {MAX_FILES:,} files; an artifact has a few, so this is none")
    for path in sorted(there):
        target = path.resolve()
        if path.is_symlink() and not (target.is_relative_to(own) or target.is_relative_to(blobs)):
            raise ValueError(
                f"{path} is a link that leads out of {folder}; put the file itself there if you want it read"
            )
        if not target.exists():
            raise ValueError(f"{path} is a link to nothing; remove it")
        mode = target.stat().st_mode
        if stat.S_ISREG(mode):
            found.append(path)
        elif not stat.S_ISDIR(mode):
            raise ValueError(f"{path} is neither a file nor a folder; remove it")
    check_names([path.relative_to(folder).as_posix() for path in found], str(folder))
    return found


def is_pickle(name: str) -> bool:
    """Whether a file of this name would be unpickled by the library that writes such files."""
    return PurePosixPath(name).suffix.lower() in PICKLES


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: missing, larger than `limit` bytes, not UTF-8, nested too deeply, not JSON, or no object.
    """
    return parse_json(_read_text(path, limit), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object from text that a stranger may have written.

    Raises:
        ValueError: nested too deeply, not JSON, NaN or infinity, or no object.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if _depth(value) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is no JSON that can be read ({type(error).__name__}: {error}); get it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got a {type(value).__name__}; get it again")
    return value


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, level by level: it may be deeper than functions can call themselves."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, list | dict)]:
        depth += 1
        if depth > MAX_DEPTH:
            break
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.40} is too large a number")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read_text(path: Path, limit: int) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing; get the whole artifact again")
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, at most {limit:,} are read; it is not what its name says")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); get it again") from error


def check_safetensors(path: Path) -> dict[str, Any]:
    """Check a safetensors file's size field, header and offsets without reading a tensor.

    Returns:
        The header: dtype, shape and offsets per tensor, and `__metadata__`.

    Raises:
        ValueError: missing, a pickle or zip under another name, a header that is too large or no JSON, offsets that do not fit.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; get the whole artifact again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_HEADER or length > size - 8:
            if start[:1] == b"\x80" or start[:2] == b"PK":
                raise ValueError(f"{path} is a pickle under another name; it was not opened, and nobody should")
            raise ValueError(f"{path} is no safetensors file (header of {length:,} bytes in {size:,}); get it again")
        head = file.read(length)
    try:
        header = json.loads(head)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted(tuple(entry["data_offsets"]) for entry in tensors.values())
        # one after the other without gaps: no two tensors share bytes, and nothing hides between or behind them
        stops = [0, *(stop for _, stop in spans)]
        starts = [*(first for first, _ in spans), size - 8 - length]
        fits = stops == starts and all(a <= b for a, b in spans)
        fits = fits and all(
            _takes(entry) == entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors.values()
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a broken safetensors header ({type(error).__name__}); get it again") from error
    if not fits:
        raise ValueError(f"{path} has tensors that do not fit the file; get it again")
    return header


def _takes(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor by its dtype and shape."""
    shape = entry["shape"]
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError("a shape that is none")
    return math.prod(shape) * (1 if entry["dtype"].startswith("F8_") else _BYTES[entry["dtype"]])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, after `check_safetensors`.

    Raises:
        ValueError: the file is not what its name says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read the tensors of {path}: {error}") from error


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse NaN and infinite values in any floating-point tensor.

    Raises:
        ValueError: there are some; the message names the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r:.80} holds NaN or infinite values")


def check_parquet(path: Path) -> Any:
    """Check a parquet file's footer without reading a row.

    Returns:
        `pyarrow.parquet.ParquetFile`.

    Raises:
        ValueError: missing, or no parquet file.
    """
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    if not path.is_file():
        raise ValueError(f"{path} is missing; get the whole artifact again")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no parquet file that can be read ({error!s:.200}); get it again") from error


def read_table(path: Path) -> Any:
    """The Arrow table in a parquet file, read a few rows at a time and only as long as it is not absurdly larger than the file.

    Raises:
        ValueError: no parquet file, or one that unpacks to more than 1,000 times its size (and 256 MB).
    """
    import pyarrow
    from pyarrow.lib import ArrowException

    file, limit, held, parts = check_parquet(path), max(_LEAST_TABLE, _MAX_RATIO * path.stat().st_size), 0, []
    try:
        for batch in file.iter_batches(batch_size=_ROWS):
            held += batch.nbytes
            if held > limit:
                raise ValueError(f"it unpacks to more than {limit:,} bytes")
            parts.append(batch)
        return pyarrow.Table.from_batches(parts, schema=file.schema_arrow)
    except (ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no parquet file that can be read ({error!s:.200}); get it again") from error


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a README.md.

    Raises:
        ValueError: too large, not UTF-8, or YAML with aliases, tags that build objects, or too much nesting.
    """
    text = _read_text(path, MAX_CARD)
    found = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", text, re.DOTALL | re.MULTILINE)
    metadata = {} if found is None else read_yaml(found[1], str(path))
    body = text if found is None else text[found.end() :]
    if len(body) > _MAX_TEXT:
        raise ValueError(f"{path} has {len(body):,} characters of text, at most {_MAX_TEXT:,} are read; shorten it")
    return metadata, body


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """A mapping from YAML that a stranger wrote.

    Raises:
        ValueError: too large, nested too deeply, with anchors or tags that build objects, or no mapping.
    """
    import yaml

    if len(text) > _MAX_YAML:
        raise ValueError(f"the metadata of {where} has {len(text):,} characters, at most {_MAX_YAML:,} are read")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it repeats itself by aliases")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_SCALAR:
                raise ValueError(f"one value has {len(event.value):,} characters, at most {_MAX_SCALAR:,} are read")
            starts = isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent)
            depth += starts - isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        value = yaml.load(text, Loader=loader)  # noqa: S506 - one of the two safe loaders
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(
            f"the metadata of {where} was refused ({type(error).__name__}: {message:.200}); edit the card"
        ) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"the metadata of {where} must be a mapping, got a {type(value).__name__}; edit the card")
    return value
