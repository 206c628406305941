"""Copies by thumbnails equal the definition over all pairs, and reach groups, votes, filters and folds."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from hf_dataopt import RelationCleaner, out_of_sample_probs
from hf_dataopt.relation import picture_copies as module
from hf_dataopt.relation.picture_copies import joined, picture_copies
from hf_dataopt.relation.rows import rows_of

from .data import make


def thumbnails(count: int = 200, seed: int = 0) -> np.ndarray:
    """Of smooth pictures: few directions hold most of what differs."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(12, 192))
    return np.clip(128 + rng.normal(size=(count, 12)) @ basis * 15, 0, 255).astype(np.uint8)


def again(small: np.ndarray, noise: float, seed: int = 1) -> np.ndarray:
    return (
        np.clip(small + np.random.default_rng(seed).normal(scale=noise, size=small.shape), 0, 255).round().astype("u1")
    )


def groups(small: np.ndarray) -> np.ndarray:
    return joined(np.arange(len(small)), *picture_copies(rows_of(small, "t")))


def defined(small: np.ndarray) -> np.ndarray:
    """The rule over all pairs, flooded."""
    wide = small.astype(np.float64)
    distance = np.sqrt(((wide[:, None] - wide[None]) ** 2).mean(axis=2))
    contrast = np.sqrt(wide.reshape(len(wide), 64, 3).var(axis=1).mean(axis=1))
    varied = np.flatnonzero(contrast > 0)
    once = varied[np.unique(small[varied], axis=0, return_index=True)[1]]
    level = module.SHARE * np.median(np.sort(distance[np.ix_(once, once)], axis=1)[:, module.RANK])
    near = distance <= np.minimum(level, module.CONTRAST * np.minimum(contrast[:, None], contrast))
    near[contrast == 0] = near[:, contrast == 0] = False
    np.fill_diagonal(near, True)
    for _ in range(6):
        near = near @ near
    return near.argmax(axis=1)


@pytest.mark.parametrize("block", [4096, 50])
def test_groups_equal_the_definition(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "SAMPLE", 1000)
    small = thumbnails()
    noisy = [again(small[:20], noise) for noise in (1, 3, 7, 11, 30)]
    flat = np.full((3, 192), 90, np.uint8)
    faint = again(np.repeat(100 + small[:10] // 40, 2, axis=0), 1.5)  # two of each, nearly of one colour
    every = np.concatenate([small, *noisy, small[:9], small[:9], flat, faint])
    found = groups(every)
    np.testing.assert_array_equal(found, defined(every))
    assert (found[200:240] == np.tile(np.arange(20), 2)).all()  # a little noise
    assert (found[280:300] == np.arange(280, 300)).all()  # too much
    assert (found[300:318] == np.tile(np.arange(9), 2)).all() and (found[318:321] == np.arange(318, 321)).all()
    assert (found[321:] == np.arange(321, 341)).all()


def test_more_copies_than_are_looked_up_hang_together() -> None:
    small = thumbnails(60)
    every = np.concatenate([small, np.repeat(small[:1], 40, axis=0), again(np.repeat(small[1:2], 30, axis=0), 1)])
    found = groups(every)
    assert (found[60:100] == 0).all() and (found[100:] == 1).all() and (found[:60] == np.arange(60)).all()


def test_few_pictures_and_other_columns() -> None:
    small = thumbnails(3)
    np.testing.assert_array_equal(groups(small[[0, 1, 0]]), [0, 1, 0])
    np.testing.assert_array_equal(groups(small[:1]), [0])
    np.testing.assert_array_equal(groups(np.zeros((4, 192), np.uint8)), np.arange(4))
    with pytest.raises(ValueError, match="rows of 12 numbers, a thumbnail has 192"):
        picture_copies(rows_of(make(n=20).features, "t"))


def test_groups_are_joined_by_pairs() -> None:
    group = np.array([0, 1, 0, 3, 3, 5, 6])
    found = joined(group, np.array([2, 6]), np.array([4, 5]))
    np.testing.assert_array_equal(found, [0, 1, 0, 0, 0, 5, 5])
    np.testing.assert_array_equal(joined(group, np.empty(0, int), np.empty(0, int)), group)


def _with_copies() -> Dataset:
    """Rows 300 to 309 repeat pictures 0 to 9, encoded again: their features are elsewhere."""
    case, small = make(n=310), thumbnails(300)
    return case.dataset(thumbnail=np.concatenate([small, again(small[:10], 2)]).astype(np.float32))


def test_a_fit_finds_copies_by_pictures_and_they_vote_once() -> None:
    data = _with_copies()
    plain = RelationCleaner().fit(data.remove_columns("thumbnail"), quiet=True)
    report = RelationCleaner().fit(data, quiet=True)
    np.testing.assert_array_equal(plain.near_duplicates(), [[96, 99]])  # by features
    np.testing.assert_array_equal(report.near_duplicates(), [*([k, 300 + k] for k in range(10)), [96, 99]])
    assert len(report.filter(data, label_errors=False, near_duplicates=True)) == 299
    assert len(report.near_duplicates(["train"] * 305 + ["test"] * 5)) == 5
    assert (report.label_noise_score != plain.label_noise_score).any()
    np.testing.assert_array_equal(report.parts["label_noise"], plain.parts["label_noise"])
    parts = RelationCleaner(partition_size=100).fit(data, quiet=True)
    np.testing.assert_array_equal(parts.group[300:], np.arange(10))


def test_several_labels_and_folds_know_of_them_too() -> None:
    data = _with_copies()
    several = data.map(lambda row: {"tags": [row["label"]]})
    found = RelationCleaner().fit_multi_label(several, "tags", probs_column=None, label_names=list("abcde"), quiet=True)
    np.testing.assert_array_equal(found.near_duplicates(), [*([k, 300 + k] for k in range(10)), [96, 99]])
    made = out_of_sample_probs(data.remove_columns("probs"), folds=3, quiet=True)
    other = out_of_sample_probs(data.remove_columns(["probs", "thumbnail"]), folds=3, quiet=True)
    assert made["probs"][:] != other["probs"][:]
