"""Puzzle Mix and Co-Mixup as the object a user hands to a stock Trainer: a data collator."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from transformers import default_data_collator

from .. import seeding
from ..decoding import read_rows, stacked
from ..saliency import main_input
from ..settings import brief, check_array, check_callable, check_config, check_flag, check_int, optional
from .co_mixup import co_mixup
from .co_mixup_config import CoMixupConfig
from .config import PuzzleMixConfig
from .live import SALIENCY_KEY, LiveMixing, LiveOptions, Mixer, as_images
from .loss import soft_targets
from .puzzle_mix import puzzle_mix
from .result import MixResult

logger = logging.getLogger(__name__)
_SLOTS = 65  # the main process, and loader workers (further ones share)


class _MixupCollator:
    """What both collators do: collate, and mix either in the model's training forward or here."""

    def __init__(
        self,
        mixer: Mixer,
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
        # shared, so that workers that live on see the epoch too
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._warned = False
        self._mixes_here = model is None
        # samples and unmixed samples of every process that collates; shared, so that workers' counts can be read here
        self._counts = torch.zeros(_SLOTS, 2, dtype=torch.int64).share_memory_()
        if model is None:
            self._check_worker_mode()
        elif self.column is not None and (self.options.clean_weight or self.options.attack is not None):
            raise ValueError(
                "clean_weight and adversarial settings use the live model's gradient: use them with saliency='live'"
            )
        else:
            self.live = LiveMixing(mixer, self.options)
            self.live.install(model)

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
                "and set them to 0 or None"
            )
        if self.options.label_smoothing:
            raise ValueError(
                "label_smoothing belongs to the loss here: functools.partial(soft_target_loss, label_smoothing=...)"
            )

    @property
    def seen(self) -> int:
        """Outputs made so far, mixed or not, over this process and its loader workers."""
        return self.live.samples if self.live is not None else int(self._counts[:, 0].sum())

    @property
    def unmixed(self) -> int:
        """Outputs among `seen` that were left as they were: zero or non-finite saliency, or no partner."""
        return self.live.unmixed if self.live is not None else int(self._counts[:, 1].sum())

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
        """Say which epoch it is.

        With a model: starts the epoch's random stream; needed only to repeat the draws of a run that is resumed. Without:
        makes equal batches of different epochs mix differently; needed only where the data are not shuffled.
        """
        self._epoch[0] = epoch = check_int("epoch", epoch, 0)
        if self.live is not None:
            self.live.set_epoch(epoch)

    def remove(self) -> None:
        """Take the hooks off the model; the collator collates plain batches from then on."""
        if self.live is not None:
            self.live.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Training forwards inside are not mixed (model given only)."""
        if self.live is None:
            raise ValueError("batches are mixed in loader workers, ahead of time: they cannot be paused")
        with self.live.paused():
            yield

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a spawned loader worker: never the model or its hooks."""
        return {**self.__dict__, "live": None}

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
                maps = _maps([row[self.column] for row in features], self.column)
                features = [{name: value for name, value in row.items() if name != self.column} for row in features]
            elif not self._warned and int(self._counts.sum()) == 0:  # later ones belong to an evaluation
                self._warned = True
                logger.warning(
                    "no column %r in a batch: it is left unmixed. That is right for evaluation data; in training set "
                    "remove_unused_columns=False",
                    self.column,
                )
        batch = dict(_collated(features) if self.collate_fn is default_data_collator else self.collate_fn(features))
        if maps is None:
            return batch
        return self._mix(batch, maps) if self._mixes_here else {**batch, SALIENCY_KEY: maps}

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
        slot = 0 if worker is None else min(1 + worker.id, _SLOTS - 1)
        self._counts[slot] += torch.stack([torch.tensor(len(result.targets)), result.unmixed.sum().cpu()])
        batch[name] = result.images.to(batch[name].dtype).reshape(-1, *batch[name].shape[1:])
        return {**batch, "labels": result.targets}


def _collated(rows: list[Any]) -> Mapping[str, Any]:
    """Rows of a data set as a batch; what cannot be one is told of in our words."""
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise TypeError(f"a row must be a dict of columns, got {brief(wrong)}; give collate_fn= for other rows")
    try:
        batch: Mapping[str, Any] = default_data_collator(rows)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{len(rows)} rows with the columns {sorted(map(str, rows[0]))!s:.200} make no batch ({error!s:.200}); bring them "
            "to one shape and dtype, or give collate_fn="
        ) from error
    return batch


def _maps(maps: list[Any], column: str) -> Tensor:
    """Saliency maps of one shape as one tensor."""

    def read(value: Any) -> np.ndarray:
        return check_array(f"a map in {column!r}", value, 2, finite=False).astype(np.float32)

    try:
        return torch.from_numpy(stacked(*read_rows(maps, read, what="row of the batch")[:2]))
    except TypeError as error:
        raise ValueError(f"{error}; every row needs a map (H, W) of numbers") from error


