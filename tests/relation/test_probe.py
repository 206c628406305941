"""Out-of-sample probabilities equal a plain logistic regression for each fold, and copies stay on one side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_dataopt import RelationCleaner, RelationReport, out_of_sample_probs
from hf_dataopt.cli import main
from hf_dataopt.relation import probe as module
from hf_dataopt.relation.rows import rows_of

from .data import make


@pytest.mark.parametrize("strength", [0.01, 0.3])
def test_each_fold_is_a_ridge_regression_on_the_others(strength: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    case, group = make(n=240, d=6, classes=3), np.arange(240)
    group[[5, 17]] = 5
    once = np.where(np.isin(np.arange(240), [5, 17]), 0.5, 1.0)
    labels = case.labels.copy()
    labels[:4] = -1
    found = module.fold_probs(rows_of(case.features * 7 + 3, "f"), labels, 3, group, 3, strength, quiet=True)
    scaled = case.features - case.features.mean(axis=0)
    scaled /= np.sqrt((scaled**2).mean())
    fold = module.deal(labels, group, 3, 0)
    assert fold[5] == fold[17]
    for k in range(3):
        train = (fold != k) & (labels >= 0)
        weights = once[train] / once[train].sum()
        model = linear.LogisticRegression(C=1 / strength, tol=1e-8, max_iter=1000)
        model.fit(scaled[train], labels[train], sample_weight=weights)
        np.testing.assert_allclose(found[fold == k], model.predict_proba(scaled[fold == k]), atol=2e-3)


def test_rows_are_dealt_class_by_class_and_groups_whole() -> None:
    labels = np.repeat([0, 1, 2], [40, 20, 8])
    group = np.arange(68)
    group[[3, 30, 50]] = 3
    fold = module.deal(labels, group, 4, 0)
    assert fold[3] == fold[30] == fold[50]
    alone = group == np.arange(68)
    for c, least in ((0, 9), (1, 4), (2, 2)):
        assert np.bincount(fold[alone & (labels == c)], minlength=4).min() >= least
    assert (module.deal(labels, group, 4, 1) != fold).any()
    with pytest.raises(ValueError, match="4 folds need as many groups of rows, got 3"):
        module.deal(labels, labels, 4, 0)


def test_the_strength_is_that_of_the_least_held_out_loss() -> None:
    case = make(n=300, d=6, classes=3, rate=0.3)
    rows = np.arange(300) % 4 != 0
    probe = module._Probe(rows_of(case.features, "f"), case.labels, 3, np.ones(300))
    losses = {}
    for strength in module.STRENGTHS:
        said = probe.say(probe.fit(rows, strength), ~rows)
        losses[strength] = -np.log(said[np.arange(75), case.labels[~rows]]).mean()
    weights, strength = probe.best(rows)
    falls = [losses[a] > losses[b] for a, b in zip(module.STRENGTHS, module.STRENGTHS[1:], strict=False)]
    assert strength == module.STRENGTHS[falls.index(False)] != module.STRENGTHS[0]
    np.testing.assert_allclose(probe.say(weights, ~rows), probe.say(probe.fit(rows, strength), ~rows), atol=5e-3)


def test_wrong_copies_do_not_vouch_for_each_other() -> None:
    case = make(n=300, d=12, classes=3, rate=0.0)
    wrong = np.arange(8)
    labels = case.labels.copy()
    labels[wrong] = (labels[wrong] + 1) % 3
    again = np.concatenate([np.arange(300), np.repeat(wrong, 12)])
    data = Dataset.from_dict({"label": labels[again], "features": case.features[again].tolist()})
    own = {}
    for groups in ("copies", None):
        with_probs = out_of_sample_probs(data, groups=groups, quiet=True)
        probs = with_probs.with_format("numpy")["probs"][:]
        assert probs.shape == (396, 3) and probs.dtype == np.float32
        np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
        own[groups] = probs[wrong, labels[wrong]]
    assert (own["copies"] < own[None]).all() and own["copies"].mean() < own[None].mean() / 2
    report = RelationCleaner().fit(out_of_sample_probs(data, quiet=True), quiet=True)
    assert report.is_label_error[wrong].sum() >= 7 and report.is_label_error[8:300].mean() < 0.02


def test_columns_are_those_of_the_labels_and_the_dataset_stays_as_it_is() -> None:
    case = make(n=120, d=6, classes=3)
    names = np.array(["bird", "cat", "dog"])[case.labels]
    data = Dataset.from_dict({"kind": names, "emb": case.features.tolist(), "n": range(120)}).select(range(119, -1, -1))
    found: Any = out_of_sample_probs(
        data, "kind", features_column="emb", probs_column="out", groups=range(120), quiet=True
    )
    assert found.column_names == ["kind", "emb", "n", "out"] and found["n"][:3] == [119, 118, 117]
    far = np.arange(120) * 10**9 - 5  # any integers number the groups
    alike: Any = out_of_sample_probs(data, "kind", features_column="emb", probs_column="out", groups=far, quiet=True)
    assert alike["out"][:] == found["out"][:]
    best = np.array(["bird", "cat", "dog"])[found.with_format("numpy")["out"][:].argmax(axis=1)]
    assert (best == np.array(found["kind"][:])).mean() > 0.8
    with pytest.raises(ValueError, match="has a column 'out' already"):
        out_of_sample_probs(found, "kind", features_column="emb", probs_column="out")
    with pytest.raises(ValueError, match="must be 'copies', None or one integer a row, got 'none'"):
        out_of_sample_probs(data, "kind", features_column="emb", groups="none")


def test_rows_without_features_are_skipped_where_asked() -> None:
    case = make(n=120, d=6, classes=3)
    features, labels = case.features.tolist(), case.labels.tolist()
    features[7], labels[9] = [float("nan")] * 6, -2
    data = Dataset.from_dict({"label": labels, "features": features})
    with pytest.raises(ValueError, match="row 9 has label -2"):
        out_of_sample_probs(data, quiet=True)
    found = out_of_sample_probs(data, groups=np.arange(120), on_error="skip", quiet=True)
    missing = np.isnan(found.with_format("numpy")["probs"][:]).all(axis=1)
    assert np.flatnonzero(missing).tolist() == [7, 9]
    report = RelationCleaner().fit(found, on_error="skip", quiet=True)
    assert report.about["skipped"]["rows"] == [7, 9]


def test_the_shell_makes_its_own_probabilities(tmp_path: Path) -> None:
    case = make(n=200, d=12, classes=3)
    case.dataset().remove_columns("probs").to_parquet(tmp_path / "rows.parquet")
    arguments = ["clean", str(tmp_path / "rows.parquet"), "--folds", "3", "--output-dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    report = RelationReport.load(tmp_path / "out" / "report")
    expected = RelationCleaner().fit(out_of_sample_probs(case.dataset().remove_columns("probs"), folds=3), quiet=True)
    np.testing.assert_allclose(report.label_noise_score, expected.label_noise_score, atol=1e-6)


def test_folds_are_checked_before_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(n=20).dataset().to_parquet(tmp_path / "rows.parquet")
    arguments = ["clean", str(tmp_path / "rows.parquet"), "--output-dir", str(tmp_path / "out"), "--folds"]
    assert main([*arguments, "1"]) == 2 and "--folds must be at least 2, got 1" in capsys.readouterr().err
