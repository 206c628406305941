"""Puzzle Mix equals the recorded reference: unaries, edges, energies at or below the optimum, plans, images, ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_dataopt.mixup.adversarial import Attack, finish_attack
from hf_dataopt.mixup.cells import Axis
from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.puzzle_mix import MaskProblem, PuzzleDraws, mask_problem, mix_under, puzzle_mix, solve
from hf_dataopt.mixup.result import MixResult
from hf_dataopt.mixup.transport import masked_transport

from ..conftest import golden_params
from ..reference import puzzle_mix as slow

pytestmark = pytest.mark.golden
mask_files = pytest.mark.parametrize("golden", golden_params("mixup", "mask_*.npz"), indirect=True)
plan_files = pytest.mark.parametrize("golden", golden_params("mixup", "plan_*.npz"), indirect=True)
puzzle_files = pytest.mark.parametrize("golden", golden_params("mixup", "puzzle_*.npz"), indirect=True)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "meta"}, json.loads(str(arrays["meta"]))


class Case:
    """A puzzle file as arguments of `puzzle_mix`: normalised images, saliency, draws, settings."""

    def __init__(self, path: Path) -> None:
        self.data, self.meta = load(path)
        meta = self.meta
        mean, std = (torch.tensor(meta[name])[:, None, None] for name in ("mean", "std"))
        self.images = (torch.from_numpy(self.data["x01_u8"]).float() / 255 - mean) / std
        self.std = std
        self.saliency = torch.from_numpy(self.data["grad"])
        self.targets = torch.eye(len(self.images))
        partner = torch.from_numpy(self.data["perm"].astype(np.int64))
        self.draws = PuzzleDraws(partner=partner, grid=meta["block_num"], lam=meta["alpha"])
        self.config = PuzzleMixConfig(
            beta=meta["beta"],
            gamma=meta["gamma"],
            eta=meta["eta"],
            neighbourhood=meta["neigh_size"],
            n_labels=meta["n_labels"],
            transport=meta["transport"],
            transport_cost=meta["t_eps"],
            transport_block=meta["t_size"] if meta["t_size"] > 0 else None,
            transport_rounds="grid",
            image_mean=tuple(meta["mean"]),
            image_std=tuple(meta["std"]),
        )

    def shown(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The recorded adversarial noise (delta times kappa) in the roles that were drawn."""
        draws = self.meta["adv"]
        if draws is None:
            return self.images, self.images
        size = len(self.images)
        noise = torch.from_numpy(self.data["noise"])
        chosen = torch.tensor([[bool(draws["m1"]), bool(draws["m2"])]]).expand(size, 2)
        attack = Attack(images=self.images, noise=noise, chosen=chosen, share=torch.ones(size, 2))
        return finish_attack(self.images, attack, torch.zeros_like(noise), self.config)

    def mixed(self) -> MixResult:
        """Mixed under the recorded mask."""
        mask, all_of_them = self.data["mask"], torch.ones(len(self.images), dtype=torch.bool)
        axis = Axis(self.images.shape[-1], self.meta["block_num"])
        found = mask, np.zeros(len(mask)), all_of_them
        layout = self.draws.partner, axis, axis
        return mix_under(self.shown(), self.targets, self.saliency, found, layout, self.config)


@mask_files
def test_masks_reach_the_certified_optimum(golden: Path) -> None:
    data, meta = load(golden)
    for b in range(len(data["u1"])):
        u1, u2, down, right = (data[name][b : b + 1].astype(np.float64) for name in ("u1", "u2", "pw_x", "pw_y"))
        problem = MaskProblem(show=u1, hide=u2, down=down, right=right, beta=float(data["beta"][b]))
        config = PuzzleMixConfig(n_labels=meta["n_labels"], eta=float(data["eta"][b]))
        mask, energy = solve(problem, float(data["alpha"][b]), config)
        assert np.isin(mask * (meta["n_labels"] - 1), np.arange(meta["n_labels"])).all()
        assert energy[0] <= data["energy_optimal"][b] + 1e-6
        assert energy[0] >= data["energy_optimal"][b] - 1e-6, "an energy below the certified optimum is a wrong energy"


