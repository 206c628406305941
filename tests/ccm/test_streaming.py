"""Streams: bounded caches, re-assigned positions, first-in-first-out memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_dataopt import StreamingContextMemory
from hf_dataopt.ccm.rotation import Rotation
from hf_dataopt.errors import UnsupportedModelError

from ..models import byte_tokenizer, tiny_model
from ..reference.ccm import rotate
from .models import adapted

SIZES = {"max_kv": 20, "compress_tokens": 8, "memory_size": 6}


def text(n: int) -> torch.Tensor:
    return torch.randint(4, 260, (n,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_moved_keys_stand_where_they_should(family: str) -> None:
    model = tiny_model(family)
    keys = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    old, new = [0, 7, 30, 31, 200], [0, 3, 40, 2, 199]
    theta = model.config.rope_parameters["rope_theta"]
    before = torch.stack([rotate(key, position, theta) for key, position in zip(keys, old, strict=True)])
    after = torch.stack([rotate(key, position, theta) for key, position in zip(keys, new, strict=True)])
    shift = torch.tensor(new) - torch.tensor(old)
    moved = Rotation(model)(0, before[None, None], shift)
    torch.testing.assert_close(moved[0, 0], after, rtol=0, atol=1e-4)


def test_a_short_stream_is_the_plain_model() -> None:
    stream, ids = StreamingContextMemory(adapted("qwen2"), byte_tokenizer(), **SIZES), text(20)
    with torch.no_grad():
        expected = tiny_model("qwen2")(ids[None], labels=ids[None])
    torch.testing.assert_close(stream.feed(ids), expected.logits[0], rtol=0, atol=1e-4)
    assert stream.perplexity(ids) == pytest.approx(math.exp(expected.loss), rel=1e-4)
    assert stream.size == 19 and stream.memory_slots == 0  # the last token has nothing to predict
    assert stream.perplexity("a text") > 1


@pytest.mark.parametrize("sink", [0, 1, 3])
def test_the_memory_is_first_in_first_out(sink: int) -> None:
    model = adapted()
    stream = StreamingContextMemory(model, sink=sink, **SIZES)
    slots, sinks = [], None
    for token in text(60):
        held, size = stream.memory_slots, stream.size
        values = [layer[1][:, :, sink : sink + held].clone() for layer in stream._layers]
        stream.feed(token[None])
        assert stream.size <= 20
        if stream.size == max(sink, 1) and sinks is None:
            sinks = [layer[1][:, :, :sink].clone() for layer in stream._layers]
        if stream.size < size:
            slots.append(stream.memory_slots)
            for old, layer in zip(values, stream._layers, strict=True):
                kept = stream.memory_slots - 2  # the new group stands behind them
                assert torch.equal(old[:, :, held - kept :], layer[1][:, :, sink : sink + kept])
    assert slots[:4] == [2, 4, 6, 6] and stream.tokens_seen == 60
    for first, layer in zip(sinks or [], stream._layers, strict=True):
        assert torch.equal(first, layer[1][:, :, :sink])


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


@pytest.mark.parametrize("compress", [True, False])
def test_texts_of_one_length_are_read_together(compress: bool) -> None:
    model, texts = adapted(), text(90).view(2, 45)
    alone = [StreamingContextMemory(model, **SIZES, compress=compress).feed(one) for one in texts]
    stream, parts = StreamingContextMemory(model, **SIZES, compress=compress), []
    while (start := sum(part.shape[1] for part in parts)) < 45:
        with torch.no_grad():
            logits, cache = stream._forward(texts[:, start : start + 21 - stream.size], stream._layers)
            stream._layers = cache.tail(cache.get_seq_length())
            if stream.size > stream.max_kv:
                stream._shrink()
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), torch.stack(alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_kv": 20}, "cannot hold"),
        ({"compress_tokens": 1}, "at least 2"),
        ({"memory_size": 1}, "at least 2"),
        ({"sink": -1}, "sink must be at least 0"),
    ],
)
def test_bad_sizes(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StreamingContextMemory(adapted(), **settings)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="merged key"):
        StreamingContextMemory(adapted(memory="merge"))
    with pytest.raises(UnsupportedModelError, match="sliding-window"):
        StreamingContextMemory(adapted("gemma3"))
    stream = StreamingContextMemory(adapted())
    for ids in ([], torch.zeros(1, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="1-D|at least 1 entry"):
            stream.feed(ids)
    with pytest.raises(ValueError, match="at least two"):
        stream.perplexity([5])
