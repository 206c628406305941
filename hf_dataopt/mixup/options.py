"""What happens around a mixer in a training forward, as one set of options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..settings import LARGEST, MOST_SEED, check_callable, check_kind, check_number, optional, settle
from .config import PuzzleMixConfig, check_normalisation
from .targets import Loss


@dataclass(frozen=True, kw_only=True)
class LiveOptions:
    """What happens around the mixer in a training forward.

    Args:
        saliency (`callable`, optional): `f(images (B, C, H, W), targets (B, classes)) -> (B, H, W)`, values >= 0, instead
            of the model's own input gradient. Called without gradients, on the model's device.
        saliency_scale (`float`, (0, 1], default 1): side of the images that the saliency pass sees, as a share of the full
            one: 0.7 costs half and was as good in our table, 0.5 a quarter. For models that take images of any size; not
            with `clean_weight`, whose pass is the saliency pass already, nor with `attack`.
        loss (`callable`, optional): `f(logits (B, classes), soft targets (B, classes)) -> scalar mean or (B,)`; default:
            cross entropy, or the binary one for a model of `problem_type` "multi_label_classification".
        clean_loss (`callable`, optional): the same for the clean term; default: `loss`.
        augmentation (`callable`, optional): `f(image (C, H, W)) -> image` of the same shape, applied to every input before
            saliency and mixing (section 3.6.2). It sees the model's values, or [0, 1] where `mean` and `std` are given.
        mean, std (tuples of floats, one per channel, optional): `(pixel - mean) / std` is what the model receives.
        attack (`PuzzleMixConfig`, optional): Algorithm 2 with its adversarial settings; the mixer must take `shown=`.
        probability (`float`, [0, 1], default 1): share of batches that are mixed.
        clean_weight (`float`, >= 0, default 0): weight of the unmixed batch's loss (section 3.5). Its gradient comes out
            of the saliency pass, which then runs in training mode, as in the reference code.
        label_smoothing (`float`, [0, 1), default 0): share of each target spread evenly over all classes.
        seed (`int`, >= 0, default 0): of the mixer's random numbers.

    Raises:
        ValueError: out of range, `attack` with a `saliency` callable, one of `mean` and `std` alone, or `label_smoothing`
            beside a `loss` of one's own.
        TypeError: `saliency`, `loss`, `clean_loss` or `augmentation` cannot be called.
    """

    saliency: Callable[[Tensor, Tensor], Tensor] | None = None
    saliency_scale: float = 1.0
    loss: Loss | None = None
    clean_loss: Loss | None = None
    augmentation: Callable[[Tensor], Tensor] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    attack: PuzzleMixConfig | None = None
    probability: float = 1.0
    clean_weight: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("saliency", "augmentation", "loss", "clean_loss"):
            optional(check_callable, name, getattr(self, name))
        optional(check_kind, "attack", self.attack, PuzzleMixConfig)
        numbers = {"probability": (0.0, 1.0), "clean_weight": (0.0, LARGEST)}
        settle(self, numbers=numbers, counts={"seed": (0, MOST_SEED)})
        smoothing = check_number("label_smoothing", self.label_smoothing, 0, 1, below=True)
        object.__setattr__(self, "label_smoothing", smoothing)
        scale = check_number("saliency_scale", self.saliency_scale, 0, 1, above=True)
        object.__setattr__(self, "saliency_scale", scale)
        if self.attack is not None and self.saliency is not None:
            raise ValueError("adversarial settings use the live model's gradient: use them with saliency='live'")
        if scale < 1 and (self.saliency is not None or self.clean_weight or self.attack is not None):
            raise ValueError(
                f"saliency_scale is {scale:g}: a smaller saliency pass is for saliency='live' alone; clean_weight and the "
                "attack need the full pass anyway"
            )
        if smoothing and (self.loss is not None or self.clean_loss is not None):
            raise ValueError("label_smoothing belongs to a loss of your own; set it there and leave it 0 here")
        mean, std = check_normalisation("mean", self.mean, "std", self.std)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @property
    def of_clean(self) -> Loss | None:
        """Loss of the clean term."""
        return self.clean_loss or self.loss
