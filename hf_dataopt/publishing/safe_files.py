"""Reading files that somebody else wrote: names, sizes and headers are checked first, and nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..progress import told

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

CARD = "README.md"
MAX_JSON = 64 * 2**20
MAX_CARD = 16 * 2**20  # of it at most 1 MiB of text
_MAX_TEXT = 2**20
MAX_HEADER = 4 * 2**20
# largest value of keys, values and weights: what float16 holds. Beyond it sums of products turn into infinity and NaN
MAX_VALUE = 65504.0
MAX_FILES = 10_000
MAX_DEPTH = 40
# lists and objects in a JSON file, events in YAML: each takes far more memory than its two signs in the file
_MAX_PARTS = 2**20
_YAML_TEXT = "tag:yaml.org,2002:str"
_MAX_AXES, _MAX_AXIS = 16, 2**48
_LONGEST_NUMBER = 1_000
# a card names every class of a data set: 21,841 of ImageNet take 1 MB
_MAX_YAML, _MAX_SCALAR = 8 * 2**20, 512 * 2**10
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


def files_of(folder: Path, besides: tuple[str, ...] = ()) -> list[Path]:
    """The regular files of a folder, subfolders included, sorted; what a Hub client's cache links to is regular too.

    Args:
        folder: where to look.
        besides: names in it that are left out, whatever they are.

    Raises:
        ValueError: no such folder, a name that is refused, a link that leads elsewhere, or a device or pipe.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found = []
    own = folder.resolve()
    # the Hub client's cache: snapshots/COMMIT/file -> blobs/HASH of the same repository
    blobs = own.parent.parent / "blobs" if own.parent.name == "snapshots" else own
    for path in sorted(_entries(folder, besides)):
        try:
            target = path.resolve()
        except (OSError, RuntimeError) as error:  # a link to itself
            raise ValueError(f"{told(path)} is a link to nothing; remove it") from error
        if path.is_symlink() and not (target.is_relative_to(own) or target.is_relative_to(blobs)):
            raise ValueError(
                f"{told(path)} is a link that leads out of {told(folder)}; put the file itself there if you want it read"
            )
        if not target.exists():
            raise ValueError(f"{told(path)} is a link to nothing; remove it")
        mode = target.stat().st_mode
        if stat.S_ISREG(mode):
            found.append(path)
        elif not stat.S_ISDIR(mode):
            raise ValueError(f"{told(path)} is neither a file nor a folder; remove it")
    check_names([path.relative_to(folder).as_posix() for path in found], str(folder))
    return found


