"""Sums of one tile: labels are compared only where some agree and some do not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hf_dataopt.relation import tiles
from hf_dataopt.relation.kernel import sign_
from hf_dataopt.relation.tiles import ExactSums, Tile, signed_sums


def tile(labels: tuple[int, ...]) -> Tile:
    return Tile(torch.zeros(len(labels), 1), None, torch.tensor(labels), (min(labels), max(labels)))


@pytest.mark.parametrize("right", list(itertools.product(range(4), repeat=2)))
@pytest.mark.parametrize("left", [(1, 1), (1, 2), (2, 1), (0, 3)])
def test_signed_sums_of_every_order_of_labels(
    left: tuple[int, int], right: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(*given: torch.Tensor) -> torch.Tensor:
        calls.append(given)
        return sign_(*given)

    monkeypatch.setattr(tiles, "sign_", record)
    kernel = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    signs = np.where(np.array(left)[:, None] == np.array(right), 1.0, -1.0)
    rows, columns = signed_sums(kernel.clone(), tile(left), tile(right), want_columns=True)
    assert columns is not None
    np.testing.assert_array_equal(rows, (kernel.numpy() * signs).sum(1))
    np.testing.assert_array_equal(columns, (kernel.numpy() * signs).sum(0))
    apart = max(left) < min(right) or max(right) < min(left)
    assert len(calls) == (0 if apart or len({*left, *right}) == 1 else 1)


@pytest.mark.parametrize("left", [(-1, -1), (-1, 2), (2, -1)])
@pytest.mark.parametrize("right", [(-1, -1), (-1, 2), (2, 2), (0, 1), (3, 3)])
def test_rows_without_a_label_relate_to_none(left: tuple[int, int], right: tuple[int, int]) -> None:
    kernel = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    named = (np.array(left) >= 0)[:, None] & (np.array(right) >= 0)
    signs = np.where(np.array(left)[:, None] == np.array(right), 1.0, -1.0) * named
    for one, two, values in ((left, right, signs), (right, left, signs.T)):
        rows, columns = signed_sums(kernel.clone(), tile(one), tile(two), want_columns=True)
        np.testing.assert_array_equal(rows, (kernel.numpy() * values).sum(1))
        np.testing.assert_array_equal(columns, (kernel.numpy() * values).sum(0))


def test_sums_without_labels_or_columns() -> None:
    kernel = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    plain, labelled = Tile(torch.zeros(2, 1), None, None), tile((3, 3))
    for left, right in ((plain, plain), (plain, labelled), (labelled, plain)):
        rows, columns = signed_sums(kernel.clone(), left, right, want_columns=False)
        assert rows.tolist() == [3, 12] and columns is None


def test_sums_are_exact_in_any_order() -> None:
    """Of numbers whose float64 sum hangs on the order."""
    values = np.array([2.0**16, 2.0**-30, -(2.0**16), 2.0**-31, 2.0**-58], dtype=np.float32)
    for order in itertools.permutations(range(5)):
        sums = ExactSums(2)
        for i in order:
            sums.add(np.array([1]), values[i : i + 1])
        assert sums.parts[0].tolist() == [0, 0]
        assert sums.parts[1].tolist() == [0, 2.0**-30 + 2.0**-31 + 2.0**-58]
