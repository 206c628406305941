"""The loop equals the plain transcription of Algorithm 5; gradients equal finite differences; runs resume bit for bit.

Invariants: images after an outer iteration = transcription's; classes together = one at a time; any split over processes
= one process; killed and resumed = uninterrupted.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_dataopt.condensation import loop as loop_module
from hf_dataopt.condensation.augment import augment, draw
from hf_dataopt.condensation.class_gradients import ClassGradients
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.loop import CondensationLoop, ImageState
from hf_dataopt.condensation.matching import match_gradients, matched_parameters
from hf_dataopt.condensation.multi_formation import Formation, form
from hf_dataopt.condensation.networks import ConvNet, ResNetAP

from ..conftest import REPO
from ..reference import condensation as reference

SMALL = IDCConfig(
    images_per_class=2,
    width=4,
    depth=2,
    outer_iterations=3,
    inner_iterations=2,
    real_batch=8,
    network_images=16,
    network_batch=8,
    learning_rate=0.05,
    scale_learning_rate=False,
    evaluation_epochs=3,
    storage="float32",
)


def network(seed: int = 0, classes: int = 3, size: int = 12, kind: type[ConvNet] = ConvNet) -> ConvNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(1, classes, size=(size, size), width=4, depth=2)


@pytest.mark.parametrize("metric", ["mse", "l1", "l1_mean", "cos"])
@pytest.mark.parametrize("factor, formed_batch", [(1, 128), (2, 128), (3, 7)])
def test_outer_iterations_equal_the_transcription(
    data: LabelledImages, metric: str, factor: int, formed_batch: int
) -> None:
    config = replace(SMALL, metric=metric, factor=factor, formed_batch=formed_batch, learning_rate=0.02)
    start = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    leaf = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([leaf], lr=config.learning_rate, momentum=config.momentum)
    state = ImageState.start(start.unflatten(0, (3, 2)).clone())
    loop = CondensationLoop(data, config, range(3), torch.device("cpu"))
    for outer in range(2):  # momentum lives on across outer iterations
        plain, ours = network(outer, kind=reference.PlainConvNet), network(outer)
        expected = reference.outer_iteration(leaf, optimiser, plain, data, config, outer)
        found = loop.outer_iteration(state, ours, loop.optimiser(ours), outer)
        assert found == pytest.approx(expected, rel=1e-4)
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.images.flatten(0, 1), leaf.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_classes_together_equal_one_at_a_time(
    data: LabelledImages, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(together: int) -> Tensor:
        monkeypatch.setitem(loop_module.TOGETHER, "cpu", together)
        state = ImageState.start(torch.full((3, 2, 1, 12, 12), 0.5) + torch.linspace(0, 0.3, 12))
        loop = CondensationLoop(data, SMALL, range(3), torch.device("cpu"))
        theta = network()
        loop.outer_iteration(state, theta, loop.optimiser(theta), 0)
        return state.images

    torch.testing.assert_close(run(8 * chunk), run(1), rtol=0, atol=1e-6)


def test_losses_are_read_once_an_outer_iteration(data: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    plain = Tensor.tolist

    def noted(self: Tensor) -> object:
        read.append(self)
        return plain(self)

    loop = CondensationLoop(data, replace(SMALL, images_per_class=24), range(3), torch.device("cpu"))  # a class a group
    state, theta = ImageState.start(torch.rand(3, 24, 1, 12, 12)), network()
    monkeypatch.setattr(Tensor, "tolist", noted)
    found = loop.outer_iteration(state, theta, loop.optimiser(theta), 0)
    losses = [one for one in read if one.is_floating_point()]
    assert loop.chunk == 1 and [one.shape for one in losses] == [(2,)]
    assert found == losses[0].tolist()


@pytest.mark.parametrize("size", [(12, 12), (13, 9), (7, 10)])
def test_pooling_equals_pytorchs(size: tuple[int, int]) -> None:
    images = torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = ConvNet(1, 3, size=size, width=4, depth=2)
        plain = reference.PlainConvNet(1, 3, size=size, width=4, depth=2)
    plain.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images), plain(images))


@pytest.mark.parametrize("kind", ["convnet", "resnet", "linear", "batchnorm"])
def test_class_gradients_equal_autograd(kind: str) -> None:
    torch.manual_seed(0)
    nets: dict[str, nn.Module] = {
        "convnet": ConvNet(1, 3, size=(8, 8), width=4, depth=2),
        "resnet": ResNetAP(1, 3, size=8, width=0.0625),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)),
        "batchnorm": nn.Sequential(nn.Conv2d(1, 3, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 3)),
    }
    net = nets[kind]
    names = matched_parameters(net)
    compute = ClassGradients(net, names)
    assert compute.together == (kind in ("convnet", "resnet"))
    images, labels = torch.randn(6, 1, 8, 8, requires_grad=True), torch.arange(3).repeat_interleave(2)
    found = compute(images, labels, 3, differentiable=True)
    weights = [torch.randn_like(value) for value in found]
    (slope,) = torch.autograd.grad(sum((f * w).sum() for f, w in zip(found, weights, strict=True)), images)
    expected_slope = torch.zeros_like(images)
    parameters = dict(net.named_parameters())
    for label in range(3):
        part = images.detach()[2 * label : 2 * label + 2].requires_grad_()
        loss = nn.functional.cross_entropy(net(part), labels[2 * label : 2 * label + 2])
        got = torch.autograd.grad(loss, [parameters[name] for name in names], create_graph=True)
        for a, b in zip(found, got, strict=True):
            torch.testing.assert_close(a[label], b, rtol=1e-4, atol=1e-6)
        total = sum((g * w[label]).sum() for g, w in zip(got, weights, strict=True))
        expected_slope[2 * label : 2 * label + 2] = torch.autograd.grad(total, part)[0]
    torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["mse", "cos"])
def test_gradient_through_decode_and_augmentation_equals_finite_differences(metric: str) -> None:
    own = torch.Generator().manual_seed(3)
    net = network(1, size=8).double()
    real = torch.rand(4, 1, 8, 8, generator=own, dtype=torch.float64)
    labels = torch.ones(4, dtype=torch.int64)
    draws = draw("color_crop_cutout", (8, 8), own)

    def loss(stored: Tensor) -> Tensor:
        formed = augment(form(stored, Formation(factor=2)), draws)
        return match_gradients(net, (augment(real, draws), labels), (formed, labels), metric)

    stored = torch.rand(1, 1, 8, 8, generator=own, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(stored), stored)
    step = 1e-6
    for row, column in [(0, 0), (3, 4), (5, 2), (7, 7)]:
        bump = torch.zeros_like(stored)
        bump[0, 0, row, column] = step
        rise = float((loss(stored + bump) - loss(stored - bump)).detach()) / (2 * step)
        assert float(slope[0, 0, row, column]) == pytest.approx(rise, rel=1e-4, abs=1e-7)


def test_factor_one_is_idc_i(train: Dataset) -> None:
    """With factor 1 decoding is the identity, whatever the formation's kind."""
    runs = [
        DatasetCondenser(replace(SMALL, factor=1, formation=kind)).condense(train)
        for kind in ("single", "bound", "multi")
    ]
    images = [torch.tensor(run.with_format("numpy")["image"][:]) for run in runs]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