def _entries(folder: Path, besides: tuple[str, ...]) -> Iterator[Path]:
    """Everything in a folder and in its folders, but for these names in it; links to folders are named, not followed."""
    left, count = [(folder, 1)], 0
    while left:
        here, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"{told(folder)} holds folders more than {MAX_DEPTH} deep; an artifact has a few")
        with os.scandir(here) as entries:
            for entry in entries:
                if depth == 1 and entry.name in besides:
                    continue
                count += 1
                if count > 2 * MAX_FILES:
                    raise ValueError(f"{told(folder)} has more than {MAX_FILES:,} files; an artifact has a few")
                yield here / entry.name
                if entry.is_dir(follow_symlinks=False):
                    left.append((here / entry.name, depth + 1))


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
        ValueError: nested too deeply, too many lists and objects, not JSON, NaN or infinity, or no object.
    """
    try:
        _check_nesting(text)
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is no JSON that can be read ({type(error).__name__}: {told(error)}); get it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got a {type(value).__name__}; get it again")
    return value


def _check_nesting(text: str) -> None:
    """Depth and number of lists and objects, from the signs alone: what is too deep never reaches a parser."""
    count = text.count("[") + text.count("{")
    if count <= MAX_DEPTH:
        return
    if count > _MAX_PARTS:
        raise ValueError(f"it holds {count:,} lists and objects, at most {_MAX_PARTS:,} are read")
    depth = 0
    for sign in _BRACKETS.findall(_STRINGS.sub("", text)):
        depth += 1 if sign in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


_STRINGS, _BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL), re.compile(r"[\[\]{}]")


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
    if size <= limit:
        with path.open("rb") as file:
            content = file.read(limit + 1)  # the size of a file that grows, or of none on a disk, says nothing
        size = len(content)
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, at most {limit:,} are read; it is not what its name says")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({told(error)}); get it again"
        ) from None  # it holds all of the text


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
        header = parse_json(head.decode("utf-8"), "the header")
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted(tuple(entry["data_offsets"]) for entry in tensors.values())
        # one after the other without gaps: no two tensors share bytes, and nothing hides between or behind them
        stops = [0, *(stop for _, stop in spans)]
        starts = [*(first for first, _ in spans), size - 8 - length]
        fits = stops == starts and all(a <= b for a, b in spans)
        fits = fits and all(
            _takes(entry) == entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a broken safetensors header ({type(error).__name__}); get it again") from error
    if not fits:
        raise ValueError(f"{path} has tensors that do not fit the file; get it again")
    return header


def _takes(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor by its dtype and shape."""
    shape, count = entry["shape"], 1
    if len(shape) > _MAX_AXES:
        raise ValueError("too many axes")
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_AXIS:
            raise ValueError("a shape that is none")
        count *= size
    return count * (1 if entry["dtype"].startswith("F8_") else _BYTES[entry["dtype"]])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, after `check_safetensors`.

    Raises:
        ValueError: the file is not what its name says, or holds a flag that is neither true nor false.
    """
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = _load(path, load_file)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise ValueError(f"{path} holds flags in {name!r:.80} that are neither true nor false; get it again")
    return tensors


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """`read_tensors` as numpy arrays; dtypes that numpy lacks are refused."""
    from safetensors.numpy import load_file

    arrays: dict[str, NDArray[Any]] = _load(path, load_file)
    for name, array in arrays.items():
        if array.dtype.kind == "b" and array.size and int(array.view("u1").max()) > 1:
            raise ValueError(f"{path} holds flags in {name!r:.80} that are neither true nor false; get it again")
    return arrays


def _load(path: Path, load: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    from safetensors import SafetensorError

    check_safetensors(path)
    try:
        return load(str(path))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read the tensors of {path}: {told(error)}; get it again") from None  # it quotes names


def check_finite(tensors: Mapping[str, torch.Tensor], most: float | None = None) -> None:
    """Refuse NaN and infinite values in any floating-point tensor, and values that products would make so.

    Args:
        tensors: by name.
        most: largest size of a value; None: any that is finite.

    Raises:
        ValueError: there are some; the message names the tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        wide = tensor if tensor.element_size() > 1 else tensor.float()  # of 8 bits torch finds no extremes
        low, high = (float(one) for one in wide.aminmax())
        if not max(-low, high) < float("inf"):  # NaN too
            raise ValueError(f"{name!r:.80} holds NaN or infinite values")
        if most is not None and max(-low, high) > most:
            raise ValueError(f"{name!r:.80} holds values of {low:g} to {high:g}, at most {most:g} are used")


def check_parquet(path: Path) -> Any:
    """Check a parquet file's footer without reading a row.

    Returns:
        `pyarrow.parquet.ParquetFile`.

    Raises:
        ValueError: missing, no parquet file, or one that claims to hold far more than its size.
    """
    from . import tables

    if not path.is_file():
        raise ValueError(f"{path} is missing; get the whole artifact again")
    try:
        return tables.opened(path)
    except tables.UNREADABLE as error:
        raise ValueError(f"{path} is no parquet file that can be read ({told(error)}); get it again") from None


def read_table(path: Path) -> Any:
    """The Arrow table in a parquet file, read a few rows at a time and only as long as it is not absurdly larger than the file.

    Raises:
        ValueError: no parquet file, or one that unpacks to more than `tables.MAX_RATIO` times its size (and 256 MB).
    """
    from . import tables

    file = check_parquet(path)
    try:
        return tables.read(path, file)
    except tables.UNREADABLE as error:
        raise ValueError(f"{path} is no parquet file that can be read ({told(error)}); get it again") from None


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
        depth, resolve = 0, yaml.resolver.Resolver().resolve
        for count, event in enumerate(yaml.parse(text, Loader=loader)):
            if count > _MAX_PARTS:
                raise ValueError(f"it has more than {_MAX_PARTS:,} parts")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it repeats itself by aliases")
            if getattr(event, "tag", None) not in (None, "!", _YAML_TEXT):
                raise ValueError(f"it has the tag {event.tag!r:.80}; plain values need none")
            if isinstance(event, yaml.ScalarEvent):
                if len(event.value) > _MAX_SCALAR:
                    raise ValueError(f"one value has {len(event.value):,} characters, at most {_MAX_SCALAR:,} are read")
                long = not event.style and len(event.value) > _LONGEST_NUMBER
                if long and resolve(yaml.ScalarNode, event.value, (True, False)) != _YAML_TEXT:
                    raise ValueError(f"one number has {len(event.value):,} digits")
            starts = isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent)
            depth += starts - isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        value = yaml.load(text, Loader=loader)  # noqa: S506 - one of the two safe loaders
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ) as error:
        # the library's own message quotes the text
        raise ValueError(
            f"the metadata of {where} was refused ({type(error).__name__}: {told(error)}); edit the card"
        ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"the metadata of {where} must be a mapping, got a {type(value).__name__}; edit the card")
    return value
