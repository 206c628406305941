"""Mixing with the weights of this step: two hooks on the model, entered with its training forward.

A data collator runs in loader workers and a batch ahead, so the model it knows is stale or frozen. Here the batch travels
unmixed; when the model's training forward is entered, the saliency is taken, the batch is mixed where it lies, and the
output leaves with the mixed targets and their loss. Evaluation passes through untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .. import distributed, seeding
from ..saliency import main_input, objective_gradient, saliency_map, unwrapped
from ..settings import check_callable, check_config, check_int
from .adversarial import finish_attack, start_attack
from .clean import CleanPass, clean_pass
from .images import as_images, augmented, check_range
from .options import LiveOptions
from .outputs import with_targets
from .result import MixResult
from .schedule import Scheduled
from .statistics import Tally
from .targets import Targets

Mixer = Callable[..., MixResult]  # (images, targets, saliency, generator); `shown=` too for Algorithm 2
SALIENCY_KEY = "mixup_saliency"  # carries a data set's maps from the collator to the hook
LABELS_KEY = "mixup_labels"  # the labels once more, for losses that take `labels` out of the batch
_FORWARDS = 2**20  # at most, of one optimizer step

_INSTALLED: WeakKeyDictionary[nn.Module, LiveMixing] = WeakKeyDictionary()


@dataclass
class _Step:
    """What a training forward leaves for its output."""

    targets: Targets
    inputs: int
    items: Tensor | int | None
    clean: Tensor | None


class _Hook:
    """A hook that stays behind: pickled or copied with a model, it does nothing."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __reduce__(self) -> str | tuple[Any, ...]:
        return _no_hook, ()

    def __deepcopy__(self, _: Any) -> Any:
        return nothing


def nothing(*_: Any) -> None:
    """A hook that does nothing."""


def _no_hook() -> Any:
    return nothing


