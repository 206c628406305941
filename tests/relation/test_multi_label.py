"""Several labels a row: columns of every form are read, wrong decisions found and turned around, refusals name their row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, List, Value

from hf_dataopt import RelationCleaner
from hf_dataopt.relation.label_sets import read_label_sets
from hf_dataopt.relation.multi_label import MultiLabelReport
from hf_dataopt.relation.report import RelationReport

NAMES = ["red", "round", "soft", "old"]


def planted(n: int = 400, rate: float = 0.05) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, probabilities, given decisions and which of them are wrong: each label is a direction of the features."""
    rng = np.random.default_rng(0)
    truth = (rng.random((n, 4)) < (0.5, 0.4, 0.3, 0.15)).astype(np.int64)
    features = (truth * 2.0 - 1) @ rng.normal(size=(4, 12)) + 0.4 * rng.normal(size=(n, 12))
    probs = np.where(truth > 0, 0.85, 0.15) + rng.uniform(-0.14, 0.14, (n, 4))
    wrong = rng.random((n, 4)) < rate
    return features.astype(np.float32), probs.astype(np.float32), np.where(wrong, 1 - truth, truth), wrong


def dataset(form: str, given: np.ndarray, **more: Any) -> Dataset:
    lists: list[Any] = given.tolist()
    if form != "hot":
        lists = [np.flatnonzero(row).tolist() for row in given]
    if form == "texts":
        lists = [[NAMES[k] for k in row] for row in lists]
    columns = {name: value.tolist() for name, value in more.items()}
    found = Dataset.from_dict({"labels": lists, **columns})
    return found.cast_column("labels", List(ClassLabel(names=NAMES))) if form == "classes" else found


def fitted(form: str = "hot", **options: Any) -> tuple[Dataset, MultiLabelReport, np.ndarray]:
    features, probs, given, wrong = planted()
    data = dataset(form, given, features=features, probs=probs)
    return data, RelationCleaner(outlier_reference=50).fit_multi_label(data, quiet=True, **options), wrong


def f1(flagged: np.ndarray, wrong: np.ndarray) -> float:
    return float(2 * (flagged & wrong).sum() / (flagged.sum() + wrong.sum()))


@pytest.mark.parametrize("form", ["hot", "ids", "classes", "texts"])
def test_all_forms_of_a_column_give_the_same_decisions_and_names(form: str) -> None:
    given = planted()[2]
    sets = read_label_sets(dataset(form, given), "labels", 4, NAMES if form != "classes" else None)
    assert (sets.given == given).all() and sets.given.dtype == np.int8
    assert sets.names == NAMES and sets.hot == (form == "hot")


def test_wrong_decisions_are_found_and_turned_around_in_the_form_of_the_column() -> None:
    for form, options in (("hot", {}), ("texts", {"label_names": NAMES})):
        data, report, wrong = fitted(form, **options)
        assert f1(report.is_label_error, wrong) > 0.9
        assert abs(report.noise_rate.mean() - wrong.mean()) < 0.02
        fixed = report.relabel(data)
        now = read_label_sets(fixed, "labels", 4, NAMES).given
        assert (now != report.sets.given).sum() == report.is_label_error.sum()
        assert (now == np.where(wrong, 1 - report.sets.given, report.sets.given)).mean() > 0.985
        assert fixed["given_label"][:] == data["labels"][:] and fixed.features["labels"] == data.features["labels"]


def test_the_nearest_rows_alone_are_a_judge_too() -> None:
    _, report, wrong = fitted(probs_column=None)
    assert f1(report.is_label_error, wrong) > 0.8


def test_a_share_is_a_cut_over_all_decisions_and_the_worst_come_first() -> None:
    features, probs, given, _ = planted()
    data = dataset("ids", given, features=features, probs=probs)
    report = RelationCleaner(cut=0.01).fit_multi_label(data, quiet=True)
    assert report.is_label_error.sum() == 16
    assert (
        report.label_noise_score[report.is_label_error].min() >= report.label_noise_score[~report.is_label_error].max()
    )
    first = report.review(3)
    assert [one["wrong"] for one in first] == sorted(
        (float(v) for v in report.label_noise_score.ravel()), reverse=True
    )[:3]
    assert all(report.is_label_error[one["row"], int(one["label"])] for one in first)
    assert all(one["given"] == bool(given[one["row"], int(one["label"])]) for one in first)


