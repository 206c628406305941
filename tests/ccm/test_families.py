"""CCM's one-pass form equals its recurrent form on every family, or the family is refused by name; none is silently wrong.

Invariants: both forms agree to 1e-5; the memory is read; without compression tokens the base model answers, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_dataopt import CompressedContextMemory

from ..families import EITHER, EXACT, REFUSED, available
from .exactness import FIRST, QUESTION, adapted, measure

FAMILIES = available()
memories = pytest.mark.parametrize("memory", ["concat", "merge"])


def of_kind(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.ccm in kinds])


@memories
@of_kind(EXACT, EITHER)
def test_one_pass_equals_recurrent(name: str, memory: str) -> None:
    found = measure(FAMILIES[name], memory)
    if found.refusal is not None:
        assert FAMILIES[name].ccm == EITHER, found.refusal
        return
    assert found.difference <= 1e-5
    assert found.remembered > 1e-3
    assert found.base == 0


@of_kind(EXACT)
def test_a_saved_memory_answers_as_before(name: str, tmp_path: Path) -> None:
    model = adapted(FAMILIES[name], "concat")
    memory = CompressedContextMemory(model)
    memory.append(FIRST)
    memory.save_pretrained(tmp_path)
    again = CompressedContextMemory.from_pretrained(model, tmp_path)
    assert torch.equal(again.logits(QUESTION), memory.logits(QUESTION))


@memories
@of_kind(REFUSED)
def test_models_that_would_carry_a_state_past_the_memory_are_refused(name: str, memory: str) -> None:
    assert measure(FAMILIES[name], memory).refusal is not None
