"""A budget of slots: the oldest contexts share a group, one user like another, and everything else goes on as it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dataopt import CompressedContextMemory

from .models import adapted

TURNS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18], [30, 31], [32, 33, 34, 35], [36, 37, 38]]
QUESTION = [20, 21, 22, 23]


def remembering(model: Any, turns: list[list[int]] = TURNS, max_slots: int | None = 6) -> CompressedContextMemory:
    one = CompressedContextMemory(model, max_slots=max_slots)
    for turn in turns:
        one.append(turn)
    return one


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("memory", "sink"), [("concat", True), ("concat", False), ("concat_apart", True)])
def test_the_oldest_group_is_the_mean_of_its_contexts(groups: int, memory: str, sink: bool) -> None:
    model = adapted("qwen3", memory=memory, sink=sink)
    one, by_hand = CompressedContextMemory(model, max_slots=2 * groups), CompressedContextMemory(model)
    written: list[list[torch.Tensor]] = []  # h(t) of every layer, keys and values one after the other
    for turn in TURNS:
        one.append(turn)
        by_hand.append(turn)
        first = by_hand._sinks
        states = [state for layer in by_hand._layers for state in layer]
        written.append([state[:, :, -2:] for state in states])
        held = [torch.stack(same).mean(0) for same in zip(*written[: max(1, len(written) - groups + 1)], strict=True)]
        later = written[max(1, len(written) - groups + 1) :]
        whole = [
            torch.cat([state[:, :, :first], held[k], *(group[k] for group in later)], 2)
            for k, state in enumerate(states)
        ]
        by_hand._layers = list(zip(whole[::2], whole[1::2], strict=True))
        by_hand._held = torch.ones(1, whole[0].shape[2] - first, dtype=torch.bool)
        for mine, theirs in zip(one._layers, by_hand._layers, strict=True):
            torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(one.logits(QUESTION), by_hand.logits(QUESTION), rtol=0, atol=1e-4)
    assert one.layers[0][0].shape[2] == 2 * groups and one.steps.tolist() == [6]


def test_a_budget_that_suffices_changes_nothing() -> None:
    model = adapted("gemma3")
    assert torch.equal(
        remembering(model, max_slots=12).logits(QUESTION), remembering(model, max_slots=None).logits(QUESTION)
    )
    assert not torch.allclose(
        remembering(model, max_slots=10).logits(QUESTION), remembering(model, max_slots=None).logits(QUESTION)
    )


def test_users_reach_the_budget_at_different_steps() -> None:
    model = adapted("gemma3", sink=True)
    together = CompressedContextMemory(model, batch_size=3, max_slots=4)
    alone = [CompressedContextMemory(model, max_slots=4) for _ in range(3)]
    who = [(1, 1, 0), (1, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 0), (0, 1, 0)]
    for turn, having in zip(TURNS, who, strict=True):
        together.append([turn if has else None for has in having])
        for one, has in zip(alone, having, strict=True):
            if has:
                one.append(turn)
        assert together.layers[0][0].shape[2] <= 4
    assert together._held.sum(1).tolist() == [4, 4, 2]
    found = together.logits([QUESTION] * 3)
    for user, one in enumerate(alone):
        torch.testing.assert_close(found[user], one.logits(QUESTION)[0], rtol=0, atol=1e-4)
    together.reset([0])
    together.append([TURNS[1], None, TURNS[1]])
    torch.testing.assert_close(
        together.logits([QUESTION] * 3)[0], remembering(model, TURNS[1:2], 4).logits(QUESTION)[0], rtol=0, atol=1e-4
    )
    torch.testing.assert_close(together.logits([QUESTION] * 3)[1], found[1], rtol=0, atol=1e-4)


def test_undo_fork_and_reset() -> None:
    one = remembering(adapted(sink=True), TURNS[:4])
    before, fork = one.logits(QUESTION), one.fork()
    one.append(TURNS[4])
    assert not torch.allclose(one.logits(QUESTION), before) and torch.equal(fork.logits(QUESTION), before)
    one.undo()
    assert torch.equal(one.logits(QUESTION), before) and one.steps.tolist() == [4]
    one.append(TURNS[4])
    assert torch.equal(one.logits(QUESTION), remembering(one.model, TURNS[:5]).logits(QUESTION))
    one.reset()
    for turn in TURNS:
        one.append(turn)
    assert torch.equal(one.logits(QUESTION), remembering(one.model).logits(QUESTION))


def test_a_saved_memory_keeps_its_budget(tmp_path: Path) -> None:
    one = remembering(adapted(sink=True))
    one.save_pretrained(tmp_path)
    again = CompressedContextMemory.from_pretrained(one.model, tmp_path)
    assert again.max_slots == 6 and again.nbytes == one.nbytes
    one.append(TURNS[0])
    again.append(TURNS[0])
    assert torch.equal(again.logits(QUESTION), one.logits(QUESTION))
    file = tmp_path / "memory.json"
    settings = json.loads(file.read_text())
    for wrong in (None, 8, 5, "6"):
        file.write_text(json.dumps(settings | {"max_slots": wrong}))
        with pytest.raises(ValueError, match="no whole memory"):
            CompressedContextMemory.from_pretrained(one.model, tmp_path)


@pytest.mark.parametrize(
    ("memory", "most", "error", "words"),
    [
        ("concat", 0, ValueError, "max_slots"),
        ("concat", 5, ValueError, "multiple of the 2"),
        ("concat", 2.5, TypeError, "max_slots"),
        ("concat", True, TypeError, "max_slots"),
        ("merge", 4, ValueError, "has 2 slots always"),
        ("gist", 4, ValueError, "has 2 slots always"),
    ],
)
def test_bad_budgets(memory: str, most: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CompressedContextMemory(adapted(memory=memory), max_slots=most)
