"""Mixing as the object a user hands to a stock Trainer: a data collator.

With a model the batches leave unmixed, and `MixupCallback`, which every Trainer made after this module was loaded has, puts
the mixing on the model that is trained when training begins, and takes it off when it ends.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from transformers import default_data_collator

from .. import _compat
from ..saliency import main_input, unwrapped
from ..settings import brief, check_callable, check_config, check_flag, check_int, optional
from .batches import batch_generator, collated, maps_of
from .callback import MixupCallback
from .co_mixup_config import CoMixupConfig
from .config import PuzzleMixConfig
from .images import as_images
from .live import LABELS_KEY, SALIENCY_KEY, LiveMixing, installed_on
from .loss import soft_targets
from .mixers import CoMixer, PuzzleMixer, scheduled
from .options import LiveOptions
from .result import MixResult
from .schedule import MixupSchedule
from .statistics import MixupStatistics, Tally

logger = logging.getLogger(__name__)
_SLOTS = 65  # the main process, and loader workers (further ones share)
_compat.give_every_trainer(MixupCallback)


class _MixupCollator:
    """What the collators share: collate, and mix either in the model's training forward or here."""

    def __init__(
        self,
        mixer: Any,
        model: nn.Module | None,
        *,
        saliency: str | Callable[[Tensor, Tensor], Tensor] = "live",
        num_labels: int | None = None,
        collate_fn: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator,
        **options: Any,
    ) -> None:
        self.mixer, self.collate_fn = mixer, check_callable("collate_fn", collate_fn)
        self.num_labels = optional(check_int, "num_labels", num_labels, 1)
        if not isinstance(saliency, str):
            check_callable("saliency", saliency, "give 'live', the name of a column, or a function")
        elif not saliency.strip():
            raise ValueError("saliency is empty; give 'live', the name of a column, or a function")
        self.column = saliency if isinstance(saliency, str) and saliency != "live" else None
        self.options = LiveOptions(saliency=None if isinstance(saliency, str) else saliency, **options)
        self.live: LiveMixing | None = None
        # shared with loader workers that live on: the epoch, and whether a model is mixing now
        self._epoch, self._on = (torch.zeros(1, dtype=torch.int64).share_memory_() for _ in range(2))
        self._warned = False
        self._mixes_here = model is None
        self._tally = Tally.shared(_SLOTS)  # of every process that collates
        self._given = ref(unwrapped(model)) if model is not None else None
        if model is None:
            self._check_worker_mode()
        elif self.column is not None and (self.options.attack is not None or self.options.saliency_scale < 1):
            raise ValueError(
                "adversarial settings and saliency_scale use the live model's gradient: use them with saliency='live'"
            )
        else:
            self.live = LiveMixing(mixer, self.options)

    def _check_worker_mode(self) -> None:
        if self.column is None:
            raise ValueError(
                "model is None: give the model (saliency is taken in its training forward), or saliency='column' of a data "
                "set that holds maps"
            )
        if self.num_labels is None:
            raise ValueError(f"without a model num_labels must be the number of classes, got {self.num_labels!r}")
        if self.options.clean_weight or self.options.attack is not None or self.options.augmentation is not None:
            raise ValueError(
                "clean_weight, adversarial settings and augmentation need the model; without it augment in the data set "
                "and set them to 0 or None: PuzzleMixConfig(clean_weight=0), CoMixupConfig(clean_weight=0)"
            )
        if self.options.label_smoothing or self.options.loss is not None or self.options.clean_loss is not None:
            raise ValueError(
                "the loss is Trainer's here: compute_loss_func=functools.partial(soft_target_loss, label_smoothing=...)"
            )

    @property
    def statistics(self) -> MixupStatistics | None:
        """How much mixing there was so far; None: nothing was mixed yet. Trainer logs it as `mixup_...`."""
        return self.tally.statistics()

    @property
    def tally(self) -> Tally:
        """The running sums behind `statistics`."""
        return self.live.tally if self.live is not None else self._tally

    @property
    def seen(self) -> int:
        """Outputs made so far, mixed or not, over this process and its loader workers."""
        return self.tally.outputs

    @property
    def unmixed(self) -> int:
        """Outputs among `seen` that show one input only."""
        return self.tally.unmixed

    @property
    def last_result(self) -> MixResult | None:
        """The last batch's `MixResult`, for `plot_mixup`; kept where `collator.keep_result` is True."""
        return self.live.last_result if self.live is not None else None

    @property
    def last_inputs(self) -> Tensor | None:
        """The images (B, C, H, W) that `last_result` was made of."""
        return self.live.last_inputs if self.live is not None else None

    @property
    def keep_result(self) -> bool:
        """Whether the last result (a batch of inputs on the model's device) is kept; False at first."""
        return self.live is not None and self.live.keep_result

    @keep_result.setter
    def keep_result(self, keep: bool) -> None:
        keep = check_flag("keep_result", keep)
        if self.live is None:
            raise ValueError("batches are mixed in loader workers: no result can be kept; give the collator the model")
        self.live.keep_result, self.live.last_result, self.live.last_inputs = keep, None, None

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is; Trainer needs no such call.

        With a model: starts the epoch's random stream, and tells a schedule where it is. Without: makes equal batches of
        different epochs mix differently; needed only where the data are not shuffled.
        """
        self._epoch[0] = epoch = check_int("epoch", epoch, 0)
        if self.live is not None:
            self.live.set_epoch(epoch)

    def install(self, model: nn.Module | None = None) -> None:
        """Begin to mix: put the hooks on `model`, by default the one given at construction. Trainer needs no such call.

        Raises:
            ValueError: there is none, the hooks sit elsewhere, or another collator's hooks sit on this model.
        """
        if self.live is None:
            raise ValueError("batches are mixed in loader workers; there is nothing to install")
        model = model if model is not None else self._given() if self._given is not None else None
        if model is None:
            raise ValueError("the model given at construction is gone; say which: collator.install(model)")
        self.live.install(model)
        self._on[0] = 1

    def take(self, model: nn.Module) -> None:
        """`install`, on whatever model a Trainer begins to train: hooks that a broken-off training left behind go first."""
        if self.live is None:
            return
        self.live.remove()
        other = installed_on(model)
        if other is not None:
            logger.warning("the mixing that another collator left on this model is taken off")
            other.remove()
        self.install(model)

    def remove(self) -> None:
        """Take the hooks off the model; the collator collates plain batches from then on."""
        self._on[0] = 0
        if self.live is not None:
            self.live.remove()

    @contextmanager
    def mixing(self, model: nn.Module | None = None) -> Iterator[None]:
        """Training forwards of `model` (default: the one given) are mixed inside: for loops of one's own."""
        self.install(model)
        try:
            yield
        finally:
            self.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Training forwards inside are not mixed (model given only)."""
        if self.live is None:
            raise ValueError("batches are mixed in loader workers, ahead of time: they cannot be paused")
        with self.live.paused():
            yield

    def state_dict(self) -> dict[str, Any]:
        """Place in the random stream, for `accelerator.register_for_checkpointing(collator)`."""
        return self.live.state_dict() if self.live is not None else {"epoch": int(self._epoch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._epoch[0] = check_int("epoch", state["epoch"], 0)
        if self.live is not None:
            self.live.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a spawned loader worker: never the model or its hooks."""
        return {**self.__dict__, "live": None, "_given": None}

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """One batch; mixed here only where there is no model and every row has a saliency map."""
        maps: Tensor | None = None
        if not isinstance(features, list | tuple) or not len(features):
            raise TypeError(f"features must be a list of rows, at least one, got {brief(features)}")
        if self.column is not None and all(isinstance(row, Mapping) for row in features):
            held = [self.column in row for row in features]
            if any(held) and not all(held):
                raise ValueError(
                    f"{held.count(False)} of {len(held)} rows lack the column {self.column!r}; fill it or drop it"
                )
            if all(held):
                maps = maps_of([row[self.column] for row in features], self.column)
                features = [{name: value for name, value in row.items() if name != self.column} for row in features]
            elif self.tally.outputs == 0:  # later ones belong to an evaluation
                self._warn_once(
                    f"no column {self.column!r} in a batch: it is left unmixed. That is right for evaluation data; in "
                    "training set remove_unused_columns=False"
                )
        batch = dict(collated(features) if self.collate_fn is default_data_collator else self.collate_fn(features))
        if self._mixes_here:
            return batch if maps is None else self._mix(batch, maps)
        if not int(self._on):
            given = self._given() if self._given is not None else None
            if given is not None and given.training:
                self._warn_once(
                    "a batch is collated while the model is in training mode and nothing mixes it. Make the Trainer after the "
                    "collator; in a loop of your own train inside `with collator.mixing(model):`"
                )
            return batch
        more = {} if maps is None else {SALIENCY_KEY: maps}
        return {**batch, **more, **({LABELS_KEY: batch["labels"]} if "labels" in batch else {})}

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(message)

    def _mix(self, batch: dict[str, Any], maps: Tensor) -> dict[str, Any]:
        if self.num_labels is None or "labels" not in batch:
            raise ValueError(f"the batch holds {list(batch)}, not 'labels'; rows need a column 'label' or 'labels'")
        name = main_input(nn.Identity(), batch)
        images = as_images(batch[name], name)
        if maps.shape != images.shape[:1] + images.shape[2:]:
            raise ValueError(
                f"saliency has shape {tuple(maps.shape)} for inputs {tuple(batch[name].shape)}; give one map each"
            )
        generator = batch_generator(self.options.seed, int(self._epoch), batch["labels"], maps)
        targets = soft_targets(batch["labels"], self.num_labels)
        if self.options.probability < 1 and float(torch.rand((), generator=generator)) >= self.options.probability:
            return {**batch, "labels": targets}
        mixer = getattr(self.mixer, "spectrogram", self.mixer) if batch[name].ndim == 3 else self.mixer
        result = mixer(images.float(), targets, maps, generator)
        worker = get_worker_info()
        self._tally.add(result, len(images), slot=0 if worker is None else min(1 + worker.id, _SLOTS - 1))
        batch[name] = result.images.to(batch[name].dtype).reshape(-1, *batch[name].shape[1:])
        return {**batch, "labels": result.targets}


