"""Mixing with the weights of this step: two hooks on the model, entered with its training forward.

A data collator runs in loader workers and a batch ahead, so the model it knows is stale or frozen. Here the batch travels
unmixed; when the model's training forward is entered, the saliency is taken, the batch is mixed where it lies, and the
output leaves with the soft-label loss. Evaluation passes through untouched.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .. import distributed, seeding
from ..saliency import input_gradient, main_input, saliency_map, unwrapped
from ..settings import (
    LARGEST,
    MOST_SEED,
    check_callable,
    check_config,
    check_int,
    check_kind,
    check_number,
    optional,
    settle,
)
from .adversarial import finish_attack, start_attack
from .clean import clean_pass
from .config import PuzzleMixConfig, check_normalisation
from .loss import row_losses, soft_targets
from .result import MixResult

logger = logging.getLogger(__name__)

Mixer = Callable[..., MixResult]  # (images, targets, saliency, generator); `shown=` too for Algorithm 2
SALIENCY_KEY = "mixup_saliency"  # carries a data set's maps from the collator to the hook

_INSTALLED: WeakKeyDictionary[nn.Module, LiveMixing] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class LiveOptions:
    """What happens around the mixer in a training forward.

    Args:
        saliency (`callable`, optional): `f(images (B, C, H, W), targets (B, classes)) -> (B, H, W)`, values >= 0, instead
            of the model's own input gradient. Called without gradients, on the model's device.
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
        ValueError: out of range, `clean_weight` or `attack` with a `saliency` callable, or one of `mean` and `std` alone.
        TypeError: `saliency` or `augmentation` cannot be called.
    """

    saliency: Callable[[Tensor, Tensor], Tensor] | None = None
    augmentation: Callable[[Tensor], Tensor] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    attack: PuzzleMixConfig | None = None
    probability: float = 1.0
    clean_weight: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("saliency", "augmentation"):
            optional(check_callable, name, getattr(self, name))
        optional(check_kind, "attack", self.attack, PuzzleMixConfig)
        numbers = {"probability": (0.0, 1.0), "clean_weight": (0.0, LARGEST)}
        settle(self, numbers=numbers, counts={"seed": (0, MOST_SEED)})
        smoothing = check_number("label_smoothing", self.label_smoothing, 0, 1, below=True)
        object.__setattr__(self, "label_smoothing", smoothing)
        if (self.clean_weight or self.attack is not None) and self.saliency is not None:
            raise ValueError(
                "clean_weight and adversarial settings use the live model's gradient: use them with saliency='live'"
            )
        mean, std = check_normalisation("mean", self.mean, "std", self.std)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)


@dataclass
class _Step:
    """What a training forward leaves for its loss."""

    targets: Tensor
    inputs: int
    items: Tensor | int | None
    clean: Tensor | None


class LiveMixing:
    """Installs a mixer on a model's training forward.

    In training mode the hooks take the labels out of the call, compute the saliency, mix, let the model run on the mixed
    batch, and put the soft-label loss into its output: divided by `num_items_in_batch` where Trainer passes it, else the
    mean over the batch. In eval mode they do nothing. The model's weights, modes, random streams and
    `config.problem_type` are as if the hooks were not there.

    Args:
        mixer: `f(images (B, C, H, W), targets (B, classes), saliency (B, H, W), generator) -> MixResult`.
        options: see `LiveOptions`.

    Source: Algorithm 2 and section 3.5 (the order of saliency, mixing and loss in a step).
    Differs: spectrograms (B, time, mel) are seen by the mixer as (B, 1, time, mel).
    Cost: one forward and one backward to the inputs, and the mixer.

    Example:
        >>> live = LiveMixing(mixer)  # doctest: +SKIP
        >>> live.install(model)  # doctest: +SKIP
    """

    def __init__(self, mixer: Mixer, options: LiveOptions | None = None) -> None:
        self.mixer: Mixer = check_callable("mixer", mixer)
        self.options = check_config(options, LiveOptions, "options")
        self.last_result: MixResult | None = None
        self.last_inputs: Tensor | None = None
        self.keep_result = False
        self.clean_backward: Callable[[Tensor], None] | None = None  # set by the Trainer mixin
        self.batches = self.samples = 0
        self._unmixed: Tensor | int = 0
        self._enabled, self._range_checked = True, False
        self._step: _Step | None = None
        self._model: ReferenceType[nn.Module] | None = None
        self._handles: list[Any] = []
        self._random: torch.Generator | None = None
        self._epoch = 0

    @property
    def _generator(self) -> torch.Generator:
        # made at the first step: before it the process may not know its rank
        if self._random is None:
            self._random = seeding.generator(self.options.seed, epoch=self._epoch, rank=process_rank())
        return self._random

    @property
    def installed(self) -> bool:
        """Whether the hooks sit on a model that still exists."""
        return bool(self._handles) and self._model is not None and self._model() is not None

    @property
    def unmixed(self) -> int:
        """Outputs left as they were so far: zero or non-finite saliency, or no partner."""
        return int(self._unmixed)

    def set_epoch(self, epoch: int) -> None:
        """Start the random stream of (seed, epoch, rank); call it when training resumes in a later epoch."""
        self._epoch, self._random = check_int("epoch", epoch, 0), None

    def install(self, model: nn.Module) -> None:
        """Put the hooks on `model`; a second call does nothing, and another mixing on the same model is taken off.

        Raises:
            ValueError: `nn.DataParallel`, or hooks that sit on another model.
            TypeError: not a module.
        """
        model = unwrapped(model)
        before = _INSTALLED.get(model)
        if before is self and self._handles:
            return
        if self.installed:
            raise ValueError("this mixing is installed on another model; call remove() first")
        if before is not None:
            logger.info("mixing of an earlier collator is taken off the model")
            before.remove()
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, with_kwargs=True),
        ]
        self._model = ref(model)
        _INSTALLED[model] = self

    def remove(self) -> None:
        """Take the hooks off; the model is as before. Does nothing where none are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        model = self._model() if self._model is not None else None
        if model is not None and _INSTALLED.get(model) is self:
            del _INSTALLED[model]
        self._model = self._step = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No mixing inside: training forwards see what they are given."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._step = None
        maps = kwargs.get(SALIENCY_KEY)
        kwargs = {name: value for name, value in kwargs.items() if name != SALIENCY_KEY}
        if not (module.training and self._enabled):
            return args, kwargs
        if getattr(module, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel runs this forward on copies of the model in threads; mixing cannot follow it there. "
                "Start one process per GPU (torchrun, accelerate launch), or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
            )
        if args:
            kwargs = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
        labels, items = kwargs.pop("labels", None), kwargs.pop("num_items_in_batch", None)
        if labels is None:
            raise ValueError(
                "a training forward without labels reached the model that a mixup collator is installed on. "
                "Trainer(compute_loss_func=...) and label_smoothing_factor take the labels away: leave them unset and "
                "give the collator label_smoothing=. For forwards that shall not mix: `with collator.paused():`"
            )
        name = main_input(module, kwargs)
        kwargs[name], self._step = self._mix(module, name, kwargs, labels, items, maps)
        return (), kwargs

    def _mix(
        self,
        module: nn.Module,
        name: str,
        kwargs: dict[str, Any],
        labels: Tensor,
        items: Tensor | int | None,
        maps: Tensor | None,
    ) -> tuple[Tensor, _Step]:
        given, options = kwargs[name], self.options
        images = as_images(given, name)
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} inputs but {len(labels)} labels; give one label per input")
        targets = soft_targets(labels, _num_labels(module))
        if options.augmentation is not None:
            images = self._augment(images, options.augmentation)
        if options.probability < 1 and float(torch.rand((), generator=self._generator)) >= options.probability:
            return images.reshape(given.shape), _Step(targets, len(images), items, None)
        self._check_range(images)
        attack = None if options.attack is None else start_attack(images.float(), options.attack, self._generator)
        seen = images if attack is None else attack.images
        clean: Tensor | None = None
        if maps is not None:
            saliency = maps.to(images.device).float()
        elif options.saliency is not None:
            with torch.no_grad():
                saliency = options.saliency(images, targets).float()
        else:
            inputs = {**kwargs, name: seen.reshape(given.shape).to(given.dtype)}
            if options.clean_weight:
                found = clean_pass(module, inputs, targets, self._clean_backward(len(images), items))
                clean, gradient = found.loss, found.gradient
            else:
                gradient = input_gradient(module, inputs, targets)
            saliency = saliency_map(gradient)
        if saliency.shape != images.shape[:1] + images.shape[2:]:
            raise ValueError(
                f"saliency has shape {tuple(saliency.shape)} for inputs {tuple(given.shape)}; give one map each"
            )
        shown: dict[str, Any] = {}
        if attack is not None and options.attack is not None:
            gradient = gradient.reshape(images.shape).float()
            shown["shown"] = finish_attack(images.float(), attack, gradient, options.attack)
        mixer = getattr(self.mixer, "spectrogram", self.mixer) if given.ndim == 3 else self.mixer
        with torch.no_grad():
            result = mixer(images.float(), targets, saliency, self._generator, **shown)
        self._count(result, images)
        mixed = result.images.to(given.dtype).reshape(-1, *given.shape[1:])
        return mixed, _Step(result.targets, len(images), items, clean)

    def _check_range(self, images: Tensor) -> None:
        """Once: pixels outside [0, 1] need mean and std where the method reasons about pixels."""
        if self._range_checked or self.options.mean is not None:
            return
        self._range_checked = True
        low, high = (float(value) for value in images.aminmax())
        if low >= -0.01 and high <= 1.01:
            return
        if self.options.attack is not None:
            raise ValueError(
                f"inputs run from {low:.3g} to {high:.3g}; the attack needs pixels in [0, 1]: set image_mean and image_std "
                "of the config to those of the image processor"
            )
        if images.shape[1] == 3 and getattr(self.mixer, "needs_pixels", False):
            logger.warning(
                "inputs run from %.3g to %.3g: set image_mean and image_std of the config to those of the image processor, "
                "so that the smoothness of the mix is measured on pixels in [0, 1]",
                low,
                high,
            )

    def _augment(self, images: Tensor, augmentation: Callable[[Tensor], Tensor]) -> Tensor:
        mean, std = (
            torch.as_tensor(value, device=images.device, dtype=images.dtype).reshape(1, -1, 1, 1)
            if value is not None
            else default
            for value, default in ((self.options.mean, 0.0), (self.options.std, 1.0))
        )
        pixels = images * std + mean
        if self.options.mean is not None:
            pixels = pixels.clamp(0, 1)
        changed = torch.stack([augmentation(image) for image in pixels])
        if changed.shape != images.shape:
            raise ValueError(
                f"augmentation turned {tuple(images.shape)} into {tuple(changed.shape)}; the shape must stay"
            )
        return (changed - mean) / std

    def _count(self, result: MixResult, images: Tensor) -> None:
        self.batches += 1
        self.samples += len(result.targets)
        self._unmixed = self._unmixed + result.unmixed.sum()  # stays on the device until it is read
        self.last_result, self.last_inputs = (result, images) if self.keep_result else (None, None)

    def _clean_backward(self, inputs: int, items: Tensor | int | None) -> Callable[[Tensor], None] | None:
        backward = self.clean_backward
        if backward is None:
            return None
        scale = self.options.clean_weight * (1.0 if items is None else inputs / items)
        return lambda loss: backward(loss * scale)

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        step, self._step = self._step, None
        if step is None:
            return None
        logits = output["logits"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output
        loss = row_losses(logits, step.targets, self.options.label_smoothing).mean()
        if step.clean is not None:
            loss = loss + self.options.clean_weight * step.clean
        if step.items is not None:
            # this batch's share of all samples under gradient accumulation; Co-Mixup may put out more or fewer than came in
            loss = loss * (step.inputs / step.items)
        if isinstance(output, dict):
            rest = {key: value for key, value in output.items() if key != "loss"}
            return type(output)(loss=loss, **rest)
        return (loss, *output) if isinstance(output, tuple) else {"loss": loss, "logits": output}


def process_rank() -> int:
    """Index of this process, by torch.distributed where it runs (some launchers set no environment variable)."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if running else distributed.rank()


def installed_on(model: nn.Module) -> LiveMixing | None:
    """The mixing whose hooks sit on `model` (looked up under DDP and `torch.compile`), or None."""
    return _INSTALLED.get(unwrapped(model))


def as_images(inputs: Tensor, name: str) -> Tensor:
    """Inputs as (B, C, H, W); a spectrogram (B, time, mel) has one channel."""
    if inputs.ndim not in (3, 4):
        raise ValueError(
            f"{name} has shape {tuple(inputs.shape)}; mixing needs images (B, C, H, W) or spectrograms (B, time, mel)"
        )
    if len(inputs) == 0:
        raise ValueError(f"the batch is empty: {name} has shape {tuple(inputs.shape)}; give at least one sample")
    return inputs.detach() if inputs.ndim == 4 else inputs.detach()[:, None]


def _num_labels(model: nn.Module) -> int:
    for owner, name in ((getattr(model, "config", None), "num_labels"), (model, "num_labels"), (model, "num_classes")):
        count = getattr(owner, name, None)
        if isinstance(count, int):
            return count
    raise ValueError(f"{type(model).__name__} does not say how many classes it has; set model.num_labels")
