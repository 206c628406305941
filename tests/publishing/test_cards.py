"""What is written by others stays inside its span, block and line of a card."""

from __future__ import annotations

import pytest

from hf_dataopt.publishing.cards import block, code, escape, first_block, hub_metadata, size_category


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


@pytest.mark.parametrize(
    ("rows", "word"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**6, "1M<n<10M"), (10**13, "n>1T")],
)
def test_sizes_have_the_words_of_the_hub(rows: int, word: str) -> None:
    assert size_category(rows) == word


def test_results_become_a_model_index() -> None:
    from huggingface_hub import EvalResult

    result = EvalResult("text-generation", "me/set", "set", "accuracy", 0.5)
    found = hub_metadata("model", license="mit", base_model=None, model_name="gates", eval_results=[result])
    assert found["library_name"] == "hf-dataopt" and found["license"] == "mit" and "base_model" not in found
    assert found["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    with pytest.raises(ValueError, match="model_name"):
        hub_metadata("model", eval_results=[result])
    assert hub_metadata("dataset", library_name="peft", tags=["a"]) == {"library_name": "peft", "tags": ["a"]}
