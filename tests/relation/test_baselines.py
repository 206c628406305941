"""Unary scores: recorded reference values, hand-computed cases, and the reference code's bugs that we do not keep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_dataopt.relation import baselines

from ..conftest import golden_params


@pytest.mark.golden
@pytest.mark.parametrize("golden", golden_params("relation", "label_*.npz"), indirect=True)
def test_recorded_label_scores(golden: Path) -> None:
    with np.load(golden) as data:
        hop = json.loads(str(data["meta"]))["hop"]
        probs, labels, features = data["prob"][::hop], data["label"][::hop], data["feat"][::hop]
        got = {
            "loss": baselines.loss(probs, labels),
            "margin": baselines.margin(probs, labels),
            "entropy": baselines.entropy(probs),
            "least-confidence": baselines.least_confidence(probs),
            "cwe": baselines.cwe(probs, labels),
            "tracin": baselines.tracin(features, probs, labels),
            "jsd": baselines.jensen_shannon(probs, labels),
        }
        tolerance = 2e-2 if json.loads(str(data["meta"]))["dtype"] == "float16" else 1e-4
        for name, scores in got.items():
            np.testing.assert_allclose(scores, data[f"ref_base_{name}"], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.golden
@pytest.mark.parametrize("golden", golden_params("relation", "ood_*.npz"), indirect=True)
def test_recorded_outlier_scores(golden: Path) -> None:
    with np.load(golden) as data:
        train, rows, logits = data["feat"], data["feat_val"], data["ref_logit_val"]
        threshold = float(data["fix_react_thres"])
        assert baselines.react_threshold(train[::100]) == pytest.approx(threshold)
        got = {
            "ref_msp": baselines.max_softmax(logits),
            "ref_maxlogit": baselines.max_logit(logits),
            "ref_energy": baselines.energy(logits),
            "fix_react": baselines.react(rows, data["weight"], data["bias"], threshold),
            "ref_kl": baselines.kl_matching(data["ref_prob_val"], data["ref_prob"]),
            "ref_knn": baselines.knn(rows, train, k=json.loads(str(data["meta"]))["k"]),
            "ref_maha": baselines.mahalanobis(rows, train, data["label"]),
        }
        for name, scores in got.items():
            np.testing.assert_allclose(scores, data[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_hand_computed() -> None:
    probs, labels = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.array([0, 0])
    np.testing.assert_allclose(baselines.loss(probs, labels), [np.log(2), np.log(10)], atol=2e-5)
    np.testing.assert_allclose(baselines.margin(probs, labels), [-0.25, 0.7])
    np.testing.assert_allclose(baselines.entropy(probs)[0], 1.5 * np.log(2), atol=1e-5)
    np.testing.assert_allclose(baselines.tracin(np.array([[2.0], [1.0]]), probs, labels), [4 * 0.375, 1.46])


def test_one_hot_probabilities_stay_finite() -> None:
    probs, labels = np.eye(3), np.array([0, 1, 0])
    for score in (baselines.loss, baselines.margin, baselines.cwe, baselines.jensen_shannon):
        assert np.isfinite(score(probs, labels)).all()


def test_tied_mahalanobis_equals_the_loop() -> None:
    rng = np.random.default_rng(0)
    train, labels, rows = rng.normal(size=(40, 3)), np.arange(40) % 2, rng.normal(size=(5, 3))
    means = [train[labels == c].mean(axis=0) for c in (0, 1)]
    shared = sum(np.outer(x - means[c], x - means[c]) for x, c in zip(train, labels, strict=True)) / 40
    inverse = np.linalg.inv(shared + 1e-3 * np.eye(3))
    slow = [min((row - mean) @ inverse @ (row - mean) for mean in means) for row in rows]
    np.testing.assert_allclose(baselines.mahalanobis(rows, train, labels, tied=True), slow)


def test_local_outlier_factor_finds_the_far_row() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 2))
    rows[7] = 30.0
    assert baselines.local_outlier_factor(rows).argmax() == 7
    assert baselines.local_outlier_factor(rows[5:9], rows[10:]).argmax() == 2


def test_bad_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="probability columns"):
        baselines.loss(np.full((2, 3), 1 / 3), np.array([0, 3]))
    with pytest.raises(TypeError, match="integers"):
        baselines.margin(np.full((2, 3), 1 / 3), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="one integer a row"):
        baselines.margin(np.full((2, 3), 1 / 3), np.array([0]))
    with pytest.raises(ValueError, match="choose k"):
        baselines.knn(np.ones((2, 3)), np.ones((4, 3)), k=4)


def test_probabilities_and_labels_at_their_limits() -> None:
    probs, labels = np.array([[0.5, 0.51], [1.0, 0.0]]), np.array([0, 1])
    np.testing.assert_allclose(baselines.loss(probs[:1], labels[:1]), -np.log([0.5]), rtol=1e-5)
    for bad in (probs + [[0.0, 0.03], [0.0, 0.0]], probs + [[0.0, 0.0], [0.01, -0.01]], -probs):
        with pytest.raises(ValueError, match="sum to 1 in every row"):
            baselines.entropy(bad)
    for wrong, words in (([0, 2], "span 0 .. 2 with 2"), ([-1, 1], "span -1 .. 1"), ([0], "give one integer a row")):
        with pytest.raises(ValueError, match=words):
            baselines.margin(probs, np.array(wrong))
    with pytest.raises(ValueError, match="rows of different length"):
        baselines.local_outlier_factor(np.zeros((3, 2)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="neighbors"):
        baselines.local_outlier_factor(np.zeros((3, 2)), neighbors=0)
