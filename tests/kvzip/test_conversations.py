"""Questions in every form: text, messages, parts, conversations, batches; and what the template is told.

A conversation's ids are those of the whole conversation under the chat template; whatever special tokens are written in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.kvzip.config import TASK_LINE
from hf_dataopt.kvzip.prompt import build_prompt, question_rows

from ..models import byte_tokenizer, tiny_model
from .conftest import CONTEXT, Compressed

USER, PARTS = (
    {"role": "user", "content": "Which key?"},
    [{"type": "text", "text": "Which "}, {"type": "text", "text": "key?"}],
)
TALK = [USER, {"role": "assistant", "content": "The blue one."}, {"role": "user", "content": "Of which room?"}]
# a template with a system turn, tools, and a switch that changes how answers start
TEMPLATE = (
    "<bos>{% if tools %}[tools]{{ tools | tojson }}<eos>{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}(calm){% endif %}"
    "{% endif %}"
)


def tokenizer_with(template: str = TEMPLATE) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rows(question: Any, tokenizer: Any = None, **settings_: Any) -> list[list[int]]:
    tokenizer, config = tokenizer or tokenizer_with(), KVzipConfig(**settings_)
    prompt = build_prompt(tokenizer, CONTEXT, config)
    return [row.tolist() for row in question_rows(tokenizer, prompt, question, config)]


def test_one_question_in_every_form() -> None:
    (expected,) = rows("Which key?")
    for form in (
        USER,
        [USER],
        {"role": "user", "content": PARTS},
        PARTS,
        tuple(PARTS),
        ["Which key?"],
        [[USER]],
        [PARTS],
    ):
        assert rows(form) == [expected]
    assert (
        rows(["Which key?", [USER], TALK]) == [expected, expected, *rows(TALK)] == rows(("Which key?", (USER,), TALK))
    )
    assert rows([TALK, [USER]]) == [*rows(TALK), expected]


@pytest.mark.parametrize("told", [{}, {"system": "Be brief.", "template_kwargs": {"enable_thinking": False}}])
def test_a_conversation_is_the_whole_one_under_the_template(told: dict[str, Any]) -> None:
    tokenizer, config = tokenizer_with(), KVzipConfig(**told)
    prompt = build_prompt(tokenizer, CONTEXT, config)
    messages = [{"role": "user", "content": f"{TASK_LINE}{CONTEXT}\n\nWhich key?"}, *TALK[1:]]
    if told:
        messages = [{"role": "system", "content": "Be brief."}, *messages]
    whole = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **told.get("template_kwargs", {})
    )
    (row,) = question_rows(tokenizer, prompt, TALK, config)
    assert [*prompt.ids.tolist(), *row.tolist()] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_conversation_without_a_template() -> None:
    (row,) = rows(TALK, byte_tokenizer(chat=False), system="Be brief.")
    assert byte_tokenizer().decode(row) == "\n\nWhich key?\nThe blue one.\n\nOf which room?\n"
    prompt = build_prompt(byte_tokenizer(chat=False), CONTEXT, KVzipConfig(system="Be brief.", task_line="Read: "))
    assert byte_tokenizer().decode(prompt.prefix_ids) == "<bos>Be brief.\n\nRead: "
    with pytest.raises(ValueError, match="need a chat template"):
        build_prompt(byte_tokenizer(chat=False), CONTEXT, KVzipConfig(template_kwargs={"a": 1}))


def test_the_template_is_told() -> None:
    tokenizer = tokenizer_with()
    plain = build_prompt(tokenizer, CONTEXT, KVzipConfig(task_line=""))
    told = build_prompt(
        tokenizer,
        CONTEXT,
        KVzipConfig(
            task_line="", system="Be brief.", template_kwargs={"enable_thinking": False, "tools": [{"name": "look"}]}
        ),
    )
    assert tokenizer.decode(plain.prefix_ids) == "<bos>[user]"
    assert tokenizer.decode(told.prefix_ids) == '<bos>[tools][{"name": "look"}]<eos>[system]Be brief.<eos>[user]'
    assert tokenizer.decode(told.suffix_ids) == "<eos>[assistant](calm)"
    assert torch.equal(told.context_ids, plain.context_ids)


text = st.lists(
    st.sampled_from(["<eos>", "<bos>", "<pad>", "<unk>", "a", "é", " ", "<", "eos>"]), min_size=1, max_size=6
)
text_ = text.map(lambda parts: f"x{''.join(parts)}x")


@settings(max_examples=60, deadline=None)
@given(text_, text_, text_, text_, text_)
def test_special_tokens_written_anywhere_are_text(a: str, b: str, c: str, d: str, e: str) -> None:
    tokenizer = tokenizer_with()
    config = KVzipConfig(system=d, template_kwargs={"tools": [{"about": e}]})
    prompt = build_prompt(tokenizer, a, config)
    talk = [{"role": "user", "content": b}, {"role": "assistant", "content": c}, {"role": "user", "content": [*PARTS]}]
    (row,) = question_rows(tokenizer, prompt, talk, config)
    (lone,) = question_rows(tokenizer, prompt, b, config)
    special = lambda ids: [token for token in ids.tolist() if token < 4]  # noqa: E731
    assert special(prompt.context_ids) == [] and tokenizer.decode(prompt.context_ids) == a
    assert special(prompt.prefix_ids) == [1, 2, 2] and special(prompt.suffix_ids) == [2]
    assert special(row) == [2, 2, 2] and special(lone) == [2]
    assert tokenizer.decode(row) == f"\n\n{b}<eos>[assistant]{c}<eos>[user]Which key?<eos>[assistant]"
    counted = KVzipConfig(special_tokens_in_text=True)
    assert build_prompt(tokenizer, a, counted).context_ids.tolist() == tokenizer(a)["input_ids"]


@pytest.mark.parametrize(
    ("question", "error", "words"),
    [
        ([], TypeError, "empty one"),
        (3, TypeError, "must be a str"),
        ([3], TypeError, "must be a str"),
        ([[]], TypeError, "must be a str"),
        (["a", USER], TypeError, r"written \[message\]"),
        (" ", ValueError, "empty"),
        ({"role": "user", "content": " "}, ValueError, "empty"),
        ([*TALK, TALK[1], {"role": "user", "content": ""}], ValueError, "empty"),
        (TALK[:2], ValueError, "last message"),
        (TALK[1:], ValueError, "starts with the user's"),
        ([{"role": "system", "content": "a"}, *TALK], ValueError, r"KVzipConfig\(system="),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, "'image'"),
        ([{"role": "user"}], TypeError, "'role' and 'content'"),
    ],
)
def test_bad_questions(question: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        rows(question)


def test_templates_that_cannot_hold_a_conversation() -> None:
    prompt = build_prompt(tokenizer_with(), CONTEXT, KVzipConfig())
    with pytest.raises(ValueError, match="not those of the cache"):
        question_rows(tokenizer_with(), prompt, TALK, KVzipConfig(system="Be brief."))
    deaf = tokenizer_with("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="leaves the system message"):
        build_prompt(deaf, CONTEXT, KVzipConfig(system="Be brief."))
    strict = tokenizer_with("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    with pytest.raises(ValueError, match="refuses the roles system, user"):
        build_prompt(strict, CONTEXT, KVzipConfig(system="Be brief."))


def test_config_keeps_what_the_template_is_told() -> None:
    config = KVzipConfig(system="Be brief.", template_kwargs={"n": (1, 2)}, special_tokens_in_text=True)
    again = KVzipConfig.from_json_string(config.to_json_string())
    assert again == config and hash(again) == hash(config) and again.template_kwargs == {"n": [1, 2]}
    for field, value in (("system", 3), ("template_kwargs", []), ("special_tokens_in_text", None), ("task_line", None)):
        with pytest.raises(TypeError, match=field):
            KVzipConfig(**{field: value})


def test_cache_asks_as_it_was_told_after_saving_too(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tokenizer_with()
    config = KVzipConfig(system="Be brief.", template_kwargs={"enable_thinking": False}, chunk_size=32)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT + "<eos>", 1.0, config=config, progress=False)
    cache.save_pretrained(tmp_path)
    again = KVzipCache.from_pretrained(tmp_path, model, tokenizer)
    assert again.config == cache.config and json.loads(again.config.to_json_string())["system"] == "Be brief."
    batch = again.inputs([TALK, "Which key?"])
    assert torch.equal(batch["input_ids"], cache.inputs([TALK, [USER]])["input_ids"])
    assert tokenizer.decode(batch["input_ids"][1]).endswith("Which key?<eos>[assistant](calm)")
    assert int((cache.prompt.context_ids < 4).sum()) == 0
    inputs = cache.inputs(TALK)
    ours = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert ours.tolist() == model.generate(inputs["input_ids"], max_new_tokens=8, do_sample=False).tolist()


def test_inputs_of_a_conversation(llama: Compressed) -> None:
    cache = llama.cache(0.5)
    one, several = cache.inputs(TALK), cache.inputs([TALK, [USER]])
    assert one["input_ids"].shape[0] == 1 and torch.equal(several["input_ids"][:1], one["input_ids"])
    assert several["attention_mask"][1].sum() < several["attention_mask"][0].sum()
