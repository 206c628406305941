"""How far CCM's one-pass form is from its recurrent form on one family."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model

from hf_dataopt import CCMConfig, CompressedContextMemory
from hf_dataopt.errors import UnsupportedModelError

from ..families import Family

FIRST, OTHER, SECOND = list(range(20, 31)), list(range(120, 131)), list(range(50, 57))
QUESTION = [70, 71, 72, 73, 74]


@dataclass
class Exactness:
    """Largest absolute logit differences in float32, or why the model was refused.

    Args:
        refusal: message of the `UnsupportedModelError`.
        difference: [c(1) COMP c(2) COMP question] in one forward against two appends and a question.
        remembered: how much another c(1) changes; zero would mean a memory that nobody reads.
        base: a text without compression tokens, against the model before it was adapted.
    """

    refusal: str | None = None
    difference: float = 0.0
    remembered: float = 0.0
    base: float = 0.0


def adapted(family: Family, memory: str) -> PeftModel:
    """The family's model with an adapter whose matrices are not zero."""
    config = CCMConfig(r=4, lora_dropout=0.0, memory=memory, target_modules=list(family.targets))
    model = get_peft_model(family.model(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def recurrent(model: PeftModel, *contexts: list[int]) -> torch.Tensor:
    """Logits (q, vocabulary) of the question behind the contexts, compressed one by one."""
    memory = CompressedContextMemory(model)
    for context in contexts:
        memory.append(context)
    return memory.logits(QUESTION)[0]


def one_pass(model: PeftModel, *contexts: list[int]) -> torch.Tensor:
    """The same from one forward over the whole row."""
    comp = model.peft_config["default"].comp_token_ids
    row = [token for context in contexts for token in [*context, *comp]] + QUESTION
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0, -len(QUESTION) :]


def measure(family: Family, memory: str) -> Exactness:
    """Compress two contexts both ways, ask, and compare."""
    ids = torch.tensor([FIRST + QUESTION])
    with torch.no_grad():
        base = family.model()(ids).logits
    try:
        model = adapted(family, memory)
        together, apart = one_pass(model, FIRST, SECOND), recurrent(model, FIRST, SECOND)
    except UnsupportedModelError as error:
        return Exactness(refusal=str(error))
    with torch.no_grad():
        unchanged = model(input_ids=ids).logits
    return Exactness(
        difference=furthest(together, apart),
        remembered=furthest(apart, recurrent(model, OTHER, SECOND)),
        base=furthest(unchanged, base),
    )


def furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference, infinite where one is not a number."""
    difference = float((one - other).abs().max())
    return math.inf if math.isnan(difference) else difference
