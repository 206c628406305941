"""Torn, flipped and hostile variants of everything that is saved, counted.

Invariants: a variant is refused with ValueError, TypeError or OSError and a message without control characters, or it loads.
What loads is what was saved, bit for bit, wherever a hash was given; without hashes another result is allowed for values that
may be anything (a score, a pixel), and only finite ones. Nothing crashes, hangs, or answers NaN.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_dataopt import CompressedContextMemory, KVzipCache, MultiFormation, RelationReport, StreamingContextMemory
from hf_dataopt.ccm.saved import load_adapter
from hf_dataopt.checkpoint import PassCheckpoint
from hf_dataopt.cli import _console
from hf_dataopt.condensation.saved import load_condensed
from hf_dataopt.kvzip.gates import KVzipGates
from hf_dataopt.kvzip.head_scores import load_head_scores
from hf_dataopt.publishing.artifacts import fetch
from hf_dataopt.publishing.dataset_files import read_parquet
from hf_dataopt.publishing.info import describe
from hf_dataopt.shell.info import show

from ..counts import tell
from ..hub.damage import without_list
from ..hub.everything import adapted
from ..models import byte_tokenizer, tiny_model
from .saves import SAVES

SECONDS, MEMORY = 20, 1_500  # MB
LEAST = 80  # variants of each kind
RECORDS = ("hf_dataopt.json", "README.md")
SEED = int(os.environ.get("HOSTILE_SEED", "0"))  # others find others
QUESTION = [5, 6, 7]


@cache
def base() -> Any:
    return tiny_model("llama")


@cache
def tuned() -> Any:
    return adapted(tiny_model("llama"))


def _logits(memory: CompressedContextMemory) -> list[Any]:
    return [memory.logits(QUESTION), *(part for layer in memory.layers for part in layer)]


def read_cache(folder: Path) -> list[Any]:
    cache = KVzipCache.from_pretrained(folder, base())
    inputs = cache.inputs(torch.tensor(QUESTION))
    inputs["input_ids"] = inputs["input_ids"][:, cache.ids.shape[1] :]
    with torch.no_grad():
        found = base()(**inputs, use_cache=True).logits
    prompt = [getattr(cache.prompt, name) for name in ("suffix_ids", "first_repeat_ids", "next_repeat_ids")]
    return [found, *prompt, cache.config.to_json_string()]


def read_memory(folder: Path) -> list[Any]:
    memory = CompressedContextMemory.from_pretrained(tuned(), folder)
    found = [*_logits(memory), memory.steps, torch.tensor(memory.tokens_seen), memory.peak_slots, memory.peak_kv_bytes]
    memory.append(QUESTION)
    return [*found, *_logits(memory)]


def read_stream(folder: Path) -> list[Any]:
    stream = StreamingContextMemory.from_pretrained(tuned(), folder, byte_tokenizer())
    return [stream.tokens_seen, stream.feed(QUESTION * 12), stream.memory_slots]


def read_heads(folder: Path) -> list[Any]:
    return list(load_head_scores(folder))


def read_gates(folder: Path) -> list[Any]:
    gates = KVzipGates.from_pretrained(folder)
    given = torch.linspace(-1, 1, 3 * gates.weights.width).view(3, -1)
    return [*gates.weights.tensors.values(), gates.score(0, given), gates.config.to_json_string(), str(gates.made_by)]


def read_adapter(folder: Path) -> list[Any]:
    model = load_adapter(tiny_model("llama"), folder)
    memory = CompressedContextMemory(model)
    memory.append([9, 8, 7])
    return [*_logits(memory), model.peft_config["default"].memory]


def read_report(folder: Path) -> list[Any]:
    report = RelationReport.load(folder)
    arrays = [report.labels, report.label_noise_score, report.is_label_error, report.suggested_label, report.is_outlier]
    kept = report.reference[0]
    width, classes = kept.features.shape[1], 0 if kept.probs is None else kept.probs.shape[1]
    rows = {kept.features_column: np.eye(3, width, dtype=np.float32)}
    rows[kept.probs_column] = np.eye(3, classes, dtype=np.float32)
    new = report.score_outliers(rows, quiet=True)
    settings = [report.label_column, report.label_names, report.label_values, report.config, report.outlier_level]
    return [*arrays, report.outlier_score, new, *map(repr, settings)]


def read_condensed(folder: Path) -> list[Any]:
    condensed = load_condensed(folder)
    formed = condensed.map(MultiFormation.from_dataset(condensed), batched=True, keep_in_memory=True)
    return [np.asarray(one.with_format(None)[:][name]) for one in (condensed, formed) for name in ("image", "label")]


def read_cleaned(folder: Path) -> list[Any]:
    fetch(folder, "cleaned_dataset")
    rows = read_parquet(folder)
    return [*(np.asarray(rows[name][:]) for name in rows.column_names), *read_report(folder / "report")]


READERS: dict[str, Callable[[Path], list[Any]]] = {
    "cache": read_cache,
    "memory": read_memory,
    "stream": read_stream,
    "heads": read_heads,
    "gates": read_gates,
    "adapter": read_adapter,
    "report": read_report,
    "condensed": read_condensed,
    "cleaned": read_cleaned,
}


@dataclass(frozen=True)
class Variant:
    """One damage: to which file, what it makes of its content, and whether another result is then allowed."""

    file: str
    make: Callable[[bytes], bytes | None]  # None: no file
    listed: bool = True  # with the list of hashes
    free: bool = False  # values that may be anything


# -- what is done to files


def flips(rng: random.Random) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        broken = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 3))):
            place = rng.randrange(8 * len(broken))
            broken[place // 8] ^= 1 << (place % 8)
        return bytes(broken)

    return flip


def torn(rng: random.Random) -> Callable[[bytes], bytes]:
    kind = rng.choice(("cut", "cut", "zeros", "noise", "twice", "longer"))

    def tear(content: bytes) -> bytes:
        start = rng.randrange(len(content))
        stop = min(len(content), start + rng.randrange(1, 600))
        middle = bytes(stop - start) if kind == "zeros" else rng.randbytes(stop - start)
        if kind in ("zeros", "noise"):
            return content[:start] + middle + content[stop:]
        return {"cut": content[:start], "twice": content * 2, "longer": content + middle}[kind]

    return tear


DEEP: Any = "deep"
EVIL = "\x1b[2J\x1b]0;owned\x07\u202eabc\x9b31m\r"
VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1e308, -1e308, 0.5, "", "x", "0", EVIL, "../../etc/passwd", "\ud800", [],
    {}, [[]], [EVIL], {"a": 1}, {EVIL: EVIL}, [None] * 3, list(range(50)), "9" * 5_000, "(a+)+$", DEEP,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every entry of a JSON object, lists by their first and last."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        if isinstance(value, list) and key not in (0, len(value) - 1):
            continue
        yield (*path, key)
        yield from places(one, (*path, key))


def entries(rng: random.Random, only: Callable[[tuple[Any, ...]], bool]) -> Callable[[bytes], bytes]:
    """One entry of a JSON file replaced, removed or added."""

    def change(content: bytes) -> bytes:
        whole = json.loads(content)
        path = rng.choice([one for one in places(whole) if only(one)])
        inner = whole
        for key in path[:-1]:
            inner = inner[key]
        what = rng.choice([*VALUES, "remove", "add"])
        if what == "remove":
            del inner[path[-1]]
        elif what == "add" and isinstance(inner, dict):
            inner[EVIL] = EVIL
        elif what == DEEP:
            inner[path[-1]] = 0
            return json.dumps(whole).encode().replace(b": 0", b": " + b"[" * 100_000 + b"]" * 100_000, 1)
        else:
            inner[path[-1]] = copy.deepcopy(what)
        return json.dumps(whole).encode()

    return change


def tensors(rng: random.Random, scratch: Path) -> Callable[[bytes], bytes]:
    """One tensor of a safetensors file made into what it should not be."""

    def change(content: bytes) -> bytes:
        (scratch / "x.safetensors").write_bytes(content)
        whole = load_file(scratch / "x.safetensors")
        name = rng.choice(sorted(whole))
        one = whole[name].clone()
        how = rng.choice(
            (
                "nan",
                "inf",
                "huge",
                "tiny",
                "drop",
                "empty",
                "scalar",
                "transpose",
                "double",
                "int",
                "more",
                "name",
                "first",
                "fill",
            )
        )
        if how in ("nan", "inf", "huge", "tiny", "fill"):
            value = {"nan": float("nan"), "inf": float("-inf"), "huge": 3e38, "tiny": 1e-40, "fill": 2.0}[how]
            if not one.is_floating_point():
                value = rng.choice((-1, 10**6, 2**62)) if one.dtype == torch.int64 else 1
            one.view(-1)[rng.randrange(max(1, one.numel())) if how != "fill" else slice(None)] = value
        made = {
            "drop": None,
            "empty": one[:0] if one.ndim else one,
            "scalar": torch.zeros((), dtype=one.dtype),
            "transpose": one.transpose(0, -1) if one.ndim else one,
            "double": one.double(),
            "int": one.to(torch.int32),
            "first": one[:1] if one.ndim else one,
        }.get(how, one)
        whole.pop(name)
        if made is not None:
            whole[EVIL if how == "name" else name] = made.contiguous()
        if how == "more":
            whole[EVIL] = torch.ones(2)
        return _safetensors(whole, scratch)

    return change


def _safetensors(whole: dict[str, torch.Tensor], scratch: Path) -> bytes:
    save_file(whole, scratch / "y.safetensors")
    return (scratch / "y.safetensors").read_bytes()


def flags(content: bytes) -> bytes:
    """A truth value that is neither true nor false."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    for entry in header.values():
        if (
            isinstance(entry, dict)
            and entry.get("dtype") == "BOOL"
            and entry["data_offsets"][0] != entry["data_offsets"][1]
        ):
            place = 8 + length + entry["data_offsets"][0]
            return content[:place] + b"\x7f" + content[place + 1 :]
    return content[: 8 + length // 2]


def headers(rng: random.Random) -> Callable[[bytes], bytes]:
    """A safetensors header whose entries lie."""
    change = entries(rng, lambda path: True)

    def lie(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = change(content[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    return lie


def variants(name: str, folder: Path, scratch: Path) -> list[Variant]:
    """At least `LEAST` of one kind; half of them without hashes, so that values alone decide."""
    rng = random.Random(f"{name} {SEED}")
    found = []
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    others = {"report.html", "preview.png", "worst.png"}
    for file in [one for one in files if Path(one).name not in others]:
        # neither is in the list of hashes
        own, ending = Path(file).name in RECORDS, Path(file).suffix
        made: list[tuple[Callable[[bytes], bytes | None], bool]] = []
        made += [(flips(rng), True) for _ in range(10)] + [(torn(rng), True) for _ in range(6)]
        made += [
            (lambda content: b"", False),
            (lambda content: None, False),
            (lambda content: b"\x80\x04" + content, False),
        ]
        if ending == ".json":
            anything = lambda path: path[0] != "files"  # noqa: E731
            made += [(entries(rng, anything), True) for _ in range(24)]
        elif ending == ".safetensors":
            made += [(tensors(rng, scratch), True) for _ in range(24)]
            made += [(headers(rng), True) for _ in range(8)] + [(flags, False)]
        if "/" in file and ending != ".parquet":  # a report in a cleaned set: a kind of its own above
            made = rng.sample(made, len(made) // 3)
        for make, free in made:
            found.append(Variant(file, make, listed=False, free=free))
            if rng.random() < 0.4:
                found.append(Variant(file, make, free=own and free))
    return found


# -- what may come of it


class Hang(BaseException):
    """A reader that does not end."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shown(folder: Path) -> list[Any]:
    """What `hf-dataopt info` writes into a terminal: its signs that are none."""
    screen = io.StringIO()
    show(describe(folder), _console(file=screen, width=100))
    bad = {one for one in screen.getvalue() if not one.isprintable()} - {"\n"}
    assert not bad, bad
    return [""]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor | np.ndarray):
        first, second = np.asarray(one), np.asarray(other)
        return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    return bool(one == other)


def holds_nan(found: list[Any]) -> bool:
    arrays = [np.asarray(one) for one in found if isinstance(one, torch.Tensor | np.ndarray)]
    return any(bool(np.isnan(one).any()) for one in arrays if one.dtype.kind == "f")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what a traceback would show with it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def outcome(read: Callable[[Path], list[Any]], folder: Path, whole: list[Any], free: bool) -> str:
    try:
        with limited():
            found = read(folder)
    except (ValueError, TypeError, OSError) as error:
        shown = "".join(str(one) for one in chain(error))
        bad = {one for one in shown if not one.isprintable()} - {"\n", "\t"}
        return f"told {bad}: {error!r:.300}" if bad else "refused"
    except Hang:
        return "hang"
    except Exception as error:  # noqa: BLE001 - what the test is about
        return f"crash {type(error).__name__}: {error!s:.200}"
    if holds_nan(found):
        return "NaN"
    if len(found) == len(whole) and all(map(same, found, whole)):
        return "equal"
    return "changed" if free else "changed although it must not"


@pytest.mark.parametrize("name", READERS)
def test_nothing_is_silently_wrong(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SAVES[name](tmp_path).first(tmp_path / "whole")
    read = READERS[name]
    whole = read(tmp_path / "whole")
    assert not holds_nan(whole)
    cases = variants(name, tmp_path / "whole", tmp_path)
    counts: Counter[str] = Counter()
    wrong = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        shutil.copytree(tmp_path / "whole", tmp_path / "it")
        if not case.listed:
            for record in (tmp_path / "it").rglob("hf_dataopt.json"):
                without_list(record.parent)
        target = tmp_path / "it" / case.file
        content = case.make(target.read_bytes())
        target.unlink()
        if content is not None:
            target.write_bytes(content)
        found = outcome(read, tmp_path / "it", whole, case.free)
        counts[found.split()[0]] += 1
        seen = outcome(shown, tmp_path / "it", [""], True) if case.file in RECORDS else "refused"
        for one in (found, seen):
            if one not in ("refused", "equal", "changed"):
                wrong.append((case.file, case.listed, one))
        if wrong and (keep := os.environ.get("KEEP_HOSTILE")):
            shutil.copytree(tmp_path / "it", Path(keep) / f"{name}-{len(wrong)}")
        shutil.rmtree(tmp_path / "it")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    with capsys.disabled():
        tell("hostile file", name, {"variants": len(cases), **dict(sorted(counts.items())), "MB more at most": grown})
    assert not wrong
    assert len(cases) >= LEAST and counts["refused"] > len(cases) // 3
    assert grown < MEMORY


def test_checkpoints_are_whole_or_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rng, place, key = random.Random(f"checkpoint {SEED}"), tmp_path / "part.safetensors", {"data": "a", "settings": "b"}
    like = {"sums": torch.rand(40, generator=torch.Generator().manual_seed(0)), "counts": torch.arange(7)}
    PassCheckpoint(place, key).save(5, like, force=True)
    whole, counts = place.read_bytes(), Counter[str]()
    anything = lambda path: True  # noqa: E731
    changes = [make(rng) for make in (flips, torn, headers) for _ in range(40)]
    changes += [tensors(rng, tmp_path) for _ in range(24)] + [lambda content: b"", lambda content: content[:8]]

    def about(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def within(content: bytes) -> bytes:
            length = struct.unpack("<Q", content[:8])[0]
            header = json.loads(content[8 : 8 + length])
            header["__metadata__"]["about"] = change(header["__metadata__"]["about"].encode()).decode()
            text = json.dumps(header).encode()
            return struct.pack("<Q", len(text)) + text + content[8 + length :]

        return within

    changes += [about(entries(rng, anything)) for _ in range(60)]
    for change in changes:
        place.write_bytes(change(whole))
        with limited():
            found = PassCheckpoint(place, key).load(10, like)
        counts["left alone" if found is None else "equal"] += 1
        if found is not None:
            assert found[0] == 5 and all(torch.equal(found[1][name], value) for name, value in like.items())
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == counts["left alone"] > 100
    assert all(
        "part.safetensors" in one and not {*one} - {"\n"} - {sign for sign in one if sign.isprintable()} for one in said
    )
    with capsys.disabled():
        tell("hostile file", "checkpoint", {"variants": len(changes), **dict(sorted(counts.items()))})
