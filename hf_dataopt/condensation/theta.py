"""The networks of a condensation run, each made, trained early or drawn from a pool as the seed says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..seeding import generator as seeded

if TYPE_CHECKING:
    from .loop import CondensationLoop

NETWORK, _POOL, _TEACHER = 2**22 + 1, 2**22 + 2, 2**22 + 4
Maker = Callable[[torch.Generator], nn.Module]


class Theta:
    """The networks of a run: a new one every `reinitialise_every` outer iterations, or drawn from a pretrained pool.

    Args:
        loop: trains them.
        make: a new network out of a generator.
        kept: network and momentum of a checkpoint, see `tensors`.
    """

    def __init__(self, loop: CondensationLoop, make: Maker, kept: dict[str, Tensor]) -> None:
        self.loop, self.make, self.kept = loop, make, kept
        self.current: tuple[nn.Module, torch.optim.SGD] | None = None
        self.pool: list[dict[str, Tensor]] = []

    def at(self, outer: int) -> tuple[nn.Module, torch.optim.SGD]:
        """Network and optimiser for an outer iteration; everything follows from the seed and `outer`."""
        config = self.loop.config
        born = outer - outer % config.reinitialise_every
        if self.current is not None and born != outer:
            return self.current
        own = seeded(config.seed, epoch=born, worker=NETWORK)
        network = self.make(own)
        if config.pretrained_networks:
            which = int(torch.randint(config.pretrained_networks, (), generator=own))
            network.load_state_dict(self._pretrained()[which])
        elif config.early_epochs and not (self.kept and born != outer):
            self.loop.train_epochs(network, self.loop.optimiser(network), own, config.early_epochs)
        optimiser = self.loop.optimiser(network)
        if self.kept and born != outer:
            _restore(network, optimiser, self.kept)
        self.kept = {}
        self.current = (network, optimiser)
        return self.current

    def _pretrained(self) -> list[dict[str, Tensor]]:
        config = self.loop.config
        while len(self.pool) < config.pretrained_networks:
            own = seeded(config.seed, epoch=len(self.pool), worker=_POOL)
            network = self.make(own)
            self.loop.train_epochs(network, self.loop.optimiser(network), own, config.early_epochs)
            self.pool.append({name: value.clone() for name, value in network.state_dict().items()})
        return self.pool

    def tensors(self, outer: int) -> dict[str, Tensor]:
        """Network and momentum, if the next outer iteration goes on with them."""
        if self.current is None or (outer + 1) % self.loop.config.reinitialise_every == 0:
            return {}
        network, optimiser = self.current
        values = {f"network.{name}": value.cpu().contiguous() for name, value in network.state_dict().items()}
        for index, parameter in enumerate(network.parameters()):
            momentum = optimiser.state[parameter].get("momentum_buffer")
            if momentum is not None:
                values[f"momentum.{index}"] = momentum.cpu().contiguous()
        return values


def _restore(network: nn.Module, optimiser: torch.optim.SGD, kept: dict[str, Tensor]) -> None:
    prefix = "network."
    network.load_state_dict({name[len(prefix) :]: value for name, value in kept.items() if name.startswith(prefix)})
    for index, parameter in enumerate(network.parameters()):
        if f"momentum.{index}" in kept:
            optimiser.state[parameter]["momentum_buffer"] = kept[f"momentum.{index}"].to(parameter.device)


def trained(loop: CondensationLoop, make: Maker, images: int) -> nn.Module:
    """A network that saw `images` real images, as a run's networks see theirs; a fifth of the step for the last quarter."""
    config = loop.config
    own = seeded(config.seed, worker=_TEACHER)
    network = make(own)
    optimiser = loop.optimiser(network)
    steps = max(2, -(-images // config.network_batch))
    for share, rate in ((steps - steps // 4, 1.0), (steps // 4, 0.2)):
        optimiser.param_groups[0]["lr"] = config.network_learning_rate * rate
        loop.train_steps(network, optimiser, own, share)
    return network.eval()