@pytest.mark.parametrize("changes", [{}, {"reinitialise_every": 2}, {"early_epochs": 1, "pretrained_networks": 2}])
def test_a_run_continues_bit_for_bit(train: Dataset, tmp_path: Path, changes: dict[str, int]) -> None:
    config = replace(SMALL, **changes)
    whole = DatasetCondenser(config)
    expected = whole.condense(train)
    DatasetCondenser(replace(config, outer_iterations=1)).condense(train, output_dir=tmp_path)
    rest = DatasetCondenser(config)
    seen: list[int] = []
    found = rest.condense(train, output_dir=tmp_path, callback=lambda outer, loss: seen.append(outer))
    assert seen == [1, 2]
    assert found["image"] == expected["image"] and rest.losses == whole.losses
    assert (tmp_path / "preview.png").stat().st_size > 0


def test_other_settings_start_afresh(train: Dataset, tmp_path: Path) -> None:
    DatasetCondenser(SMALL).condense(train, output_dir=tmp_path)
    seen: list[int] = []
    other = DatasetCondenser(replace(SMALL, learning_rate=0.01))
    other.condense(train, output_dir=tmp_path, callback=lambda outer, loss: seen.append(outer))
    assert seen == [0, 1, 2]


_RUN = """
import sys, time, torch
torch.set_num_threads(1)
from tests.condensation.conftest import as_dataset, synthetic_images
from tests.condensation.test_loop import SMALL
from dataclasses import replace
from hf_dataopt.condensation.condenser import DatasetCondenser
slow = lambda outer, loss: (print(outer, flush=True), time.sleep(float(sys.argv[2])))
condensed = DatasetCondenser(replace(SMALL, outer_iterations=4)).condense(
    as_dataset(*synthetic_images(90)), output_dir=sys.argv[1], callback=slow)
condensed.save_to_disk(sys.argv[1] + "/out")
"""


def test_two_processes_equal_one(train: Dataset, tmp_path: Path) -> None:
    code = _RUN.replace(
        'condensed.save_to_disk(sys.argv[1] + "/out")',
        (
            "from hf_dataopt import distributed\n"
            'condensed.save_to_disk(sys.argv[1] + f"/out{distributed.rank()}")\n'
            "import torch.distributed; torch.distributed.destroy_process_group()"
        ),
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `accelerate launch --num_processes 2` sets
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    shared |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "two"), "0"],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        for rank in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    one = DatasetCondenser(replace(SMALL, outer_iterations=4)).condense(train)
    for rank in range(2):
        found = Dataset.load_from_disk(str(tmp_path / "two" / f"out{rank}"))
        assert found["label"][:] == one["label"][:]
        a, b = (torch.tensor(ds.with_format("numpy")["image"][:]) for ds in (found, one))
        assert torch.equal(a, b)


def test_bfloat16_stays_close_and_no_global_random_number_is_drawn(train: Dataset) -> None:
    before = torch.random.get_rng_state()
    full, half = (
        torch.tensor(DatasetCondenser(replace(SMALL, dtype=dtype)).condense(train).with_format("numpy")["image"][:])
        for dtype in ("float32", "bfloat16")
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert float((full - half).abs().mean()) < 0.05


def test_speech_shapes_cut_along_time() -> None:
    own = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    values = torch.randn(40, 1, 8, 12, generator=own) - 3
    values[labels == 1, :, :4] += 4
    spectrograms = Dataset.from_dict(
        {"audio": values.numpy(), "word": ["yes" if one else "no" for one in labels.tolist()]}
    )
    config = IDCConfig.speech(
        images_per_class=2, depth=2, width=4, outer_iterations=2, inner_iterations=2, network_images=16,
        real_batch=8, evaluation_epochs=20,
    )  # fmt: skip
    condenser = DatasetCondenser(config)
    condensed = condenser.condense(spectrograms, image_column="audio", label_column="word")
    assert condensed.features["word"].names == ["no", "yes"]
    scores = condenser.evaluate(condensed, spectrograms, seeds=1)
    assert scores["condensed"][0].images == 8 and scores["condensed"][0].mean > 80
    assert float(torch.tensor(condensed["audio"][:]).min()) >= float(values.min()) - 1e-6