class LiveMixing:
    """Installs a mixer on a model's training forward.

    In training mode the hooks take the labels out of the call, compute the saliency, mix, let the model run on the mixed
    batch, and put into its output the mixed targets (`labels`) and their loss: divided by `num_items_in_batch` where
    Trainer passes it, else the mean over the batch. In eval mode they do nothing. The model's weights, modes, random
    streams and `config.problem_type` are as if the hooks were not there; a pickled or copied model has none of them.

    Random numbers follow from (seed, epoch, rank, optimizer step, forward within it), so that a resumed run draws what the
    whole one drew: `start_step` (Trainer's callback calls it), `set_epoch`, or `state_dict` for loops of one's own.

    Args:
        mixer: `f(images (B, C, H, W), targets (B, classes), saliency (B, H, W), generator) -> MixResult`. One that has
            `needs_saliency = False` gets None and costs no saliency pass.
        options: see `LiveOptions`.

    Source: Algorithm 2 and section 3.5 (the order of saliency, mixing and loss in a step).
    Differs: spectrograms (B, time, mel) are seen by the mixer as (B, 1, time, mel).
    Cost: one forward and one backward to the inputs, and the mixer.

    Example:
        >>> live = LiveMixing(mixer)  # doctest: +SKIP
        >>> live.install(model)  # doctest: +SKIP
    """

    def __init__(self, mixer: Mixer | Scheduled, options: LiveOptions | None = None) -> None:
        self.mixer: Any = mixer if isinstance(mixer, Scheduled) else check_callable("mixer", mixer)
        self.options = check_config(options, LiveOptions, "options")
        self.last_result: MixResult | None = None
        self.last_inputs: Tensor | None = None
        self.keep_result = False
        self.clean_backward: Callable[[Tensor], None] | None = None  # set by the Trainer mixin
        self.batches = 0
        self.tally = Tally()
        self._enabled, self._range_checked = True, False
        self._step: _Step | None = None
        self._model: ReferenceType[nn.Module] | None = None
        self._handles: list[Any] = []
        self._epoch = self._global_step = self._forward = 0
        self._passed = 0.0  # epochs so far, for schedules

    @property
    def installed(self) -> bool:
        """Whether the hooks sit on a model that still exists."""
        return bool(self._handles) and self._model is not None and self._model() is not None

    @property
    def samples(self) -> int:
        """Outputs made so far."""
        return self.tally.outputs

    @property
    def unmixed(self) -> int:
        """Outputs that show one input only, so far."""
        return self.tally.unmixed

    def set_epoch(self, epoch: int) -> None:
        """Start the random stream of (seed, epoch, rank), in loops that are not Trainer's."""
        self._epoch = check_int("epoch", epoch, 0)
        self._global_step, self._forward, self._passed = 0, 0, float(epoch)

    def start_step(self, step: int, epochs: float) -> None:
        """Say which optimizer step begins, and how many epochs have passed: draws follow from it."""
        self._global_step, self._forward, self._passed = check_int("step", step, 0), 0, epochs

    def state_dict(self) -> dict[str, Any]:
        """Where in its random stream the mixing is: `accelerator.register_for_checkpointing(collator)` saves it."""
        return {
            "epoch": self._epoch,
            "step": self._global_step,
            "forward": self._forward,
            "passed": self._passed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._epoch, self._global_step, self._forward = (
            check_int(name, state[name], 0) for name in ("epoch", "step", "forward")
        )
        self._passed = float(state["passed"])

    def _generator(self) -> torch.Generator:
        place = self._global_step * _FORWARDS + self._forward
        self._forward += 1
        # the rank is asked for here: at construction the process may not know it
        return seeding.generator(self.options.seed, epoch=self._epoch, rank=process_rank(), worker=place)

    def install(self, model: nn.Module) -> None:
        """Put the hooks on `model`; a second call does nothing.

        Raises:
            ValueError: `nn.DataParallel`, hooks that sit on another model, or another mixing's hooks on this one.
            TypeError: not a module.
        """
        model = unwrapped(model)
        before = _INSTALLED.get(model)
        if before is self and self._handles:
            return
        if self.installed:
            raise ValueError("this mixing is installed on another model; call remove() first")
        if before is not None:
            raise ValueError(
                "another mixing is installed on this model, and a batch can be mixed by one only; call its remove() first"
            )
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True),
            model.register_forward_hook(_Hook(self._leave), with_kwargs=True),
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
        self.tally.warn()

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
        maps, spare = kwargs.get(SALIENCY_KEY), kwargs.get(LABELS_KEY)
        kwargs = {name: value for name, value in kwargs.items() if name not in (SALIENCY_KEY, LABELS_KEY)}
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
        labels = spare if labels is None else labels
        if labels is None:
            raise ValueError(
                "a training forward without labels reached the model that a mixup collator is installed on. Batches of "
                "the collator carry them twice, so that a loss function may take them away; Trainer's "
                "label_smoothing_factor cannot be used: give the collator label_smoothing=. For forwards that shall not "
                "mix: `with collator.paused():`"
            )
        name = main_input(module, kwargs)
        kwargs[name], self._step = self._mix(module, name, kwargs, labels, items, maps)
        if self._step.targets.form == "pixels":  # the model's own loss
            kwargs |= {"labels": self._step.targets.values} | ({} if items is None else {"num_items_in_batch": items})
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
        given, options, generator = kwargs[name], self.options, self._generator()
        images = as_images(given, name)
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} inputs but {len(labels)} labels; give one label per input")
        targets = Targets.of(labels, module)
        mixer = self.mixer.drawn(generator, self._passed) if isinstance(self.mixer, Scheduled) else self.mixer
        if targets.form == "pixels" and mixer is not None and not getattr(mixer, "moves_maps", False):
            raise ValueError("labels are maps (B, H, W), which Puzzle Mix alone can mix; use DataCollatorForPuzzleMix")
        images = augmented(images, options)
        skip = options.probability < 1 and float(torch.rand((), generator=generator)) >= options.probability
        if mixer is None or skip:
            return images.reshape(given.shape), _Step(targets, len(images), items, None)
        if not self._range_checked and options.mean is None:
            self._range_checked = True
            check_range(images, options, mixer)
        attack = None if options.attack is None else start_attack(images.float(), options.attack, generator)
        seen = images if attack is None else attack.images
        inputs = {**kwargs, name: seen.reshape(given.shape).to(given.dtype)}
        saliency, gradient, clean = self._looked_at(module, name, inputs, targets, items, maps, mixer)
        if saliency is not None and saliency.shape != images.shape[:1] + images.shape[2:]:
            raise ValueError(
                f"saliency has shape {tuple(saliency.shape)} for inputs {tuple(given.shape)}; give one map each"
            )
        shown: dict[str, Any] = {}
        if attack is not None and options.attack is not None and gradient is not None:
            gradient = gradient.reshape(images.shape).float()
            shown["shown"] = finish_attack(images.float(), attack, gradient, options.attack)
        mixer = getattr(mixer, "spectrogram", mixer) if given.ndim == 3 else mixer
        with torch.no_grad():
            result = targets.mixed(mixer(images.float(), targets.for_mixer, saliency, generator, **shown))
        self.batches += 1
        self.tally.add(result, len(images))
        self.last_result, self.last_inputs = (result, images) if self.keep_result else (None, None)
        mixed = result.images.to(given.dtype).reshape(-1, *given.shape[1:])
        return mixed, _Step(Targets(result.targets, targets.form), len(images), items, clean)

    def _looked_at(
        self,
        module: nn.Module,
        name: str,
        inputs: dict[str, Any],
        targets: Targets,
        items: Tensor | int | None,
        maps: Tensor | None,
        mixer: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Saliency (B, H, W) and gradient of the inputs, where the mixer needs them, and the clean loss, where there is one."""
        options, clean, gradient = self.options, None, None
        if options.clean_weight:
            backward = self._clean_backward(len(targets), items)
            found: CleanPass = clean_pass(module, inputs, targets.mean_loss(options.of_clean), backward)
            clean, gradient = options.clean_weight * found.loss, found.gradient
        if not getattr(mixer, "needs_saliency", True):
            return None, gradient, clean
        if maps is not None:
            return maps.to(inputs[name].device).float(), gradient, clean
        if options.saliency is not None:
            with torch.no_grad():
                return options.saliency(as_images(inputs[name], name), targets.values).float(), gradient, clean
        if gradient is None:
            mean, rows = targets.mean_loss(None), len(targets)
            small = _smaller(inputs, name, module, options)
            # the sum over the batch: each sample's gradient stands alone
            gradient = objective_gradient(module, small, lambda model, given: mean(model, given) * rows)
        saliency = saliency_map(gradient)
        if saliency.shape[1:] != inputs[name].shape[-2:]:
            saliency = nn.functional.interpolate(saliency[:, None], size=inputs[name].shape[-2:], mode="nearest")[:, 0]
        return saliency, gradient, clean

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
        targets = step.targets
        if targets.form == "pixels":
            loss = output["loss"] if isinstance(output, dict) else output[0]
            if step.clean is not None:
                loss = loss + step.clean
            if isinstance(output, tuple):
                return (loss, *output[1:])
            return with_targets(output, loss, targets.values, step.clean)
        loss = targets.loss(logits, self.options.loss, self.options.label_smoothing)
        if step.clean is not None:
            loss = loss + step.clean
        if step.items is not None:
            # this batch's share of all samples under gradient accumulation; Co-Mixup may put out more or fewer than came in
            loss = loss * (step.inputs / step.items)
        return with_targets(output, loss, targets.values, step.clean)


def _smaller(inputs: dict[str, Any], name: str, module: nn.Module, options: LiveOptions) -> dict[str, Any]:
    """The inputs with smaller images, where a cheaper saliency is asked for."""
    if options.saliency_scale == 1:
        return inputs
    images = inputs[name]
    if images.ndim != 4:
        raise ValueError(f"saliency_scale is for images (B, C, H, W), got {name} of shape {tuple(images.shape)}")
    size = [max(1, round(side * options.saliency_scale)) for side in images.shape[2:]]
    small = {**inputs, name: nn.functional.interpolate(images, size=size, mode="area")}
    if "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:  # ViT and its kind
        small["interpolate_pos_encoding"] = True
    return small


def process_rank() -> int:
    """Index of this process, by torch.distributed where it runs (some launchers set no environment variable)."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if running else distributed.rank()


def installed_on(model: nn.Module) -> LiveMixing | None:
    """The mixing whose hooks sit on `model` (looked up under DDP and `torch.compile`), or None."""
    return _INSTALLED.get(unwrapped(model))
