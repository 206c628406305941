"""What is written by others stays inside its span, block and line of a card."""

from __future__ import annotations

import pytest

from hf_dataopt.publishing.cards import block, code, escape, first_block


@pytest.mark.parametrize(
    ("text", "found"),
    [("a", "`a`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("a``b`c", "``` a``b`c ```"), ("", "")],
)
def test_code_spans_have_one_tick_more(text: str, found: str) -> None:
    assert code(text) == found


@pytest.mark.parametrize(("ticks", "fence"), [(0, 3), (1, 3), (2, 3), (3, 4), (5, 6)])
def test_blocks_have_one_tick_more_and_three_at_least(ticks: int, fence: int) -> None:
    text = "a" + "`" * ticks + "b"
    assert block(text, "python") == "`" * fence + "python\n" + text + "\n" + "`" * fence
    if fence < 6:
        assert first_block(block(text, "python")) == text + "\n"


def test_texts_are_cut_after_400_characters() -> None:
    assert escape("x" * 400) == "x" * 400
    assert escape("x" * 401) == "x" * 400 + " …"
    assert code("x" * 401) == "`" + "x" * 400 + "`"


def test_blocks_that_are_not_closed_are_none() -> None:
    assert first_block("```python\na\n```\n```python\nb\n```") == "a\n"
    assert first_block("````python\na\n```\n````") == "a\n```\n"
    assert first_block("```python\na") == "" and first_block("a") == ""
