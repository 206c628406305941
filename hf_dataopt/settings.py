"""Settings and arguments: a JSON round trip for configs, and the one set of checks that public functions begin with.

A check takes an argument's name and what was given. It returns the value to go on with, numpy scalars and 0-d tensors as
Python's own numbers, or raises a `TypeError` (another kind of thing) or `ValueError` (out of range) that says what was
given and what is needed.

Own code because, measured: pydantic 2.14 and beartype 0.23 add 150 to 230 ms to an import of 28 ms; pydantic reads True and
"3" as ints (strict: refuses `np.int64(3)`), beartype raises neither of the two errors and refuses every numpy scalar.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

T = TypeVar("T")
MOST = 2**31 - 1  # of a count, where nothing else bounds it
MOST_SEED = 2**63 - 1
LARGEST = 1.7e308  # finite number


class Settings:
    """Base of the frozen, keyword-only config dataclasses."""

    METHOD: ClassVar[str] = ""  # what messages call the method

    def to_json_string(self) -> str:
        """The settings as one JSON object."""
        own: Any = self
        return json.dumps(asdict(own))

    @classmethod
    def from_json_string(cls, text: str) -> Self:
        """Settings from `to_json_string`'s output.

        Raises:
            ValueError: not JSON, or a field this version does not know.
            TypeError: no text.
        """
        known: Any = cls
        check_text("text", text)
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{text[:80]!r} is no JSON ({error!s:.80}); give what to_json_string wrote") from error
        if not isinstance(values, dict):
            raise ValueError(f"{text[:80]!r} is no JSON object; give what to_json_string wrote")
        unknown = sorted(set(values) - {field.name for field in fields(known)})
        if unknown:
            raise ValueError(f"unknown {cls.METHOD} settings {unknown}; were they written by a newer version?")
        return cls(**values)


def settle(
    settings: Any,
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    numbers: Mapping[str, tuple[float, float]] | None = None,
    counts: Mapping[str, int | tuple[int, int]] | None = None,
    flags: Iterable[str] = (),
    texts: Iterable[str] = (),
    optional: Iterable[str] = (),
    above: Iterable[str] = (),
    below: Iterable[str] = (),
) -> None:
    """Check the fields of a (frozen) dataclass and put the values to go on with in their place.

    Args:
        settings: the dataclass, from its `__post_init__`.
        choices: words by field.
        numbers: least and most by field.
        counts: least, or least and most, by field of an integer.
        flags, texts: fields of booleans and of texts.
        optional: fields that may be None.
        above, below: fields among `numbers` that must differ from their least, from their most.
    """

    def put(names: Iterable[str], check: Callable[[str, Any], Any]) -> None:
        for name in names:
            value = getattr(settings, name)
            if value is not None or name not in optional:
                object.__setattr__(settings, name, check(name, value))

    ranges = {name: one if isinstance(one, tuple) else (one, MOST) for name, one in (counts or {}).items()}
    put(choices or (), lambda name, value: check_choice(name, value, (choices or {})[name]))
    put(
        numbers or (),
        lambda name, value: check_number(name, value, *(numbers or {})[name], above=name in above, below=name in below),
    )
    put(ranges, lambda name, value: check_int(name, value, *ranges[name]))
    put(flags, check_flag)
    put(texts, check_text)


def brief(value: Any) -> str:
    """What was given, in a few words."""
    if isinstance(value, int) and abs(value) > 10**40:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if isinstance(value, str | bytes):
        return f"{value[:60]!r}{'...' if len(value) > 60 else ''}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind, shape, dtype = type(value).__name__, getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"{kind} of shape {tuple(shape)} and dtype {dtype}"
    if isinstance(value, list | tuple | dict | set | frozenset):
        return f"{kind} of {len(value)}"
    return kind


def plain(value: Any) -> Any:
    """A numpy scalar, 0-d array or 0-d tensor as Python's own value; anything else as it is."""
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or shape or isinstance(value, type):
        return value
    try:
        return value.item()
    except (AttributeError, RuntimeError, TypeError, ValueError):  # a meta tensor has no value
        return value


def optional(check: Callable[..., T], name: str, value: Any, *args: Any, **options: Any) -> T | None:
    """None, or what `check` makes of the value."""
    return None if value is None else check(name, value, *args, **options)


