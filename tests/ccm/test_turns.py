"""Turns in every form, and what the template is told: training and online give the same ids.

Whatever is written in a turn, no special id comes out of it; a list of messages is one context; files and forks keep how
messages become text.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from hf_dataopt import CompressedContextMemory, DataCollatorForCCM, StreamingContextMemory
from hf_dataopt.ccm.turns import answer_prompt, awaits_answer, encode_answer, encode_turn
from hf_dataopt.text.chat import ChatFormat

from ..hub.damage import without_list
from ..models import byte_tokenizer
from .models import adapted

TEMPLATE = (
    "<bos>{% if tools %}[tools]{{ tools | tojson }}<eos>{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{% if calm and m['role'] == 'assistant' %}(calm){% endif %}{{ m['content'] }}<eos>"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if calm %}(calm){% endif %}{% endif %}"
)
TOLD: dict[str, Any] = {"system": "Be <eos> brief.", "template_kwargs": {"calm": True, "tools": [{"about": "<pad>"}]}}
_MADE: dict[str, PeftModel] = {}


def model_of(memory: str = "concat") -> PeftModel:
    if memory not in _MADE:
        _MADE[memory] = adapted(memory=memory)
    return _MADE[memory]


def chatting() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]


written = st.lists(st.sampled_from(["<eos>", "<bos>", "<pad>", "<unk>", "a", "é", " ", "<", "eos>"]), max_size=5).map(
    lambda found: f"x{''.join(found)}x"
)
turn = st.one_of(
    written,
    written.map(user),
    written.map(lambda text: user(parts(text))),
    st.tuples(written, written).map(lambda two: [user(two[0]), assistant(two[1])]),
    st.lists(st.integers(4, 259), min_size=1, max_size=5),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(turn, min_size=1, max_size=3), turn, written, st.booleans(), st.booleans())
def test_training_and_online_give_the_same_ids(
    contexts: list[Any], question: Any, answer: str, told: bool, counts: bool
) -> None:
    model, tokenizer = model_of(), chatting()
    chat: dict[str, Any] = {**(TOLD if told else {}), "special_tokens_in_text": counts}
    if told and not isinstance(contexts[0], dict):
        contexts = [user("first"), *contexts]
    collate = DataCollatorForCCM(tokenizer, model.peft_config["default"], **chat)
    batch = collate([{"contexts": contexts, "input": question, "output": assistant(answer)}])
    memory, online = CompressedContextMemory(model, tokenizer, **chat), []
    compress = memory._compress

    def recorded(rows: Any) -> Any:
        online.extend([*rows[0], *(memory.config.comp_token_ids or [])])
        return compress(rows)

    memory._compress = recorded  # type: ignore[method-assign]
    for context in contexts:
        memory.append(context)
    asked = memory.inputs(question)["input_ids"][0].tolist()
    opening = [] if isinstance(question, dict) else answer_prompt(tokenizer, memory.chat)  # a user's message has it
    trained = batch["input_ids"][0].tolist()
    begun = [*online, *asked, *opening]
    assert trained[: len(begun)] == begun
    assert tokenizer.decode(trained[len(begun) :]) == f"{answer}<eos>"


@settings(max_examples=60, deadline=None)
@given(turn, st.booleans(), st.booleans())
def test_no_special_id_comes_out_of_a_turn(one: Any, first: bool, told: bool) -> None:
    tokenizer = chatting()
    chat = ChatFormat(**TOLD) if told and isinstance(one, dict) else ChatFormat()
    ids = encode_turn(tokenizer, one, first, chat)
    special = [token for token in ids if token < 4]
    messages = [one] if isinstance(one, dict) else one if isinstance(one, list) and isinstance(one[0], dict) else []
    ends = len(messages) + (2 if chat.system and first else 0)  # tools and system message end too
    assert special == [1] * (first and bool(messages)) + [2] * ends
    if isinstance(one, str):
        assert tokenizer.decode(ids) == one


def test_messages_in_one_list_are_one_context() -> None:
    memory = CompressedContextMemory(model_of(), chatting())
    memory.append([user("hi"), assistant("yo")])
    assert memory.steps.tolist() == [1] and memory.tokens_seen == [len("[user]hi[assistant]yo") + 3]
    apart = encode_turn(chatting(), user("hi"), True) + encode_turn(chatting(), assistant("yo"), False)
    assert encode_turn(chatting(), [user("hi"), assistant("yo")], True) == apart
    two = CompressedContextMemory(model_of(), chatting(), batch_size=2)
    two.append([[user("hi"), assistant("yo")], user("ho")])
    two.append([None, [user("hi"), assistant("yo")]])
    assert two.steps.tolist() == [1, 2]
    torch.testing.assert_close(two.logits([user("a"), user("a")])[0], memory.logits(user("a"))[0], rtol=0, atol=1e-4)


def test_questions_of_one_user() -> None:
    memory = CompressedContextMemory(model_of(), chatting())
    memory.append(user("hi"))
    talk = [user("a"), assistant("b"), user("c")]
    (one,) = memory.inputs(talk)["input_ids"].tolist()
    assert chatting().decode(one) == "[user]a<eos>[assistant]b<eos>[user]c<eos>[assistant]"
    several = memory.inputs([talk, [user("a")], "plain"])
    assert several["input_ids"][0].tolist() == one and several["input_ids"].shape[0] == 3
    assert chatting().decode(memory.inputs(parts("plain"))["input_ids"][0]) == "plain"
    assert (
        chatting().decode(memory.inputs([user("a"), assistant("b")])["input_ids"][0]) == "[user]a<eos>[assistant]b<eos>"
    )


def test_the_system_message_stands_before_the_first_message() -> None:
    collate = DataCollatorForCCM(chatting(), model_of().peft_config["default"], max_length=110, system="Be brief.")
    sample = {"messages": [user("one"), assistant("two"), user("three"), assistant("four")]}
    text = chatting().decode([token for token in collate([sample])["input_ids"][0].tolist() if token < 264])
    assert text == "<bos>[system]Be brief.<eos>[user]one<eos>[assistant]two<eos>[user]three<eos>[assistant]four<eos>"
    collate.max_length = 60  # the oldest turns are cut, the system message stays
    text = chatting().decode([token for token in collate([sample])["input_ids"][0].tolist() if token < 264])
    assert text == "<bos>[system]Be brief.<eos>[user]three<eos>[assistant]four<eos>"
    plain = CompressedContextMemory(model_of(), byte_tokenizer(chat=False), system="Be brief.")
    ids = encode_turn(plain.tokenizer, user("a"), True, plain.chat)
    assert byte_tokenizer().decode(ids) == "system: Be brief.\nuser: a\n"
    for first in ("text", [5, 6]):
        with pytest.raises(ValueError, match="first turn is no message"):
            plain.append(first)
    with pytest.raises(ValueError, match="two system messages"):
        plain.append({"role": "system", "content": "a"})


def test_files_and_forks_keep_the_format(tmp_path: Path) -> None:
    memory = CompressedContextMemory(model_of(), chatting(), **TOLD, special_tokens_in_text=True)
    memory.append(user("hi"))
    memory.save_pretrained(tmp_path / "memory")
    again = CompressedContextMemory.from_pretrained(memory.model, tmp_path / "memory", memory.tokenizer)
    assert again.chat == memory.chat == memory.fork().chat and again.chat.system == TOLD["system"]
    assert torch.equal(again.logits(user("a<eos>")), memory.logits(user("a<eos>")))
    file = without_list(tmp_path / "memory") / "memory.json"
    kept = json.loads(file.read_text())
    for change in ({"template_kwargs": [1]}, {"system": 3}, {"template_kwargs": {"tokenize": True}}):
        file.write_text(json.dumps(kept | change))
        with pytest.raises(ValueError, match="wrong settings of the chat template"):
            CompressedContextMemory.from_pretrained(memory.model, tmp_path / "memory")
    older = {name: value for name, value in kept.items() if name not in memory.chat.to_dict()}
    file.write_text(json.dumps(older))
    assert CompressedContextMemory.from_pretrained(memory.model, tmp_path / "memory").chat == ChatFormat()
    stream = StreamingContextMemory(model_of(), chatting(), max_kv=40, compress_tokens=8, memory_size=4, **TOLD)
    stream.feed([5, 6, 7])
    stream.save_pretrained(tmp_path / "stream")
    assert StreamingContextMemory.from_pretrained(stream.model, tmp_path / "stream").chat == stream.chat


def test_calls_of_tools_need_no_content() -> None:
    tokenizer = chatting()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>"
        "{% endfor %}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"at": "<eos>"}}]}
    ids = encode_turn(tokenizer, [user("hi"), call, {"role": "tool", "content": "a<bos>"}], True)
    assert ids.count(2) == 3 and 1 not in ids and '"at": "<eos>"' in tokenizer.decode(ids)
    with pytest.raises(ValueError, match="tool_calls need a chat template"):
        encode_turn(byte_tokenizer(chat=False), call, False)


@pytest.mark.parametrize("content", ["", " \n", [{"type": "text", "text": ""}]])
def test_messages_that_say_nothing_take_no_slots(content: Any) -> None:
    memory = CompressedContextMemory(model_of(), chatting())
    for turn in (
        user(content),
        [user(content), assistant(content)],
        {"role": "user", "name": "ada", "content": content},
    ):
        with pytest.raises(ValueError, match="has no tokens; pass None"):
            memory.append(turn)
        with pytest.raises(ValueError, match="an output and contexts that have tokens"):
            DataCollatorForCCM(chatting(), memory.config)([{"contexts": [turn], "input": "a", "output": "b"}])
    with pytest.raises(ValueError, match="an output and contexts that have tokens"):
        DataCollatorForCCM(chatting(), memory.config)([{"messages": [user("a"), assistant(content)]}])
    assert memory.steps.tolist() == [0]
    memory.append([user(content), assistant("b")])  # with something said beside it, it is a part of that
    assert memory.steps.tolist() == [1]


def test_a_stream_reads_text_as_text() -> None:
    stream = StreamingContextMemory(model_of(), chatting(), max_kv=40, compress_tokens=8, memory_size=4)
    spelled = encode_turn(chatting(), "a<eos>b", True)
    assert len(spelled) == 7 and stream.perplexity("a<eos>b") == stream.perplexity(spelled)
    counts = StreamingContextMemory(
        model_of(), chatting(), max_kv=40, compress_tokens=8, memory_size=4, special_tokens_in_text=True
    )
    assert counts.perplexity("a<eos>b") == stream.perplexity([spelled[0], 2, spelled[-1]])
    fed = StreamingContextMemory(model_of(), chatting(), max_kv=40, compress_tokens=8, memory_size=4)
    talk = [user("hi"), assistant("yo<eos>")]
    logits = [fed.feed(talk[:1]), fed.feed(talk[1]), fed.feed("a<eos>")]
    stream.reset()
    whole = [*encode_turn(chatting(), talk, True), *encode_turn(chatting(), "a<eos>", False)]
    torch.testing.assert_close(torch.cat(logits), stream.feed(whole), rtol=0, atol=1e-4)
    for ids in ([264], [-1], [0.5]):
        with pytest.raises(ValueError, match=r"in \[0, 263\]"):
            stream.feed(torch.tensor(ids))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("contexts", "Anna lives"),
        ("contexts", user("a")),
        ("contexts", 3),
        ("texts", "ab"),
        ("messages", user("a")),
        ("examples", "ab"),
    ],
)
def test_lists_forgotten_in_samples_are_refused(field: str, value: Any) -> None:
    collate = DataCollatorForCCM(byte_tokenizer(), model_of().peft_config["default"])
    with pytest.raises(TypeError, match=f"{field} must be a list"):
        collate([{field: value, "input": "q", "output": "a"}])


def test_contexts_may_be_rows_of_a_tensor() -> None:
    collate = DataCollatorForCCM(None, model_of().peft_config["default"])
    rows = [[5, 6], [7, 8]]
    made = [
        collate([{"contexts": given_, "output": [9]}])["input_ids"].tolist() for given_ in (rows, torch.tensor(rows))
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize("ids", [[10**9], [1, -5], [264, 5, 265], torch.tensor([3, 264])])
def test_ids_outside_the_vocabulary_are_refused(ids: Any) -> None:
    memory = CompressedContextMemory(model_of(), byte_tokenizer())
    for use in (memory.append, memory.inputs):
        with pytest.raises(ValueError, match=r"ids must be in \[0, 263\]"):
            use(ids)
    assert memory.tokens_seen == [0]


@pytest.mark.parametrize("context", ["text", user("a"), [user("a")], [user("a")] * 3, [5, 6]])
def test_a_batch_of_users_needs_an_entry_each(context: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="2 users and needs a list|must be str"):
        CompressedContextMemory(model_of(), byte_tokenizer(), batch_size=2).append(context)


@pytest.mark.parametrize("memory", ["concat", "gist"])
def test_text_beyond_the_model_s_positions_warns_once(memory: str) -> None:
    one = CompressedContextMemory(model_of(memory))  # 1024 positions
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        one.append([5] * 1000)
        one.inputs([5] * 24)
        assert not [w for w in found if "positions" in str(w.message)]
        one.append([5] * 40)
        one.append([5] * 40)
        one.inputs([5] * 40)
    assert len([w for w in found if "1,024" in str(w.message)]) == 1
    other = CompressedContextMemory(model_of(memory))
    other.append([5] * 500)
    with pytest.warns(UserWarning, match="needs 1,100 positions"):
        other.inputs([[5] * 600, [5] * 20])
    with pytest.warns(UserWarning, match="a stream with max_kv 1024"):
        StreamingContextMemory(model_of("concat"), max_kv=1024)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("kind", ["concat", "merge", "gist"])
def test_reset_forgets(kind: str, sink: bool) -> None:
    model = adapted(memory=kind, sink=sink)
    new = CompressedContextMemory(model, batch_size=3)
    memory = CompressedContextMemory(model, batch_size=3)
    steps: list[list[Any]] = [[[5, 6], [7], [8, 9]], [[9, 8, 7], [6, 5], [4]]]
    ask = [[20, 21], [20, 21], [20, 21]]
    for step in steps:
        memory.append(step)
    before, fork = memory.logits(ask), memory.fork()
    memory.reset(users=[1])
    assert memory.tokens_seen == [5, 0, 3] and memory.steps.tolist() == [
        int(kind != "gist") + 1,
        0,
        int(kind != "gist") + 1,
    ]
    assert torch.equal(memory.logits(ask)[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(memory.logits(ask)[1], new.logits(ask)[1], rtol=0, atol=1e-5)
    assert all(float(states[1].abs().max()) == 0 for layer in memory.layers for states in layer)
    assert torch.equal(fork.logits(ask), before)
    memory.append([[11], [12, 13], [14]])
    alone = CompressedContextMemory(model)
    alone.append([12, 13])
    torch.testing.assert_close(memory.logits(ask)[1], alone.logits(ask[1])[0], rtol=0, atol=1e-4)
    memory.reset(users=[0, 2])
    memory.reset(users=[1])
    assert memory.nbytes == 0 and torch.equal(memory.logits(ask), new.logits(ask))
    memory.append(steps[0])
    memory.reset()
    assert memory.nbytes == 0 and memory.peak_kv_bytes == 0 and torch.equal(memory.logits(ask), new.logits(ask))
    for users in ([3], [-1]):
        with pytest.raises(ValueError, match=r"users must be in \[0, 2\]"):
            memory.reset(users)
    with pytest.raises(TypeError, match=r"users\[0\] must be an int, got True"):
        memory.reset([True])


def test_answers_are_split_behind_the_templates_opening() -> None:
    """Only messages of the assistant that do not come first; what is given and what is learned are the whole turn."""
    answer = [{"role": "assistant", "content": "Otto."}]
    bare = byte_tokenizer()
    bare.chat_template = None
    for tokenizer, opening in ((chatting(), "[assistant]"), (bare, "assistant:")):
        given, learned = encode_answer(tokenizer, answer, False)
        assert tokenizer.decode(given) == opening and given + learned == encode_turn(tokenizer, answer, False)
        assert "Otto." in tokenizer.decode(learned) and answer_prompt(tokenizer) == given
        for turn, first in ((answer, True), ([user("Who?")], False), ("Otto.", False), ([5, 6, 7], False)):
            assert encode_answer(tokenizer, turn, first) == ([], encode_turn(tokenizer, turn, first))
    assert awaits_answer([user("Who?")]) and not awaits_answer(answer) and not awaits_answer("Who?")
    assert not awaits_answer([user("Who?"), *answer]) and awaits_answer([*answer, user("Who?")])


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_a_turn_that_needs_more_positions_than_there_are_is_split(memory: str) -> None:
    model = model_of(memory)  # 1024 positions, 2 of them for the compression tokens
    turn = [5 + index % 200 for index in range(2100)]
    one, by_hand = (CompressedContextMemory(model, batch_size=2) for _ in range(2))
    for each in (one, by_hand):
        each.append([[6, 7, 8], [9]])
    before = one.logits([[20, 21], [22]])
    with pytest.warns(UserWarning, match="positions"):
        one.append([turn, [30, 31]])
        for rows in ([turn[:700], [30, 31]], [turn[700:1400], None], [turn[1400:], None]):
            by_hand.append(rows)
    assert one.steps.tolist() == [4, 2] and one.tokens_seen == [2103, 3]
    assert torch.equal(one.logits([[20, 21], [22]]), by_hand.logits([[20, 21], [22]]))
    one.undo()
    assert torch.equal(one.logits([[20, 21], [22]]), before)
    calls = []
    layer = model.get_base_model().model.layers[0]

    def failing(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    handle = layer.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        one.append([turn, None])
    handle.remove()
    assert one.steps.tolist() == [1, 1] and torch.equal(one.logits([[20, 21], [22]]), before)
    one.append([[5] * 1022, None])
    assert one.steps.tolist() == [2, 1]
