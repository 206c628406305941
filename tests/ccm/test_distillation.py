"""Distillation from the full context, against the definition written out row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_dataopt import DataCollatorForCCM
from hf_dataopt.ccm import distillation
from hf_dataopt.ccm.distillation import distillation_loss

from ..models import byte_tokenizer, tiny_model
from .models import adapted, sample

STREAM = {"max_kv": 20, "compress_tokens": 8, "memory_size": 6}


def batches(model: Any) -> list[tuple[list[list[int]], dict[str, torch.Tensor]]]:
    """Turns and streams of two lengths, and the text of each row."""
    config = model.peft_config["default"]
    turns = [sample(), sample((5, 6), seed=4)]
    rows = [[*sum(one["contexts"], []), *one["input"], *one["output"]] for one in turns]
    texts = [torch.randint(4, 260, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (41, 30)]
    stream = DataCollatorForCCM(byte_tokenizer(), config, layout="stream")([{"input_ids": one} for one in texts])
    return [(rows, DataCollatorForCCM(None, config)(turns)), (texts, stream)]


@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0)])
def test_loss_and_gradient_are_those_of_the_definition(
    share: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_ROWS", 7)  # several pieces
    model, plain = adapted(stream=STREAM), tiny_model("llama", num_hidden_layers=3)
    for texts, batch in batches(model):
        labels, expected = batch["labels"], []
        student = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        for index, row in enumerate(texts):
            with torch.no_grad():
                teacher = plain(torch.tensor([row])).logits[0]
            seen = 0
            for column, token in enumerate(batch["input_ids"][index].tolist()):
                if int(labels[index, column]) >= 0:
                    told = torch.log_softmax(teacher[seen - 1] / temperature, -1)
                    said = torch.log_softmax(student[index, column - 1] / temperature, -1)
                    kl = (told.exp() * (told - said)).sum() * temperature**2
                    ce = -torch.log_softmax(student[index, column - 1], -1)[token]
                    expected.append(share * kl + (1 - share) * ce)
                seen += token < 260
        slow = torch.stack(expected).mean()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        fast = distillation_loss(model, batch, share=share, temperature=temperature)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
        for mine, theirs in zip(torch.autograd.grad(fast, weights), torch.autograd.grad(slow, weights), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_the_adapter_is_on_again_behind_it() -> None:
    model = adapted(stream=STREAM)
    _, batch = batches(model)[0]
    before = model(**batch).loss
    distillation_loss(model, batch)
    assert torch.equal(model(**batch).loss, before)


def test_refusals() -> None:
    model = adapted()
    config = model.peft_config["default"]
    packed = DataCollatorForCCM(None, config, pack=True)([sample(), sample()])
    with pytest.raises(ValueError, match="pack=False"):
        distillation_loss(model, packed)
    batch = DataCollatorForCCM(None, config)([sample()])
    with pytest.raises(ValueError, match="no labels"):
        distillation_loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(TypeError, match="a batch needs"):
        distillation_loss(model, {"input_ids": batch["input_ids"]})
    for wrong in ({"share": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="share|temperature"):
            distillation_loss(model, batch, **wrong)
