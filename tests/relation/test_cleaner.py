"""RelationCleaner and RelationReport on real `datasets` objects: fit, annotate, filter, re-cut, save, stream, resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Sequence, Value
from datasets.fingerprint import Hasher

from hf_dataopt.metrics import average_precision
from hf_dataopt.relation.cleaner import RelationCleaner
from hf_dataopt.relation.config import RelationConfig
from hf_dataopt.relation.relation_map import draw_relation_map, relation_values
from hf_dataopt.relation.report import RelationReport
from hf_dataopt.relation.summary import facts, flagging_rule
from hf_dataopt.relation.tiles import LARGEST_TILE

from ..conftest import REPO
from .data import make

CASE = make(n=400)
DATA = CASE.dataset()


@pytest.fixture(scope="module")
def report() -> RelationReport:
    return RelationCleaner(temperature=4).fit(DATA, quiet=True)


def test_finds_the_wrong_labels_and_suggests_the_right_ones(report: RelationReport) -> None:
    assert average_precision(CASE.wrong, report.label_noise_score) > 0.95
    assert CASE.wrong[report.is_label_error].mean() > 0.95
    truth = CASE.probs.argmax(axis=1)
    found = report.is_label_error & CASE.wrong
    assert (report.suggested_label[found] == truth[found]).mean() > 0.9
    np.testing.assert_array_equal(report.suggested_label[~report.is_label_error], CASE.labels[~report.is_label_error])


def test_annotate_adds_five_columns_and_caches(report: RelationReport, tmp_path: Path) -> None:
    DATA.save_to_disk(tmp_path / "d")
    data = Dataset.load_from_disk(str(tmp_path / "d"))
    one = data.map(report.annotate, batched=True, with_indices=True)
    again = data.map(report.annotate, batched=True, with_indices=True)
    assert one.cache_files == again.cache_files and one._fingerprint == again._fingerprint
    assert set(one.column_names) - set(data.column_names) == {
        "label_noise_score",
        "is_label_error",
        "suggested_label",
        "outlier_score",
        "is_outlier",
    }
    assert one["label_noise_score"][:] == report.label_noise_score.tolist()
    two = data.map(report.annotate, batched=True, with_indices=True, num_proc=2)
    assert two["outlier_score"][:] == report.outlier_score.tolist()
    other = data.map(report.rethreshold(noise_rate=0.2).annotate, batched=True, with_indices=True)
    assert other._fingerprint != one._fingerprint


def test_equal_fits_hash_equal_and_changed_fields_do_not(report: RelationReport) -> None:
    same = RelationCleaner(temperature=4).fit(DATA, quiet=True)
    assert Hasher.hash(same.annotate) == Hasher.hash(report.annotate)
    assert Hasher.hash(RelationCleaner(temperature=6).fit(DATA, quiet=True).annotate) != Hasher.hash(report.annotate)


def test_filter_and_rethreshold(report: RelationReport) -> None:
    assert len(report.filter(DATA)) == 400 - report.is_label_error.sum()
    assert len(report.filter(DATA, label_errors=False, outliers=True)) == 400 - report.is_outlier.sum()
    stricter = report.rethreshold(noise_rate=0.05, outlier_share=0.1)
    assert stricter.is_label_error.sum() == 20 and stricter.is_outlier.sum() == 40
    np.testing.assert_array_equal(np.flatnonzero(stricter.is_label_error), np.sort(report.worst(20)))
    assert stricter.label_noise_score is report.label_noise_score
    everything = report.rethreshold(noise_rate=0.5)
    assert everything.is_label_error.sum() == 200
    certain = report.rethreshold(threshold=0.9).is_label_error
    np.testing.assert_array_equal(certain, report.label_noise_score > 0.9)
    assert report.rethreshold(outlier_threshold=1e9).is_outlier.sum() == 0
    assert report.rethreshold(quantile=0.9).is_label_error.sum() == 40
    np.testing.assert_array_equal(
        everything.suggested_label, np.where(everything.is_label_error, report.other_label, CASE.labels)
    )
    assert (report.suggested_label[report.is_label_error] != CASE.labels[report.is_label_error]).all()
    assert stricter.about["cut"] == {"rule": "noise_rate", "value": 0.05}
    assert flagging_rule(stricter) == "the worst by the probability that the label is wrong, cut at noise_rate 0.05"
    assert report.about["cut"]["rule"] == "estimated" and "how many was estimated" in flagging_rule(report)
    with pytest.raises(ValueError, match="two rules"):
        report.rethreshold(noise_rate=0.1, quantile=0.9)


def test_evidence_names_the_contradicting_rows(report: RelationReport) -> None:
    row = int(report.worst(1)[0])
    found = report.evidence(row, count=3)
    assert len(found.conflicting) == 3 and (found.conflicting_labels != CASE.labels[row]).all()
    assert (np.diff(found.conflicting_relations) >= 0).all() and (found.conflicting_relations < 0).all()
    assert (found.supporting_labels == CASE.labels[row]).all() and row not in found.supporting
    json.dumps(found.to_dict())
    with pytest.raises(ValueError, match="rows 0 to 399"):
        report.evidence(400)


def test_relation_map_is_a_figure(report: RelationReport, tmp_path: Path) -> None:
    report.relation_map(17).savefig(tmp_path / "17.png")
    assert (tmp_path / "17.png").stat().st_size > 5_000


def test_a_relation_map_shows_the_strongest_and_every_so_manieth_of_the_rest_once(report: RelationReport) -> None:
    graphs, row, most = report._need_graphs(), 17, 40
    mean = relation_values(graphs, row)[0]
    (points,) = draw_relation_map(graphs, row, title="", max_points=most).axes[0].collections
    shown = np.asarray(points.get_offsets())[:, 0]
    ranked = np.delete(np.abs(mean), row)
    ranked.sort()
    strong, rest = ranked[-(most // 2) :], ranked[: -(most // 2)]
    np.testing.assert_allclose(np.abs(shown[-(most // 2) :]), strong)  # last, so that nothing hides them
    np.testing.assert_allclose(np.abs(shown[: -(most // 2)]), rest[:: -(-len(rest) // (most // 2))])
    assert points.get_linewidths() == [0]  # no borders: at 3 points across they would be all there is to see


def test_save_and_load_in_a_fresh_process(report: RelationReport, tmp_path: Path) -> None:
    report.save(tmp_path / "r")
    DATA.save_to_disk(tmp_path / "d")
    code = (
        "import sys, datasets, json; from hf_dataopt import RelationReport\n"
        "d = datasets.load_from_disk(sys.argv[2]); r = RelationReport.load(sys.argv[1], d)\n"
        "print(json.dumps([r.label_noise_score.tolist(), r.evidence(5).to_dict(), r.score_outliers(d).tolist()]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "r"), str(tmp_path / "d")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO)
    scores, evidence, outliers = json.loads(out.stdout.splitlines()[-1])
    assert scores == report.label_noise_score.tolist()
    assert evidence == json.loads(json.dumps(report.evidence(5).to_dict()))
    np.testing.assert_allclose(outliers, report.score_outliers(DATA, quiet=True), rtol=1e-6)


def test_a_report_without_its_dataset_says_so(report: RelationReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    loaded = RelationReport.load(tmp_path)
    with pytest.raises(ValueError, match="load"):
        loaded.evidence(0)
    with pytest.raises(ValueError, match="400"):
        RelationReport.load(tmp_path, DATA.select(range(10)))


@pytest.mark.parametrize("name", ["report.json", "report.safetensors"])
def test_corrupt_files_are_refused(report: RelationReport, tmp_path: Path, name: str) -> None:
    report.save(tmp_path)
    (tmp_path / name).write_bytes(b"{ broken")
    with pytest.raises(ValueError, match="no readable relation report"):
        RelationReport.load(tmp_path)


def test_new_rows_are_scored_against_the_reference(report: RelationReport) -> None:
    rng = np.random.default_rng(0)
    strange = {"features": rng.normal(size=(50, 12)).astype(np.float32), "probs": np.full((50, 5), 0.2, np.float32)}
    scores = report.score_outliers(strange, quiet=True)
    assert np.median(scores) > 2 * np.median(report.outlier_score)
    stream = report.score_outliers(DATA.to_iterable_dataset())
    rows = list(stream.take(3))
    np.testing.assert_allclose([row["outlier_score"] for row in rows], report.score_outliers(DATA[:3], quiet=True))
    assert isinstance(rows[0]["is_outlier"], bool)
    with pytest.raises(ValueError, match="same model"):
        report.score_outliers({"features": np.ones((2, 3), np.float32), "probs": strange["probs"][:2]})


def test_temporal_ensemble_is_the_mean_of_its_checkpoints(tmp_path: Path) -> None:
    other = make(n=400, spread=0.9)
    data = CASE.dataset(features_2=other.features, probs_2=other.probs)
    both = RelationCleaner().fit(
        data, features_column=["features", "features_2"], probs_column=["probs", "probs_2"], quiet=True
    )
    single = [
        RelationCleaner().fit(data, features_column=f, probs_column=p, quiet=True).parts["label_noise"]
        for f, p in (("features", "probs"), ("features_2", "probs_2"))
    ]
    np.testing.assert_allclose(both.parts["label_noise"], np.mean(single, axis=0))
    both.relation_map(3).savefig(tmp_path / "map.png")
    assert len(both.about["checkpoints"]) == 2
    with pytest.raises(ValueError, match="per checkpoint"):
        RelationCleaner().fit(data, features_column=["features", "features_2"])


def test_both_scores_and_both_cuts_come_from_one_fit(tmp_path: Path) -> None:
    combined, plain = (RelationCleaner(score=score).fit(DATA, quiet=True) for score in ("combined", "label_noise"))
    for name in ("combined", "label_noise"):
        np.testing.assert_array_equal(combined.parts[name], plain.parts[name])
    np.testing.assert_array_equal(combined.label_noise_score, combined.parts["combined"])
    np.testing.assert_array_equal(plain.label_noise_score, plain.parts["label_noise"])
    assert 0 <= combined.label_noise_score.min() < combined.label_noise_score.max() <= 1
    assert combined.is_label_error.sum() == plain.is_label_error.sum()  # the rate does not hang on the ranking
    np.testing.assert_array_equal(
        np.sort(plain.worst(plain.is_label_error.sum())), np.flatnonzero(plain.is_label_error)
    )
    assert average_precision(CASE.wrong, combined.label_noise_score) > 0.95
    assert abs(combined.noise_rate - CASE.wrong.mean()) < 0.02
    set_of_text = RelationCleaner(cut="algorithm4").fit(DATA, quiet=True)
    assert flagging_rule(set_of_text) == "the set that Algorithm 4 found" and dict(facts(set_of_text))["flagged"]
    assert set_of_text.is_label_error.sum() == set_of_text.about["checkpoints"][0]["noisy"]
    given = RelationCleaner(cut=0.05).fit(DATA, quiet=True)
    np.testing.assert_array_equal(np.flatnonzero(given.is_label_error), np.sort(combined.worst(20)))
    assert combined.evidence(int(combined.worst(1)[0])).ranks["combined"] == 399 / 400
    combined.save(tmp_path)
    loaded = RelationReport.load(tmp_path)
    np.testing.assert_array_equal(loaded.parts["label_noise"], combined.parts["label_noise"])
    np.testing.assert_array_equal(loaded.other_label, combined.other_label)
    assert loaded.noise_rate == combined.noise_rate


def test_without_probabilities_the_nearest_rows_are_asked() -> None:
    report = RelationCleaner(compatibility=False).fit(DATA.remove_columns("probs"), quiet=True)
    assert average_precision(CASE.wrong, report.label_noise_score) > 0.8 and report.about["columns"]["columns"] == []


def test_unlabelled_rows_are_outliers_at_most() -> None:
    labels = [None if k % 4 == 0 else int(v) for k, v in enumerate(CASE.labels)]
    named = np.arange(400) % 4 > 0
    kept = np.flatnonzero(named)
    for data in (_with_label(labels), _with_label([-1 if v is None else v for v in labels], Value("int32"))):
        report = RelationCleaner(neighbours=10).fit(data, quiet=True)
        alone = RelationCleaner(neighbours=10).fit(DATA.select(kept), quiet=True)
        np.testing.assert_array_equal(report.labels[named], CASE.labels[kept])
        assert (report.labels[~named] == -1).all() and not report.is_label_error[~named].any()
        assert (report.suggested_label[~named] == -1).all() and (report.label_noise_score[~named] == 0).all()
        np.testing.assert_allclose(report.parts["label_noise"][kept], alone.parts["label_noise"], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(report.label_noise_score[kept], alone.label_noise_score, atol=0.02)
        assert report.is_label_error.sum() == alone.is_label_error.sum()
        assert report.outlier_score[~named].min() > 0 and len(report.evidence(0).supporting) == 0
        assert report.evidence(1).supporting_labels.min() >= 0
        again = data.map(report.annotate, batched=True, with_indices=True)
        assert again["suggested_label"][0] in (None, -1) and len(report.filter(data)) < 400
        assert ("unlabelled rows", "100") in facts(report)


def test_text_labels_find_their_columns() -> None:
    names = np.array(["zebra", "ape", "cat", "dog", "eel"])
    texts = RelationCleaner().fit(_with_label(names[CASE.labels].tolist()), quiet=True)
    numbers = RelationCleaner().fit(DATA, quiet=True)
    np.testing.assert_allclose(texts.label_noise_score, numbers.label_noise_score, rtol=1e-3, atol=1e-6)
    assert texts.about["columns"] == {"matched": True, "columns": [1, 2, 3, 4, 0]}
    assert texts.about["columns"]["columns"] == [names.tolist().index(name) for name in texts.label_names]


def test_a_model_of_fewer_classes_has_no_say(caplog: pytest.LogCaptureFixture) -> None:
    two = np.stack([CASE.probs[:, :2].sum(1), CASE.probs[:, 2:].sum(1)], axis=1)
    data = _with_label([f"c{k}" for k in CASE.labels]).remove_columns("probs").add_column("probs", two.tolist())
    report = RelationCleaner().fit(data, quiet=True)
    assert "2 columns for 5 labels" in caplog.text and report.about["columns"]["columns"] == []


def test_near_duplicates_are_grouped_kept_once_and_found_across_splits(tmp_path: Path) -> None:
    copies = np.concatenate([np.arange(400), np.repeat(np.arange(20), 3)])
    data = make(n=400, d=40).dataset().select(copies)
    report = RelationCleaner().fit(data, quiet=True)
    groups = report.near_duplicates()
    assert [rows.tolist() for rows in groups] == [[k, *range(400 + 3 * k, 403 + 3 * k)] for k in range(20)]
    assert len(report.filter(data, label_errors=False, near_duplicates=True)) == 400
    both = report.filter(data, near_duplicates=True)
    assert len(both) == len(set(report.group[~report.is_label_error]))
    split = ["train"] * 430 + ["test"] * 30
    assert {int(rows[0]) for rows in report.near_duplicates(across=split)} == {int(k) for k in range(20)} - set(
        range(10)
    )
    with pytest.raises(ValueError, match="460 rows"):
        report.near_duplicates(across=split[:5])
    report.save(tmp_path)
    np.testing.assert_array_equal(RelationReport.load(tmp_path).group, report.group)
    assert dict(facts(report))["near duplicates"] == "80 rows in 20 groups"
    first = report.filter(data.remove_columns("label"), label_errors=False, near_duplicates=True)
    assert len(first) == 400


@pytest.mark.parametrize("count", [5, 30])
def test_copies_of_a_wrong_row_do_not_speak_for_it(count: int) -> None:
    wrong = np.flatnonzero(CASE.wrong)[:20]
    data = CASE.dataset().select(np.concatenate([np.arange(400), np.repeat(wrong, count)]))
    report = RelationCleaner().fit(data, quiet=True)
    assert report.is_label_error[wrong].sum() >= 18


def test_partitions_are_graphs_of_their_own() -> None:
    whole = RelationCleaner(score="label_noise").fit(DATA, quiet=True)
    parted = RelationCleaner(score="label_noise", partition_size=150).fit(DATA, quiet=True)
    assert parted.about["checkpoints"][0]["partitions"] == 3
    assert average_precision(CASE.wrong, parted.label_noise_score) > 0.9
    assert np.corrcoef(whole.label_noise_score, parted.label_noise_score)[0, 1] > 0.9
    np.testing.assert_allclose(
        RelationCleaner(score="label_noise", partition_size=400).fit(DATA, quiet=True).label_noise_score,
        whole.label_noise_score,
    )
    assert average_precision(CASE.wrong, parted.parts["combined"]) > 0.95


@pytest.mark.parametrize("kind", ["shuffled", "nested lists", "array2d", "strings", "float64", "float16"])
def test_columns_in_any_storage_give_the_same_scores(kind: str, report: RelationReport) -> None:
    data, order = DATA, np.arange(400)
    if kind == "shuffled":
        order = np.random.default_rng(0).permutation(400)
        data = DATA.select(order)
    elif kind == "nested lists":
        data = data.cast_column("features", Sequence(Value("float32"))).cast_column("probs", Sequence(Value("float32")))
    elif kind == "array2d":
        from datasets import Array2D, Features

        data = Dataset.from_dict(
            {"label": CASE.labels, "features": CASE.features[:, None, :], "probs": CASE.probs},
            features=Features(
                label=DATA.features["label"], features=Array2D((1, 12), "float32"), probs=Sequence(Value("float32"))
            ),
        )
    elif kind == "strings":
        data = data.remove_columns("label").add_column("label", [f"name {k}" for k in CASE.labels])
    else:
        data = data.cast_column("features", Sequence(Value(kind)))
    found = RelationCleaner().fit(data, quiet=True)
    tolerance = 2e-3 if kind == "float16" else 1e-5
    scale = np.abs(report.label_noise_score).max()
    np.testing.assert_allclose(found.label_noise_score, report.label_noise_score[order], atol=tolerance * scale)
    if kind == "strings":
        assert data.map(found.annotate, batched=True, with_indices=True)["suggested_label"][0].startswith("name ")


def _with_label(column: Any, feature: Any = None) -> Dataset:
    data = DATA.remove_columns("label").add_column("label", column)
    return data if feature is None else data.cast_column("label", feature)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DATA.remove_columns("label"), "label_column"),
        (DATA.remove_columns("features"), "FeatureExtractor"),
        (_with_label([[0, 1]] * 400), "several labels"),
        (_with_label([0.5] * 400), "regression"),
        (_with_label([None] + [1] * 399), "two classes"),
        (_with_label([1] * 400), "two classes"),
        (_with_label([-1] * 200 + [1] * 200), "cast_column"),
        (_with_label([-2] + [0, 1] * 199 + [1]), "row 0 has label -2"),
        (_with_label([None] * 400), "two classes"),
        (DATA.select([]), "empty"),
    ],
)
def test_unfit_columns_are_refused(data: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelationCleaner().fit(data, quiet=True)


def test_rows_of_unequal_length_are_refused() -> None:
    ragged = [row.tolist() for row in CASE.features]
    ragged[3] = ragged[3][:-1]
    data = DATA.remove_columns("features").add_column("features", ragged)
    with pytest.raises(ValueError, match="11 to 12"):
        RelationCleaner().fit(data, quiet=True)


def test_other_kinds_of_datasets_are_refused() -> None:
    from datasets import DatasetDict

    with pytest.raises(TypeError, match="one split"):
        RelationCleaner().fit(DatasetDict(train=DATA))
    with pytest.raises(TypeError, match="score_outliers"):
        RelationCleaner().fit(DATA.to_iterable_dataset())


def test_annotating_another_dataset_is_refused(report: RelationReport) -> None:
    shuffled = DATA.shuffle(seed=0)
    with pytest.raises(ValueError, match="shuffled"):
        shuffled.map(report.annotate, batched=True, with_indices=True)
    with pytest.raises(ValueError, match="fitted"):
        report.annotate({}, [400])


def test_filter_and_load_refuse_another_order(report: RelationReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    for call in (report.filter, lambda data: RelationReport.load(tmp_path, data)):
        with pytest.raises(ValueError, match="shuffled"):
            call(DATA.shuffle(seed=0))
    assert len(report.filter(DATA.remove_columns("label"))) == len(report.filter(DATA))


def test_rows_at_fault_can_be_filtered_out() -> None:
    ragged = [row.tolist() for row in CASE.features]
    ragged[3], ragged[5] = ragged[3][:-1], None
    labels = [None if k == 9 else int(v) for k, v in enumerate(CASE.labels)]
    data = DATA.remove_columns(["features", "label"]).add_column("features", ragged).add_column("label", labels)
    good = [k for k in range(400) if k not in (3, 5, 9)]
    found = RelationCleaner().fit(data.select(good), quiet=True)
    clean = RelationCleaner().fit(DATA.select(good), quiet=True)
    np.testing.assert_allclose(found.label_noise_score, clean.label_noise_score, atol=1e-4)


def test_combined_reads_the_column_of_its_class() -> None:
    keep = np.flatnonzero(CASE.labels != 1)
    data = _with_label(CASE.labels).select(keep)
    found = RelationCleaner().fit(data, quiet=True)
    assert average_precision(CASE.wrong[keep], found.label_noise_score) > 0.95
    assert found.about["columns"] == {"matched": False, "columns": [0, 2, 3, 4]}


def test_an_ensemble_skips_and_bounds_like_its_checkpoints(caplog: pytest.LogCaptureFixture) -> None:
    shuffled = np.random.default_rng(0).permutation(CASE.labels)
    data = (
        CASE.dataset(features_2=CASE.features, probs_2=CASE.probs).remove_columns("label").add_column("label", shuffled)
    )
    columns = {"features_column": ["features", "features_2"], "probs_column": ["probs", "probs_2"]}
    assert not RelationCleaner(cut="algorithm4").fit(data, quiet=True, **columns).is_label_error.any()
    bound: dict[str, Any] = {"threshold": "noise_rate", "threshold_value": 0.2, "max_noisy_share": 0.05}
    few = RelationCleaner(cut="algorithm4", **bound).fit(DATA, quiet=True)
    assert few.is_label_error.sum() <= 20


def test_streams_follow_the_outlier_threshold(report: RelationReport) -> None:
    none = report.rethreshold(outlier_threshold=1e9)
    assert not any(row["is_outlier"] for row in none.score_outliers(DATA.to_iterable_dataset()))


def test_an_unreadable_checkpoint_starts_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "0-0-sums-0-of-1.safetensors").write_bytes(b"broken")
    found = RelationCleaner().fit(DATA, output_dir=tmp_path, quiet=True)
    assert "starting afresh" in caplog.text and found.is_label_error.any()


def test_config_round_trip_and_ranges() -> None:
    config = RelationConfig(temperature=6, partition_size=100)
    assert RelationConfig.from_json_string(config.to_json_string()) == config
    with pytest.raises(ValueError, match="newer"):
        RelationConfig.from_json_string('{"colour": 1}')
    bad: list[dict[str, Any]] = [
        {"temperature": 0},
        {"similarity": "dot"},
        {"max_noisy_share": 1.5},
        {"threshold_value": -1},
        {"max_passes": 0},
        {"partition_size": 1},
        {"score": "both"},
        {"threshold_value": 0.05, "threshold": "quantile"},
        {"cut": "half"},
        {"cut": 1.5},
    ]
    for fields in bad:
        with pytest.raises(ValueError, match=next(iter(fields))):
            RelationConfig(**fields)
    with pytest.raises(TypeError, match="bool"):
        RelationConfig(diagonal=1)
    with pytest.raises(ValueError, match="not both"):
        RelationCleaner(config, temperature=2)


FIT = """
import sys, datasets, numpy as np, torch
torch.set_num_threads(1)
import hf_dataopt.relation.tiles as tiles
from hf_dataopt.relation.cleaner import RelationCleaner
tiles.LARGEST_TILE["cpu"] = 64
if sys.argv[3] == "slow":
    import time
    kernel = tiles.base_kernel
    def slow(*a, **k):
        time.sleep(0.004); open(sys.argv[2] + ".tiles", "a").write("."); return kernel(*a, **k)
    tiles.base_kernel = slow
    from hf_dataopt.checkpoint import PassCheckpoint
    PassCheckpoint.__init__.__defaults__ = (0.0,)