def test_filter_drops_rows_with_a_flag_and_keeps_one_of_each_group_of_copies() -> None:
    features, probs, given, _ = planted()
    again = np.concatenate([np.arange(400), [7, 7, 9]])
    data = dataset("hot", given[again], features=features[again], probs=probs[again])
    report = RelationCleaner(outlier_reference=50).fit_multi_label(data, quiet=True)
    groups = [rows.tolist() for rows in report.near_duplicates()]
    assert groups[0] == [7, 400, 401] and [9, 402] in groups
    assert len(report.filter(data)) == 403 - report.is_label_error.any(axis=1).sum()
    assert len(report.filter(data, label_errors=False, near_duplicates=True)) == 403 - sum(
        len(rows) - 1 for rows in groups
    )
    assert f"{sum(map(len, groups))} rows in {len(groups)} groups" in report.summary()


def test_rows_without_a_list_and_decisions_that_nobody_made_have_no_say_and_no_score() -> None:
    features, probs, given, wrong = planted()
    lists: list[Any] = given.tolist()
    lists[3], lists[5][2] = None, -1
    data = Dataset.from_dict({"labels": lists, "features": features.tolist(), "probs": probs.tolist()})
    report = RelationCleaner(outlier_reference=50).fit_multi_label(data, quiet=True)
    assert (report.sets.given[3] == -1).all() and report.sets.given[5].tolist().count(-1) == 1
    assert not report.label_noise_score[3].any() and report.label_noise_score[5, 2] == 0
    assert not report.is_label_error[3].any() and report.outlier_score[3] > 0
    assert f1(report.is_label_error, wrong) > 0.9
    # the silent rows' answers would be "no": with a quarter of the rows silent on a label, its "no" does not win
    lists = given.tolist()
    for row in range(0, 400, 2):
        lists[row][0] = -1
    data = Dataset.from_dict({"labels": lists, "features": features.tolist()})
    half = RelationCleaner(outlier_reference=50).fit_multi_label(data, probs_column=None, quiet=True)
    told = np.arange(1, 400, 2)
    assert f1(half.is_label_error[told, 0], wrong[told, 0]) > 0.75


def test_a_label_that_all_rows_have_is_not_judged() -> None:
    features, probs, given, _ = planted()
    given[:, 1] = 1
    report = RelationCleaner().fit_multi_label(dataset("hot", given, features=features, probs=probs), quiet=True)
    assert not report.label_noise_score[:, 1].any() and report.label_noise_score[:, 0].any()


def test_partitions_and_columns_of_scores() -> None:
    features, probs, given, wrong = planted()
    data = dataset("hot", given, features=features, probs=probs)
    report = RelationCleaner(partition_size=200).fit_multi_label(data, quiet=True)
    assert f1(report.is_label_error, wrong) > 0.85
    scored = data.map(report.annotate, batched=True, with_indices=True, batch_size=90)
    assert np.array_equal(np.array(scored["label_noise_score"][:], np.float32), report.label_noise_score)
    assert np.array_equal(np.array(scored["is_outlier"][:]), report.is_outlier)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ([[0, 1], [1, 1], [2]], "row 1 has a label twice"),
        ([[0, 1], [1, 4], [2]], "row 1 has label 4, there are 4 labels"),
        ([[0, 1], [-1], [2]], "row 1 has label -1"),
        ([[0.0, 1.0, 0.0, 0.5]] * 3, "row 0 of 'labels' is not 4 numbers 0 or 1"),
        ([["red"], ["blue"], ["soft"]], "row 1 has label 'blue'"),
        ([1, 2, 3], "use fit for one label a row"),
    ],
)
def test_what_is_no_label_is_refused_by_row(lists: list[Any], said: str) -> None:
    names = NAMES if isinstance(lists[0], list) and isinstance(lists[0][0], str) else None
    with pytest.raises(ValueError, match=said):
        read_label_sets(Dataset.from_dict({"labels": lists}), "labels", 4, names)


