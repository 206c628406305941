"""What the collator makes of chats, texts, few-shot examples and ids: groups, positions, labels, cuts, refusals."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hf_dataopt import CompressedContextMemory, DataCollatorForCCM
from hf_dataopt.ccm.turns import encode_turn

from ..models import byte_tokenizer
from .models import adapted

CHAT = [
    {"role": "user", "content": "my cat is otto"},
    {"role": "assistant", "content": "nice"},
    {"role": "user", "content": "its name?"},
    {"role": "assistant", "content": "otto"},
]
# as Gemma's: turns alternate, the system text goes into the first user turn, which has to come first
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set lead = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "<{{ m['role'] }}>{% if loop.first %}{{ lead }}{% endif %}{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def collator(
    max_length: int = 1024, pack: bool = False, tokenizer: Any = "chat", **settings: Any
) -> DataCollatorForCCM:
    config = adapted(**settings).peft_config["default"]
    return DataCollatorForCCM(
        byte_tokenizer(tokenizer == "chat") if isinstance(tokenizer, str) else tokenizer,
        config,
        max_length=max_length,
        pack=pack,
    )


def shown(batch: dict[str, torch.Tensor], row: int = 0) -> str:
    """A row as text: one dot per compression token, special tokens by their names."""
    tokenizer, length = byte_tokenizer(), int(batch["attention_mask"][row].sum())
    ids = batch["input_ids"][row, :length].tolist()
    return "".join("." if token >= 264 else tokenizer.decode([token]) for token in ids)


def learned(batch: dict[str, torch.Tensor], row: int = 0) -> str:
    return byte_tokenizer().decode(batch["labels"][row][batch["labels"][row] >= 0])


def test_a_chat() -> None:
    batch = collator()([{"messages": CHAT}])
    assert shown(batch) == (
        "<bos>[user]my cat is otto<eos>..[assistant]nice<eos>..[user]its name?<eos>[assistant]otto<eos>"
    )
    assert learned(batch) == "otto<eos>"
    text = batch["input_ids"][0] < 264
    assert batch["position_ids"][0][text].tolist() == list(range(int(text.sum())))
    after = batch["position_ids"][0, 1:][~text[:-1] & text[1:]]  # text goes on where the first compression token stood
    assert torch.equal(batch["position_ids"][0][~text], torch.stack([after, after + 1], 1).flatten())


def test_the_memory_is_asked_what_was_trained() -> None:
    model = adapted()
    batch = DataCollatorForCCM(byte_tokenizer(), model.peft_config["default"])([{"messages": CHAT}])
    memory = CompressedContextMemory(model, byte_tokenizer())
    for message in CHAT[:2]:
        memory.append(message)
    asked = memory.inputs(CHAT[2])["input_ids"][0]
    start = int((batch["labels"][0] >= 0).nonzero()[0])
    assert torch.equal(batch["input_ids"][0, start - len(asked) : start], asked)
    with torch.no_grad():
        parallel = model(**batch).logits[0, start - len(asked) : start]
    torch.testing.assert_close(memory.logits(CHAT[2])[0], parallel, rtol=0, atol=1e-4)


def test_a_chat_without_template_and_texts() -> None:
    plain = collator(tokenizer="plain")
    assert shown(plain([{"messages": CHAT[2:]}])) == "user: its name?\nassistant: otto\n"
    assert learned(plain([{"messages": CHAT[2:]}])) == " otto\n"
    batch = plain([{"texts": ["one\n", "two\n", "three"]}])
    assert shown(batch) == "one\n..two\nthree<eos>" and learned(batch) == "three<eos>"


def test_few_shot_examples() -> None:
    examples = [{"input": "1+1=", "output": "2"}, {"input": "2+2=", "output": "4"}]
    batch = collator()(
        [{"examples": examples, "input": "3+3=", "output": "6"}, {"examples": [], "input": "a", "output": "b"}]
    )
    assert shown(batch) == "1+1= 2\n..2+2= 4\n..3+3= 6<eos>" and learned(batch) == " 6<eos>"
    assert shown(batch, 1) == "a b<eos>" and learned(batch, 1) == " b<eos>"


def test_ids_and_gist() -> None:
    feature = {"contexts": [[5, 6], torch.tensor([7])], "input": [8], "output": [9, 10]}
    batch = collator(tokenizer=None)([feature, {"contexts": [[5]], "output": [6]}])
    assert batch["input_ids"].tolist() == [[5, 6, 264, 265, 7, 264, 265, 8, 9, 10], [5, 264, 265, 6, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [-100] * 8 + [9, 10]
    assert batch["labels"][1].tolist() == [-100] * 3 + [6] + [-100] * 6
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 3, 4, 5], [0, 1, 2, 1, 1, 1, 1, 1, 1, 1]]
    gist = collator(tokenizer=None, memory="gist", num_comp_tokens=3)([feature])
    assert gist["input_ids"].tolist() == [[5, 6, 7, 264, 265, 266, 8, 9, 10]]


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_every_turn_learns_behind_the_memory_before_it(memory: str) -> None:
    model = adapted("qwen3", memory=memory, sink=True)
    collate = DataCollatorForCCM(None, model.peft_config["default"], completion_only_loss=False)
    feature = {"contexts": [[5, 6, 7, 8], [9, 10, 11], [12]], "input": [13, 14], "output": [15, 16]}
    batch = collate([feature])
    labels = batch["labels"][0]
    assert labels[labels >= 0].tolist() == [6, 7, 8, 10, 11, 14, 15, 16]  # none on first tokens and compression tokens
    one, expected = CompressedContextMemory(model), []
    for turn in (*feature["contexts"], [*feature["input"], *feature["output"]]):
        expected.append(one.logits(turn)[0, :-1])
        one.append(turn)
    with torch.no_grad():
        found = model(**{name: batch[name] for name in batch if name != "labels"}).logits[0]
    torch.testing.assert_close(found[:-1][labels[1:] >= 0], torch.cat(expected), rtol=0, atol=1e-4)


def test_labels_on_all_text_keep_to_their_sample() -> None:
    config = adapted().peft_config["default"]
    collate = DataCollatorForCCM(None, config, pack=True, completion_only_loss=False)
    batch = collate([{"contexts": [[5, 6]], "output": [7]}, {"contexts": [], "input": [8], "output": [9]}])
    assert batch["input_ids"].tolist() == [[5, 6, 264, 265, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 7, -100, 9]]
    collate.completion_only_loss = True
    assert collate([{"contexts": [], "output": [5, 6]}] * 2)["labels"].tolist() == [[-100, 6, -100, 6]]


def test_long_samples_are_cut_at_a_turn(caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "assistant" if i % 2 else "user", "content": f"turn number {i}"} for i in range(8)]
    for size, first in ((1000, 0), (140, 2), (120, 4), (70, 6)):
        short = collator(size)
        with caplog.at_level(logging.WARNING):
            text = shown(short([{"messages": turns}]))
        assert text.startswith(f"<bos>[user]turn number {first}<eos>") and text.endswith("turn number 7<eos>")
        assert (short.cut_samples, short.cut_turns) == (int(first > 0), first)
        assert text.count("..") == 6 - first
    assert "oldest contexts left out" in caplog.text
    strict = byte_tokenizer()
    strict.chat_template = STRICT
    assert shown(collator(110, tokenizer=strict)([{"messages": turns}])).startswith("<bos><user>turn number 4</s>")
    ids = {"contexts": [[1, 5, 6, 7], [8, 9, 10], [11, 12]], "input": [13], "output": [14]}
    cut = {
        "begin": collator(6)([ids]),
        "sink": collator(6, tokenizer=None, sink=True)([ids]),
        "none": collator(6, tokenizer=None)([ids]),
        "nothing": collator(3)([ids]),
    }
    assert [batch["input_ids"][0].tolist() for batch in cut.values()] == [
        [1, 11, 12, 264, 265, 13, 14], [1, 11, 12, 264, 265, 13, 14], [11, 12, 264, 265, 13, 14], [1, 13, 14]
    ]  # fmt: skip
    with pytest.raises(ValueError, match="max_length is 2"):
        collator(2)([ids])


def test_cuts_in_loader_workers_are_counted() -> None:
    ids = {"contexts": [[5, 6], [7, 8]], "input": [9], "output": [10]}
    short = collator(4, tokenizer=None)
    loader = torch.utils.data.DataLoader([ids] * 8, batch_size=2, collate_fn=short, num_workers=2)  # type: ignore[arg-type]
    assert len(list(loader)) == 4
    assert (short.cut_samples, short.cut_turns) == (8, 8)


def test_packing_fills_rows_to_the_limit() -> None:
    ids = {"contexts": [[5, 6]], "input": [9], "output": [10]}  # 6 with its compression tokens
    batch = collator(14, pack=True, tokenizer=None)([ids] * 5)
    assert batch["attention_mask"].sum(1).tolist() == [12, 12, 6]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 2, 3] * 2
    assert (batch["labels"] >= 0).sum() == 5


@pytest.mark.parametrize(
    ("feature", "error", "words"),
    [
        ({"contexts": [[5]], "input": [6], "output": []}, ValueError, "needs an output"),
        ({"contexts": [[5], []], "output": [6]}, ValueError, "contexts that have tokens"),
        ({"contexts": [[5, 264]], "output": [6]}, ValueError, r"in \[0, 263\]"),
        ({"contexts": [[-1]], "output": [6]}, ValueError, r"in \[0, 263\]"),
        ({"contexts": [[0.5]], "output": [6]}, TypeError, "token ids"),
        ({"contexts": [torch.zeros(1, 2)], "output": [6]}, TypeError, r"\(n,\)"),
        ({"contexts": [3], "output": [6]}, TypeError, "must be str"),
        ({"texts": ["one"]}, ValueError, "two turns"),
        ({"messages": [{"role": "user"}] * 2}, TypeError, "'role' and 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}] * 2}, TypeError, "must be text"),
        ({"messages": CHAT, "texts": ["a", "b"]}, ValueError, "one of"),
        ({"examples": [{"input": "a"}], "input": "b", "output": "c"}, TypeError, "few-shot"),
        ({"label": 1}, TypeError, "remove_unused_columns"),
        ([5, 6], TypeError, "must be a dict"),
    ],
)
def test_bad_samples(feature: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        collator()([feature])


def test_bad_settings() -> None:
    config = adapted().peft_config["default"]
    with pytest.raises(ValueError, match="empty batch"):
        DataCollatorForCCM(None, config)([])
    with pytest.raises(ValueError, match="at least 2"):
        DataCollatorForCCM(None, config, max_length=1)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        DataCollatorForCCM(None, config)([{"texts": ["a", "b"]}])
    config.comp_token_ids = None
    with pytest.raises(ValueError, match="peft_config"):
        DataCollatorForCCM(None, config)


def test_templates_that_cannot_render_a_turn() -> None:
    strict = byte_tokenizer()
    strict.chat_template = STRICT
    assert strict.decode(encode_turn(strict, CHAT[1], first=False)) == "<assistant>nice</s>"
    with pytest.raises(ValueError, match="refuses the roles assistant"):
        encode_turn(strict, CHAT[1], first=True)
    with pytest.raises(ValueError, match="lone 'system'"):
        encode_turn(strict, {"role": "system", "content": "be kind"}, first=True)