report = RelationCleaner().fit(datasets.load_from_disk(sys.argv[1]), output_dir=sys.argv[2], quiet=True)
from hf_dataopt import distributed
if distributed.is_main_process():  # what one process alone may ask of a report
    report.rethreshold(noise_rate=0.2)
    report.evidence(3)
    report.score_outliers(datasets.load_from_disk(sys.argv[1]), quiet=True)
"""


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **more}


def test_kill_and_start_again_gives_the_same_scores(tmp_path: Path) -> None:
    case = make(n=900)
    case.dataset().save_to_disk(tmp_path / "d")
    out = tmp_path / "run"
    command = [sys.executable, "-c", FIT, str(tmp_path / "d"), str(out), "slow"]
    tiles = Path(f"{out}.tiles")
    counts = []
    for wanted in (70, 55):  # killed in the sums, twice
        process = subprocess.Popen(command, env=_environment())
        start = time.monotonic()
        before = tiles.stat().st_size if tiles.exists() else 0
        while (tiles.stat().st_size if tiles.exists() else 0) < before + wanted:
            assert process.poll() is None and time.monotonic() - start < 120
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(tiles.stat().st_size)
    assert not (out / "report.json").exists()
    subprocess.run(command, env=_environment(), check=True)
    resumed = RelationReport.load(out)
    subprocess.run([*command[:4], str(tmp_path / "fresh"), "slow"], env=_environment(), check=True)
    fresh = RelationReport.load(tmp_path / "fresh")
    np.testing.assert_array_equal(resumed.label_noise_score, fresh.label_noise_score)
    np.testing.assert_array_equal(resumed.outlier_score, fresh.outlier_score)
    np.testing.assert_array_equal(resumed.suggested_label, fresh.suggested_label)
    total = Path(f"{tmp_path / 'fresh'}.tiles").stat().st_size
    # each kill costs four stripes (15 + 14 + 13 + 12 tiles) and the two tiles of the estimate at most
    assert tiles.stat().st_size <= total + 2 * 56
    assert not (out / "unfinished").exists()


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(n=700)
    case.dataset().save_to_disk(tmp_path / "d")
    script = tmp_path / "fit.py"
    script.write_text(FIT)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    fit = [str(script), str(tmp_path / "d"), str(tmp_path / "two"), "fast"]
    subprocess.run([*launch, *fit], env=_environment(), check=True, capture_output=True)
    two = RelationReport.load(tmp_path / "two")
    monkeypatch.setitem(LARGEST_TILE, "cpu", 64)
    one = RelationCleaner().fit(case.dataset(), quiet=True)
    assert two.about["processes"] == 2
    np.testing.assert_array_equal(two.label_noise_score, one.label_noise_score)
    np.testing.assert_array_equal(two.outlier_score, one.outlier_score)
    np.testing.assert_array_equal(two.is_label_error, one.is_label_error)
    np.testing.assert_array_equal(two.suggested_label, one.suggested_label)
