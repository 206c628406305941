"""Decode, initialisation, augmentation, networks, distances, match values and trajectories equal the recorded runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_dataopt.condensation.augment import PICKED, Draws, augment, cutmix, operations
from hf_dataopt.condensation.class_gradients import ClassGradients
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.config import IDCConfig, evaluation_epochs_of
from hf_dataopt.condensation.initialise import herding, mosaic
from hf_dataopt.condensation.loop import CondensationLoop, ImageState, RealBatches
from hf_dataopt.condensation.matching import (
    class_distance,
    distance,
    match_features,
    match_gradients,
    matched_parameters,
)
from hf_dataopt.condensation.multi_formation import Formation, form, form_labels
from hf_dataopt.condensation.networks import ConvNet, ResNetAP

from ..conftest import golden_files, golden_params

pytestmark = pytest.mark.golden


def files(pattern: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("golden", golden_params("condensation", pattern), indirect=True)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with np.load(path) as arrays:
        meta = json.loads(str(arrays["meta"]))
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files if name != "meta"}, meta


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest expected value, or of 1."""
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


def formation_for(meta: dict[str, Any], factor: int) -> Formation:
    if meta["case"] == "decode1d":
        return Formation(factor=factor, axis="time", pad_value=0.0)
    return Formation(factor=factor, kind=meta["kind"], bound=meta["bound"])


@files("decode_*.npz")
def test_decode(golden: Path) -> None:
    data, meta = load(golden)
    for factor in meta["factors"]:
        formation = formation_for(meta, factor)
        close(form(data["x"], formation), data[f"ref_x_f{factor}"], 1e-6)
        assert torch.equal(form_labels(data["y"], formation), data[f"ref_y_f{factor}"])
        assert formation.count(len(data["x"])) == len(data[f"ref_y_f{factor}"])


@files("speech_*.npz")
def test_decode_and_initialise_along_time(golden: Path) -> None:
    data, meta = load(golden)
    for factor in meta["factors"]:
        formation = formation_for(meta, factor)
        close(form(data["x"], formation), data[f"ref_x_f{factor}"], 1e-6)
        assert torch.equal(form_labels(data["y"], formation), data[f"ref_y_f{factor}"])
    per_class = meta["init_ipc"]
    factor = data["init_real"].shape[1] // per_class
    formation = Formation(factor=factor, axis="time", pad_value=0.0)
    found = torch.cat([mosaic(real, formation, reference_cells=True) for real in data["init_real"]])
    close(found, data["ref_init"], 0)


@files("init_*.npz")
def test_initialisation(golden: Path) -> None:
    data, meta = load(golden)
    if meta["init"] == "mix":
        formation = Formation(factor=meta["factor"])
        found = torch.cat([mosaic(real, formation, reference_cells=True) for real in data["real"]])
    else:
        found = data["real"][:, : meta["ipc"]].flatten(0, 1)  # the reference takes the first images of a class
    close(found, data["ref_data"], 0)
    assert torch.equal(torch.arange(len(data["real"])).repeat_interleave(meta["ipc"]), data["ref_targets"])


@files("aug_*.npz")
def test_augmentations_with_replayed_draws(golden: Path) -> None:
    data, meta = load(golden)
    for strategy in meta["strategies"]:
        for mode in ("batch", "each"):
            name = f"{strategy}_{mode}"
            recorded = iter(data[f"draw_{name}_{i}"].reshape(-1) for i in range(len(meta["draws"][name])))
            close(augment(data["x"], replay(strategy, recorded)), data[f"ref_{name}"])
            assert next(recorded, None) is None, "a recorded draw was not used"


def replay(strategy: str, recorded: Iterator[Tensor]) -> Draws:
    """Recorded draws in the reference's order: flip, colours, which one of the rest, its numbers, cutout."""
    names, values = operations(strategy), {}
    if "flip" in names:
        values["flip"] = next(recorded)
    if "color" in names:
        values |= {name: next(recorded) for name in ("brightness", "saturation", "contrast")}
    choices = [name for name in names if name in PICKED]
    if choices:
        values["picked"] = choices[int(next(recorded))]
        values["first"] = next(recorded)
        if values["picked"] != "rotate":
            values["second"] = next(recorded)
    if "cutout" in names:
        values |= {"cutout_row": next(recorded), "cutout_column": next(recorded)}
    return Draws(**values)


