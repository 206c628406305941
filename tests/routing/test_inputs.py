"""Both names of the cache's keyword read and write one entry, which is stored under the installed release's name."""

from __future__ import annotations

import copy

from hf_dataopt._compat import CACHE_NAMES, cache_keyword
from hf_dataopt.routing.inputs import CallInputs

from ..models import tiny_model


def test_either_name_is_the_one_entry() -> None:
    stored = cache_keyword()
    for name in CACHE_NAMES:
        inputs = CallInputs(input_ids=1, **{name: 2})
        assert list(inputs) == ["input_ids", stored] and dict(**inputs) == {"input_ids": 1, stored: 2}
        for other in CACHE_NAMES:
            assert inputs[other] == inputs.get(other) == 2 and other in inputs
            inputs[other] = 3
            assert len(inputs) == 2 and inputs.setdefault(other, 4) == 3
            for joined in (inputs | {other: 5}, {other: 4} | CallInputs({name: 5}), copy.copy(inputs) | {other: 5}):
                assert joined["past_key_values"] == 5 and list(joined).count(stored) == 1
            inputs |= {other: 2}
            assert inputs.copy().pop(other) == 2 and other not in CallInputs(input_ids=1)
        del inputs[name]
        assert stored not in inputs and inputs.pop(name, None) is None


def test_the_keyword_is_the_one_that_the_release_wants() -> None:
    model = tiny_model("llama")
    assert cache_keyword() == cache_keyword(model.forward) == cache_keyword(model.model.forward)

    def older(input_ids: object, past_key_values: object = None) -> None: ...

    assert cache_keyword(older) == "past_key_values"
