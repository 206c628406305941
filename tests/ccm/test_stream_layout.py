"""A stream in one parallel forward is the stream step by step, and learns.

Oracle: `StreamingContextMemory.feed`, which moves its own cache and knows nothing of layouts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_dataopt import CCMConfig, DataCollatorForCCM, StreamingContextMemory
from hf_dataopt.ccm.stream_layout import is_stream, stream_order

from ..models import byte_tokenizer
from .models import adapted, sample

SIZES = {"max_kv": 20, "compress_tokens": 8, "memory_size": 6, "sink": 1}


def text(n: int, seed: int = 0) -> list[int]:
    return torch.randint(4, 260, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def collator(model: Any, **more: Any) -> DataCollatorForCCM:
    return DataCollatorForCCM(byte_tokenizer(), model.peft_config["default"], layout="stream", **more)


@pytest.mark.parametrize(
    ("family", "sizes", "n_tok"),
    [
        ("llama", {}, 2),
        ("qwen2", {"sink": 3, "memory_size": 4}, 2),
        ("qwen3", {"sink": 0}, 1),
        ("llama", {"memory_size": 5, "compress_tokens": 11}, 3),  # a group is cut in two by first in, first out
        ("llama", {"max_kv": 15}, 2),  # one recent token left when it compresses
    ],
)
def test_one_pass_is_the_stream_step_by_step(family: str, sizes: dict[str, int], n_tok: int) -> None:
    model = adapted(family, num_comp_tokens=n_tok, stream={**SIZES, **sizes})
    rows = [text(75), text(50, seed=1), text(13, seed=2)]  # six compressions, four, none
    batch = collator(model)([{"input_ids": row} for row in rows])
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
    for index, row in enumerate(rows):
        said = (batch["input_ids"][index] < 260) & batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][said].tolist() == row
        apart = StreamingContextMemory(model).feed(row)
        torch.testing.assert_close(together[index][said], apart, rtol=0, atol=2e-5)
        learned = labels[index][labels[index] >= 0].tolist()
        groups = len(stream_order(len(row), model.peft_config["default"].stream, n_tok))
        assert len(learned) == len(row) - 1 - groups


def test_labels_are_predicted_by_text_and_positions_are_those_of_the_text() -> None:
    model, row = adapted(stream=SIZES), text(38)
    batch = collator(model)([{"input_ids": row}])
    ids, positions, labels = (batch[name][0].tolist() for name in ("input_ids", "position_ids", "labels"))
    comp = model.peft_config["default"].comp_token_ids
    ends = stream_order(38, SIZES, 2)
    assert ends == [21, 27, 33]  # 20 and one more; then what the compression freed: 8 tokens for 2 slots
    assert [k for k, token in enumerate(ids) if token == comp[0]] == [21, 29, 37]
    assert [positions[k] for k in (21, 22, 29, 30)] == [9, 10, 17, 18]  # behind the sink and 8, 16 tokens
    assert [at for at, token in zip(positions, ids, strict=True) if token < comp[0]] == list(range(38))
    unlearned = {0, 21, 22, 23, 29, 30, 31, 37, 38, 39}
    assert {k for k, label in enumerate(labels) if label < 0} == unlearned
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))


@pytest.mark.parametrize("full", [33, 34])
def test_no_compression_without_a_token_behind_it(full: int) -> None:
    assert len(stream_order(full, SIZES, 2)) == (2 if full == 33 else 3)


def test_turns_with_the_same_adapter_are_no_stream() -> None:
    model = adapted(stream=SIZES)
    plain = DataCollatorForCCM(byte_tokenizer(), model.peft_config["default"], pack=True)([sample(), sample(seed=3)])
    first = model.peft_config["default"].comp_token_ids[0]
    comp = torch.where(plain["input_ids"] >= first, plain["input_ids"] - first, -1)
    assert int((comp == 0).sum()) == 6
    assert not is_stream(comp, plain["position_ids"])
    del plain["labels"]
    other = adapted()
    with torch.no_grad():
        assert torch.equal(model(**plain).logits, other(**plain).logits)


def test_it_learns_what_only_the_memory_can_tell() -> None:
    """The first tokens after the sink come back once they have left the window: the loss there falls."""
    torch.manual_seed(0)
    model = adapted(stream={"max_kv": 12, "compress_tokens": 6, "memory_size": 4, "sink": 1}, layers=2)
    collate = collator(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for step in range(40):
        key = [10 + step % 3 * 7] * 4
        row = [5, *key, *text(11, seed=step), *key]
        batch = collate([{"input_ids": row}])
        batch["labels"][0, :-2] = -100
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    grads = collate([{"input_ids": [5, *text(30)]}])
    model(**grads).loss.backward()
    moved = model.get_input_embeddings().lora_comp_embeddings["default"].grad
    assert moved is not None and float(moved.abs().sum()) > 0


def test_a_stream_takes_the_sizes_of_its_adapter(tmp_path: Any) -> None:
    model = adapted(stream={"max_kv": 20, "compress_tokens": 8})
    config = model.peft_config["default"]
    assert config.stream == {"max_kv": 20, "compress_tokens": 8, "memory_size": 8, "sink": 1}
    stream = StreamingContextMemory(model)
    assert (stream.max_kv, stream.compress_tokens, stream.memory_size, stream.sink) == (20, 8, 8, 1)
    assert StreamingContextMemory(model, max_kv=40, sink=0).max_kv == 40
    model.save_pretrained(str(tmp_path))
    assert CCMConfig.from_pretrained(str(tmp_path)).stream == config.stream
    assert StreamingContextMemory(adapted()).max_kv == 160


def test_text_and_long_texts(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(stream=SIZES)
    long = collator(model, max_length=30)
    batch = long([{"text": "abc" * 20}, {"text": "abcd"}])
    assert int((batch["input_ids"][0] < 260).sum()) == 30 and long.cut_samples == 1
    assert "30 last tokens left out" in caplog.text
    assert batch["attention_mask"].sum(1).tolist() == [30 + 2 * 2, 4]


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ({"max_kv": 20}, "cannot hold"),
        ({"window": 3}, "max_kv, compress_tokens"),
        ({"max_kv": 20.5}, "max_kv"),
        ([20, 8], "must be a dict"),
    ],
)
def test_bad_sizes(stream: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        CCMConfig(stream=stream)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="memory='concat', not 'merge'"):
        CCMConfig(memory="merge", stream={})
    with pytest.raises(ValueError, match="needs CCMConfig"):
        collator(adapted())
    model = adapted(stream=SIZES)
    with pytest.raises(ValueError, match="pack=False"):
        collator(model, pack=True)
    with pytest.raises(ValueError, match="layout"):
        DataCollatorForCCM(None, model.peft_config["default"], layout="river")
    for sample_ in ({"texts": ["a"]}, {"text": "a", "input_ids": [5]}, "a"):
        with pytest.raises(TypeError, match="text or input_ids"):
            collator(model)([sample_])
    with pytest.raises(ValueError, match="at least two ids"):
        collator(model)([{"input_ids": [5, 10**6]}])
