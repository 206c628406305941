"""Positions and the layout of Figure 7.3, token by token in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_dataopt import CCMConfig
from hf_dataopt.ccm.attention import build_layout, rows_of, skip_positions

Row = list[tuple[int, bool, int, int]]  # compression index, real, position, sample


def row_of(samples: list[list[int]], padding: int, n_tok: int) -> Row:
    """Samples packed behind padding; a sample is lengths of contexts, each followed by its group, and of what comes last."""
    row: Row = [(-1, False, 1, 0)] * padding
    for number, (*contexts, last) in enumerate(samples):
        at = 0
        for length in contexts:
            row += [(-1, True, at + i, number) for i in range(length)]
            at += length
            row += [(k, True, at + k, number) for k in range(n_tok)]
        row += [(-1, True, at + i, number) for i in range(last)]
    return row


def rules(row: Row, config: CCMConfig) -> dict[str, Any]:
    """The figure's rules: what each token sees of its own block, of the memory, and the averages after each group."""
    n, n_tok = len(row), config.num_comp_tokens
    finished, step = [], []
    for t, (_, _, _, number) in enumerate(row):
        before = [k for k in range(t) if row[k][0] == n_tok - 1]
        finished.append(len(before))
        step.append(sum(row[k][3] == number for k in before))
    total = {number: sum(r[0] == n_tok - 1 and r[3] == number for r in row) for number in {r[3] for r in row}}
    sees = [config.recurrent or step[t] == total[row[t][3]] for t in range(n)]
    first = {}
    for t, (comp, real, _, number) in enumerate(row):
        if real and comp < 0:
            first.setdefault(number, t)
    own = [[a[3] == b[3] and step[q] == step[k] for k, b in enumerate(row)] for q, a in enumerate(row)]
    memory = [[False] * n for _ in row]
    for q, (_, _, _, number) in enumerate(row):
        for k in range(q + 1):
            if row[k][1] and row[k][3] == number and step[k] < step[q]:
                memory[q][k] |= not config.merges and row[k][0] >= 0 and sees[q]
            if config.sink and step[q] and first.get(number) == k:
                memory[q][k] = True
    groups = [(t, row[t][3], step[t] + 1) for t in range(n) if row[t][0] == n_tok - 1]
    weights = []
    for _, number, s in groups:
        for k in range(n_tok):
            line = [0.0] * n
            for t, (comp, _, _, owner) in enumerate(row):
                j = step[t] + 1
                if comp == k and owner == number and j <= s:
                    a = config.merge_weight
                    line[t] = 1 / s if a is None else (1.0 if j == 1 else a) * (1 - a) ** (s - j)
            weights.append(line)
    slots = [
        [finished[q] == g + 1 and step[q] > 0 and sees[q] for g in range(len(groups)) for _ in range(n_tok)]
        for q in range(n)
    ]
    return {"own": own, "memory": memory, "weights": weights, "slots": slots}


@pytest.mark.parametrize("memory", ["concat", "merge", "concat_apart", "merge_apart", "gist"])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("n_tok", [1, 2, 3])
def test_layout_of_packed_and_padded_rows(memory: str, sink: bool, n_tok: int) -> None:
    for weight in (None, 0.3) if memory.startswith("merge") else (None,):
        config = CCMConfig(memory=memory, sink=sink, num_comp_tokens=n_tok, merge_weight=weight)
        for samples in ([[2, 3, 1, 2]], [[1, 2, 3], [2, 2, 1, 1], [3]], [[2, 2], [1, 1, 1, 2]]):
            row = row_of(samples, padding=2 if len(samples) == 1 else 0, n_tok=n_tok)
            comp, real, position = (torch.tensor([[r[i] for r in row]]) for i in range(3))
            layout = build_layout(comp, real, position, config)
            expected = rules(row, config)
            known = real[0]
            own = torch.tensor(expected["own"])
            assert torch.equal(layout.own[0][known][:, known], own[known][:, known])
            assert torch.equal(layout.memory[0][known], torch.tensor(expected["memory"])[known])
            if config.merges:
                torch.testing.assert_close(layout.weights[0], torch.tensor(expected["weights"]))
                assert torch.equal(layout.slots[0][known], torch.tensor(expected["slots"])[known])
            else:
                assert layout.weights is None and layout.slots is None


def test_a_row_that_starts_late_starts_with_its_first_token() -> None:
    """A row cut out of a longer one has no position 0: the sink is its first token, not padding."""
    comp = torch.tensor([[-1, -1, -1, 0, -1, 0, -1]])
    real = torch.tensor([[False, True, True, True, True, True, True]])
    config = CCMConfig(memory="concat_apart", sink=True, num_comp_tokens=1)
    layout = build_layout(comp, real, skip_positions(comp, real) + 5, config)
    assert layout.memory[0, -1].tolist() == [False, True, False, True, False, True, False]
    assert layout.memory[0, 4].tolist() == [False, True, False, False, False, False, False]
    assert layout.memory[0, 2].tolist() == [False] * 7


def test_positions_skip_compression_tokens() -> None:
    comp = torch.tensor([[-1, -1, -1, 0, 1, -1, 0, 1, -1, -1], [-1, 0, 1, -1, -1, -1, -1, -1, -1, -1]])
    real = torch.tensor([[False] + [True] * 9, [True] * 10])
    assert skip_positions(comp, real).tolist() == [[1, 0, 1, 2, 3, 2, 3, 4, 3, 4], [0, 1, 2, 1, 2, 3, 4, 5, 6, 7]]
    assert rows_of(comp).tolist() == [3, 4, 6, 7, 11, 12]
    leading = torch.tensor([[0, 1, -1]])
    assert skip_positions(leading, torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0, 1, 0]]
