"""Settings of Co-Mixup, each with its range and the place it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from ..settings import Settings, check_each, check_int, settle
from .config import check_normalisation

if TYPE_CHECKING:
    from .fields import CoMixupFields

_RANGES: dict[str, tuple[float, float]] = {
    "beta": (0.0, 1e3),
    "gamma": (0.0, 1e3),
    "eta": (0.0, 1e3),
    "alpha": (1e-3, 1e3),
    "tau": (0.0, 1e3),
    "omega": (0.0, 1.0),
    "probability": (0.0, 1.0),
    "clean_weight": (0.0, 1e3),
}
_ALPHA = 2.0  # the reference code's, beside a clean loss of weight 1
_ALPHA_ALONE = 0.5  # without one alpha "should be decreased accordingly" (reference code), no figure given
_COUNTS: dict[str, int | tuple[int, int]] = {
    "part_size": 1,
    "outputs_per_part": (1, 2**16),
    "sweeps": 1,
    "distance_window": 1,
    "distance_stride": 1,
}


@dataclass(frozen=True, kw_only=True)
class CoMixupConfig(Settings):
    """What Co-Mixup minimises (Eq. 4.1) and how (Eq. 4.2, Algorithm 3).

    Args:
        grid (`int` or `(int, int)`, 1 to 64, optional, default 4): rows and columns of the mask (`m_block_num`). None: one
            of 2, 4, 8, 16 is drawn for every batch.
        part_size (`int`, >= 1, default 20): inputs that are mixed with each other: the batch is cut into consecutive parts.
        outputs_per_part (`int`, >= 1, optional): m' of a full part; shorter parts keep the proportion. Default: as many
            outputs as inputs.
        beta (`float`, >= 0, default 0.32): smoothness, per cell. The reference's read-me tries 0.16 to 0.48.
        gamma (`float`, >= 0, default 1): penalty of outputs that share inputs, per cell.
        eta (`float`, >= 0, default 0.05): mixing prior, per cell.
        alpha (`float`, > 0, optional): of the symmetric Dirichlet that the mixing ratios of the prior are drawn from. None:
            2 beside a clean loss (the reference code's), 0.5 where `clean_weight` is 0: its authors say that alpha should
            fall then, and give no figure.
        tau (`float`, >= 0, default 0.83): no penalty below this level, in units of one output's cells. The read-me tries
            0.81 to 0.84.
        tau_type (`str`, default `"hard"`): the penalty of an input above tau is all of it (`"hard"`) or what is above tau
            (`"soft"`).
        omega (`float`, [0, 1], default 0.001): weight of the distance between salient objects in A.
        sweeps (`int`, >= 1, default 4): T of Algorithm 3 (the read-me: 3 saves time).
        resolve (`bool`, default True): before the last sweep, outputs with the same set of inputs are pushed apart.
        keep_best (`bool`, default True): in the last sweep an output keeps, of its old labels and those found with the hard
            and the soft penalty, the ones with the least Eq. 4.1. False: the last sweep is like the others, as in the
            reference code.
        distance_window, distance_stride (`int`, >= 1, pixels, default 8 and 1): the salient object is the window with the
            largest mean saliency.
        probability (`float`, [0, 1], default 1): share of batches that are mixed (drawn by the collator).
        clean_weight (`float`, >= 0, default 1): weight of the loss on unmixed inputs, which Co-Mixup's recipe counts on
            (section 3.5; the reference code's default). It needs the model: 0 where batches are mixed in loader workers.
        image_mean, image_std (`tuple[float, ...]`, optional): per channel, subtracted from pixels in [0, 1] and what they
            were divided by: for `augmentation` and pictures; the masks need no pixels.
        strict (`bool`, default False): follow the text where the reference code departs from it: smoothness 1 - z'z, every
            half-and-half pair is a label in every sweep, multinomial prior with one Dirichlet draw per output, one scalar
            clip max(tau', v'o), raw distances between the most salient cells, stopping on Eq. 4.1, no `resolve`,
            `keep_best` or `tau_type`.

    Raises:
        ValueError: a field is out of its range.
        TypeError: a field has the wrong type.

    Source: chapter 4, Eqs. 4.1 and 4.2; the text prints no values: all figures are the reference code's.

    Example:
        >>> CoMixupConfig.cifar100().part_size
        20
    """

    METHOD: ClassVar[str] = "Co-Mixup"
    grid: int | tuple[int, int] | None = 4
    part_size: int = 20
    outputs_per_part: int | None = None
    beta: float = 0.32
    gamma: float = 1.0
    eta: float = 0.05
    alpha: float | None = None
    tau: float = 0.83
    tau_type: Literal["hard", "soft"] = "hard"
    omega: float = 0.001
    sweeps: int = 4
    resolve: bool = True
    keep_best: bool = True
    distance_window: int = 8
    distance_stride: int = 1
    probability: float = 1.0
    clean_weight: float = 1.0
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        self._check_grid()
        settle(
            self,
            choices={"tau_type": ("hard", "soft")},
            numbers=_RANGES,
            counts=_COUNTS,
            flags=("resolve", "keep_best", "strict"),
            optional=("outputs_per_part", "alpha"),
        )
        if self.alpha is None:
            object.__setattr__(self, "alpha", _ALPHA if self.clean_weight else _ALPHA_ALONE)
        mean, std = check_normalisation("image_mean", self.image_mean, "image_std", self.image_std)
        object.__setattr__(self, "image_mean", mean)
        object.__setattr__(self, "image_std", std)

    def _check_grid(self) -> None:
        grid: Any = self.grid
        if grid is None:
            return
        if not isinstance(grid, list | tuple) and getattr(grid, "ndim", 0) != 1:  # JSON has no tuples
            object.__setattr__(self, "grid", check_int("grid", grid, 1, 64, todo="or give (rows, columns)"))
            return
        sides = check_each("grid", grid, check_int, 1, 64)
        if len(sides) != 2:
            raise TypeError(f"grid must be an int, a pair of ints (rows, columns) or None, got {len(sides)} of them")
        object.__setattr__(self, "grid", sides)

    @classmethod
    def cifar100(cls, **changes: Unpack[CoMixupFields]) -> CoMixupConfig:
        """CIFAR-100, batch 100: the reference code's defaults, a clean loss of weight 1 among them."""
        return cls(**changes)

    @classmethod
    def tiny_imagenet(cls, **changes: Unpack[CoMixupFields]) -> CoMixupConfig:
        """Tiny-ImageNet, batch 100: the same figures as CIFAR-100, clean loss of weight 1."""
        return cls(**changes)

    @classmethod
    def imagenet(cls, **changes: Unpack[CoMixupFields]) -> CoMixupConfig:
        """ImageNet: parts of 16, three sweeps, Dirichlet(1) (the code never reads the file's 2), windows every 8 pixels, clean
        loss of weight 1; without it alpha falls as elsewhere."""
        figures: CoMixupFields = {"part_size": 16, "sweeps": 3, "distance_stride": 8}
        if changes.get("clean_weight", 1.0):
            figures["alpha"] = 1.0
        return cls(**(figures | changes))

    @classmethod
    def dissertation(cls, **changes: Unpack[CoMixupFields]) -> CoMixupConfig:
        """The text read literally, `strict=True`."""
        text: CoMixupFields = {"strict": True}
        return cls(**(text | changes))
