"""Consensus of several annotators: Bayes by hand, better than the majority, quality as planted, any kind of column."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset

from hf_dataopt import consensus_labels
from hf_dataopt.relation import annotators as module

SKILL = np.array([0.95, 0.9, 0.8, 0.55, 0.5, 0.45, 0.4])


def voted(n: int = 600, asked: int = 4, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Votes (n, 7), of four annotators a row, and the truth."""
    rng = np.random.default_rng(seed)
    truth, votes = rng.integers(0, classes, n), np.full((n, len(SKILL)), -1)
    for row in range(n):
        for who in rng.choice(len(SKILL), asked, replace=False):
            right = rng.random() < SKILL[who]
            votes[row, who] = truth[row] if right else (truth[row] + rng.integers(1, classes)) % classes
    return votes, truth


def table(votes: np.ndarray, **more: list[object]) -> tuple[Dataset, list[str]]:
    names = [f"a{k}" for k in range(votes.shape[1])]
    return Dataset.from_dict({**{name: votes[:, k] for k, name in enumerate(names)}, **more}), names


def test_good_annotators_are_heard_more_than_bad_ones() -> None:
    votes, truth = voted()
    data, names = table(votes)
    found = consensus_labels(data, names)
    labels = np.array(found.dataset["label"][:])
    majority = module._first(votes, 4)
    assert (labels != truth).mean() < 0.8 * (majority != truth).mean()
    assert np.corrcoef(list(found.quality.values()), SKILL)[0, 1] > 0.97
    assert found.votes == {name: int((votes[:, k] >= 0).sum()) for k, name in enumerate(names)}
    assert found.dataset.column_names == [*names, "label", "label_probability"]
    sure = np.array(found.dataset["label_probability"][:])
    right = labels == truth
    assert abs(sure.mean() - right.mean()) < 0.05 and sure[right].mean() > sure[~right].mean() + 0.1
    for matrix in found.confusion.values():
        np.testing.assert_allclose(matrix.sum(axis=1), 1)
    assert found.confusion["a0"].diagonal().mean() > 0.85 > 0.6 > found.confusion["a6"].diagonal().mean()


def test_a_row_is_bayes_rule_over_its_votes() -> None:
    votes, _ = voted(300, classes=3)
    rng = np.random.default_rng(1)
    said = rng.dirichlet(np.ones(3), 300)
    for prior in (None, said):
        after, given = module._agree(votes, 3, prior)
        for row in (0, 7, 50):
            like = after.mean(axis=0) if prior is None else said[row]
            for who, vote in enumerate(votes[row]):
                like = like * (given[who][:, vote] if vote >= 0 else 1)
            np.testing.assert_allclose(after[row], like / like.sum(), atol=1e-4)


def test_an_annotator_of_few_votes_is_taken_for_an_average_one() -> None:
    votes, _ = voted()
    votes[:, 0] = -1
    votes[0, 0] = votes[0].max()
    _, given = module._agree(votes, 4, None)
    others = [given[who].diagonal().mean() for who in range(1, 7)]
    assert min(others) < given[0].diagonal().mean() < max(others)


def test_a_model_decides_where_votes_are_even() -> None:
    votes, truth = voted()
    said = np.full((600, 4), 0.05)
    said[np.arange(600), truth] = 0.85
    data, names = table(votes, probs=said.tolist())
    with_model = np.array(consensus_labels(data, names, probs_column="probs").dataset["label"][:])
    alone = np.array(consensus_labels(data, names).dataset["label"][:])
    assert (with_model != truth).mean() < 0.5 * (alone != truth).mean()
    with pytest.raises(ValueError, match="3 columns for 4 classes"):
        consensus_labels(data.map(lambda row: {"probs": row["probs"][:3]}), names, probs_column="probs")


def test_texts_class_labels_and_rows_without_votes() -> None:
    votes, truth = voted(200)
    votes[3] = -1
    words = np.array(["ant", "bee", "cow", "dog"])
    columns = {f"a{k}": [None if v < 0 else words[v] for v in votes[:, k]] for k in range(7)}
    texts = consensus_labels(Dataset.from_dict(columns), list(columns), label_column="kind")
    numbers = consensus_labels(*table(votes))
    data, names = table(votes)
    for name in names:
        data = data.cast_column(name, ClassLabel(names=words.tolist()))
    classed = consensus_labels(data.select(range(199, -1, -1)), names)
    assert texts.dataset["kind"][3] is None and numbers.dataset["label"][3] == -1 == classed.dataset["label"][196]
    assert numbers.dataset["label_probability"][3] == 0
    assert [words.tolist().index(one) if one else -1 for one in texts.dataset["kind"][:]] == numbers.dataset["label"][:]
    assert classed.dataset["label"][:] == numbers.dataset["label"][:][::-1]
    assert (
        classed.dataset.features["label"] == ClassLabel(names=words.tolist()) and classed.label_names == words.tolist()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.rename_column("a1", "x"), "not 'a1'"),
        (lambda data: data.remove_columns("a1").add_column("a1", ["cat"] * 200), "of different kinds"),
        (lambda data: data.cast_column("a1", ClassLabel(names=["x", "y", "z", "w"])), "of different kinds"),
        (lambda data: data.map(lambda row: {"a1": -2}), "none below 0"),
        (lambda data: data.add_column("label", [0] * 200), "has a column 'label' already"),
    ],
)
def test_unfit_votes_are_refused(change: object, message: str) -> None:
    data, names = table(voted(200)[0])
    with pytest.raises(ValueError, match=message):
        consensus_labels(change(data), names)  # type: ignore[operator]
