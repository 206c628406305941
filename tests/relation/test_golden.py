"""Kernel, initial scores, noisy sets, final scores and outlier scores equal the recorded runs (golden/relation)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_dataopt.relation.config import RelationConfig
from hf_dataopt.relation.graph import RelationGraph
from hf_dataopt.relation.kernel import relation
from hf_dataopt.relation.label_noise import LabelNoise, find_label_noise
from hf_dataopt.relation.outlier import outlier_scores
from hf_dataopt.relation.rows import rows_of

from ..conftest import golden_params

pytestmark = pytest.mark.golden
label_files = pytest.mark.parametrize("golden", golden_params("relation", "label_*.npz"), indirect=True)
ood_files = pytest.mark.parametrize("golden", golden_params("relation", "ood_*.npz"), indirect=True)


class Case:
    """One file: arrays after the reference's `[::hop]`, and the settings of each (kernel, power)."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.data: dict[str, Any] = {name: arrays[name] for name in arrays.files if name != "meta"}
            self.meta: dict[str, Any] = json.loads(str(arrays["meta"]))
        hop = self.meta["hop"]
        self.features, self.probs = self.data["feat"][::hop], self.data.get("prob", np.empty(0))[::hop]
        self.labels = self.data["label"][::hop].astype(np.int64)

    def settings(self, kernel: str, power: int) -> dict[str, Any]:
        return {"temperature": power, "compatibility": kernel == "cos_p"}

    def graph(self, config: RelationConfig) -> RelationGraph:
        return RelationGraph(rows_of(self.features, "features"), rows_of(self.probs, "probs"), self.labels, config)

    def solve(self, config: RelationConfig) -> tuple[np.ndarray, LabelNoise]:
        graph = self.graph(config)
        initial = -graph.relation_sums(quiet=True)
        return initial, find_label_noise(initial, lambda rows: -graph.sums_against(rows, quiet=True), config)


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the largest expected value; every row."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@label_files
def test_relation_values_equal_the_reference(golden: Path) -> None:
    case = Case(golden)
    for kernel in case.meta["kernels"]:
        expected = case.data[f"ref_rel_{kernel}"]
        config = RelationConfig(**case.settings(kernel, 1), edge_cutoff=0, dtype=case.meta["dtype"])
        features, probs, labels = (torch.from_numpy(a) for a in (case.features, case.probs, case.labels))
        few = len(expected)
        found = relation(features[:few], features, probs[:few], probs, (labels[:few], labels), config)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


@label_files
def test_the_reference_rule(golden: Path) -> None:
    case = Case(golden)
    for kernel in case.meta["kernels"]:
        for power in case.meta["pows"]:
            name = f"{kernel}_t{power}"
            for passes in range(1, case.meta["n_iter"]):
                config = RelationConfig.reference(
                    **case.settings(kernel, power),
                    max_passes=passes,
                    threshold_value=case.meta["reg"],
                    edge_cutoff=case.meta["thres"],
                    dtype=case.meta["dtype"],
                )
                initial, found = case.solve(config)
                close(initial, -case.data[f"ref_init_{name}"])
                np.testing.assert_array_equal(found.noisy, case.data[f"ref_set{passes}_{name}"])
                close(found.scores, -case.data[f"ref_score{passes}_{name}"])


@label_files
def test_edge_cutoffs_of_the_reference(golden: Path) -> None:
    case = Case(golden)
    for cutoff in case.meta.get("thres_extra", []):
        power = case.meta["pows"][0]
        config = RelationConfig.reference(**case.settings("cos_p", power), edge_cutoff=cutoff)
        close(case.graph(config).relation_sums(quiet=True), case.data[f"ref_init_thres{cutoff}"])


@label_files
def test_the_text_rule(golden: Path) -> None:
    case = Case(golden)
    for kernel in case.meta["kernels"]:
        for power in case.meta["pows"]:
            name = f"{kernel}_t{power}"
            if f"dis_score_{name}" not in case.data:
                assert case.meta["dtype"] != "float32" or case.meta["hop"] > 1
                continue
            level, passes, objective = case.data[f"dis_lambda_iters_obj_{name}"]
            initial, found = case.solve(RelationConfig.dissertation(float(level), **case.settings(kernel, power)))
            close(initial, case.data[f"dis_init_{name}"])
            np.testing.assert_array_equal(found.noisy, case.data[f"dis_set_{name}"])
            close(found.scores, case.data[f"dis_score_{name}"])
            assert found.objective == pytest.approx(objective, rel=1e-4, abs=1e-6)
            if passes < 100:
                assert (found.stopped, found.passes) == ("converged", int(passes))
            else:
                assert found.stopped == "cycle" and found.passes < 100


@ood_files
def test_outlier_scores(golden: Path) -> None:
    case = Case(golden)
    everything = np.arange(len(case.features))
    for power in case.meta["pows"]:
        for changes, expected in (
            ({}, case.data[f"ref_outlier_t{power}"]),
            ({"edge_cutoff": 0, "outlier_epsilon": 0}, case.data[f"dis_outlier_t{power}"]),
        ):
            config = RelationConfig(outlier_temperature=power, **changes)
            fitted, asked = (
                RelationGraph(rows_of(f, "features"), rows_of(p, "probs"), None, config)
                for f, p in (
                    (case.features, case.data["ref_prob"]),
                    (case.data["feat_val"], case.data["ref_prob_val"]),
                )
            )
            found = outlier_scores(fitted, everything, asked, quiet=True)
            np.testing.assert_allclose(found, expected, rtol=1e-4)
