"""The parallel forward, the online memory and the written-out recurrence agree, values and gradients.

Invariants: parallel = recurrent = oracle to 1e-4 for every memory mode, family and attention; padding, packing and the batch
change nothing; without compression tokens the base model answers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from hf_dataopt import CompressedContextMemory, DataCollatorForCCM

from ..models import FAMILIES, tiny_model
from ..reference.ccm import Recurrence
from .models import adapted, sample

MEMORIES = ["concat", "merge", "concat_apart", "merge_apart", "gist"]
families = pytest.mark.parametrize("family", sorted(FAMILIES))


def equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def settings(memory: str) -> dict[str, Any]:
    """One mode with everything that belongs to it switched on: general a_t, sinks."""
    extra = {"merge": {"sink": True}, "merge_apart": {"merge_weight": 0.3}, "concat_apart": {"sink": True}}
    return {"memory": memory, "num_comp_tokens": 3 if memory == "gist" else 2, **extra.get(memory, {})}


def question_of(feature: dict[str, Any]) -> list[int]:
    return [*feature["input"], *feature["output"]]


@lru_cache
def oracle(family: str, memory: str) -> tuple[Any, list[Any]]:
    feature = sample()
    with torch.no_grad():
        return Recurrence(adapted(family, **settings(memory))).run(feature["contexts"], question_of(feature))


@pytest.fixture(params=["sdpa", "eager", "flex_attention"])
def attention(request: pytest.FixtureRequest) -> Iterator[str]:
    # compiling flex attention for a CPU takes minutes: run the same function uncompiled
    torch.compiler.set_stance("force_eager" if request.param == "flex_attention" else "default")
    yield request.param
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("memory", MEMORIES)
@families
def test_parallel_equals_recurrent(family: str, memory: str, attention: str) -> None:
    model = adapted(family, **settings(memory))
    model.get_base_model().set_attn_implementation(attention)
    feature = sample()
    batch = DataCollatorForCCM(None, model.peft_config["default"])([feature, sample((5, 6), 3)])
    expected, memories = oracle(family, memory)
    with torch.no_grad():
        parallel = model(**batch).logits[0]
    equal(parallel[-len(expected) :], expected)
    online = CompressedContextMemory(model)
    for step, context in enumerate(feature["contexts"]):
        online.append(context)
        if memory != "gist":
            for layer, heads in zip(online.layers, memories[step], strict=True):
                equal(layer[0][0], torch.stack([keys for keys, _ in heads]))
                equal(layer[1][0], torch.stack([values for _, values in heads]))
    equal(online.logits(question_of(feature))[0], expected)


@pytest.mark.parametrize("memory", ["concat", "merge"])
@families
def test_gradients(family: str, memory: str) -> None:
    feature, gradients = sample((6, 4, 7)), []
    for parallel in (True, False):
        model = adapted(family, **settings(memory))
        if parallel:
            loss = model(**DataCollatorForCCM(None, model.peft_config["default"])([feature])).loss
        else:
            logits, _ = Recurrence(model).run(feature["contexts"], question_of(feature))
            loss = torch.nn.functional.cross_entropy(logits[-4:-1], torch.tensor(feature["output"]))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("comp_embeddings" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        if expected is None:  # the last layer's queries and outputs of compression tokens reach no loss
            assert gradient is None or not gradient.any()
        else:
            equal(gradient, expected, 1e-3 * max(float(expected.abs().max()), 1e-2))


def test_the_oracle_tells_variants_apart() -> None:
    found = [oracle("llama", memory)[0] for memory in MEMORIES]
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            assert (one - other).abs().max() > 0.1


def left_padded(batch: dict[str, torch.Tensor], extra: int) -> dict[str, torch.Tensor]:
    """The collator's rows pushed to the right end, and `extra` more columns of padding."""
    lengths = batch["attention_mask"].sum(1)
    fill = {"input_ids": 0, "attention_mask": 0, "position_ids": 1, "labels": -100}
    moved = {}
    for name, rows in batch.items():
        moved[name] = torch.full((len(rows), rows.shape[1] + extra), fill[name])
        for row, length, target in zip(rows, lengths, moved[name], strict=True):
            target[len(target) - length :] = row[:length]
    return moved


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_and_packing_change_nothing(family: str, memory: str, sink: bool) -> None:
    model = adapted(family, **{**settings(memory), "sink": sink})
    config = model.peft_config["default"]
    features = [sample(), sample((5, 6, 4), 3), sample((8,), 4), sample((3, 3, 3, 3, 5), 5)]
    single = [DataCollatorForCCM(None, config)([feature]) for feature in features]
    packed = DataCollatorForCCM(None, config, pack=True)(features)
    assert packed["input_ids"].shape[0] == 1
    padded = left_padded(DataCollatorForCCM(None, config)(features), 5)
    with torch.no_grad():
        alone = [model(**batch) for batch in single]
        together = model(**packed)
        left = model(**padded)
        own_positions = model(single[0]["input_ids"]).logits
        no_positions = model(padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    equal(together.logits[0], torch.cat([one.logits[0] for one in alone]))
    for index, one in enumerate(alone):
        equal(left.logits[index, -one.logits.shape[1] :], one.logits[0])
        equal(no_positions[index, -one.logits.shape[1] :], one.logits[0])
    equal(own_positions, alone[0].logits)
    equal(together.loss, torch.stack([one.loss for one in alone]).mean(), 1e-5)  # 3 labels in each
    equal(left.loss, together.loss, 1e-5)


@pytest.mark.parametrize("attention_name", ["sdpa", "eager"])
@families
def test_no_compression_token_is_the_base_model(family: str, attention_name: str) -> None:
    changes = {"sliding_window": 6} if family in ("gemma3", "mistral") else {}
    base, model = tiny_model(family, **changes), adapted(family, memory="merge")
    for one in (base, model.get_base_model()):
        one.set_attn_implementation(attention_name)
    ids = torch.randint(4, 260, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits)
        assert torch.equal(
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False),
            base.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False),
        )
