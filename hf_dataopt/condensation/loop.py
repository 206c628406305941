"""The inner loops of Algorithm 5: image updates class by class with a shared, lazily applied momentum, then the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..distributed import Room, Undo
from ..seeding import generator as seeded
from .augment import augment, draw
from .class_gradients import ClassGradients
from .columns import LabelledImages
from .config import IDCConfig
from .formation import Formation, form
from .initialise import stored_counts
from .matching import class_distance, match_features, matched_parameters
from .training import batches, compiled, network_augmentation, sgd, train_step

# synthetic images of several classes go through the network together up to this many: below it, calls cost more than
# arithmetic, above it, caches overflow (measured on a CPU: benchmarks/condensation_speed.py)
TOGETHER = {"cpu": 24, "cuda": 512}
_LEAST = 1e-12  # of a slope: where nothing is left to match, nothing moves
_PROBED, _PROBE = 5, 2**23  # classes that a first step is measured on, and where their random numbers begin


@dataclass
class ImageState:
    """Condensed images of some classes and their SGD momentum.

    Args:
        images: (classes, images_per_class, C, H, W) stored values.
        velocity: momentum buffer of the same shape.
        pending: (classes,) updates of other classes that this class's momentum has not been applied for yet.
    """

    images: Tensor
    velocity: Tensor
    pending: list[int]

    @classmethod
    def start(cls, images: Tensor) -> ImageState:
        """No momentum yet."""
        return cls(images, torch.zeros_like(images), [0] * len(images))

    def settle(self, index: int, momentum: float, rate: float) -> None:
        """Apply the drift of the updates in which this class had no gradient: a geometric series of its momentum."""
        count = self.pending[index]
        if count:
            drift = sum(momentum**k for k in range(1, count + 1))
            self.images[index] -= rate * drift * self.velocity[index]
            self.velocity[index] *= momentum**count
            self.pending[index] = 0

    def step(self, index: int, gradient: Tensor, momentum: float, rate: float) -> None:
        """The class's own update."""
        self.velocity[index] = momentum * self.velocity[index] + gradient
        self.images[index] -= rate * self.velocity[index]


class RealBatches:
    """Batches of one class without replacement until it is used up, then shuffled anew."""

    def __init__(self, rows: Tensor, size: int, generator: torch.Generator) -> None:
        self.rows, self.size, self.generator = rows, min(size, len(rows)), generator
        self.order: Tensor = rows[:0]

    def next(self) -> Tensor:
        """Rows of the next batch."""
        if len(self.order) < self.size:
            self.order = self.rows[torch.randperm(len(self.rows), generator=self.generator)]
        batch, self.order = self.order[: self.size], self.order[self.size :]
        return batch