@files("cutmix*.npz")
def test_cutmix(golden: Path) -> None:
    data, _ = load(golden)
    for i in range(sum(name.startswith("ref_ratio") for name in data)):
        box = tuple(data[f"ref_bbox{i}"].tolist())
        mixed, ratio = cutmix(data["x"], data[f"idx{i}"], box)
        close(mixed, data[f"ref_x{i}"], 0)
        assert ratio == pytest.approx(float(data[f"ref_ratio{i}"]), abs=1e-12)


@files("dist*.npz")
def test_distances(golden: Path) -> None:
    data, _ = load(golden)
    for i in range(sum(name.startswith("x") for name in data)):
        for metric in ("mse", "l1", "l1_mean", "cos"):
            expected = float(data[f"ref_{metric}_{i}"])
            assert float(distance(data[f"x{i}"], data[f"y{i}"], metric)) == pytest.approx(expected, rel=1e-5)


def network_for(data: dict[str, Tensor], meta: dict[str, Any]) -> torch.nn.Module:
    weights = {name[2:]: value for name, value in data.items() if name.startswith("w.")}
    network: torch.nn.Module
    if "classifier.weight" in weights:
        first, head = weights["layers.conv.0.weight"], weights["classifier.weight"]
        depth = sum(name.startswith("layers.conv") and name.endswith("weight") for name in weights)
        side = meta["h"]
        network = ConvNet(first.shape[1], len(head), size=(side, side), width=len(first), depth=depth)
    else:
        network = ResNetAP(meta["c"], meta["nclass"], size=meta["h"], width=meta["width"])
    network.load_state_dict(weights)
    return network


@files("net_*.npz")
def test_network_forward(golden: Path) -> None:
    data, meta = load(golden)
    close(network_for(data, meta)(data["x"]).detach(), data["ref_logit"])


@files("match_*.npz")
def test_match_values_and_gradients(golden: Path) -> None:
    data, meta = load(golden)
    network = network_for(data, meta)
    close(network(data["x_real"]).detach(), data["ref_logit_real"])
    double = network_for(data, meta).double()
    for key in (key for key in data if key.startswith("ref_loss_")):
        name = key.removeprefix("ref_loss_").removesuffix("_f64")
        wide = key.endswith("_f64")
        dtype = torch.float64 if wide else torch.float32
        real, syn = data["x_real"].to(dtype), data["x_syn"].to(dtype).requires_grad_()
        used = double if wide else network
        if name.startswith("feat"):
            loss = match_features(used, real, syn, int(name.removeprefix("feat")))
        else:
            metric, bias, head = name.rsplit("_", 2)
            options = {"bias": bias == "b1", "head": head == "fc1"}
            loss = match_gradients(used, (real, data["y_real"]), (syn, data["y_syn"]), metric, **options)
        assert float(loss.detach()) == pytest.approx(float(data[key]), rel=1e-9 if wide else 1e-5)
        expected = data.get(key.replace("loss", "grad", 1))
        if expected is not None:
            (found,) = torch.autograd.grad(loss, syn)
            close(found, expected, 1e-10 if wide else 1e-5)


@files("match_*.npz")
def test_classes_together_equal_the_recorded_class(golden: Path) -> None:
    """The batched gradients, with another class beside the recorded one, give the recorded loss and gradient."""
    data, meta = load(golden)
    network = network_for(data, meta)
    compute = ClassGradients(network, matched_parameters(network))
    wanted = compute(data["x_real"], data["y_real"], 1)
    syn = data["x_syn"].clone().requires_grad_()
    other = torch.zeros_like(data["y_syn"])
    got = compute(torch.cat([syn.flip(0), syn]), torch.cat([other, data["y_syn"]]), 2, differentiable=True)
    assert compute.together
    loss = sum(class_distance(a, b[1:], "mse").sum() for a, b in zip(wanted, got, strict=True))
    assert float(loss.detach()) == pytest.approx(float(data["ref_loss_mse_b0_fc0"]), rel=1e-5)
    close(torch.autograd.grad(loss, syn)[0], data["ref_grad_mse_b0_fc0"])


