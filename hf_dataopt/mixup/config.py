"""Settings of Puzzle Mix, each with its range and the place it comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from ..settings import MOST, Settings, check_each, check_int, check_number, settle

if TYPE_CHECKING:
    from .fields import PuzzleMixFields

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
_COUNTS = {"n_labels": (2, 4), "neighbourhood": (1, MOST), "transport_block": (1, MOST)}


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
        settle(
            self,
            choices=_CHOICES,
            numbers=_RANGES,
            counts=_COUNTS,
            flags=("transport",),
            optional=("transport_block",),
        )
        grids = check_each("grid_sizes", self.grid_sizes, check_int, 1)
        object.__setattr__(self, "grid_sizes", grids)
        rounds = self.transport_rounds
        if rounds is not None and not (isinstance(rounds, str) and rounds == "grid"):
            object.__setattr__(
                self, "transport_rounds", check_int("transport_rounds", rounds, 1, 10_000, todo="or give 'grid'")
            )
        mean, std = check_normalisation("image_mean", self.image_mean, "image_std", self.image_std)
        object.__setattr__(self, "image_mean", mean)
        object.__setattr__(self, "image_std", std)

    @classmethod
    def cifar100(cls, **changes: Unpack[PuzzleMixFields]) -> PuzzleMixConfig:
        """CIFAR-100, 32 x 32 pixels: neighbourhood 4, cells of 4 pixels move, no clean loss."""
        figures: PuzzleMixFields = {"transport_block": 4}
        return cls(**(figures | changes))

    @classmethod
    def tiny_imagenet(cls, **changes: Unpack[PuzzleMixFields]) -> PuzzleMixConfig:
        """Tiny-ImageNet, 64 x 64 pixels: neighbourhood 4, clean loss of weight 1."""
        figures: PuzzleMixFields = {"clean_weight": 1.0}
        return cls(**(figures | changes))

    @classmethod
    def imagenet(cls, **changes: Unpack[PuzzleMixFields]) -> PuzzleMixConfig:
        """ImageNet, 100 epochs: beta 1.5, neighbourhood 2, clean loss of weight 1 (300 epochs: beta 1.2, weight 0)."""
        figures: PuzzleMixFields = {"beta": 1.5, "neighbourhood": 2, "clean_weight": 1.0}
        return cls(**(figures | changes))

    def adversarial(self, probability: float = 0.1, eps: float = 10 / 255) -> PuzzleMixConfig:
        """The same settings with Algorithm 2 (CIFAR-100: p 0.1; Tiny-ImageNet: p 0.15); step `eps` + 2/255."""
        eps = check_number("eps", eps, 0.0, 1 - 2 / 255)
        new = {"adversarial_probability": probability, "adversarial_eps": eps, "adversarial_step": eps + 2 / 255}
        return type(self)(**{**asdict(self), **new})


def check_normalisation(
    mean_name: str, mean: Any, std_name: str, std: Any
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation per channel, of one length, or neither."""
    if (mean is None) != (std is None):
        raise ValueError(f"{mean_name} and {std_name} go together; give both or neither")
    if mean is None:
        return None, None
    means = check_each(mean_name, mean, check_number, -1e6, 1e6)
    stds = check_each(std_name, std, check_number, 1e-9, 1e9)
    if len(means) != len(stds):
        raise ValueError(f"{mean_name} has {len(means)} channels, {std_name} {len(stds)}; give one of each a channel")
    return means, stds