class CondensationLoop:
    """One process's share of Algorithm 5's inner loops.

    Args:
        data: all training images (networks train on every class).
        config: settings.
        classes: classes whose images this process updates, ascending.
        device: where networks run.
    """

    def __init__(self, data: LabelledImages, config: IDCConfig, classes: Sequence[int], device: torch.device) -> None:
        self.data, self.config, self.classes, self.device = data, config, list(classes), device
        self.formation = formation_of(config)
        self.counts = stored_counts(data, config)
        self.rate = config.image_learning_rate(data.size[0])
        formed = min(self.formation.count(config.images_per_class), config.formed_batch)
        self._room = Room("groups of {} classes", most=max(1, TOGETHER.get(device.type, 64) // formed))
        self._compiled: tuple[nn.Module, nn.Module] | None = None

    @property
    def chunk(self) -> int:
        """Classes whose images go through the network together."""
        return self._room.fits or len(self.classes)

    def rate_for(self, start: Tensor, network: nn.Module) -> float:
        """The rate by which the first step moves the images (all classes, images_per_class, C, H, W) that a run starts from by
        `learning_rate` deviations of the data: root mean square, mean over the first classes, whoever updates them."""
        slopes = []
        for label in range(min(_PROBED, len(start))):
            stream = seeded(self.config.seed, worker=_PROBE + label)
            one = CondensationLoop(self.data, self.config, [label], self.device)
            compute = ClassGradients(network, one._names(network))
            real = [RealBatches(self.data.rows_of_class[label], self.config.real_batch, stream)]
            with sdpa_kernel(SDPBackend.MATH):
                _, slope = one._match(start[label : label + 1], network, compute, real, [stream], range(1))
            slopes.append(float((slope / self.data.std.to(slope).reshape(-1, 1, 1)).square().mean().sqrt()))
        return self.config.learning_rate / max(sum(slopes) / len(slopes), _LEAST)

    def _names(self, network: nn.Module) -> list[str]:
        return matched_parameters(network, bias=self.config.match_bias, head=self.config.match_head)

    def outer_iteration(
        self, state: ImageState, network: nn.Module, optimiser: torch.optim.Optimizer, outer: int
    ) -> Iterator[float]:
        """Run the inner iterations; yields the matching loss (mean over classes) after each.

        Args:
            state: changed in place.
            network, optimiser: theta, changed in place.
            outer: index of the outer iteration: all random numbers follow from it and the seed.
        """
        config = self.config
        streams = [seeded(config.seed, epoch=outer, worker=1 + label) for label in self.classes]
        real = [
            RealBatches(self.data.rows_of_class[label], config.real_batch, stream)
            for label, stream in zip(self.classes, streams, strict=True)
        ]
        own = seeded(config.seed, epoch=outer)
        low, high = config.clamp_low, config.clamp_high
        state.images.clamp_(float(self.data.images.min()) if low is None else low, high)
        for _ in range(config.inner_iterations):
            yield self._round(state, network, real, streams)
            self._update_network(state, network, optimiser, own)
        # the last updates of a round, so that a checkpoint needs no counters
        for index in range(len(self.classes)):
            state.settle(index, config.momentum, self.rate)

    def _round(
        self, state: ImageState, network: nn.Module, real: list[RealBatches], streams: list[torch.Generator]
    ) -> float:
        """One update of every class, in order; classes are independent within a round."""
        config, found = self.config, []
        count = len(self.data.class_names)
        compute = ClassGradients(network, self._names(network))
        for index, label in enumerate(self.classes):
            state.pending[index] += label  # classes before this one in the round
            state.settle(index, config.momentum, self.rate)
        done = 0

        def group(start: int, stop: int) -> None:
            nonlocal done
            chosen = range(start, stop)
            with sdpa_kernel(SDPBackend.MATH):  # the only attention with a second derivative
                losses, slopes = self._match(state.images[start:stop], network, compute, real, streams, chosen)
            found.append(losses)
            for index, slope in zip(chosen, slopes, strict=True):
                state.step(index, slope, config.momentum, self.rate)
                state.pending[index] += count - 1 - self.classes[index]
            done = stop

        def mark() -> Undo:
            """What the next group draws."""
            chosen = range(done, min(done + self.chunk, len(self.classes)))
            drawn = [(real[index].order, streams[index].get_state()) for index in chosen]

            def undo() -> None:
                for index, (order, before) in zip(chosen, drawn, strict=True):
                    real[index].order = order
                    streams[index].set_state(before)

            return undo

        self._room.parts(len(self.classes), group, self.device, mark)
        # read once a round: a device is not waited for before
        return sum(torch.cat(found).tolist()) / len(self.classes) if found else 0.0

    def _match(
        self,
        images: Tensor,
        network: nn.Module,
        compute: ClassGradients,
        real: list[RealBatches],
        streams: list[torch.Generator],
        chosen: range,
    ) -> tuple[Tensor, Tensor]:
        """Matching loss of each chosen class and its gradient by the class's images."""
        config, size = self.config, self.data.size
        wanted, formed, labels = [], [], []
        leaf = images.to(self.device, copy=True).requires_grad_()
        for position, index in enumerate(chosen):
            rows, stream = real[index].next(), streams[index]
            synthetic = form(leaf[position, : self.counts[self.classes[index]]], self.formation)
            if len(synthetic) > config.formed_batch:
                kept = torch.randperm(len(synthetic), generator=stream)[: config.formed_batch]
                synthetic = synthetic[kept.to(self.device)]
            draws = draw(config.augmentation, size, stream)
            with torch.no_grad():
                pixels = augment(self.data.normalised(self.data.pixels(rows).to(self.device)), draws)
            synthetic = augment(self.data.normalised(synthetic), draws)
            formed.append(synthetic)
            if config.match == "feature":
                labels.append(match_features(network, pixels, synthetic))
                continue
            target = torch.full((len(rows),), self.classes[index], device=self.device)
            with self._autocast():
                wanted.append(compute(pixels, target, 1))
            labels.append(torch.full((len(synthetic),), self.classes[index], device=self.device))
        if config.match == "feature":
            losses = torch.stack(labels)
        else:
            with self._autocast():
                got = _of_classes(compute, formed, labels)
            layers = zip(zip(*wanted, strict=True), got, strict=True)
            losses = torch.stack(
                [class_distance(torch.cat(want).detach().float(), have.float(), config.metric) for want, have in layers]
            ).sum(0)
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
        if config.learning_rate_space == "normalised":
            slope = slope * self.data.std.to(slope).reshape(-1, 1, 1) ** 2
        return losses.detach(), slope.to(images.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def _update_network(
        self, state: ImageState, network: nn.Module, optimiser: torch.optim.Optimizer, own: torch.Generator
    ) -> None:
        """`network_images` images in batches: real ones (IDC), synthetic ones (DSA) or none (DM)."""
        config = self.config
        if config.train_network_on == "nothing":
            return
        options = {"augmentation": network_augmentation(config.augmentation, config.cutmix), "mix": config.cutmix}
        dtype = getattr(torch, config.dtype)
        network = self._trained(network)
        if config.train_network_on == "synthetic":
            parts = [
                form(one[: self.counts[label]], self.formation)
                for one, label in zip(state.images.detach(), self.classes, strict=True)
            ]
            images = self.data.normalised(torch.cat(parts).to(self.device))
            labels = torch.cat([torch.full((len(part),), k) for k, part in zip(self.classes, parts, strict=True)])
            labels = labels.to(self.device)
            for rows in batches(len(images), config.network_batch, own):
                picked = rows.to(self.device)
                train_step(network, optimiser, (images[picked], labels[picked]), own, dtype=dtype, **options)  # type: ignore[arg-type]
            return
        whole = (
            -(-config.network_images // config.network_batch) * config.network_batch
        )  # full batches, as the reference
        rows = torch.randperm(len(self.data.labels), generator=own)[:whole]
        for part in rows.split(config.network_batch):
            images, labels = self.data.batch(part)
            batch = (images.to(self.device), labels.to(self.device))
            train_step(network, optimiser, batch, own, dtype=dtype, **options)  # type: ignore[arg-type]

    def _trained(self, network: nn.Module) -> nn.Module:
        """The network as it is called for its own updates; compiled once in its life, if asked for."""
        if self._compiled is None or self._compiled[0] is not network:
            self._compiled = (network, compiled(network, self.config.compile))
        return self._compiled[1]

    def train_epochs(
        self, network: nn.Module, optimiser: torch.optim.Optimizer, own: torch.Generator, epochs: int
    ) -> None:
        """Early phase: whole passes over the real data before the network is matched."""
        self.train_steps(network, optimiser, own, epochs * -(-len(self.data.labels) // self.config.network_batch))

    def train_steps(
        self, network: nn.Module, optimiser: torch.optim.Optimizer, own: torch.Generator, steps: int
    ) -> None:
        """Batches of the real data, pass after pass."""
        config = self.config
        augmentation = network_augmentation(config.augmentation, config.cutmix)
        network, dtype = self._trained(network), getattr(torch, config.dtype)
        while steps > 0:
            for part in islice(batches(len(self.data.labels), config.network_batch, own), steps):
                images, labels = self.data.batch(part)
                batch = (images.to(self.device), labels.to(self.device))
                train_step(network, optimiser, batch, own, augmentation=augmentation, mix=config.cutmix, dtype=dtype)
                steps -= 1

    def optimiser(self, network: nn.Module) -> torch.optim.SGD:
        """A fresh SGD for a network."""
        config = self.config
        return sgd(network, config.network_learning_rate, config.network_momentum, config.network_weight_decay)


def _of_classes(compute: ClassGradients, images: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
    """Gradients (classes, *shape) of formed images: together where all classes have as many."""
    if len({len(part) for part in images}) == 1:
        return compute(torch.cat(images), torch.cat(labels), len(images), differentiable=True)
    found = [compute(part, target, 1, differentiable=True) for part, target in zip(images, labels, strict=True)]
    return [torch.cat(values) for values in zip(*found, strict=True)]


def formation_of(config: IDCConfig) -> Formation:
    """The formation a config asks for."""
    return Formation(factor=config.factor, kind=config.formation, axis=config.axis, pad_value=config.pad_value)
