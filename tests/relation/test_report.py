"""What a report is asked for beside scores: rows dropped and why, new labels, confusion, rows to review, a summary."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset

from hf_dataopt import RelationCleaner, RelationReport

from .data import make

CASE = make(n=400, d=40)
ROWS = np.concatenate([np.arange(400), np.repeat(np.arange(20), 3)])  # 20 rows have three copies each
DATA = CASE.dataset().select(ROWS)


@pytest.fixture(scope="module")
def report() -> RelationReport:
    return RelationCleaner().fit(DATA, quiet=True)


def test_dropped_rows_are_those_that_filter_drops_with_their_reason(report: RelationReport) -> None:
    for switches in ({}, {"outliers": True}, {"label_errors": False, "outliers": True, "near_duplicates": True}):
        gone = report.dropped(**switches)
        kept = np.setdiff1d(np.arange(460), list(gone))
        assert report.filter(DATA.add_column("n", range(460)), **switches)["n"][:] == kept.tolist()
        assert list(gone) == sorted(gone)
    gone = report.dropped(outliers=True, near_duplicates=True)
    errors = {row for row, why in gone.items() if why == "label error"}
    assert errors == set(np.flatnonzero(report.is_label_error).tolist())
    assert {row for row, why in gone.items() if why == "outlier"} == set(np.flatnonzero(report.is_outlier)) - errors
    copies = {row: int(why.split()[-1]) for row, why in gone.items() if why.startswith("near duplicate of row ")}
    assert len(copies) > 30 and all(report.group[a] == report.group[b] and b not in gone for a, b in copies.items())


def test_relabelling_changes_flagged_rows_and_keeps_what_was_given(report: RelationReport) -> None:
    flagged = report.is_label_error
    fixed = report.relabel(DATA)
    assert fixed.column_names == ["label", "features", "probs", "given_label"] and len(fixed) == 460
    assert isinstance(fixed.features["label"], ClassLabel) and fixed.features["given_label"] == DATA.features["label"]
    labels, given = np.array(fixed["label"][:]), np.array(fixed["given_label"][:])
    np.testing.assert_array_equal(given, CASE.labels[ROWS])
    np.testing.assert_array_equal(labels, report.suggested_label)
    assert (labels[flagged] != given[flagged]).all() and flagged.sum() > 20
    some = report.relabel(DATA, rows=[3, 7], given_column="before")
    changed = np.flatnonzero(np.array(some["label"][:]) != np.array(some["before"][:]))
    assert changed.tolist() == [3, 7] and some["label"][3] == report.other_label[3]
    assert report.relabel(DATA, rows=[])["label"][:] == DATA["label"][:]
    assert report.relabel(DATA.with_format("numpy", columns=["label"])).format["type"] == "numpy"
    with pytest.raises(ValueError, match="'given_label' already"):
        report.relabel(
            fixed.remove_columns("label").rename_column("given_label", "label").add_column("given_label", ROWS)
        )
    with pytest.raises(ValueError, match="row 460 is not among the 460 fitted rows"):
        report.relabel(DATA, rows=[460])
    with pytest.raises(ValueError, match="not the labels 'label'"):
        report.relabel(DATA.remove_columns("label"))
    with pytest.raises(ValueError, match="another label"):
        report.relabel(DATA.select(range(459, -1, -1)))


def test_texts_unlabelled_and_skipped_rows_keep_their_places() -> None:
    names = np.array(["ape", "bee", "cat", "dog", "eel"])[CASE.labels].astype(object)
    names[::9] = None
    features = CASE.features.tolist()
    features[5] = [float("nan")] * 40
    columns = {"kind": names.tolist(), "features": features, "probs": CASE.probs.tolist(), "n": range(400)}
    data = Dataset.from_dict(columns).select(range(399, -1, -1))
    report = RelationCleaner().fit(data, "kind", on_error="skip", quiet=True)
    fixed = report.relabel(data)
    assert fixed["n"][:] == list(range(399, -1, -1)) and fixed["given_label"][:] == data["kind"][:]
    changed = [row for row, (a, b) in enumerate(zip(fixed["kind"][:], data["kind"][:], strict=True)) if a != b]
    assert changed == report.rows[report.is_label_error].tolist() and 394 not in changed and len(changed) > 20
    assert [fixed["kind"][row] for row in changed[:3]] == [
        report.name_of(code) for code in report.suggested_label[report.is_label_error][:3]
    ]
    everything = report.relabel(data, rows=range(399))
    assert [a is None for a in everything["kind"][:]] == [a is None for a in data["kind"][:]]


def test_confusion_has_what_is_likely_in_its_columns(report: RelationReport) -> None:
    table = report.confusion()
    wrong, other = report.parts["combined"], report.other_label
    expected = np.zeros((5, 5))
    for row, label in enumerate(report.labels):
        expected[label, other[row]] += wrong[row]
        expected[label, label] += 1 - wrong[row]
    np.testing.assert_allclose(table, expected, atol=1e-9)
    np.testing.assert_allclose(table.sum(axis=1), np.bincount(report.labels))
    shifted = replace(report, labels=np.where(np.arange(460) < 100, -1, report.labels))
    assert shifted.confusion().sum() == pytest.approx(360)


def test_review_asks_once_a_group_and_first_where_the_flag_is_least_sure(report: RelationReport) -> None:
    order, wrong = report.review(1000), report.parts["combined"]
    assert len(order) == len(set(report.group)) == len(set(report.group[order]))
    alone = [row for row in order if (report.group == report.group[row]).sum() == 1]
    assert (np.diff(np.abs(wrong[alone] - 0.5)) >= -1e-12).all()
    copied = [row for row in order if report.group[row] < 20 and report.group[row] != row or row < 20]
    doubt = -wrong * np.log(wrong) - (1 - wrong) * np.log1p(-wrong)
    for row in copied[:5]:
        rank = order.tolist().index(row)
        behind = [one for one in alone if one in order[rank:]]
        assert 4 * doubt[row] >= doubt[behind].max() - 1e-12
    assert report.review(7).tolist() == order[:7].tolist()
    unlabelled = replace(report, labels=np.where(np.arange(460) == order[0], -1, report.labels))
    assert order[0] not in unlabelled.review(1000)


def test_a_summary_says_what_was_found(report: RelationReport) -> None:
    text = dict(line.split(": ", 1) for line in report.summary().splitlines())
    sizes = np.bincount(report.labels)
    assert text["rows"] == "460" and text["classes"] == "5"
    assert text["class sizes"] == f"{sizes.min()} (class {sizes.argmin()}) to {sizes.max()} (class {sizes.argmax()})"
    assert (
        text["label errors"].startswith(f"{report.is_label_error.sum()} (")
        and "how many was estimated" in text["flagged"]
    )
    table = report.confusion()
    np.fill_diagonal(table, 0)
    given, likely = np.unravel_index(table.argmax(), table.shape)
    assert text["most often wrong"].startswith(f"class {given}, likely class {likely}: about {table.max():.0f}; ")