class DataCollatorForPuzzleMix(_MixupCollator):
    """Puzzle Mix for a stock `Trainer`: pass it as `data_collator`, with integer labels, and nothing else changes.

    With a model, batches leave the collator unmixed. When training begins, two hooks are put on the model that is trained,
    whichever was given here (`model_init` works); they take the saliency, mix, and set targets and loss when its *training*
    forward is entered, with the weights of that very step, and they go when training ends. Evaluation and prediction see
    plain batches. The output's `labels` are the mixed targets, (B, classes): a `compute_loss` or `compute_loss_func` of
    one's own reads those; one that trains on the labels of the unmixed batch is refused at its first step.

    Loops of one's own train inside `with collator.mixing(model):`. Lightning: `collator.install(self.model)` in
    `on_fit_start`, `collator.set_epoch(self.current_epoch)` in `on_train_epoch_start`, `collator.remove()` in `on_fit_end`.

    With `model=None` and a column of saliency maps, batches are mixed in the loader workers; then
    `Trainer(compute_loss_func=soft_target_loss, args with remove_unused_columns=False)`, and the evaluation data must not
    have that column. What a batch becomes depends on `seed`, the epoch set and the batch alone, however many workers there are.

    Labels may be classes, several at once (a model of `problem_type` "multi_label_classification"), or maps (B, H, W) for a
    segmentation model, which follow the image.

    Args:
        model (`nn.Module`, optional): the classifier that Trainer trains (before or after DDP and `torch.compile` wrap it).
        config (`PuzzleMixConfig`, optional): default `PuzzleMixConfig()`.
        saliency (`str` or callable, default `"live"`): `"live"`: the model's input gradient at this step; a callable: see
            `LiveOptions`; any other string: a column of the data set that holds (H, W) maps.
        num_labels (`int`, optional): number of classes, for `model=None`.
        collate_fn (callable, optional): turns rows into a batch; default `transformers.default_data_collator`.
        options: `loss`, `clean_loss`, `saliency_scale`, `augmentation`, `label_smoothing` and `seed` of `LiveOptions`; the
            rest of them is in the config.

    Raises:
        ValueError: `nn.DataParallel`, no model without a column, or options that exclude each other.
        TypeError: not a module, or an unknown option.

    Source: chapter 3 (Eqs. 3.2 to 3.5, Algorithms 1 and 2, section 3.5).
    Cost: a second forward and a backward to the inputs per step, and the mixing.

    Example:
        >>> collator = DataCollatorForPuzzleMix(model, PuzzleMixConfig.cifar100())  # doctest: +SKIP
        >>> Trainer(model=model, args=args, train_dataset=train, data_collator=collator).train()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module | None, config: PuzzleMixConfig | None = None, **options: Any) -> None:
        self.config = config = check_config(config, PuzzleMixConfig)
        attack = config if config.adversarial_probability else None
        super().__init__(PuzzleMixer(config), model, attack=attack, **_from_config(config), **options)


class DataCollatorForCoMixup(_MixupCollator):
    """Co-Mixup for a stock `Trainer`: pass it as `data_collator`, with integer labels, and nothing else changes.

    All of `DataCollatorForPuzzleMix` holds here, but for maps as labels. Each part of the batch may come out with another
    number of samples (`outputs_per_part`); the loss is that of the batch's share all the same.

    Args:
        model (`nn.Module`, optional): the classifier that Trainer trains.
        config (`CoMixupConfig`, optional): default `CoMixupConfig()`, the reference code's recipe with its clean loss.
        saliency, num_labels, collate_fn, options: as `DataCollatorForPuzzleMix`.

    Raises:
        ValueError, TypeError: as `DataCollatorForPuzzleMix`.

    Source: chapter 4 (Eqs. 4.1 and 4.2, Algorithm 3).
    Cost: a second forward and backward per step (with the clean loss a full one, whose gradient is used), and the mixing.

    Example:
        >>> collator = DataCollatorForCoMixup(model, CoMixupConfig.cifar100())  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module | None, config: CoMixupConfig | None = None, **options: Any) -> None:
        moved = {new: options.pop(old) for old, new in _MOVED_TO_CONFIG.items() if old in options}
        if moved:
            warnings.warn(
                f"{', '.join(moved)} are settings of CoMixupConfig; as options of the collator they go in 0.3",
                DeprecationWarning,
                stacklevel=2,
            )
            config = CoMixupConfig(**moved) if config is None else replace(check_config(config, CoMixupConfig), **moved)
        self.config = config = check_config(config, CoMixupConfig)
        super().__init__(CoMixer(config), model, **_from_config(config), **options)


