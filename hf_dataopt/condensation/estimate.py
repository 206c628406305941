"""What a condensation run will cost, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..seeding import generator as seeded
from .loop import ImageState, RealBatches

if TYPE_CHECKING:
    from .loop import CondensationLoop

_TIMED_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Time and memory of a run on this machine.

    Args:
        class_step_seconds: one update of one class's images.
        network_seconds: the network's updates after one round over the classes.
        outer_seconds: one outer iteration.
        early_seconds: networks trained on real data before they are used, over the whole run.
        total_seconds: the whole run.
        data_bytes: training images in memory.
        network_bytes: activations of one class step and the parameters, roughly.
    """

    class_step_seconds: float
    network_seconds: float
    outer_seconds: float
    early_seconds: float
    total_seconds: float
    data_bytes: int
    network_bytes: int

    def __str__(self) -> str:
        return (
            f"estimate: {self.total_seconds / 60:.1f} min ({self.outer_seconds:.1f} s per outer iteration, "
            f"{self.early_seconds / 60:.1f} min of networks' own epochs), "
            f"{(self.data_bytes + self.network_bytes) / 2**20:.0f} MiB"
        )


def estimate(loop: CondensationLoop, network: nn.Module, classes: int, teacher_steps: int = 0) -> Estimate:
    """Time one class step and one network update on throw-away state; memory from the outputs of every layer.

    Args:
        loop: of one class.
        network: changed; throw it away.
        classes: that the run updates in this process.
        teacher_steps: batches that a teacher is trained on first.
    """
    config, data = loop.config, loop.data
    stream = seeded(config.seed)
    state = ImageState.start(torch.rand(1, config.images_per_class, *data.images.shape[1:], generator=stream))
    batches = [RealBatches(data.rows_of_class[0], config.real_batch, stream)]
    held = _activations(loop, network, batches)
    seconds = []
    optimiser = loop.optimiser(network)
    if not config.outer_iterations:
        early = _early_seconds(loop, network, stream, teacher_steps)
        return Estimate(
            class_step_seconds=0.0,
            network_seconds=0.0,
            outer_seconds=0.0,
            early_seconds=early,
            total_seconds=early,
            data_bytes=data.images.nbytes,
            network_bytes=held if early else 0,
        )
    for action in (
        lambda: loop._round(state, network, batches, [stream]),
        lambda: loop._update_network(state, network, optimiser, stream),
    ):
        action()  # first calls prepare kernels
        start = time.perf_counter()
        action()
        _wait(loop.device)
        seconds.append(time.perf_counter() - start)
    outer = config.inner_iterations * (classes * seconds[0] + seconds[1])
    early = _early_seconds(loop, network, stream, teacher_steps)
    return Estimate(
        class_step_seconds=seconds[0],
        network_seconds=seconds[1],
        outer_seconds=outer,
        early_seconds=early,
        total_seconds=outer * config.outer_iterations + early,
        data_bytes=data.images.nbytes,
        network_bytes=held,
    )


def _early_seconds(loop: CondensationLoop, network: nn.Module, stream: torch.Generator, teacher_steps: int) -> float:
    """The epochs on real data of every network of the run, and of a teacher, from a few of their batches."""
    config = loop.config
    epoch = -(-len(loop.data.labels) // config.network_batch)
    lives = config.pretrained_networks or -(-config.outer_iterations // config.reinitialise_every)
    steps = teacher_steps + (lives * config.early_epochs * epoch if config.outer_iterations else 0)
    if not steps:
        return 0.0
    timed = min(_TIMED_BATCHES, steps)
    optimiser = loop.optimiser(network)
    loop.train_steps(network, optimiser, stream, 1)
    start = time.perf_counter()
    loop.train_steps(network, optimiser, stream, timed)
    _wait(loop.device)
    return steps * (time.perf_counter() - start) / timed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _activations(loop: CondensationLoop, network: nn.Module, batches: list[RealBatches]) -> int:
    """Bytes of all leaf modules' outputs for the real batch, and three times those of the formed one."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.nbytes

    leaves = [module for module in network.modules() if not list(module.children())]
    handles = [module.register_forward_hook(count) for module in leaves]
    rows = batches[0].next()
    with torch.no_grad():
        network(loop.data.batch(rows)[0].to(loop.device))
    for handle in handles:
        handle.remove()
    formed = min(loop.formation.count(loop.config.images_per_class), loop.config.formed_batch) * loop.chunk
    share = 1 + 3 * formed / max(len(rows), 1)
    return int(total * share) + 4 * sum(parameter.nbytes for parameter in network.parameters())
