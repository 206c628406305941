"""The inner loops of Algorithm 5: image updates class by class with a shared, lazily applied momentum, then the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..distributed import Room, Undo
from ..seeding import generator as seeded
from .augment import augment_groups, draw
from .class_gradients import ClassGradients
from .columns import LabelledImages
from .config import IDCConfig
from .devices import sent
from .formation import Formation, form, form_groups
from .initialise import stored_counts
from .matching import class_distance, match_features, matched_parameters
from .training import Updates, compiled, network_augmentation, sgd, train_on

# images of several classes go through the network together up to this many: below it, calls cost more than arithmetic, above
# it, caches overflow (measured on a CPU: benchmarks/condensation_speed.py)
TOGETHER = {"cpu": 24, "cuda": 1024}
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

    def settle(self, momentum: float, rate: float) -> None:
        """Apply, to every class, the drift of the updates in which it had no gradient: a geometric series of its momentum."""
        if not any(self.pending):
            return
        drifts = {count: rate * sum(momentum**k for k in range(1, count + 1)) for count in set(self.pending)}
        numbers = [[drifts[count], momentum**count] for count in self.pending]
        drift, left = sent(torch.tensor(numbers, dtype=self.images.dtype), self.images.device).unbind(1)
        shape = (-1, *[1] * (self.images.ndim - 1))
        self.images -= drift.reshape(shape) * self.velocity
        self.velocity *= left.reshape(shape)
        self.pending = [0] * len(self.pending)

    def step(self, chosen: slice, gradients: Tensor, momentum: float, rate: float) -> None:
        """Some classes' own updates."""
        self.velocity[chosen] = momentum * self.velocity[chosen] + gradients
        self.images[chosen] -= rate * self.velocity[chosen]


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
        self.data, self.config, self.classes, self.device = data.on(device), config, list(classes), device
        self.low = float(data.images.min()) if config.clamp_low is None else config.clamp_low
        self.formation = formation_of(config)
        self.counts = stored_counts(data, config)
        self.rate = config.image_learning_rate(data.size[0])
        formed = min(self.formation.count(config.images_per_class), config.formed_batch)
        self.together = TOGETHER.get(device.type, 64)
        self._room = Room("groups of {} classes", most=max(1, self.together // formed))
        self._compiled: tuple[nn.Module, nn.Module] | None = None
        self.updates = Updates(
            batch=config.network_batch,
            augmentation=network_augmentation(config.augmentation, config.cutmix),
            mix=config.cutmix,
            dtype=getattr(torch, config.dtype),
        )

    @property
    def chunk(self) -> int:
        """Classes whose images go through the network together."""
        return self._room.fits or len(self.classes)

    def rate_for(self, start: Tensor, network: nn.Module) -> float:
        """The rate by which the first step moves the images (all classes, images_per_class, C, H, W) that a run starts from by
        `learning_rate` deviations of the data: root mean square, mean over the first classes, whoever updates them."""
        slopes, start = [], start.to(self.device)
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
    ) -> list[float]:
        """Run the inner iterations. The device is waited for once, at the end.

        Args:
            state: changed in place, on the loop's device.
            network, optimiser: theta, changed in place.
            outer: index of the outer iteration: all random numbers follow from it and the seed.

        Returns:
            The matching loss (mean over classes) of each inner iteration.
        """
        config, losses = self.config, []
        streams = [seeded(config.seed, epoch=outer, worker=1 + label) for label in self.classes]
        real = [
            RealBatches(self.data.rows_of_class[label], config.real_batch, stream)
            for label, stream in zip(self.classes, streams, strict=True)
        ]
        own = seeded(config.seed, epoch=outer)
        state.images.clamp_(self.low, config.clamp_high)
        for _ in range(config.inner_iterations):
            losses.append(self.update_images(state, network, real, streams))
            self.update_network(state, network, optimiser, own)
        # the last updates of a round, so that a checkpoint needs no counters
        state.settle(config.momentum, self.rate)
        found: list[float] = torch.stack(losses).tolist()
        return found

    def update_images(
        self, state: ImageState, network: nn.Module, real: list[RealBatches], streams: list[torch.Generator]
    ) -> Tensor:
        """A round: one update of every class, in order, each alone. Gives the mean loss, on its device."""
        config = self.config
        found: list[Tensor] = []
        count = len(self.data.class_names)
        compute = ClassGradients(network, self._names(network))
        for index, label in enumerate(self.classes):
            state.pending[index] += label  # classes before this one in the round
        state.settle(config.momentum, self.rate)
        done = 0

        def group(start: int, stop: int) -> None:
            nonlocal done
            chosen = range(start, stop)
            with sdpa_kernel(SDPBackend.MATH):  # the only attention with a second derivative
                losses, slopes = self._match(state.images[start:stop], network, compute, real, streams, chosen)
            found.append(losses)
            state.step(slice(start, stop), slopes, config.momentum, self.rate)
            for index in chosen:
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
        return torch.cat(found).mean() if found else torch.zeros((), device=self.device)

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
        config, labels = self.config, [self.classes[index] for index in chosen]
        leaf = images.detach().clone().requires_grad_()
        formed, counts = self._formed(leaf, labels)
        rows, draws, kept = [], [], []
        for index, count in zip(chosen, counts, strict=True):
            stream = streams[index]
            rows.append(real[index].next())
            few = count <= config.formed_batch
            kept.append(torch.arange(count) if few else torch.randperm(count, generator=stream)[: config.formed_batch])
            draws.append(draw(config.augmentation, self.data.size, stream))
        if max(counts) > config.formed_batch:
            places = [start + own for start, own in zip(accumulate(counts, initial=0), kept, strict=False)]
            formed, counts = formed[sent(torch.cat(places), self.device)], [len(own) for own in kept]
        sizes = [len(part) for part in rows]
        with torch.no_grad():
            pixels = augment_groups(self.data.normalised(self.data.pixels(torch.cat(rows))), draws, sizes)
        formed = augment_groups(self.data.normalised(formed), draws, counts)
        if config.match == "feature":
            pairs = zip(pixels.split(sizes), formed.split(counts), strict=True)
            losses = torch.stack([match_features(network, *pair) for pair in pairs])
        else:
            wanted = self._of_classes(compute, pixels, labels, sizes, differentiable=False)
            got = self._of_classes(compute, formed, labels, counts, differentiable=True)
            layers = zip(wanted, got, strict=True)
            losses = torch.stack(
                [class_distance(want.detach().float(), have.float(), config.metric) for want, have in layers]
            ).sum(0)
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
        if config.learning_rate_space == "normalised":
            slope = slope * self.data.std.to(slope).reshape(-1, 1, 1) ** 2
        return losses.detach(), slope

    def _formed(self, images: Tensor, labels: list[int]) -> tuple[Tensor, list[int]]:
        """What stored images (classes, images_per_class, C, H, W) form, class by class, and how many each class has."""
        stored = [self.counts[label] for label in labels]
        if len(set(stored)) == 1:  # together
            formed = form_groups(images[:, : stored[0]], self.formation)
            return formed.flatten(0, 1), [formed.shape[1]] * len(labels)
        parts = [form(own[:count], self.formation) for own, count in zip(images, stored, strict=True)]
        return torch.cat(parts), [len(part) for part in parts]

    def _targets(self, labels: list[int], counts: list[int]) -> Tensor:
        return sent(torch.tensor(labels).repeat_interleave(torch.tensor(counts)), self.device)

    def _of_classes(
        self, compute: ClassGradients, images: Tensor, labels: list[int], counts: list[int], *, differentiable: bool
    ) -> list[Tensor]:
        """Gradients (classes, *shape) of images class by class: of several classes at once where they have as many."""
        each = max(1, self.together // counts[0]) if len(set(counts)) == 1 else 1
        targets, ends = self._targets(labels, counts), [0, *accumulate(counts)]
        found = []
        for first in range(0, len(labels), each):
            last = min(first + each, len(labels))
            part = slice(ends[first], ends[last])
            found.append(compute(images[part], targets[part], last - first, differentiable=differentiable))
        return [torch.cat(values) for values in zip(*found, strict=True)]

    def update_network(
        self, state: ImageState, network: nn.Module, optimiser: torch.optim.Optimizer, own: torch.Generator
    ) -> None:
        """`network_images` images in batches: real ones (IDC), synthetic ones (DSA) or none (DM)."""
        config = self.config
        if config.train_network_on == "nothing":
            return
        if config.train_network_on == "synthetic":
            images, counts = self._formed(state.images.detach(), self.classes)
            rows = sent(torch.randperm(len(images), generator=own), self.device)
            shown = self.data.normalised(images)[rows], self._targets(self.classes, counts)[rows]
            train_on(self._trained(network), optimiser, shown, own, self.updates)
            return
        # full batches, as the reference
        whole = -(-config.network_images // config.network_batch) * config.network_batch
        rows = torch.randperm(len(self.data.labels), generator=own)[:whole]
        self._train_on_real(network, optimiser, own, rows)

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
        while steps > 0:
            rows = torch.randperm(len(self.data.labels), generator=own)[: steps * self.config.network_batch]
            self._train_on_real(network, optimiser, own, rows)
            steps -= -(-len(rows) // self.config.network_batch)

    def _train_on_real(
        self, network: nn.Module, optimiser: torch.optim.Optimizer, own: torch.Generator, rows: Tensor
    ) -> None:
        network = self._trained(network)
        for part in rows.split(self.updates.ahead(self.data.images[0].numel())):
            train_on(network, optimiser, self.data.batch(part), own, self.updates)

    def optimiser(self, network: nn.Module) -> torch.optim.SGD:
        """A fresh SGD for a network."""
        config = self.config
        return sgd(network, config.network_learning_rate, config.network_momentum, config.network_weight_decay)


def formation_of(config: IDCConfig) -> Formation:
    """The formation a config asks for."""
    return Formation(factor=config.factor, kind=config.formation, axis=config.axis, pad_value=config.pad_value)
