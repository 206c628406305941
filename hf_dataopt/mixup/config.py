"""Settings of Puzzle Mix, each with its range and the place it comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from ..settings import Settings, check_int, check_number

_CHOICES = {
    "data_term": ("code", "text"),
    "solver": ("exact", "pygco"),
    "transport_axis": ("both", "height", "width"),
    "transport_mask": ("visible", "share"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "alpha": (1e-3, 1e3),
    "beta": (0.0, 1e3),
    "gamma": (0.0, 1e3),
    "eta": (0.0, 1e3),
    "transport_cost": (1e-6, 1e3),
    "probability": (0.0, 1.0),
    "clean_weight": (0.0, 1e3),
    "adversarial_probability": (0.0, 1.0),
    "adversarial_eps": (0.0, 1.0),
    "adversarial_step": (0.0, 1.0),
}
_LEAST = {"n_labels": 2, "neighbourhood": 1, "transport_block": 1, "transport_rounds": 1}
_OPTIONAL = {"transport_block": (None,), "transport_rounds": (None, "grid")}


@dataclass(frozen=True, kw_only=True)
class PuzzleMixConfig(Settings):
    """How Puzzle Mix cuts, moves and mixes pairs of inputs.

    Args:
        grid_sizes (`tuple[int, ...]`, default (2, 4, 8, 16)): cells along each side of the mask; one is drawn per batch
            (section 3.5). A side of the image with fewer pixels gets that many cells.
        alpha (`float`, > 0, default 1): mixing weight lam ~ Beta(alpha, alpha), one per batch (section 3.5).
        n_labels (`int`, 2 to 4, default 3): mask values 0, 1/(K-1), ..., 1 (section 3.5: {0, 1/2, 1}).
        beta (`float`, >= 0, default 1.2): label smoothness (Definition 1); the edge weight is beta / (16 grid).
        gamma (`float`, >= 0, default 0.5): data smoothness (Definition 2) relative to beta: gamma of Eq. 3.4 is
            beta gamma / (16 grid). At most 1 keeps every edge weight >= 0 for pixels in [0, 1].
        eta (`float`, >= 0, default 0.2): weight of the prior; eta of Eq. 3.4 is eta / cells.
        neighbourhood (`int`, >= 1, pixels, default 4): depth and length of the border strips whose means are compared.
        data_term (`str`, default `"code"`): `"code"` keeps the cross term of the binary distances in the edge weights
            (reference code); `"text"` is Definition 3, where it vanishes.
        solver (`str`, default `"exact"`): `"exact"` is the global optimum; `"pygco"` the reference code's local one.
        transport (`bool`, default True): move salient cells to visible places (section 3.4.2).
        transport_cost (`float`, > 0, default 0.8): xi of Eq. 3.5.
        transport_block (`int`, >= 1, pixels, optional): cells moved are cut to about this size where the mask's are larger.
        transport_rounds (`int`, >= 1, or `"grid"`, optional): None runs Algorithm 1 to convergence; a number is the
            reference code's fixed count of rounds; `"grid"` as many as a side of the grid has cells (what it uses).
        transport_axis (`str`, default `"both"`): `"height"` or `"width"` moves cells along that axis only (spectrograms).
        transport_mask (`str`, default `"visible"`): z of Eq. 3.5: `"visible"` rounds every visible share up to 1
            (reference code), `"share"` is the text.
        probability (`float`, [0, 1], default 1): share of batches that are mixed (drawn by the collator).
        clean_weight (`float`, >= 0, default 0): weight of the loss on unmixed inputs (section 3.5).
        adversarial_probability (`float`, [0, 1], default 0): p of Algorithm 2, drawn per sample.
        adversarial_eps (`float`, [0, 1], pixels in [0, 1], default 10/255): radius of the attack.
        adversarial_step (`float`, [0, 1], default 12/255): tau of Algorithm 2.
        image_mean (`tuple[float, ...]`, optional): per channel, subtracted from pixels in [0, 1] before `puzzle_mix` saw
            them; None: the images are in [0, 1] (or have no range: then gamma 0).
        image_std (`tuple[float, ...]`, optional): per channel, what they were divided by.

    Raises:
        ValueError: a field is out of its range.
        TypeError: a field has the wrong type.

    Source: chapter 3; defaults are the reference code's for CIFAR-100 without the transport block.

    Example:
        >>> PuzzleMixConfig(grid_sizes=(4,)).n_labels
        3
    """

    METHOD: ClassVar[str] = "Puzzle Mix"
    grid_sizes: tuple[int, ...] = (2, 4, 8, 16)
    alpha: float = 1.0
    n_labels: int = 3
    beta: float = 1.2
    gamma: float = 0.5
    eta: float = 0.2
    neighbourhood: int = 4
    data_term: Literal["code", "text"] = "code"
    solver: Literal["exact", "pygco"] = "exact"
    transport: bool = True
    transport_cost: float = 0.8
    transport_block: int | None = None
    transport_rounds: int | Literal["grid"] | None = None
    transport_axis: Literal["both", "height", "width"] = "both"
    transport_mask: Literal["visible", "share"] = "visible"
    probability: float = 1.0
    clean_weight: float = 0.0
    adversarial_probability: float = 0.0
    adversarial_eps: float = 10 / 255
    adversarial_step: float = 12 / 255
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, (low, high) in _RANGES.items():
            check_number(name, getattr(self, name), low, high)
        for name, least in _LEAST.items():
            if getattr(self, name) not in _OPTIONAL.get(name, ()):
                check_int(name, getattr(self, name), least)
        if self.n_labels > 4:
            raise ValueError(f"n_labels must be 2, 3 or 4, got {self.n_labels}")
        if not isinstance(self.transport, bool):
            raise TypeError(f"transport must be a bool, got {type(self.transport).__name__}")
        self._check_tuples()

    def _check_tuples(self) -> None:
        for name in ("grid_sizes", "image_mean", "image_std"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif not isinstance(value, tuple) and not (value is None and name != "grid_sizes"):
                raise TypeError(f"{name} must be a tuple, got {type(value).__name__}")
        if not self.grid_sizes:
            raise ValueError("grid_sizes is empty; name at least one grid size, such as (4,)")
        for size in self.grid_sizes:
            check_int("grid_sizes", size, 1)
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std go together; give both or neither")
        for value in self.image_mean or ():
            check_number("image_mean", value, -1e6, 1e6)
        for value in self.image_std or ():
            check_number("image_std", value, 1e-9, 1e9)
        if self.image_mean is not None and len(self.image_mean) != len(self.image_std or ()):
            raise ValueError(f"image_mean has {len(self.image_mean)} channels, image_std {len(self.image_std or ())}")

    @classmethod
    def cifar100(cls, **changes: Any) -> PuzzleMixConfig:
        """CIFAR-100, 32 x 32 pixels: neighbourhood 4, cells of 4 pixels move, no clean loss."""
        return cls(**{"transport_block": 4, **changes})

    @classmethod
    def tiny_imagenet(cls, **changes: Any) -> PuzzleMixConfig:
        """Tiny-ImageNet, 64 x 64 pixels: neighbourhood 4, clean loss of weight 1."""
        return cls(**{"clean_weight": 1.0, **changes})

    @classmethod
    def imagenet(cls, **changes: Any) -> PuzzleMixConfig:
        """ImageNet, 100 epochs: beta 1.5, neighbourhood 2, clean loss of weight 1 (300 epochs: beta 1.2, weight 0)."""
        return cls(**{"beta": 1.5, "neighbourhood": 2, "clean_weight": 1.0, **changes})

    def adversarial(self, probability: float = 0.1, eps: float = 10 / 255) -> PuzzleMixConfig:
        """The same settings with Algorithm 2 (CIFAR-100: p 0.1; Tiny-ImageNet: p 0.15); step `eps` + 2/255."""
        new = {"adversarial_probability": probability, "adversarial_eps": eps, "adversarial_step": eps + 2 / 255}
        return type(self)(**{**asdict(self), **new})
