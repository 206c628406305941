"""Inside a round nothing waits for the device: the same calls on torch's meta device, which has no values to read.

Invariants: a round and its network's updates need no value of a device tensor (`.item()`, `float()`, `if tensor`, `.cpu()`,
boolean masks all raise on the meta device); what goes there goes through `sent`; groups of classes = one class at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dataopt.condensation import augment as augment_module
from hf_dataopt.condensation import columns, devices, networks, training
from hf_dataopt.condensation import formation as formation_module
from hf_dataopt.condensation import loop as loop_module
from hf_dataopt.condensation.augment import augment, augment_groups, draw
from hf_dataopt.condensation.baselines import method_config
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.formation import Formation, form, form_groups
from hf_dataopt.condensation.loop import CondensationLoop, ImageState, RealBatches
from hf_dataopt.condensation.networks import factory_of
from hf_dataopt.condensation.training import Updates, train_on

from .test_loop import SMALL

META = torch.device("meta")
RUNS = {
    "idc": SMALL,
    "cos": replace(SMALL, metric="cos", match_bias=True, match_head=True),
    "few": replace(SMALL, formed_batch=5, cutmix=1.0),
    "bound": replace(SMALL, formation="bound", factor=3, learning_rate_space="normalised"),
    "dsa": method_config("dsa", SMALL),
    "dm": method_config("dm", SMALL),
    "resnet": replace(SMALL, network="resnet_ap", width=0.0625),
    "written out": SMALL,
}


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments without values are refused; the checks of a round read none of them anyway."""

    def unread(name: str, value: Tensor, shape: object = None, *, finite: bool = False, least: object = None) -> Tensor:
        assert not finite and least is None
        return value

    for module in (augment_module, formation_module):
        monkeypatch.setattr(module, "check_tensor", unread)


class _Crossings(TorchDispatchMode):
    """Counts copies from the CPU to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        onto = any(one.device == META for one in tree_leaves((found, given)) if isinstance(one, Tensor))
        # a number that Python wraps is no copy: 0-dimensional CPU tensors go along with a call; an index from the CPU is one
        self.count += onto and any(one.device.type == "cpu" and one.ndim > 0 for one in given)
        return found


@contextmanager
def noted_crossings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[int, int]]]:
    """Copies to the device in the block, and those of them that went through `sent`."""
    allowed = 0

    def noted(value: Tensor, device: torch.device) -> Tensor:
        nonlocal allowed
        allowed += value.device.type == "cpu" and device == META
        return devices.sent(value, device)

    for module in (augment_module, columns, loop_module, training):
        monkeypatch.setattr(module, "sent", noted)
    with _Crossings() as crossings:
        yield lambda: (crossings.count, allowed)


def on_meta(data: LabelledImages, config: IDCConfig, outer: int = 0) -> Callable[[], Tensor]:
    """One round of a run with everything on the meta device."""
    network = factory_of(config)(1, 3, data.size).to(META)
    loop = CondensationLoop(data, config, range(3), META)
    own = torch.Generator().manual_seed(0)
    state = ImageState.start(torch.rand(3, config.images_per_class, 1, *data.size, device=META))
    real = [RealBatches(rows, config.real_batch, own) for rows in loop.data.rows_of_class]
    optimiser = loop.optimiser(network)

    def round_() -> Tensor:
        loss = loop.update_images(state, network, real, [own] * 3)
        loop.update_network(state, network, optimiser, own)
        state.settle(config.momentum, loop.rate)
        return loss

    return round_


@pytest.mark.parametrize("name", RUNS)
def test_a_round_reads_nothing_from_the_device(
    data: LabelledImages, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "WRITTEN_OUT", {"meta"} if name == "written out" else set())
    run = on_meta(data, RUNS[name])
    with noted_crossings(monkeypatch) as counted:
        losses = [run(), run()]
    assert all(loss.device == META and loss.shape == () for loss in losses)
    found, allowed = counted()
    assert found == allowed > 0


@pytest.mark.parametrize(
    "spoilt", [float, bool, Tensor.cpu, lambda loss: loss[loss > 0]], ids=["float", "bool", "cpu", "mask"]
)
def test_reading_would_be_noticed(data: LabelledImages, spoilt: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        spoilt(on_meta(data, SMALL)())


def test_a_round_takes_few_transfers(data: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number does not grow with the classes, nor with the network's batches."""
    counts = []
    for images, batch in ((16, 8), (64, 4)):
        run = on_meta(data, replace(SMALL, network_images=images, network_batch=batch, cutmix=1.0))
        with noted_crossings(monkeypatch) as counted:
            run()
        counts.append(counted()[1])
    assert counts[0] == counts[1] <= 12


def test_early_epochs_read_nothing(data: LabelledImages) -> None:
    network = factory_of(SMALL)(1, 3, data.size).to(META)
    loop = CondensationLoop(data, SMALL, range(3), META)
    loop.train_epochs(network, loop.optimiser(network), torch.Generator().manual_seed(0), 2)


@pytest.mark.parametrize("strategy", ["color_crop_cutout", "color_crop_cutout_flip_scale_rotate", "none"])
def test_groups_are_augmented_as_each_alone(strategy: str) -> None:
    own = torch.Generator().manual_seed(1)
    counts = [3, 1, 4, 2, 3]
    images = torch.rand(sum(counts), 3, 12, 10, generator=own)
    shared = [draw(strategy, (12, 10), own) for _ in counts]
    each = [draw(strategy, (12, 10), own, count) for count in counts]
    assert strategy != "color_crop_cutout_flip_scale_rotate" or len({one.picked for one in shared}) > 1
    for draws in (shared, each):
        alone = [augment(part, one) for part, one in zip(images.split(counts), draws, strict=True)]
        torch.testing.assert_close(augment_groups(images, draws, counts), torch.cat(alone), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["single", "multi", "bound"])
def test_groups_are_formed_as_each_alone(kind: Any) -> None:
    images = torch.rand(4, 5, 1, 9, 12, generator=torch.Generator().manual_seed(0))
    formation = Formation(factor=3, kind=kind, bound=20)
    expected = torch.stack([form(group, formation) for group in images])
    assert torch.equal(form_groups(images, formation), expected)


def test_updates_drawn_ahead_equal_one_batch_at_a_time() -> None:
    config = replace(SMALL, width=4)
    images, labels = torch.rand(30, 1, 12, 12), torch.arange(30) % 3
    updates = Updates(batch=8, augmentation="color_crop_flip_scale_rotate", mix=0.5)
    ends = []
    for step in (30, 8):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = factory_of(config)(1, 3, (12, 12))
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        own = torch.Generator().manual_seed(3)
        for start in range(0, 30, step):
            part = slice(start, start + step)
            train_on(network, optimiser, (images[part], labels[part]), own, updates)
        ends.append(torch.cat([value.detach().flatten() for value in network.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_how_much_is_prepared_at_once() -> None:
    updates = Updates(batch=64)
    assert updates.ahead(3 * 32 * 32) == 21 * 64 and updates.ahead(10**9) == 64
