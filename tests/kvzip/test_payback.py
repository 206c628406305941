"""Payback: the arithmetic on given seconds, and a clock of our own that shows which call is charged to what."""

from __future__ import annotations

import math

import pytest

from hf_dataopt import KVzipConfig, payback
from hf_dataopt.kvzip.payback import Payback

from ..models import byte_tokenizer, tiny_model

CONTEXT = "The key of room 12 is blue. " * 12


def _found(**changes: float) -> Payback:
    seconds = {"prefill": 10.0, "compress": 8.0, "ask_full": 0.5, "ask_compressed": 0.25}
    tokens = {"token_full": 0.1, "token_whole": 0.09, "token_compressed": 0.05}
    return Payback(**{"tokens": 2000, **seconds, **tokens, **changes})


def test_seconds_saved_and_break_even() -> None:
    found = _found()
    # one question of 32 tokens: 0.25 + 32 * 0.05 = 1.85 s
    assert found.saved(0, 32) == pytest.approx(-8.0)
    assert found.saved(5, 32) == pytest.approx(5 * 1.85 - 8)
    assert found.break_even(32) == 5
    assert found.saved(4, 32) < 0 < found.saved(5, 32)
    assert found.break_even(0) == 32  # the questions' reading alone


def test_what_never_pays_and_what_costs_nothing() -> None:
    slower = _found(token_compressed=0.2)
    assert slower.break_even(32) == math.inf
    assert "does not pay" in slower.line()
    assert _found(compress=0.0).break_even(32) == 0


def test_line_says_both_ratios() -> None:
    line = _found().line(32)
    assert "0.80 of a prefill" in line and "after 5 questions of 32 tokens" in line
    assert "0.50 of the full" in line and "0.56 of an uncompressed" in line


def test_measured_with_a_clock_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward takes as many seconds as it reads queries, plus a thousandth of the pairs in sight."""
    model, tokenizer, now = tiny_model("llama", num_hidden_layers=2), byte_tokenizer(), [0.0]
    forward = type(model.model).forward

    def slow(self: object, *args: object, **kwargs: object) -> object:
        ids = kwargs.get("input_ids")
        now[0] += ids.shape[1] if ids is not None else 0  # type: ignore[union-attr]
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", slow)
    config = KVzipConfig(keep_ratio=0.5, chunk_size=64)
    found = payback(model, tokenizer, CONTEXT, config, clock=lambda: now[0], steps=3, progress=False)
    assert found.prefill == found.tokens
    assert found.compress > found.tokens  # every token is repeated, behind repeat prompts
    assert found.token_full == found.token_whole == found.token_compressed == 1
    assert found.ask_full == found.ask_compressed > 5
    assert found.break_even(32) == math.inf  # no token became cheaper


def test_gates_cost_what_they_add_to_a_prefill() -> None:
    from ..arguments.kvzip import CONTEXT as SHORT
    from ..arguments.kvzip import gates, model, tokenizer

    ticks = iter(range(1000))
    found = payback(model(), tokenizer(), SHORT, gates=gates(), clock=lambda: next(ticks), steps=1, progress=False)
    # each timed call takes one tick: scoring by gates within a second prefill adds none to the first, evicting one
    assert (found.prefill, found.compress) == (1, 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"steps": 0}, "steps"), ({"context": ""}, "context"), ({"clock": 3}, "clock"), ({"question": ""}, "question")],
)
def test_bad_arguments(change: dict[str, object], told: str) -> None:
    arguments = {"model": tiny_model("llama"), "tokenizer": byte_tokenizer(), "context": CONTEXT, **change}
    with pytest.raises((TypeError, ValueError), match=told):
        payback(**arguments)  # type: ignore[arg-type]
