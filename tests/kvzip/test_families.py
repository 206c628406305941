"""Every family of decoder-only models is compressed exactly, or refused by name; none is silently wrong.

Invariants: keeping everything changes no logit by more than 1e-5, in forwards and in `generate`; the model without a cache
answers as before; evicting changes the logits; scores and answers after eviction equal KVzip written out on a plain cache.
"""

from __future__ import annotations

import pytest

from hf_dataopt import KVzipCache
from hf_dataopt.errors import UnsupportedModelError

from ..families import EITHER, EXACT, REFUSED, available
from ..models import byte_tokenizer
from .exactness import CONTEXT, measure, measure_against_the_oracle

FAMILIES = available()
TOLERANCE = 1e-5


def of_kind(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.kvzip in kinds])


@of_kind(EXACT, EITHER)
def test_keeping_everything_changes_nothing(name: str) -> None:
    found = measure(FAMILIES[name])
    assert found.plain <= TOLERANCE
    if found.refusal is not None:
        assert FAMILIES[name].kvzip == EITHER, found.refusal
        return
    assert found.forward <= TOLERANCE
    assert found.generated <= TOLERANCE
    assert found.evicted > 1e-3


@of_kind(EXACT)
def test_scores_and_eviction_equal_the_written_out_method(name: str) -> None:
    scores, answers = measure_against_the_oracle(FAMILIES[name])
    assert scores <= TOLERANCE
    assert answers <= TOLERANCE


@of_kind(REFUSED)
def test_models_without_anything_to_evict_are_refused(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    with pytest.raises(UnsupportedModelError, match=model.config.get_text_config(decoder=True).model_type):
        KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, keep_ratio=0.5, progress=False)


def test_at_least_34_model_types_are_exact() -> None:
    exact = {family.config_class for family in FAMILIES.values() if family.kvzip == EXACT}
    assert len(exact) >= 34
