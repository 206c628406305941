"""Which method mixes which batch: probabilities, switching, a warm-up, and an end before training ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from ..settings import Settings, check_choice, check_kind, check_number, settle
from .co_mixup_config import CoMixupConfig
from .config import PuzzleMixConfig

METHODS = ("puzzle_mix", "co_mixup", "cutmix", "mixup")
_EQUAL = {"puzzle_mix": 0.5, "cutmix": 0.5}


@dataclass(frozen=True, kw_only=True)
class MixupSchedule(Settings):
    """How often each method mixes a batch, and from when to when.

    Args:
        probabilities (`dict[str, float]`, default half `"puzzle_mix"`, half `"cutmix"`): share of batches that each of
            `"puzzle_mix"`, `"co_mixup"`, `"cutmix"` and `"mixup"` (input mixup) gets; together at most 1, the rest stays
            unmixed.
        puzzle_mix (`PuzzleMixConfig`, optional): settings of Puzzle Mix.
        co_mixup (`CoMixupConfig`, optional): settings of Co-Mixup.
        cutmix_alpha, mixup_alpha (`float`, > 0, default 1): of timm's CutMix and input mixup.
        clean_weight (`float`, >= 0, optional): weight of the clean loss (section 3.5), whichever method mixes. None: what
            the configs of the methods in use say, else 0.
        warmup_epochs (`float`, >= 0, default 0): the share of mixed batches grows linearly from 0 over this time.
        off_epoch (`float`, >= 0, optional): from here on nothing is mixed (timm's `mixup_off_epoch`).

    Raises:
        ValueError: out of range, probabilities above 1, an unknown method, a config with a `probability` or an attack of its
            own, or different clean weights.
        TypeError: a field has the wrong type.

    Source: switching as in timm's `Mixup`; chapters 3 and 4 mix every batch by one method.

    Example:
        >>> MixupSchedule(probabilities={"puzzle_mix": 0.5, "cutmix": 0.3}, off_epoch=280).probabilities["cutmix"]
        0.3
    """

    METHOD: ClassVar[str] = "mixup schedule"
    probabilities: Mapping[str, float] | None = None
    puzzle_mix: PuzzleMixConfig | None = None
    co_mixup: CoMixupConfig | None = None
    cutmix_alpha: float = 1.0
    mixup_alpha: float = 1.0
    clean_weight: float | None = None
    warmup_epochs: float = 0.0
    off_epoch: float | None = None

    def __post_init__(self) -> None:
        settle(
            self,
            numbers={
                "cutmix_alpha": (1e-3, 1e3),
                "mixup_alpha": (1e-3, 1e3),
                "clean_weight": (0.0, 1e3),
                "warmup_epochs": (0.0, 1e6),
                "off_epoch": (0.0, 1e6),
            },
            optional=("clean_weight", "off_epoch"),
        )
        object.__setattr__(self, "probabilities", _probabilities(self.probabilities))
        kinds: dict[str, type[PuzzleMixConfig] | type[CoMixupConfig]] = {
            "puzzle_mix": PuzzleMixConfig,
            "co_mixup": CoMixupConfig,
        }
        weights = set()
        for name, kind in kinds.items():
            config = getattr(self, name)
            if isinstance(config, Mapping):  # out of JSON
                config = _from_mapping(name, config, kind)
                object.__setattr__(self, name, config)
            if config is None:
                continue
            check_kind(name, config, kind, f"give {kind.__name__}(...)")
            if config.probability != 1 or getattr(config, "adversarial_probability", 0):
                raise ValueError(
                    f"{name} has a probability or an attack of its own; in a schedule `probabilities` say how often it mixes, "
                    "and the attack needs a collator for Puzzle Mix alone"
                )
            if name in self.shares:
                weights.add(config.clean_weight)
        self._settle_clean(weights)

    def _settle_clean(self, weights: set[float]) -> None:
        told = {self.clean_weight} if self.clean_weight is not None else set()
        if len(weights | told) > 1:
            raise ValueError(
                f"the clean weights {sorted(weights | told)} differ; a schedule has one for all methods: give "
                "clean_weight, and the configs the same"
            )
        weight = next(iter(weights | told), 0.0)
        object.__setattr__(self, "clean_weight", weight)
        for name, kind in (("puzzle_mix", PuzzleMixConfig), ("co_mixup", CoMixupConfig)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, kind(clean_weight=weight))

    @property
    def shares(self) -> dict[str, float]:
        """Methods in use and how often."""
        return {name: share for name, share in (self.probabilities or {}).items() if share}

    def strength(self, epochs: float) -> float:
        """Share of `probabilities` that holds after so many epochs; 0 from `off_epoch` on."""
        epochs = check_number("epochs", epochs, 0.0)
        if self.off_epoch is not None and epochs >= self.off_epoch:
            return 0.0
        return min(1.0, epochs / self.warmup_epochs) if self.warmup_epochs else 1.0


@dataclass(frozen=True)
class Scheduled:
    """A schedule with its mixers: gives every batch its own."""

    schedule: MixupSchedule
    mixers: Mapping[str, Callable[..., Any]]

    def drawn(self, generator: torch.Generator, epochs: float) -> Callable[..., Any] | None:
        """The mixer of this batch; None: it stays unmixed."""
        place = float(torch.rand((), generator=generator, dtype=torch.float64))
        strength = self.schedule.strength(epochs)
        for name, share in self.schedule.shares.items():
            place -= share * strength
            if place < 0:
                return self.mixers[name]
        return None


def _probabilities(given: Any) -> dict[str, float]:
    given = (
        _EQUAL if given is None else check_kind("probabilities", given, Mapping, f"give shares by name of {METHODS}")
    )
    found = {}
    for name, share in given.items():
        check_choice("a name in probabilities", name, METHODS)
        found[str(name)] = check_number(f"probabilities[{name!r}]", share, 0.0, 1.0)
    if not sum(found.values()) <= 1 + 1e-9:
        raise ValueError(f"probabilities sum to {sum(found.values()):g}; together they can be at most 1")
    return found


def _from_mapping(name: str, values: Mapping[str, Any], kind: Any) -> Any:
    known = {field.name for field in fields(kind)}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(f"unknown settings {unknown} in {name}; known are {', '.join(sorted(known))}")
    return kind(**values)
