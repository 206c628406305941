"""Nearest rows and copies out of tiles: equal to a sort of f f^T, whatever the tiles, and to a flood fill over close pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_dataopt.relation import nearest as nearest_module
from hf_dataopt.relation import tiles
from hf_dataopt.relation.config import RelationConfig
from hf_dataopt.relation.graph import RelationGraph
from hf_dataopt.relation.nearest import NearestRows, Neighbours, copy_level
from hf_dataopt.relation.rows import rows_of

from .data import make

CASE = make(n=300)
CPU = torch.device("cpu")


def with_copies(count: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of which the last rows nearly repeat the first ones, probabilities, labels."""
    noise = 1e-4 * np.random.default_rng(1).normal(size=(count, CASE.features.shape[1]))
    features = np.concatenate([CASE.features, CASE.features[:count] + noise]).astype(np.float32)
    again = np.concatenate([np.arange(300), np.arange(count)])
    return features, CASE.probs[again], CASE.labels[again]


def found(graph: RelationGraph) -> tuple[Neighbours, NearestRows]:
    nearest = graph.nearest_rows()
    graph.relation_sums(nearest=nearest, quiet=True)
    return nearest.result(CPU), nearest


@pytest.mark.parametrize("tile", [512, 64, 32])
@pytest.mark.parametrize("changes", [{}, {"neighbours": 400}, {"neighbours": 1}, {"similarity": "rbf"}])
def test_nearest_rows_equal_a_sort(changes: dict[str, Any], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.LARGEST_TILE, "cpu", tile)
    features, probs, labels = with_copies()
    labels = np.where(np.arange(340) % 7 == 3, -1, labels)
    config = RelationConfig(**changes)
    graph = RelationGraph(rows_of(features, "f"), rows_of(probs, "p"), labels, config)
    near, nearest = found(graph)
    unit = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    assert 0.97 < nearest.level < 1 - 1e-5
    copies = cosine > nearest.level
    groups = copies.copy()
    cosine[copies | (labels < 0)[None, :]] = -1
    width = min(config.neighbours, 339)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :width]
    expected = np.take_along_axis(cosine, order, axis=1)
    expected[expected <= 0] = 0
    assert near.rows.shape == (340, width)
    if width >= 10:  # pairs that stand out among their neighbours
        usual = np.where(expected[:, 9] > 0, 1 - expected[:, 9], 0)
        close = (1 - cosine < 0.3 * usual[:, None]) & (1 - cosine < 0.3 * usual)
        groups |= (close | close.T) & (1 - cosine < 0.5 * (1 - nearest.level) / nearest_module.COPY)
        assert groups.sum() > copies.sum()
    for _ in range(5):
        groups = groups @ groups
    np.testing.assert_array_equal(near.group, groups.argmax(axis=1))
    np.testing.assert_allclose(near.similarity, expected, atol=1e-6)
    there = near.rows >= 0
    np.testing.assert_array_equal(there, expected > 0)
    np.testing.assert_allclose(
        np.take_along_axis(cosine, np.maximum(near.rows, 0), 1)[there], expected[there], atol=1e-6
    )


def test_the_sums_do_not_know_that_they_are_watched() -> None:
    graph = RelationGraph(
        rows_of(CASE.features, "f"), rows_of(CASE.probs, "p"), CASE.labels, RelationConfig(diagonal=True)
    )
    alone = graph.relation_sums(quiet=True)
    np.testing.assert_array_equal(graph.relation_sums(nearest=graph.nearest_rows(), quiet=True), alone)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_finds_exact_copies(dtype: str) -> None:
    features = np.concatenate([CASE.features, CASE.features[:20]])
    again = np.concatenate([np.arange(300), np.arange(20)])
    config = RelationConfig(dtype=dtype)  # type: ignore[arg-type]
    graph = RelationGraph(rows_of(features, "f"), rows_of(CASE.probs[again], "p"), CASE.labels[again], config)
    assert (found(graph)[0].group[300:] == np.arange(20)).all()


def test_tiles_in_any_order_give_the_same_lists() -> None:
    """Equal cosines are told apart by row number, not by who came first."""
    unit = np.eye(8, 40, dtype=np.float32)[np.arange(96) % 8] + np.eye(96, 40, k=-8, dtype=np.float32)
    unit = torch.from_numpy(unit / np.linalg.norm(unit, axis=1, keepdims=True))
    results = []
    for order in (range(3), (2, 0, 1)):
        nearest = NearestRows(96, 3, 0.9, np.ones(96, bool))
        for a in order:
            for b in order if order[0] else range(3):
                if a <= b:
                    here, there = np.arange(32 * a, 32 * a + 32), np.arange(32 * b, 32 * b + 32)
                    nearest.look(unit[here] @ unit[there].T, here, there, same=a == b)
        results.append(nearest.result(CPU))
    np.testing.assert_array_equal(results[0].rows, results[1].rows)
    np.testing.assert_array_equal(results[0].group, results[1].group)


def test_groups_of_all_rows_alike() -> None:
    features = np.ones((200, 4), np.float32)
    features[150:] *= -1
    graph = RelationGraph(rows_of(features, "f"), None, np.arange(200) % 2, RelationConfig(max_memory_gb=1e-3))
    near, _ = found(graph)
    np.testing.assert_array_equal(near.group, np.where(np.arange(200) < 150, 0, 150))
    assert (near.rows == -1).all() and (near.similarity == 0).all()


def test_what_another_process_reports_is_dropped() -> None:
    nearest = NearestRows(8, 2, 1.0, np.ones(8, bool))
    here = np.arange(4)
    nearest.look(torch.full((4, 4), 0.5), here, here, same=True)
    nearest.look(torch.full((4, 4), 0.4), here, here + 4, same=False)
    order = np.arange(8)
    kept = nearest.keys.clone()
    nearest.forget_shared(order, 4, range(0, 2, 1))
    assert torch.equal(nearest.keys, kept)
    nearest.forget_shared(order, 4, range(1, 2))
    assert (nearest.keys[:4] == 0).all() and torch.equal(nearest.keys[4:], kept[4:])


def test_the_level_follows_how_close_rows_lie() -> None:
    levels = []
    for spread in (1.0, 0.01):
        direction = np.zeros(12, np.float32)
        direction[0] = 30
        features = direction + spread * CASE.features
        graph = RelationGraph(rows_of(features, "f"), None, CASE.labels, RelationConfig())
        levels.append(1 - copy_level(graph, graph._stripes(graph.order), 0))
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        apart = 1 - unit.astype(np.float64) @ unit.T.astype(np.float64) + 2 * np.eye(300)
        drawn = np.median(apart.min(axis=1)) * nearest_module.COPY
        assert levels[-1] == pytest.approx(max(2e-6, drawn), rel=0.25)
    assert levels[0] > 20 * levels[1]
