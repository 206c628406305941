"""Detection metrics: recorded reference values, scikit-learn on ties and infinities, and the offline `evaluate` modules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from hf_dataopt.metrics import METRIC_NAMES, auroc, average_precision, detection_metrics, module_path, tnr_at_tpr

from .conftest import golden_params


def _draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 300))
    labels = rng.random(n) < rng.uniform(0.05, 0.95)
    labels[:2] = True, False
    levels = int(rng.choice([1, 3, 10, 100_000]))  # from one big tie to none
    return labels, rng.integers(0, levels, n) + labels * rng.uniform(0, 2)


@pytest.mark.parametrize("seed", range(40))
def test_equal_to_scikit_learn(seed: int) -> None:
    labels, scores = _draw(seed)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert tnr_at_tpr(labels, scores) == pytest.approx(1 - fpr[tpr >= 0.95][0], abs=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("golden", golden_params("relation", "metrics*.npz"), indirect=True)
def test_recorded_values(golden: Path) -> None:
    with np.load(golden) as data:
        assert json.loads(str(data["meta"]))["order"] == "ROC, AP, TNR95"
        for key in [name for name in data.files if name.startswith("ref_")]:
            case = key.removeprefix("ref_")
            got = detection_metrics(data[f"y{case}"], data[f"s{case}"])
            np.testing.assert_allclose([got["auroc"], got["ap"], got["tnr95"]], data[key], atol=1e-9)


def test_hand_computed() -> None:
    labels, scores = [1, 0, 1, 0], [4.0, 3.0, 2.0, 1.0]
    assert average_precision(labels, scores) == pytest.approx((1 + 2 / 3) / 2)
    assert auroc(labels, scores) == pytest.approx(3 / 4)
    assert tnr_at_tpr(labels, scores) == pytest.approx(1 / 2)
    assert tnr_at_tpr(labels, scores, tpr=0.5) == 1.0


def test_infinite_scores_are_ranked() -> None:
    assert detection_metrics([0, 1, 0, 1], [-np.inf, np.inf, 0.0, np.inf]) == {"ap": 1.0, "auroc": 1.0, "tnr95": 1.0}


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1], "one length"),
        ([0, 2], [0.1, 0.2], "what is to be found"),
        ([0, 1], [0.1, np.nan], "NaN"),
        ([0, 0], [0.1, 0.2], "0 of 2"),
        ([1, 1], [0.1, 0.2], "2 of 2"),
    ],
)
def test_bad_input_says_what_is_wrong(labels: list[int], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auroc(labels, scores)


def test_tpr_outside_its_range() -> None:
    with pytest.raises(ValueError, match=r"tpr must be in \(0, 1\]"):
        tnr_at_tpr([0, 1], [0, 1], tpr=0)


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_evaluate_module_loads_without_network(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    labels, scores = _draw(3)
    metric = evaluate.load(module_path(name), cache_dir=str(tmp_path))
    got = metric.compute(references=labels.astype(int), predictions=scores)
    expected = {"average_precision": average_precision, "auroc": auroc, "tnr_at_tpr": tnr_at_tpr}[name]
    assert got == {name: pytest.approx(expected(labels, scores), abs=1e-12)}


def test_evaluate_modules_combine(tmp_path: Path) -> None:
    evaluate = pytest.importorskip("evaluate")
    both = evaluate.combine(
        [evaluate.load(module_path(name), cache_dir=str(tmp_path)) for name in ("auroc", "tnr_at_tpr")]
    )
    got = both.compute(references=[0, 1, 0, 1], predictions=[0.0, 3.0, 1.0, 2.0])
    assert got == {"auroc": 1.0, "tnr_at_tpr": 1.0}


def test_unknown_module() -> None:
    with pytest.raises(ValueError, match="must be one of average_precision"):
        module_path("accuracy")
