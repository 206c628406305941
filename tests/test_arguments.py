"""A sample of the bad argument sets of `python -m tests.arguments`, and that its judge sees what it is there to see."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import hf_dataopt
from hf_dataopt import KVzipConfig, PuzzleMixConfig, RelationConfig

from .arguments.cases import cases
from .arguments.judge import good, run
from .arguments.pool import Argument, Case, count
from .pages import MAPPED

SETS = 30
# of the map of equations (docs/equations.md): called by ours alone, for every tile, token, sweep or call, with what the
# callable behind the colon has checked. Every other name of the map has a case, and so has every public name.
INNER = {
    "co_mixup_sweeps.objective": "co_mixup",
    "co_mixup_sweeps.sweep": "co_mixup",
    "kernel.base_kernel": "relation",
    "loop.CondensationLoop": "DatasetCondenser.condense",
    "tuner.CCMLinearVariant": "CCMConfig",
    "attention.build_layout": "DataCollatorForCCM.__call__",
    "scores.kvzip.KVzip": "score_context",
    "ragged_attention.attend_ragged": "KVzipCache.from_scores",
}
ASKED_BY_MODELS = {
    "KVzipCache.check_model",
    "KVzipCache.view",
    "KVzipCache.update",
    "CCMConfig.save_pretrained",
}  # a forward calls them, or one of PEFT's saves, with what it was given


@pytest.mark.parametrize("name", list(cases()))
def test_bad_arguments_are_refused_in_our_words(name: str) -> None:
    good(cases()[name])
    tally = run(name, cases()[name], SETS, seed=1)
    assert not tally.other, tally.other


def test_every_public_callable_has_a_case() -> None:
    missing = set()
    for name in set(hf_dataopt.__all__) - {"__version__"}:
        public = getattr(hf_dataopt, name)
        methods = vars(public).items() if inspect.isclass(public) else ()
        wanted = {f"{name}.{method}" for method, value in methods if not method.startswith("_") and _takes(value)}
        missing |= {one for one in {name, *wanted} if not any(case.split(" ")[0] == one for case in cases())}
    assert missing <= ASKED_BY_MODELS, missing


def test_every_equation_has_a_case_or_is_inner() -> None:
    names = {path.removeprefix("hf_dataopt.").split(".", 1)[1] for path in MAPPED if path.count(".") > 2}
    assert set(INNER) <= names and set(INNER.values()) <= set(cases())
    missing = {name for name in names - set(INNER) if not {name, name.rpartition(".")[2]} & set(cases())}
    assert not missing, missing


def _takes(method: object) -> bool:
    """Whether a method has arguments of its own."""
    function = getattr(method, "__func__", method)
    return inspect.isfunction(function) and len(inspect.signature(function).parameters) > 1


def test_numpy_scalars_and_tensors_without_dimensions_are_numbers() -> None:
    config = RelationConfig(
        temperature=np.float32(2), neighbours=np.int64(3), max_passes=torch.tensor(5), diagonal=np.True_
    )
    assert (config.temperature, config.neighbours, config.max_passes, config.diagonal) == (2.0, 3, 5, True)
    assert RelationConfig.from_json_string(config.to_json_string()) == config
    assert type(config.neighbours) is int
    puzzle = PuzzleMixConfig(grid_sizes=np.array([2, 4]), image_mean=torch.tensor([0.5]), image_std=[0.5])
    assert puzzle == PuzzleMixConfig(grid_sizes=(2, 4), image_mean=(0.5,), image_std=(0.5,))
    assert KVzipConfig.from_json_string(KVzipConfig(keep_ratio=torch.tensor(0.5)).to_json_string()).keep_ratio == 0.5


def test_the_judge_sees_other_errors_and_nonsense_that_passes() -> None:
    def by_chance(n: object) -> object:
        return [1][n]  # type: ignore[index]

    arguments = {"n": Argument(lambda: 0, count(0, 0))}
    found = run("chance", Case(by_chance, arguments), 60).other
    assert any("raised at" in one or "IndexError" in one for one in found)
    assert any("accepted" in one for one in run("all", Case(lambda n: None, arguments), 60).other)
    with pytest.raises(TypeError):
        good(Case(lambda: None, arguments))