@files("trajectory_*.npz")
def test_trajectory(golden: Path) -> None:
    data, meta = load(golden)
    steps, classes, side = meta["steps"], meta["nclass"], meta["h"]
    real = data["real"]  # steps, classes, batch, C, H, W
    batch = real.shape[2]
    config = IDCConfig(
        images_per_class=meta["ipc"],
        factor=meta["factor"],
        metric=meta["metric"],
        learning_rate=meta["lr_img"],
        scale_learning_rate=False,
        momentum=meta["mom"],
        augmentation="none",
        train_network_on="nothing",
    )
    channels = real.shape[3]
    images = LabelledImages(
        images=real.flatten(0, 2),
        labels=torch.arange(classes).repeat_interleave(batch).repeat(steps),
        class_names=[str(i) for i in range(classes)],
        mean=torch.zeros(channels),
        std=torch.ones(channels),
    )
    assert images.size == (side, side)
    loop = CondensationLoop(images, config, range(classes), torch.device("cpu"))
    state = ImageState.start(data["init"].unflatten(0, (classes, -1)).clone())
    network = network_for(data, meta)

    # the recorded rows of class c in step t lie at (t * classes + c) * batch, and are drawn in that order
    rows = torch.arange(steps * classes * batch).reshape(steps, classes, batch)
    recorded = [RealBatches(rows[0, label], batch, torch.Generator()) for label in range(classes)]
    for label, real_batches in enumerate(recorded):
        real_batches.order = rows[:, label].flatten()
    streams = [torch.Generator() for _ in range(classes)]
    mean_losses = data["ref_loss"].reshape(steps, classes).mean(1)
    for step in range(steps):
        found = float(loop.update_images(state, network, recorded, streams))
        assert found == pytest.approx(float(mean_losses[step]), rel=1e-5)
    state.settle(config.momentum, loop.rate)
    close(state.images.flatten(0, 1), data["ref_data_last"])


@files("herding*.npz")
def test_herding_and_first_rows(golden: Path) -> None:
    data, meta = load(golden)
    rows = [(data["label"] == label).nonzero()[:, 0] for label in range(meta["C"])]
    for label, of_class in enumerate(rows):
        assert torch.equal(of_class[herding(data["feat"][of_class], meta["ipc"])], data["ref_herding"][label])
    assert torch.equal(torch.cat([of_class[: meta["ipc"]] for of_class in rows]), data["ref_random"])


@pytest.mark.skipif(not golden_files("condensation", "tables.json"), reason="no golden folder")
def test_presets_and_epochs_equal_the_reference_tables() -> None:
    tables = json.loads(golden_files("condensation", "tables.json")[0].read_text())
    for name, epochs in tables["ipc_epoch"].items():
        per_class, factor, classes = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
        assert evaluation_epochs_of(per_class * factor**2, classes) == epochs, name
    presets = {
        "cifar10": IDCConfig.cifar10,
        "cifar100": IDCConfig.cifar100,
        "svhn": IDCConfig.svhn,
        "mnist": IDCConfig.mnist,
        "fashion": IDCConfig.fashion_mnist,
        "speech": IDCConfig.speech,
        "imagenet10": IDCConfig.imagenet_subset,
        "imagenet100": lambda **changes: IDCConfig.imagenet_subset(classes=100, **changes),
    }
    for name, args in tables["args"].items():
        data, per_class, factor = name.split("_")
        if data not in presets:
            continue
        config = presets[data](images_per_class=int(per_class[3:]), factor=int(factor[1:]))
        found = {
            "metric": config.metric,
            "lr_img": config.image_learning_rate(args["size"]),
            "niter": config.outer_iterations,
            "inner_loop": config.inner_iterations,
            "mom_img": config.momentum,
            "n_data": config.network_images,
            "aug_type": config.augmentation,
            "depth": 10 if config.network == "resnet_ap" else config.depth,
            "net_type": config.network,
            "batch_real": config.real_batch,
            "batch_size": config.network_batch,
            "weight_decay": config.network_weight_decay,
            "decode_type": config.formation,
            "batch_syn_max": config.formed_batch,
        }
        found["lr_img"] = pytest.approx(found["lr_img"], rel=1e-6)
        assert {key: args[key] for key in found} == found, name
        assert config.cutmix > 0 if args["mixup_net"] == "cut" else config.cutmix == 0
        if data.startswith("imagenet"):
            assert config.epochs_of_evaluation(args["nclass"]) == args["epochs"], name
            assert config.early_epochs == args["early"] or config.pretrained_networks == 10
        else:
            assert config.epochs_of_evaluation(args["nclass"]) == args["epochs"], name
