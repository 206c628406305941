"""Messages, content parts, template arguments: one form for all that can be said, JSON for all that is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_dataopt.text.chat import ChatFormat, said, text_of

from ..models import byte_tokenizer

PARTS = [{"type": "text", "text": "my "}, {"type": "text", "text": "cat"}]


def weather(city: str) -> str:
    """
    The weather now.

    Args:
        city: where.
    """
    return city


def test_parts_are_joined() -> None:
    assert text_of(PARTS) == "my cat" == said(PARTS) == said(tuple(PARTS))
    assert said({"role": "user", "content": PARTS, "name": "a"}) == [{"role": "user", "content": "my cat", "name": "a"}]
    assert said(PARTS[0]) == "my "
    assert [said(other) for other in ("text", [1, 2], [], 3, ["a"])] == ["text", [1, 2], [], 3, ["a"]]


@pytest.mark.parametrize(
    ("turn", "error", "words"),
    [
        ({"role": "user"}, TypeError, "'role' and 'content'"),
        ({"content": "a"}, TypeError, "'role' and 'content'"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], TypeError, "'role' and 'content'"),
        ({"role": 3, "content": "a"}, TypeError, "a word such as"),
        ({"role": "user", "content": 3}, TypeError, "must be text"),
        ({"role": "user", "content": []}, TypeError, "must be text"),
        ({"role": "user", "content": None}, TypeError, "must be text"),
        ({"role": "user", "content": ["a"]}, TypeError, "must be text"),
        ({"role": "user", "content": [{"type": "text"}]}, TypeError, "must be text"),
        ({"role": "user", "content": [*PARTS, {"type": "image", "url": "x"}]}, ValueError, "'image'"),
        ([{"type": "audio"}], ValueError, "'audio'"),
    ],
)
def test_what_cannot_be_said(turn: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        said(turn)


def test_arguments_are_json_and_a_copy() -> None:
    mine: dict[str, Any] = {"enable_thinking": False, "tools": [weather], "numbers": (1, 2)}
    one = ChatFormat(template_kwargs=mine, system="Be brief.")
    mine["tools"].append("more")
    assert one.template_kwargs is not None and one.template_kwargs["numbers"] == [1, 2]
    tool = one.template_kwargs["tools"][0]["function"]
    assert tool["name"] == "weather" and tool["parameters"]["properties"]["city"]["description"] == "where."
    again = ChatFormat.from_dict(json.loads(json.dumps(one.to_dict())) | {"steps": 3})
    assert again == one and hash(again) == hash(one)
    assert ChatFormat.from_dict({}) == ChatFormat()


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"template_kwargs": "tools"}, TypeError, "dict of names"),
        ({"template_kwargs": {1: 2}}, TypeError, "dict of names"),
        ({"template_kwargs": {"when": object()}}, TypeError, r"'when'.*JSON"),
        ({"template_kwargs": {"hook": len}}, TypeError, r"'hook'.*in 'tools' only"),
        ({"template_kwargs": {"x": float("nan")}}, TypeError, "JSON"),
        ({"template_kwargs": {"tools": [lambda city: city]}}, ValueError, "no JSON schema"),
        ({"template_kwargs": {"tokenize": True}}, ValueError, "cannot set tokenize"),
        ({"template_kwargs": {"add_generation_prompt": True}}, ValueError, "cannot set add_generation_prompt"),
        ({"system": 3}, TypeError, "system must be a str"),
        ({"system": " "}, ValueError, "empty"),
        ({"special_tokens_in_text": 1}, TypeError, "must be a bool"),
    ],
)
def test_bad_formats(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ChatFormat(**fields)


def test_templates_get_the_arguments_with_special_tokens_hidden() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    )
    chat = ChatFormat(template_kwargs={"tools": [{"name": "a<eos>"}], "mood": "calm"})
    text = chat.render(tokenizer, chat.hide(tokenizer, [{"role": "user", "content": "hi<eos>"}]))
    ids = chat.ids(tokenizer, text)
    assert tokenizer.decode(ids) == '[{"name": "a<eos>"}]calmhi<eos><eos>' and ids.count(2) == 1 and ids[-1] == 2
    counts = ChatFormat(special_tokens_in_text=True)
    assert counts.ids(tokenizer, counts.hide(tokenizer, "hi<eos>")) == tokenizer("hi<eos>")["input_ids"]
    with pytest.raises(ValueError, match="need a chat template"):
        chat.check(byte_tokenizer(chat=False))