def check_number(
    name: str,
    value: Any,
    low: float = -LARGEST,
    high: float = LARGEST,
    *,
    above: bool = False,
    below: bool = False,
    todo: str = "",
) -> float:
    """A finite real number in [low, high]; `above` and `below` leave out the ends.

    Args:
        name: of the argument.
        value: int, float, numpy scalar or 0-d tensor; no bool.
        low, high: the range.
        above, below: whether the number must differ from `low`, from `high`.
        todo: what else to say.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be a number, got {brief(value)}{_said(todo)}")
    inside = low <= number <= high and -LARGEST <= number <= LARGEST  # NaN is not
    if not inside or (above and number == low) or (below and number == high):
        left, right = "(" if above else "[", ")" if below else "]"
        if low <= -LARGEST and high >= LARGEST:
            span = "finite"
        elif high >= LARGEST:
            span = f"finite and {'>' if above else '>='} {low:g}"
        else:
            span = f"in {left}{low:g}, {high:g}{right}"
        raise ValueError(f"{name} must be {span}, got {brief(number)}{_said(todo)}")
    return number


def check_int(name: str, value: Any, least: int = -MOST, most: int = MOST, *, todo: str = "") -> int:
    """A whole number in [least, most]: int, numpy integer or 0-d integer tensor; no bool, no 3.0."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an int, got {brief(value)}{_said(todo)}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {brief(number)}{_said(todo)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {brief(number)}{_said(todo)}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """True or False: bool, numpy bool or 0-d bool tensor."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {brief(value)}; give True or False")
    return flag


def check_choice(name: str, value: Any, words: Sequence[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(words)}, got {brief(value)}")
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {brief(value)}")
    return str(value)


def check_text(name: str, value: Any, *, empty: bool = True, todo: str = "") -> str:
    """A text; `empty=False` refuses one without a sign in it."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {brief(value)}{_said(todo)}")
    if not empty and not value.strip():
        raise ValueError(f"{name} is empty{_said(todo or 'give a text')}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half of a character at place {error.start}, which is no text; repair it"
        ) from error
    return str(value)  # a numpy string is one too, and YAML does not know it


def check_path(name: str, value: Any) -> Path:
    """A path that the system can take: `str` or `os.PathLike`, not empty."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path (str or Path), got {brief(value)}")
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path of text, got {brief(text)}")
    if not text.strip() or "\0" in text or any(len(part) > 255 for part in Path(text).parts):
        raise ValueError(f"{name} must name a file or folder, got {brief(text)}")
    check_text(name, text)
    return Path(text)


def check_kind(name: str, value: Any, kind: type[T] | tuple[type, ...], todo: str = "") -> T:
    """An instance of a class, or of one of several."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds):
        wanted = " or ".join(one.__name__ for one in kinds)
        raise TypeError(f"{name} must be a {wanted}, got {brief(value)}{_said(todo)}")
    found: Any = value
    return found


def check_config(value: Any, kind: type[T], name: str = "config") -> T:
    """Settings of one kind; None stands for their defaults."""
    if value is None:
        return kind()
    return check_kind(name, value, kind, f"give {kind.__name__}(...), or None for its defaults")


def check_callable(name: str, value: Any, todo: str = "") -> Any:
    """What can be called; no class of ours or theirs has to be."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {brief(value)}{_said(todo)}")
    return value


