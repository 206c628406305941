"""What a condensation run will cost, before it starts."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..seeding import generator as seeded
from .initialise import initial_of_class, stored_counts
from .loop import CondensationLoop, ImageState, RealBatches, formation_of
from .teacher import Teacher, soft_labels_of

if TYPE_CHECKING:
    from .columns import LabelledImages
    from .config import IDCConfig

logger = logging.getLogger(__name__)

_DAY = 86_400  # seconds
_TIMED_BATCHES = 8
# calls of an action after the first, and the seconds after which there are no more
_CALLS, _ENOUGH = 3, 0.05


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Time and memory of a run on this machine, with the training images in memory.

    Args:
        start_seconds: the images that the run starts from, and soft labels if there are any.
        class_step_seconds: one update of one class's images.
        network_seconds: the network's updates after one round over the classes.
        outer_seconds: one outer iteration, its network's making included.
        early_seconds: networks trained on real data before they are used, over the whole run, and a teacher of our own.
        total_seconds: the whole run.
        data_bytes: training images in memory.
        network_bytes: activations of one class step and the parameters, roughly.
    """

    start_seconds: float
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

    def tell(self) -> None:
        """Log it, and warn of a run of days."""
        logger.info("%s", self)
        if self.total_seconds > _DAY:
            logger.warning(
                "this run takes about %.1f days here; method='idc-short' or 'mosaic' takes seconds to minutes, a smaller width "
                "or fewer outer_iterations less time",
                self.total_seconds / _DAY,
            )


def estimate(
    data: LabelledImages,
    config: IDCConfig,
    make: Callable[[], nn.Module],
    teacher: Teacher | None,
    classes: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """Time the steps of a run on throw-away state; memory from the outputs of every layer.

    Args:
        data, config, device: of the run.
        make: a new network.
        teacher: that was given; None: one of our own, where the run needs one.
        classes: that the run updates in this process.
        clock: counts seconds.

    Cost: a first call of every kind of step and a twentieth of a second of further ones.
    """
    together = CondensationLoop(data, config, [], device).chunk
    loop = CondensationLoop(data, config, range(min(together, classes)), device)
    stream, network = seeded(config.seed), make()
    shape = (len(loop.classes), config.images_per_class, *data.images.shape[1:])
    state = ImageState.start(torch.rand(shape, generator=stream).to(device))
    real = [RealBatches(data.rows_of_class[label], config.real_batch, stream) for label in loop.classes]
    optimiser = loop.optimiser(network)

    def seconds(action: Callable[[], object]) -> float:
        found: list[float] = []
        while len(found) <= _CALLS and (len(found) < 2 or sum(found[1:]) < _ENOUGH):
            _wait(device)
            begun = clock()
            action()
            _wait(device)
            found.append(clock() - begun)
        return statistics.median(found[1:])  # the first call prepares kernels, or compiles them

    one, share = _start(data, config, teacher, network)
    start = seconds(one) * share
    judged = (config.initialisation == "patches" or config.soft_labels) and teacher is None
    taught = -(-config.teacher_images // config.network_batch) if judged else 0
    early = _early_seconds(loop, network, stream, taught, clock)
    step = update = outer = 0.0
    if config.outer_iterations and real:
        step = seconds(lambda: loop.update_images(state, network, real, [stream] * len(real))) / len(real)
        update = seconds(lambda: loop.update_network(state, network, optimiser, stream))
        outer = config.inner_iterations * (classes * step + update) + seconds(make) / config.reinitialise_every
    return Estimate(
        start_seconds=start,
        class_step_seconds=step,
        network_seconds=update,
        outer_seconds=outer,
        early_seconds=early,
        total_seconds=start + outer * config.outer_iterations + early,
        data_bytes=data.images.nbytes,
        network_bytes=_activations(loop, network, real) if real and (early or outer) else 0,
    )


def _start(
    data: LabelledImages, config: IDCConfig, teacher: Teacher | None, network: nn.Module
) -> tuple[Callable[[], object], float]:
    """What makes the first images (and soft labels) of the largest class, and how often that is the whole."""
    sizes = [len(rows) for rows in data.rows_of_class]
    label = max(range(len(sizes)), key=sizes.__getitem__)
    formation, count = formation_of(config), stored_counts(data, config)[label]
    patches = config.initialisation == "patches"
    judge = teacher or Teacher(network=network, name="untrained: as slow as a trained one")

    def one() -> None:
        judged = judge if patches else teacher
        found = initial_of_class(data, label, count, config, formation, seeded(config.seed), judged)
        if config.soft_labels:
            soft_labels_of(found, formation.ways(count), judge, data)

    # of every class as many patches are judged; herding and features take their time by images
    return one, len(sizes) if patches else sum(sizes) / sizes[label]


def _early_seconds(
    loop: CondensationLoop,
    network: nn.Module,
    stream: torch.Generator,
    teacher_steps: int,
    clock: Callable[[], float],
) -> float:
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
    _wait(loop.device)
    begun = clock()
    loop.train_steps(network, optimiser, stream, timed)
    _wait(loop.device)
    return steps * (clock() - begun) / timed


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
        network(loop.data.batch(rows)[0])
    for handle in handles:
        handle.remove()
    formed = min(loop.formation.count(loop.config.images_per_class), loop.config.formed_batch) * loop.chunk
    share = 1 + 3 * formed / max(len(rows), 1)
    return int(total * share) + 4 * sum(parameter.nbytes for parameter in network.parameters())
