"""Positions a model was made for, and the warning beyond them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from hf_dataopt.text.positions import positions_of, warn_beyond_positions


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 64),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
            256,
        ),
        (
            {
                "max_position_embeddings": 512,
                "rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 64},
            },
            512,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"full_attention": {"factor": 2, "original_max_position_embeddings": 64}},
            },
            128,
        ),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_positions(config: dict[str, object], positions: int | None) -> None:
    made = SimpleNamespace(**config)
    assert positions_of(made) == positions
    if positions is None:
        assert not warn_beyond_positions(made, 10**9, "a text")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_beyond_positions(made, positions, "a text")
    with pytest.warns(UserWarning, match=f"a text needs {positions + 1} positions, the model was made for {positions}"):
        assert warn_beyond_positions(made, positions + 1, "a text")