@plan_files
def test_plans(golden: Path) -> None:
    """The recorded fixed rounds exactly; convergence where they had converged, and elsewhere no worse a value."""
    data, meta = load(golden)
    side, size = meta["block_num"], len(data["mask"])
    saliency, mask = data["saliency"].reshape(size, -1), (data["mask"].reshape(size, -1) > 0).astype(np.float32)
    visible = data["visible"]
    same, converged = (
        masked_transport(saliency, mask, (side, side), cost=meta["t_eps"], rounds=rounds) for rounds in (side, None)
    )
    np.testing.assert_array_equal(same[visible], data["source"][visible])
    columns = np.arange(side * side)
    for b in range(size):
        cost = np.float32(meta["t_eps"]) * slow.squared_distances(side, side) - np.outer(saliency[b], mask[b])
        expected, _ = slow.algorithm_1(cost)
        np.testing.assert_array_equal(converged[b], expected)
        value = cost[converged[b], columns][visible[b]].sum()
        assert data["value_hungarian"][b] - 1e-5 <= value <= data["value"][b] + 1e-5


@puzzle_files
def test_terms_of_the_mask_problem(golden: Path) -> None:
    case = Case(golden)
    problem = mask_problem(case.images, case.saliency, case.draws, case.config)
    assert problem.beta == pytest.approx(case.meta["beta_normalised"], rel=1e-12)
    for found, name in ((problem.show, "u1"), (problem.hide, "u2"), (problem.down, "pw_x"), (problem.right, "pw_y")):
        np.testing.assert_allclose(found, case.data[name], rtol=0, atol=1e-6)


@puzzle_files
def test_energies(golden: Path) -> None:
    case = Case(golden)
    _, energies = solve(mask_problem(case.images, case.saliency, case.draws, case.config), case.draws.lam, case.config)
    np.testing.assert_allclose(energies, case.data["energy_optimal"], rtol=0, atol=1e-6)


@puzzle_files
def test_images_given_the_mask(golden: Path) -> None:
    case = Case(golden)
    result = case.mixed()
    np.testing.assert_allclose(result.images.numpy(), case.data["mixed"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.ratios[:, 0].numpy(), case.data["ratio"], rtol=0, atol=1e-6)
    ratio = torch.from_numpy(case.data["ratio"])[:, None]
    soft = ratio * case.targets + (1 - ratio) * case.targets[case.draws.partner]
    np.testing.assert_allclose(result.targets.numpy(), soft.numpy(), rtol=0, atol=1e-6)
    if not case.meta["transport"]:
        assert result.plans is None
        return
    assert result.plans is not None
    assert result.saliency is not None
    for which in (0, 1):
        visible = case.data[f"plan{which + 1}_visible"]
        source = case.data[f"plan{which + 1}_source"]
        np.testing.assert_array_equal(result.plans[:, which].numpy()[visible], source[visible])


@puzzle_files
def test_the_whole_function(golden: Path) -> None:
    """`puzzle_mix` itself: where its mask is the recorded one, so are image and ratio; its energy is the optimum."""
    case = Case(golden)
    found = puzzle_mix(case.images, case.targets, case.saliency, case.config, draws=case.draws, shown=case.shown())
    assert found.energies is not None
    np.testing.assert_allclose(found.energies.numpy(), case.data["energy_optimal"], rtol=0, atol=1e-6)
    same = torch.isclose(found.masks, case.mixed().masks).all(-1).all(-1).all(-1).numpy()
    np.testing.assert_allclose(found.images.numpy()[same], case.data["mixed"][same], rtol=0, atol=1e-5)


@mask_files
def test_pygco_gives_the_recorded_masks(golden: Path) -> None:
    """`solver="pygco"` is the reference's cut, overflow included; a last-bit difference may fall across a truncation."""
    pytest.importorskip("gco")
    data, meta = load(golden)
    same = []
    for b in range(len(data["u1"])):
        u1, u2, down, right = (data[name][b : b + 1].astype(np.float64) for name in ("u1", "u2", "pw_x", "pw_y"))
        problem = MaskProblem(show=u1, hide=u2, down=down, right=right, beta=float(data["beta"][b]))
        config = PuzzleMixConfig(n_labels=meta["n_labels"], eta=float(data["eta"][b]), solver="pygco")
        mask, energy = solve(problem, float(data["alpha"][b]), config)
        same.append(np.array_equal(mask[0], data["mask"][b]))
        if same[-1]:
            assert energy[0] == pytest.approx(float(data["energy"][b]), abs=1e-6)
    assert np.mean(same) >= 0.8
