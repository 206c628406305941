"""The memory object: batches, forks, generate, files, refusals, streams against a full recomputation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_dataopt import CompressedContextMemory, StreamingContextMemory
from hf_dataopt.errors import DroppedTokensError

from ..models import byte_tokenizer
from .models import adapted

TURNS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
QUESTION = [20, 21, 22, 23]


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
    one = CompressedContextMemory(model)
    for turn in TURNS:
        one.append(turn)
    expected = list(QUESTION)
    for _ in range(5):
        expected.append(int(one.logits(expected)[0, -1].argmax()))
    output = one.generate(QUESTION, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert output[0].tolist() == expected
    several = one.generate([QUESTION, QUESTION[:2]], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert several[0].tolist() == expected
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "eos_token_id": None}
    beams = model.generate(**one.inputs(QUESTION), **options)
    assert beams.tolist() == one.generate(QUESTION, **options).tolist() and beams.shape[0] == 2
    for settings in ({"num_beams": 3}, {"do_sample": True}):
        assert one.generate(QUESTION, max_new_tokens=4, eos_token_id=None, **settings).shape == (1, 8)


def test_dropped_tokens_are_refused() -> None:
    one = CompressedContextMemory(adapted())
    one.append(TURNS[0])
    inputs = one.inputs(QUESTION)
    with pytest.raises(DroppedTokensError, match="prompt tokens"):
        one.model.generate(input_ids=inputs["input_ids"], past_key_values=inputs["past_key_values"], max_new_tokens=2)
    with pytest.raises(ValueError, match="no tokens"):
        one.append([])
    with pytest.raises(ValueError, match="2 users"):
        CompressedContextMemory(one.model, batch_size=2).append(TURNS[:1])


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_save_and_fork(memory: str, tmp_path: Path) -> None:
    one = CompressedContextMemory(adapted(memory=memory, sink=True), byte_tokenizer())
    one.append({"role": "user", "content": "the cat is called Bismarck"})
    one.append("and the dog Otto")
    one.save_pretrained(tmp_path)
    again = CompressedContextMemory.from_pretrained(one.model, tmp_path, one.tokenizer)
    expected = one.logits("who?")
    assert torch.equal(again.logits("who?"), expected)
    other = one.fork()
    other.append("a third turn")
    assert torch.equal(one.logits("who?"), expected)
    assert not torch.allclose(other.logits("who?"), expected)
    assert isinstance(one.generate("who?", max_new_tokens=3), str)
    with pytest.raises(ValueError, match="belongs to"):
        CompressedContextMemory.from_pretrained(adapted(memory="concat_apart"), tmp_path)


def test_a_stream_in_pieces_and_its_baseline() -> None:
    model = adapted("qwen3")
    sizes = {"max_kv": 20, "compress_tokens": 8, "memory_size": 6}
    ids = torch.randint(4, 260, (70,), generator=torch.Generator().manual_seed(0))
    whole, pieces = StreamingContextMemory(model, **sizes), StreamingContextMemory(model, **sizes)
    plain = StreamingContextMemory(model, **sizes, compress=False)
    parts = []
    for token in ids:
        parts.append(pieces.feed(token[None]))
        plain.feed(token[None])
        assert plain.size == pieces.size <= 20
    torch.testing.assert_close(whole.feed(ids), torch.cat(parts), rtol=0, atol=1e-4)
    assert whole.perplexity(ids) != plain.perplexity(ids)
    with pytest.raises(ValueError, match="merged key"):
        StreamingContextMemory(adapted(memory="merge"))
    with pytest.raises(ValueError, match="cannot hold"):
        StreamingContextMemory(model, max_kv=20)