def test_what_cannot_be_fitted_is_refused_with_a_way_out() -> None:
    features, probs, given, _ = planted()
    data = dataset("texts", given, features=features, probs=probs)
    with pytest.raises(ValueError, match="give label_names"):
        RelationCleaner().fit_multi_label(data)
    with pytest.raises(ValueError, match="Algorithm 4 compares one class a row"):
        RelationCleaner(cut="algorithm4").fit_multi_label(data, label_names=NAMES)
    with pytest.raises(ValueError, match="fit_multi_label takes several"):
        RelationCleaner().fit(data, "labels")
    probs[7, 1] = 1.5
    with pytest.raises(ValueError, match="row 7 of 'probs' holds numbers outside"):
        RelationCleaner().fit_multi_label(dataset("hot", given, features=features, probs=probs))
    fine, report, _ = fitted()
    with pytest.raises(ValueError, match="other labels than were fitted"):
        report.filter(fine.shuffle(seed=1))
    plain = fine.cast_column("labels", List(Value("float32"), length=4))
    assert len(report.filter(plain)) == len(report.filter(fine))


@pytest.mark.parametrize("form", ["hot", "texts"])
def test_a_report_is_saved_and_loaded_as_it_was(form: str, tmp_path: Path) -> None:
    data, report, _ = fitted(form, label_names=NAMES)
    report.save(tmp_path / "r")
    again = MultiLabelReport.load(tmp_path / "r")
    for name in ("label_noise_score", "is_label_error", "outlier_score", "is_outlier", "group"):
        np.testing.assert_array_equal(getattr(again, name), getattr(report, name))
    assert again.summary() == report.summary() and again.config == report.config
    assert again.relabel(data)["labels"][:] == report.relabel(data)["labels"][:]
    again.save(tmp_path / "r")  # in place
    assert MultiLabelReport.load(tmp_path / "r").outlier_level == report.outlier_level
    replace(report, outlier_level=np.inf).save(tmp_path / "odd")
    assert MultiLabelReport.load(tmp_path / "odd").outlier_level == np.inf
    with pytest.raises(ValueError, match="multi_label_report|relation_report|relation graph"):
        RelationReport.load(tmp_path / "r")
    text = (tmp_path / "r" / "report.json").read_text()
    for old, new in (('"red"', "3"), ('"hot": ', '"cold": '), ('"outlier_level": ', '"outlier_level": "x", "y": ')):
        (tmp_path / "r" / "report.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="no readable report"):
            MultiLabelReport.load(tmp_path / "r")


def test_damaged_scores_are_refused_when_they_are_saved(tmp_path: Path) -> None:
    report = fitted()[1]
    bad = {
        "label_noise_score": np.full_like(report.label_noise_score, np.nan),
        "group": report.group + len(report),
        "is_label_error": report.is_label_error[:5],
        "outlier_score": report.outlier_score.astype(np.float32),
    }
    for name, values in bad.items():
        with pytest.raises(ValueError, match=name):
            replace(report, **{name: values}).save(tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("form", ["hot", "ids", "texts"])
def test_annotations_know_the_fitted_rows(form: str) -> None:
    data, report, _ = fitted(form, **({"label_names": NAMES} if form == "texts" else {}))
    annotated = data.map(report.annotate, batched=True, with_indices=True, batch_size=64)
    assert annotated["is_label_error"][:] == report.is_label_error.tolist()
    other = data.select([1, 0, *range(2, len(data))])
    with pytest.raises(ValueError, match="row 0 .*other labels than were fitted"):
        other.map(report.annotate, batched=True, with_indices=True)
    with pytest.raises(ValueError, match="row 400 is not among"):
        report.annotate({}, [400])


def test_why_rows_go_and_what_they_are_called() -> None:
    data, report, _ = fitted(label_names=NAMES)
    gone = report.dropped(outliers=True)
    assert set(gone.values()) == {"label error", "outlier"}
    assert len(report.filter(data, outliers=True)) == len(data) - len(gone)
    row = int(np.flatnonzero(report.sets.given.sum(axis=1) == 2)[0])
    assert report.label_text(row) == ", ".join(np.array(NAMES)[report.sets.given[row] > 0].tolist())
    none = int(np.flatnonzero(report.sets.given.sum(axis=1) == 0)[0])
    assert report.label_text(none) == "no label"