def batch_generator(seed: int, epoch: int, labels: Tensor, maps: Tensor) -> torch.Generator:
    """The random stream of a batch that is mixed from a column of maps.

    It follows from seed, epoch and the batch's own labels and maps, and from nothing else: not from torch's global seed,
    the number of loader workers or processes, nor from the batches before, so that a resumed run draws the same.

    Args:
        seed, epoch: numbers >= 0.
        labels: (B,) or (B, classes).
        maps: (B, H, W) or (B, time, mel) float32.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (labels, maps):
        digest.update(part.detach().cpu().contiguous().numpy().data)
    return seeding.generator(seed, epoch=epoch, worker=int.from_bytes(digest.digest(), "little"))


class DataCollatorForPuzzleMix(_MixupCollator):
    """Puzzle Mix for a stock `Trainer`: pass it as `data_collator`, with integer labels, and nothing else changes.

    With a model, batches leave the collator unmixed; two hooks on the model take the saliency, mix, and set the soft-label
    loss when its *training* forward is entered, with the weights of that very step. Evaluation and prediction see plain
    batches. `remove()` takes the hooks off, `paused()` suspends them.

    With `model=None` and a column of saliency maps, batches are mixed in the loader workers; then
    `Trainer(compute_loss_func=soft_target_loss, args with remove_unused_columns=False)`, and the evaluation data must not
    have that column. What a batch becomes depends on `seed`, the epoch set and the batch alone, however many workers there are.

    Args:
        model (`nn.Module`, optional): the classifier that Trainer trains (before or after DDP and `torch.compile` wrap it).
        config (`PuzzleMixConfig`, optional): default `PuzzleMixConfig()`.
        saliency (`str` or callable, default `"live"`): `"live"`: the model's input gradient at this step; a callable: see
            `LiveOptions`; any other string: a column of the data set that holds (H, W) maps.
        num_labels (`int`, optional): number of classes, for `model=None`.
        collate_fn (callable, optional): turns rows into a batch; default `transformers.default_data_collator`.
        options: `augmentation`, `label_smoothing` and `seed` of `LiveOptions`; the rest of them is in the config.

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
        super().__init__(
            PuzzleMixer(config),
            model,
            mean=config.image_mean,
            std=config.image_std,
            attack=config if config.adversarial_probability else None,
            probability=config.probability,
            clean_weight=config.clean_weight,
            **options,
        )


class DataCollatorForCoMixup(_MixupCollator):
    """Co-Mixup for a stock `Trainer`: pass it as `data_collator`, with integer labels, and nothing else changes.

    All of `DataCollatorForPuzzleMix` holds here. Each part of the batch may come out with another number of samples
    (`outputs_per_part`); the loss is that of the batch's share all the same.

    Args:
        model (`nn.Module`, optional): the classifier that Trainer trains.
        config (`CoMixupConfig`, optional): default `CoMixupConfig()`.
        saliency, num_labels, collate_fn: as `DataCollatorForPuzzleMix`.
        options: `augmentation`, `clean_weight`, `label_smoothing`, `mean`, `std`, `probability` and `seed` of `LiveOptions`.
            The reference code trains CIFAR-100 with `clean_weight=1`.

    Raises:
        ValueError, TypeError: as `DataCollatorForPuzzleMix`.

    Source: chapter 4 (Eqs. 4.1 and 4.2, Algorithm 3).
    Cost: a second forward and a backward to the inputs per step, and the mixing.

    Example:
        >>> collator = DataCollatorForCoMixup(model, CoMixupConfig.cifar100(), clean_weight=1.0)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module | None, config: CoMixupConfig | None = None, **options: Any) -> None:
        self.config = check_config(config, CoMixupConfig)
        super().__init__(CoMixer(self.config), model, **options)


@dataclass(frozen=True)
class PuzzleMixer:
    """`puzzle_mix` with its settings bound; for spectrograms (B, 1, time, mel) along time only."""

    config: PuzzleMixConfig

    @property
    def needs_pixels(self) -> bool:
        """Whether the settings reason about pixel values (data smoothness)."""
        return self.config.gamma > 0 and self.config.beta > 0

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        saliency: Tensor,
        generator: torch.Generator,
        shown: tuple[Tensor, Tensor] | None = None,
    ) -> MixResult:
        """See `puzzle_mix`."""
        return puzzle_mix(images, targets, saliency, self.config, generator, shown=shown)

    @property
    def spectrogram(self) -> PuzzleMixer:
        """The same for sounds: cells move along time, and values without a pixel range have no data smoothness."""
        axis = "height" if self.config.transport_axis == "both" else self.config.transport_axis
        gamma = self.config.gamma if self.config.image_std is not None else 0.0
        return PuzzleMixer(replace(self.config, transport_axis=axis, gamma=gamma))


@dataclass(frozen=True)
class CoMixer:
    """`co_mixup` with its settings bound."""

    config: CoMixupConfig

    def __call__(self, images: Tensor, targets: Tensor, saliency: Tensor, generator: torch.Generator) -> MixResult:
        """See `co_mixup`."""
        return co_mixup(images, targets, saliency, self.config, generator)
