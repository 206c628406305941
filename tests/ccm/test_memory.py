"""The memory object: batches, forks, generate, files, refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from hf_dataopt import CCMConfig, CompressedContextMemory
from hf_dataopt.errors import DroppedTokensError
from hf_dataopt.routing.attach import cache_in

from ..models import byte_tokenizer, held, tiny_model
from .models import adapted

TURNS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
QUESTION = [20, 21, 22, 23]
GREEDY = {"do_sample": False, "eos_token_id": None}


def remembering(
    model: PeftModel, turns: list[list[int]] = TURNS, max_slots: int | None = None
) -> CompressedContextMemory:
    one = CompressedContextMemory(model, max_slots=max_slots)
    for turn in turns:
        one.append(turn)
    return one


@pytest.mark.parametrize("memory", ["concat", "merge", "concat_apart"])
def test_users_with_different_steps(memory: str) -> None:
    model = adapted("gemma3", memory=memory, sink=True)
    together = CompressedContextMemory(model, batch_size=2)
    alone = [CompressedContextMemory(model), CompressedContextMemory(model)]
    for first, second in ((TURNS[0], None), (TURNS[1], TURNS[2]), (None, TURNS[0])):
        together.append([first, second])
        for one, turn in zip(alone, (first, second), strict=True):
            if turn is not None:
                one.append(turn)
    found = together.logits([QUESTION, QUESTION[:3]])
    torch.testing.assert_close(found[0], alone[0].logits(QUESTION)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1, 1:], alone[1].logits(QUESTION[:3])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_generate_equals_step_by_step(memory: str) -> None:
    model = adapted("qwen3", memory=memory)
    one = remembering(model)
    expected = list(QUESTION)
    for _ in range(5):
        expected.append(int(one.logits(expected)[0, -1].argmax()))
    output = one.generate(QUESTION, max_new_tokens=5, **GREEDY)
    assert output[0].tolist() == expected
    several = one.generate([QUESTION, QUESTION[:2]], max_new_tokens=5, **GREEDY)
    assert several[0].tolist() == expected
    assert several[1, 2:].tolist() == one.generate(QUESTION[:2], max_new_tokens=5, **GREEDY)[0].tolist()


def test_beams_equal_a_search_by_hand() -> None:
    one = remembering(adapted("qwen3", memory="merge"))
    options = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, **GREEDY}
    beams: list[tuple[float, list[int]]] = [(0.0, QUESTION)]
    for _ in range(3):
        found = []
        for score, ids in beams:
            following = one.logits(ids)[0, -1].float().log_softmax(-1)
            found += [(score + float(following[token]), [*ids, token]) for token in following.topk(3).indices.tolist()]
        beams = sorted(found, reverse=True)[:3]
    assert one.generate(QUESTION, **options).tolist() == [ids for _, ids in beams[:2]]
    assert one.model.generate(**one.inputs(QUESTION), **options).tolist() == [ids for _, ids in beams[:2]]
    two = CompressedContextMemory(one.model, batch_size=2)
    for turn in TURNS:
        two.append([turn, turn[:2]])
    assert two.generate([QUESTION, QUESTION], **options).tolist()[:2] == [ids for _, ids in beams[:2]]


def test_sampling_repeats_with_its_seed_and_reads_the_memory() -> None:
    one, other = remembering(adapted()), remembering(adapted(), TURNS[:1])
    options = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None, "num_return_sequences": 3}
    drawn = []
    for memory in (one, one, other):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            drawn.append(memory.generate(QUESTION, **options))
    assert drawn[0].shape == (3, 12) and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_positions_are_the_memory_s_own(memory: str) -> None:
    one = remembering(adapted("qwen3", memory=memory))
    expected = one.generate(QUESTION, max_new_tokens=5, **GREEDY)
    inputs = one.inputs(QUESTION)
    del inputs["position_ids"]  # generate would count memory slots instead
    assert torch.equal(one.model.generate(**inputs, max_new_tokens=5, **GREEDY), expected)
    inputs = one.inputs(QUESTION)
    del inputs["position_ids"]
    with torch.no_grad():
        assert torch.equal(one.model(**inputs).logits, one.logits(QUESTION))


def test_an_empty_memory_is_the_base_model() -> None:
    model = adapted("mistral")
    one = CompressedContextMemory(model)
    with torch.no_grad():
        expected = tiny_model("mistral", sliding_window=6)(torch.tensor([QUESTION * 3])).logits
    torch.testing.assert_close(one.logits(QUESTION * 3), expected, rtol=0, atol=1e-4)
    assert one.nbytes == 0 and one.tokens_seen == [0]
    assert one.generate(QUESTION, max_new_tokens=3, **GREEDY).shape == (1, 7)


@pytest.mark.parametrize("change", [{"attention_mask": None}, {"attention_mask": 4}, {"users": 3}])
def test_calls_that_would_drop_tokens_are_refused(change: dict[str, Any]) -> None:
    model = adapted()
    one = CompressedContextMemory(model, batch_size=2)
    one.append([TURNS[0], None])
    one.append([TURNS[1], TURNS[2]])
    inputs = one.inputs([QUESTION, QUESTION])
    if "users" in change:
        for name in ("input_ids", "attention_mask", "position_ids"):
            inputs[name] = inputs[name][[0, 1, 0]]
    else:
        inputs["attention_mask"] = change["attention_mask"] and inputs["attention_mask"][:, : change["attention_mask"]]
    with pytest.raises(ValueError, match="attention_mask|2 users, the call 3"):
        model(**inputs)
    if "users" not in change:
        with pytest.raises(DroppedTokensError, match="memory.inputs"):
            model.generate(**{**inputs, "position_ids": None}, max_new_tokens=2)


def test_dropped_tokens_are_refused() -> None:
    one = remembering(adapted(), TURNS[:1])
    inputs = one.inputs(QUESTION)
    with pytest.raises(DroppedTokensError, match="prompt tokens"):
        one.model.generate(input_ids=inputs["input_ids"], **held(inputs["past_key_values"]), max_new_tokens=2)
    with torch.no_grad():
        parallel = one.model(torch.tensor([[*TURNS[0], 264, 265]]), use_cache=True)
        with pytest.raises(ValueError, match="parallel forward"):
            one.model(torch.tensor([[5]]), **held(cache_in((), dict(parallel))))
        with pytest.raises(ValueError, match="parallel forward"):
            one.model.generate(torch.tensor([[*TURNS[0], 264, 265, *QUESTION]]), max_new_tokens=2)
        plain = one.model(torch.tensor([TURNS[0]]), use_cache=True)
        with pytest.raises(ValueError, match="after a plain cache"):
            one.model(torch.tensor([[264, 265]]), **held(cache_in((), dict(plain))))
        recomputed = one.model.generate(
            torch.tensor([[*TURNS[0], 264, 265, *QUESTION]]), max_new_tokens=3, use_cache=False, **GREEDY
        )
    assert recomputed[0, 8:].tolist() == one.generate(QUESTION, max_new_tokens=3, **GREEDY)[0].tolist()


@pytest.mark.parametrize(
    ("users", "context", "error", "words"),
    [
        (1, [], ValueError, "no tokens"),
        (1, None, ValueError, "nothing|anything"),
        (1, [[5], [6]], ValueError, "1 users"),
        (2, [[5]], ValueError, "2 users"),
        (2, "text", ValueError, "2 users"),
        (2, [None, None], ValueError, "anything new"),
        (1, "text", ValueError, "tokenizer"),
        (1, 3.5, TypeError, "must be str"),
        (1, torch.tensor([0.5]), TypeError, "whole numbers"),
    ],
)
def test_bad_contexts(users: int, context: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CompressedContextMemory(adapted(), batch_size=users).append(context)


def test_bad_memories() -> None:
    with pytest.raises(ValueError, match="no active CCM adapter"):
        CompressedContextMemory(tiny_model("llama"))
    with pytest.raises(ValueError, match="batch_size"):
        CompressedContextMemory(adapted(), batch_size=0)
    two = CompressedContextMemory(adapted(), batch_size=2)
    two.append([[5], None])
    with pytest.raises(ValueError, match="every user needs a question"):
        two.inputs([[6], None])
    gist = CompressedContextMemory(adapted(memory="gist"), batch_size=2)
    gist.append([[5], [6, 7]])
    before = gist.logits([[8], [8]])
    with pytest.raises(ValueError, match="made anew"):
        gist.append([[5], None])
    assert torch.equal(gist.logits([[8], [8]]), before) and gist._history == [[5], [6, 7]]


def test_a_failed_append_leaves_the_memory() -> None:
    for memory in ("concat", "merge", "gist"):
        one = remembering(adapted(memory=memory))
        before = one.logits(QUESTION)
        layer = one.model.get_base_model().model.layers[1]
        handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            one.append(TURNS[0])
        handle.remove()
        assert torch.equal(one.logits(QUESTION), before)
        one.append(TURNS[0])
        whole = remembering(one.model, [*TURNS, TURNS[0]])
        assert torch.equal(one.logits(QUESTION), whole.logits(QUESTION)) and one.tokens_seen == whole.tokens_seen


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("memory", ["concat", "merge"])
@pytest.mark.parametrize("turns", [0, 2])
def test_an_update_that_fails_midway_is_taken_back(
    memory: str, sink: bool, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = remembering(adapted(memory=memory, sink=sink), TURNS[:turns])
    before, steps = [(keys.clone(), values.clone()) for keys, values in one.layers], one.steps.tolist()
    join, joined = torch.cat, []

    def failing(tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(one._layers) == 3 and len(tensors) < 4 and "grown" in sys._getframe(1).f_code.co_name:
            joined.append(1)
            if len(joined) == 4:  # the second of three layers has its keys, not its values
                raise RuntimeError("out of memory")
        return join(tensors, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(torch, "cat", failing)
        one.append(TURNS[2])
    assert one.steps.tolist() == steps and len(one.layers) == len(before)
    for found, kept in zip(one.layers, before, strict=True):
        assert torch.equal(found[0], kept[0]) and torch.equal(found[1], kept[1])
    one.append(TURNS[2])
    assert torch.equal(one.logits(QUESTION), remembering(one.model, [*TURNS[:turns], TURNS[2]]).logits(QUESTION))


@pytest.mark.parametrize(("memory", "most"), [("concat", None), ("concat", 2), ("merge", None)])
def test_an_interrupt_at_any_line_of_an_append_is_taken_back(memory: str, most: int | None) -> None:
    model = adapted(memory=memory, sink=True)
    lines = 0

    def appended(stop: int) -> CompressedContextMemory:
        """A memory whose third turn was interrupted at line `stop` of memory.py."""
        one, count = remembering(model, TURNS[:2], most), 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal count, lines
            if not frame.f_code.co_filename.endswith("memory.py"):
                return None
            count += event == "line"
            lines = count if stop < 0 else lines
            if count == stop and event == "line":
                raise KeyboardInterrupt
            return trace

        others = sys.gettrace()  # a measurement of coverage goes on afterwards
        sys.settrace(trace)
        try:
            one.append(TURNS[2])
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(others)
        return one

    whole, before = appended(-1), remembering(model, TURNS[:2], most)
    expected = {one.steps.item(): one.logits(QUESTION) for one in (before, whole)}
    assert lines > 60
    for stop in range(lines - 45, lines + 1, 2):  # behind the forward
        one = appended(stop)
        assert one.tokens_seen == (before if one.steps.item() == 2 else whole).tokens_seen
        assert torch.equal(one.logits(QUESTION), expected[one.steps.item()])


def test_what_is_done_to_a_fork_leaves_the_memory() -> None:
    one = remembering(adapted())
    before = one.logits(QUESTION)
    for change in ("reset", "crop", "reorder_cache", "batch_repeat_interleave"):
        cache = one.inputs(QUESTION)["past_key_values"]
        value = {"reset": (), "crop": (-1,), "batch_repeat_interleave": (2,)}.get(change, (torch.tensor([0]),))
        getattr(cache, change)(*value)
        assert torch.equal(one.logits(QUESTION), before), change
    cache.reset()
    assert cache.get_seq_length() == 0


def test_the_size_of_each_memory() -> None:
    slot = 2 * 3 * 2 * 8 * 4  # keys and values, layers, KV heads, head dim, bytes
    for memory, slots in (("concat", 2 * 6), ("merge", 2), ("gist", 2)):
        one = CompressedContextMemory(adapted(memory=memory))
        for _ in range(6):
            one.append(TURNS[0])
        assert one.nbytes == slots * slot and one.tokens_seen == [36] and one.full_nbytes == 36 * slot
        held = {"concat": 10, "merge": 2, "gist": 0}[memory]  # before the last step, beside its tokens
        attended = held + len(TURNS[0]) * (6 if memory == "gist" else 1) + 2
        assert one.peak_slots == attended
        compressing = (
            held + 2 + 2 * (memory == "gist")
        ) * slot + attended * slot // 3  # the text is there in one of three layers at a time
        updating = (slots + 2) * slot
        assert one.peak_kv_bytes == max(compressing, updating)
        before = one.peak_kv_bytes
        one.generate([QUESTION] * 4, max_new_tokens=3, **GREEDY)
        assert one.peak_kv_bytes >= before and one.peak_kv_bytes >= 4 * (slots + 6) * slot


def test_a_model_that_transformers_put_the_adapter_on(tmp_path: Path) -> None:
    model = adapted(memory="merge")
    model.save_pretrained(tmp_path / "adapter")
    one = remembering(model)
    one.save_pretrained(tmp_path / "memory")
    native = tiny_model("llama")
    native.load_adapter(str(tmp_path / "adapter"), adapter_name="mine")
    again = CompressedContextMemory.from_pretrained(native, tmp_path / "memory")
    assert torch.equal(again.logits(QUESTION), one.logits(QUESTION))


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_save_and_fork(memory: str, tmp_path: Path) -> None:
    one = CompressedContextMemory(adapted(memory=memory, sink=True), byte_tokenizer())
    one.append({"role": "user", "content": "the cat is called Bismarck"})
    one.append("and the dog Otto")
    one.save_pretrained(tmp_path)
    again = CompressedContextMemory.from_pretrained(one.model, tmp_path, one.tokenizer)
    expected = one.logits("who?")
    assert torch.equal(again.logits("who?"), expected)
    assert (again.tokens_seen, again.peak_kv_bytes) == (one.tokens_seen, one.peak_kv_bytes)
    other = one.fork()
    other.append("a third turn")
    assert torch.equal(one.logits("who?"), expected)
    assert not torch.allclose(other.logits("who?"), expected)
    again.append("a third turn")
    assert torch.equal(again.logits("who?"), other.logits("who?"))
    assert isinstance(one.generate("who?", max_new_tokens=3), str)
    assert len(one.generate(["who?", "and the dog?"], max_new_tokens=3)) == 2


def test_inputs_are_for_the_adapter_that_made_them() -> None:
    memory = remembering(adapted())
    expected, inputs = memory.logits([8, 9]), memory.inputs([8, 9])
    model = memory.model
    first = model.active_adapter
    model.add_adapter("other", CCMConfig(r=2))
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"made with adapters \['default'\] active, now \['other'\] are"):
        model(**inputs)
    model.set_adapter(first)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_a_memory_knows_who_wrote_it(tmp_path: Path) -> None:
    one = remembering(adapted())
    one.save_pretrained(tmp_path)
    CompressedContextMemory.from_pretrained(adapted(), tmp_path)
    trained = adapted()
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight += 1e-4
    for other, words in (
        (adapted(memory="concat_apart"), "another adapter .memory 'concat', here 'concat_apart'"),
        (adapted("qwen2"), "another model .model_type 'llama', here 'qwen2'"),
        (adapted(layers=2), "num_hidden_layers 3, here 2"),
        (adapted(seed=2), "other weights"),
        (trained, "append the contexts again"),
    ):
        with pytest.raises(ValueError, match=words):
            CompressedContextMemory.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a Hub name"):
        CompressedContextMemory.from_pretrained(one.model, tmp_path / "elsewhere")
    one.model.add_adapter("other", CCMConfig(r=2))
    one.model.set_adapter("other")
    for use in (one.append, one.logits):
        with pytest.raises(ValueError, match="'other' is active now"):
            use(TURNS[0])
    one.model.set_adapter("default")
    one.append(TURNS[0])


def test_positions_counts_and_peaks_in_numbers() -> None:
    one = CompressedContextMemory(adapted(), batch_size=2)
    assert (one.peak_kv_bytes, one.peak_slots, one.nbytes, one.full_nbytes) == (0, 0, 0, 0)
    one.append([TURNS[0], TURNS[1]])
    one.append([TURNS[2], None])
    assert one.tokens_seen == [11, 3] and one.steps.tolist() == [2, 1]
    ids = one.inputs([QUESTION, QUESTION[:1]])
    assert ids["position_ids"].tolist() == [[11, 12, 13, 14], [3, 3, 3, 3]]
    comp = one.config.num_comp_tokens
    assert ids["attention_mask"].tolist() == [[1] * (2 * comp + 4), [1] * comp + [0] * (comp + 3) + [1]]
    slot = sum(keys[:1, :, :1].nbytes + values[:1, :, :1].nbytes for keys, values in one.layers)
    assert one.nbytes == 2 * 2 * comp * slot
    assert one.full_nbytes == 14 * slot
    assert one.peak_slots == comp + 5 + comp
    alone = remembering(one.model)
    several = alone.inputs([QUESTION, QUESTION[:1]])
    assert several["position_ids"].tolist() == [[14, 15, 16, 17], [14, 14, 14, 14]]
    assert alone.logits(QUESTION).shape[1] == 4


def test_forgetting_users_by_number() -> None:
    one = CompressedContextMemory(adapted(sink=True), batch_size=3)
    one.append([TURNS[0], TURNS[1], None])
    one.append([TURNS[2], None, TURNS[0]])
    for users in ([-1], [3], [0, 3]):
        with pytest.raises(ValueError, match=r"users must be in \[0, 2\]"):
            one.reset(users)
    one.reset([1])
    assert one.steps.tolist() == [2, 0, 1] and one.tokens_seen == [11, 0, 6]
    one.reset([2])
    assert one.steps.tolist() == [2, 0, 0] and all(not keys[1:].any() for keys, _ in one._layers)
    one.reset([0])
    assert one.layers == [] and one.nbytes == 0 and one._held.shape == (3, 0)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("memory", ["concat", "merge", "concat_apart", "gist"])
def test_undo_takes_one_append_back(memory: str, sink: bool) -> None:
    one = CompressedContextMemory(adapted(memory=memory, sink=sink), batch_size=2)
    with pytest.raises(ValueError, match="no append to undo"):
        one.undo()
    late = None if memory != "gist" else QUESTION
    one.append([TURNS[0], late])
    asked, once = one.logits([QUESTION, QUESTION]), one.fork()
    one.append([TURNS[1], TURNS[2]])
    twice, other = one.logits([QUESTION, QUESTION]), one.fork()
    one.undo()
    assert torch.equal(one.logits([QUESTION, QUESTION]), asked)
    assert (one.nbytes, one.tokens_seen, one.steps.tolist()) == (once.nbytes, once.tokens_seen, once.steps.tolist())
    for layer, before in zip(one.layers, once.layers, strict=True):
        assert torch.equal(layer[0][0], before[0][0]) and torch.equal(layer[1][0], before[1][0])
    if memory.startswith("concat"):  # the second user had nothing yet, and nothing of that user is left, sinks included
        assert not any(part[1].any() for layer in one._layers for part in layer)
    with pytest.raises(ValueError, match="one step is kept"):
        one.undo()
    assert torch.equal(other.logits([QUESTION, QUESTION]), twice)  # a fork has its own
    other.undo()
    other.append([TURNS[1], TURNS[2]])
    assert torch.equal(other.logits([QUESTION, QUESTION]), twice)
    other.reset([0])
    with pytest.raises(ValueError, match="reset"):
        other.undo()


def test_undo_of_the_first_append_leaves_nothing() -> None:
    one = CompressedContextMemory(adapted(sink=True))
    one.append(TURNS[0])
    one.undo()
    assert one.nbytes == 0 and one.tokens_seen == [0] and one.steps.tolist() == [0]
    one.append(TURNS[1])
    assert torch.equal(one.logits(QUESTION), remembering(adapted(sink=True), TURNS[1:2]).logits(QUESTION))