def check_each(
    name: str, value: Any, check: Callable[..., T], *args: Any, least: int = 1, **options: Any
) -> tuple[T, ...]:
    """A list, tuple, column or other sequence, 1-D array or 1-D tensor, each entry checked and the whole as a tuple.

    Args:
        name: of the argument.
        value: what was given.
        check: of an entry; `args` and `options` are handed on to it.
        least: entries.
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape) == 1 and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise TypeError(f"{name} must be a list or tuple, got {brief(value)}")
    if len(value) < least:
        raise ValueError(f"{name} needs at least {least} {'entry' if least == 1 else 'entries'}, got {len(value)}")
    return tuple(check(f"{name}[{place}]", one, *args, **options) for place, one in enumerate(value))


def check_tensor(
    name: str,
    value: Any,
    shape: Sequence[int | str] | None = None,
    *,
    floating: bool | None = True,
    finite: bool = False,
    least: float | None = None,
    todo: str = "",
) -> torch.Tensor:
    """A dense tensor with values.

    Args:
        name: of the argument.
        value: what was given.
        shape: sizes; a word stands for any size of at least 1.
        floating: floats are needed; False: integers; None: one of both.
        finite: refuse NaN and infinity.
        least: refuse smaller values; NaN and infinity pass.
        todo: what else to say of a wrong shape or dtype.
    """
    import torch

    sizes = "" if shape is None else f" ({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor{sizes}, got {brief(value)}")
    if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
        raise TypeError(f"{name} must be a dense tensor with values, got {value.layout} on {value.device}")
    floats = value.is_floating_point()
    whole = not floats and not value.is_complex() and value.dtype != torch.bool
    if not ((floats or whole) if floating is None else floats if floating else whole):
        wanted = "numbers" if floating is None else "floating point" if floating else "integers"
        raise TypeError(f"{name} must be of {wanted}, got {value.dtype}{_said(todo)}")
    if shape is not None:
        fits = value.ndim == len(shape) and all(
            size == want if isinstance(want, int) else size >= 1 for size, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name} must have shape{sizes}, none of them empty, got {tuple(value.shape)}{_said(todo)}"
            )
    if finite and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity; drop or repair those rows")
    if least is not None and bool(((value < least) & torch.isfinite(value)).any()):
        raise ValueError(f"{name} must be >= {least:g}, got {float(value[torch.isfinite(value)].min()):g}")
    return value


def check_shares(name: str, value: Any, shape: Sequence[int | str] = ("B", "classes")) -> torch.Tensor:
    """Rows of shares, such as soft labels: floats (B, classes), >= 0, each row summing to 1."""
    import torch

    found = check_tensor(name, value, shape, todo="one-hot the labels")
    near = 1e-3 if torch.finfo(found.dtype).bits >= 32 else 2e-2
    wrong = ~(((found.sum(1, dtype=torch.float32) - 1).abs() <= near) & (found >= 0).all(1))  # NaN too
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} must be >= 0 and sum to 1 in every row (one label per sample, not several), got a row {row} that sums to "
            f"{float(found[row].sum()):g} with a least value of {float(found[row].min()):g}"
        )
    return found


def check_device(name: str, value: Any, *, here: bool = False) -> str:
    """A device as torch names it, `"cpu"` or `"cuda:0"`; `here` makes sure that this machine has it."""
    import torch

    if not isinstance(value, str | torch.device):
        raise TypeError(f"{name} must be a string such as 'cuda:0', got {brief(value)}")
    try:
        device = torch.device(value)
        if here:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"{name} {brief(str(value))} cannot be used here ({error!s:.80}); give 'cpu' or 'cuda:0'"
        ) from error
    if device.type == "meta":
        raise ValueError(f"{name} 'meta' holds no values; give 'cpu' or 'cuda:0'")
    return str(device)


def check_together(**tensors: torch.Tensor) -> None:
    """Tensors on one device."""
    (first, reference), *others = tensors.items()
    for name, value in others:
        if value.device != reference.device:
            raise ValueError(f"{first} are on {reference.device}, {name} on {value.device}; bring them to one device")


def check_generator(name: str, value: Any) -> torch.Generator:
    """A `torch.Generator` on the CPU."""
    import torch

    found = check_kind(name, value, torch.Generator, "use torch.Generator().manual_seed(...)")
    if found.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got one on {found.device}; use torch.Generator()")
    return found


def check_array(
    name: str, value: Any, ndim: int, *, kinds: str = "fiu", finite: bool = True, rows: int | None = None
) -> np.ndarray[Any, Any]:
    """An array of numbers, from whatever numpy makes one of.

    Args:
        name: of the argument.
        value: array, tensor or nested lists.
        ndim: dimensions; none of them may be empty.
        kinds: numpy's letters of the dtypes that are taken: f floats, i and u integers, b booleans.
        finite: refuse NaN and infinity.
        rows: length of the first dimension.
    """
    import numpy as np

    array = numbers(name, value, kinds=kinds)
    if array.ndim != ndim or not array.size:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, none empty, got shape {array.shape}")
    if rows is not None and len(array) != rows:
        raise ValueError(f"{name} must have {rows} rows, got {len(array)}; give one for each row")
    if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity; drop or repair those rows")
    return array


def numbers(name: str, value: Any, *, kinds: str = "fiu") -> np.ndarray[Any, Any]:
    """An array of numbers of any shape, from an array, a tensor or nested lists; `kinds` as for `check_array`."""
    import numpy as np

    try:
        array = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError, NotImplementedError) as error:
        raise TypeError(f"{name} must be an array of numbers, got {brief(value)} ({error!s:.80})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds:
        words = {"f": "floats", "i": "integers", "b": "booleans"}
        wanted = " or ".join(word for letter, word in words.items() if letter in kinds)
        raise TypeError(
            f"{name} must be an array of {wanted}, got {brief(value)}, dtype {getattr(array, 'dtype', '?')}"
        )
    return array


def check_dataset(name: str, value: Any, todo: str = "pick a split, or load without streaming") -> Any:
    """A `datasets.Dataset`: one split, in memory or memory-mapped."""
    import datasets

    if isinstance(value, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise TypeError(
            f"{name}: need a datasets.Dataset, got {type(value).__name__}; pick one split, such as ...['train']"
        )
    if not isinstance(value, datasets.Dataset):
        raise TypeError(f"{name}: need a datasets.Dataset, got {brief(value)}; {todo}")
    return value


def check_tokenizer(name: str, value: Any) -> Any:
    """A tokenizer or processor of transformers, or what acts as one: called with text, it gives `input_ids`."""
    acts = callable(value) and (hasattr(value, "convert_ids_to_tokens") or hasattr(value, "tokenizer"))
    if not acts or isinstance(value, type):
        raise TypeError(
            f"{name} must be a tokenizer or processor of transformers, got {brief(value)}; use AutoTokenizer"
        )
    return value


def _said(todo: str) -> str:
    return f"; {todo}" if todo else ""