_MOVED_TO_CONFIG = {
    "clean_weight": "clean_weight",
    "probability": "probability",
    "mean": "image_mean",
    "std": "image_std",
}


class DataCollatorForMixup(_MixupCollator):
    """Several methods in turn for a stock `Trainer`: Puzzle Mix, Co-Mixup, CutMix and input mixup, as a schedule says.

    All of `DataCollatorForPuzzleMix` holds here but for columns of saliency maps; a batch that CutMix or input mixup gets,
    or nobody, costs no saliency pass.

    Args:
        model (`nn.Module`): the classifier that Trainer trains.
        schedule (`MixupSchedule`, optional): default `MixupSchedule()`.
        options: `collate_fn`, `saliency` (`"live"` or a callable), and those of `DataCollatorForPuzzleMix`.

    Raises:
        ValueError, TypeError: as `DataCollatorForPuzzleMix`.

    Source: see `MixupSchedule`.
    Cost: as the method that is drawn.

    Example:
        >>> schedule = MixupSchedule(probabilities={"puzzle_mix": 0.5, "cutmix": 0.5}, off_epoch=55)
        >>> collator = DataCollatorForMixup(model, schedule)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, schedule: MixupSchedule | None = None, **options: Any) -> None:
        self.schedule = schedule = check_config(schedule, MixupSchedule, "schedule")
        if model is None:
            raise TypeError("model is None; a schedule mixes in the model's training forward: give the model")
        puzzle, co = schedule.puzzle_mix or PuzzleMixConfig(), schedule.co_mixup or CoMixupConfig()
        scaled = puzzle if puzzle.image_mean is not None else co
        super().__init__(
            scheduled(schedule),
            model,
            mean=scaled.image_mean,
            std=scaled.image_std,
            clean_weight=schedule.clean_weight,
            **options,
        )


def _from_config(config: PuzzleMixConfig | CoMixupConfig) -> dict[str, Any]:
    """The options that are settings of a method."""
    return {
        "mean": config.image_mean,
        "std": config.image_std,
        "probability": config.probability,
        "clean_weight": config.clean_weight,
    }
