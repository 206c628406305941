"""Limits of what is read: exactly what they say is read, and not one byte, level or row more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_dataopt.publishing import safe_files
from hf_dataopt.publishing.safe_files import check_safetensors, is_pickle, read_card, read_json, read_table, read_yaml

MEBI = 1_048_576


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def tensors(path: Path, header: Any, data: int) -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * data)
    return path


@pytest.mark.parametrize(("read", "mebi"), [(read_json, 64), (read_card, 16)])
def test_files_are_as_long_as_they_may_be(read: Any, mebi: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as one_more:
        read(sparse(tmp_path / "x", mebi * MEBI + 1))
    assert f"has {mebi * MEBI + 1:,} bytes, at most {mebi * MEBI:,} are read" in str(one_more.value)
    with pytest.raises(ValueError) as just_so:  # zeros are neither JSON nor a short card, but they were read
        read(sparse(tmp_path / "x", mebi * MEBI))
    assert " bytes, at most" not in str(just_so.value)


def test_cards_have_a_mebi_of_text_beside_their_metadata(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for head, metadata in (("", {}), ("---\nlicense: mit\n---\n", {"license": "mit"})):
        card.write_text(head + "x" * MEBI)
        assert read_card(card) == (metadata, "x" * MEBI)
        card.write_text(head + "x" * (MEBI + 1))
        with pytest.raises(ValueError, match="has 1,048,577 characters of text, at most 1,048,576"):
            read_card(card)


def test_card_heads(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for text, found in (
        ("---\na: 1\n---\nb", ({"a": 1}, "b")),
        ("---\r\na: 1\r\n---\r\nb", ({"a": 1}, "b")),
        ("---\n---\nb", ({}, "b")),
        ("b\n---\na: 1\n---\n", ({}, "b\n---\na: 1\n---\n")),
    ):
        card.write_bytes(text.encode())
        metadata, body = read_card(card)
        assert (metadata, body.replace("\r\n", "\n")) == found


def test_metadata_is_as_long_and_as_deep_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 512 * 1024
    assert read_yaml(f"a: {'x' * longest}", "x") == {"a": "x" * longest}
    with pytest.raises(ValueError, match="one value has 524,289 characters, at most 524,288"):
        read_yaml(f"a: {'x' * (longest + 1)}", "x")
    inner = lambda depth: "a: " + "[" * (depth - 1) + "]" * (depth - 1)  # noqa: E731
    assert read_yaml(inner(safe_files.MAX_DEPTH), "x")
    with pytest.raises(ValueError, match=f"more than {safe_files.MAX_DEPTH} deep"):
        read_yaml(inner(safe_files.MAX_DEPTH + 1), "x")
    side_by_side = "".join(f"a{n}: [{{b: [1]}}]\n" for n in range(3 * safe_files.MAX_DEPTH))
    assert len(read_yaml(side_by_side, "x")) == 3 * safe_files.MAX_DEPTH
    monkeypatch.setattr(safe_files, "_MAX_YAML", 4)
    assert read_yaml("a: 1", "x") == {"a": 1}
    with pytest.raises(ValueError, match="has 5 characters, at most 4"):
        read_yaml("a: 12", "x")
    assert read_yaml("", "x") == {}


SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "U16": 2, "I16": 2}
SIZES |= {"F32": 4, "U32": 4, "I32": 4, "F64": 8, "U64": 8, "I64": 8, "C64": 8}


@pytest.mark.parametrize("dtype", SIZES)
def test_tensors_take_what_their_dtype_and_shape_say(dtype: str, tmp_path: Path) -> None:
    for shape, count in (([3, 2], 6), ([], 1), ([0, 5], 0)):
        size = count * SIZES[dtype]
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
        assert check_safetensors(tensors(tmp_path / "x", {"a": entry}, size)) == {"a": entry}
        more = entry | {"data_offsets": [0, size + 1]}
        with pytest.raises(ValueError, match="do not fit"):
            check_safetensors(tensors(tmp_path / "x", {"a": more}, size + 1))


@pytest.mark.parametrize("shape", [[-1, -4], [2.0, 2], ["4"], [None]])
def test_shapes_that_are_none(shape: list[Any], tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, 4]}
    with pytest.raises(ValueError, match="broken safetensors header"):
        check_safetensors(tensors(tmp_path / "x", {"a": entry}, 4))


def test_headers_end_where_the_file_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert check_safetensors(tensors(path, b"{}", 0)) == {}
    for content in (b"", b"\0" * 7, (3).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors file"):
            check_safetensors(path)
    for content in (b"PK\x03\x04" + b"\xff" * 60, b"\x80\x04" + b"\xff" * 60):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="pickle under another name"):
            check_safetensors(path)
    monkeypatch.setattr(safe_files, "MAX_HEADER", 4)
    assert check_safetensors(tensors(path, b"{  }", 0)) == {}
    with pytest.raises(ValueError, match="no safetensors file"):
        check_safetensors(tensors(path, b"{   }", 0))


def test_tables_of_one_value_are_read_however_small_their_file(tmp_path: Path) -> None:
    table = pa.table({"n": pa.array([7] * 2_000_000, pa.int64())})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, compression="zstd")
    assert table.nbytes > 1_000 * path.stat().st_size
    assert read_table(path).equals(table)


@pytest.mark.parametrize("name", ["", "a\\b", "a:b", "a\x1bb", "a//b", "./a", "a/..", "/a"])
def test_names_are_refused_for_one_reason_alone(name: str) -> None:
    safe_files.check_names(["a", "a/b.json"], "x")
    with pytest.raises(ValueError, match="no plain relative path"):
        safe_files.check_names(["a", name], "x")


def test_pickles_by_name() -> None:
    assert is_pickle("a/b.PT") and is_pickle("x.tar.npz")
    assert not is_pickle("a.pt/b.json") and not is_pickle("pt")


def test_nesting_is_counted_from_the_signs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels that were closed again do not count, nor do signs in texts."""
    check, most = safe_files._check_nesting, safe_files.MAX_DEPTH
    flat = "[" + "[]," * 90 + "{}" * 20 + "]"
    check(flat)
    check("[" * most + "]" * most)
    check('["' + "[" * 99 + '", "\\\\", "\\"' + "{" * 99 + '"]')
    for deep in ("[" * (most + 1), "[" + "{}," * 90 + "[" * most, flat[:-1] + "{" * most):
        with pytest.raises(ValueError, match="nested more than 40 deep"):
            check(deep)
    monkeypatch.setattr(safe_files, "_MAX_PARTS", 111)
    check(flat)
    with pytest.raises(ValueError, match="holds 112 lists and objects, at most 111 are read"):
        check(flat + "[")


def test_limits_in_numbers() -> None:
    """What is read of other people's files is a promise: none of these changes by accident."""
    mebi = 1024 * 1024
    names = ("MAX_JSON", "MAX_CARD", "_MAX_TEXT", "MAX_HEADER", "_MAX_PARTS", "_MAX_YAML", "_MAX_SCALAR")
    expected = [64 * mebi, 16 * mebi, mebi, 4 * mebi, mebi, 8 * mebi, mebi // 2]
    assert [getattr(safe_files, name) for name in names] == expected
    assert [safe_files.MAX_DEPTH, safe_files._MAX_AXES, safe_files._MAX_AXIS] == [40, 16, 1 << 48]
