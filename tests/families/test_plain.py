"""transformers itself: which families go on from a cache exactly, so that the tests compare with the right thing."""

from __future__ import annotations

import math

import pytest
import torch

from .models import available
from .plain import own_difference

FAMILIES = available()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.continues])
def test_the_plain_model_goes_on_exactly(name: str) -> None:
    assert own_difference(FAMILIES[name]) <= 1e-5


@pytest.mark.parametrize("name", list(FAMILIES))
def test_models_are_the_same_every_time_and_see_far_back(name: str) -> None:
    family = FAMILIES[name]
    ids = torch.randint(4, 250, (1, 90), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 5] += 1
    with torch.no_grad():
        found, again, changed = family.model()(ids).logits, family.model()(ids).logits, family.model()(other).logits
    assert torch.equal(found, again)
    assert math.isfinite(float(found.abs().max()))
    if family.kvzip != "refused":
        assert float((changed - found)[:, 60:].abs().max()) > 1e-3
