"""Information-intensive dataset condensation (IDC, Algorithm 5): the story of chapter 6.

Read a data set, lay real images into mosaics, then again and again: a young network, gradients of real and formed images
class by class, a step of the images, a step of the network. What comes out is a plain `datasets.Dataset`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..checkpoint import PassCheckpoint, locked
from ..decoding import OnError, check_on_error
from ..progress import bar
from ..seeding import generator as seeded
from ..seeding import layers_draw_from
from ..settings import (
    brief,
    check_callable,
    check_choice,
    check_config,
    check_dataset,
    check_device,
    check_int,
    check_kind,
    check_path,
    check_text,
    optional,
)
from .baselines import METHODS, method_config
from .columns import LabelledImages, check_range, read_images, to_dataset
from .config import IDCConfig
from .decoded import decode
from .devices import gather, own_device
from .estimate import Estimate, estimate
from .evaluation import Score, ranked, score
from .identity import checkpoint_key
from .initialise import initial_images, kept_rows, resemblance, stored_counts
from .loop import CondensationLoop, ImageState, formation_of
from .memory import reused_memory
from .networks import NetworkFactory, build, factory_of
from .preview import save_preview
from .recipe import recipe_text
from .teacher import Teacher, soft_labels_of
from .theta import NETWORK, Theta, trained
from .tracking import check_trackers, reporting

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_WORTH_AN_ESTIMATE = 50  # rounds: an estimate takes two to four of them
_RANDOM, _INITIAL, _LAYERS = 2**21, 2**22, 2**22 + 3


class DatasetCondenser:
    """Condense a labelled image or spectrogram data set to a few elements per class.

    Args:
        config ([`IDCConfig`], optional): settings; default `IDCConfig()`.
        method (`str`, default `"idc"`): `"idc"` runs for hours on a GPU; `"idc-short"` (twelve rounds of it), `"mosaic"`
            (herded images in multi-formation, as they are) and `"rded"` (patches that a trained network is surest of) take
            seconds to minutes; `"idc-i"`, `"dm"`, `"dsa"`, `"herding"`, `"random"` are what they are compared with. See
            `method_config`.
        teacher ([`Teacher`], module or `str`, optional): a trained classifier (transformers, timm, any module, or the name of
            one on the Hub): herding goes by its features, `"rded"` by its losses. None: herding goes by pixels, and for
            `"rded"` a network like the configured one is trained on `teacher_images` images.
        network (`Callable`, optional): factory (channels, classes, (height, width)) -> classifier for the matching
            instead of the configured one; any module or transformers model that maps (n, C, H, W) to logits.
        device (`str`, optional): default the process's own: CUDA if there is one, else CPU.
        on_error (`str`, default `"raise"`): `"skip"` leaves rows without a readable image or a class out; `skipped` then
            says which of the data set read last, and why.

    Source: chapter 6, Algorithm 5; defaults from the reference code where text and code differ.
    Differs: see `IDCConfig`; stored values are clamped at the end (the reference saves them as they are).
    Cost: per inner iteration and class one backward pass of `real_batch` images and three of the formed ones.

    Example:
        >>> condenser = DatasetCondenser(IDCConfig(images_per_class=1, factor=2))
        >>> condensed = condenser.condense(train, output_dir="run1")  # doctest: +SKIP
        >>> condensed.map(MultiFormation.from_dataset(condensed), batched=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: IDCConfig | None = None,
        *,
        method: str = "idc",
        teacher: Any = None,
        network: NetworkFactory | None = None,
        device: str | None = None,
        on_error: OnError = "raise",
    ) -> None:
        check_on_error(on_error)
        self.on_error: OnError = on_error
        self.method = check_choice("method", method, tuple(METHODS))
        self.config = method_config(self.method, check_config(config, IDCConfig))
        self.teacher = None if teacher is None else Teacher.of(teacher)
        todo = "give a function of (channels, classes, (height, width)) that makes a classifier"
        self.network = optional(check_callable, "network", network, todo) or factory_of(self.config)
        found = optional(check_device, "device", device, here=True)
        self.device = torch.device(found) if found else own_device()
        self.losses: list[float] = []
        self._data: tuple[tuple[str, ...], LabelledImages] | None = None
        self._trained: tuple[LabelledImages, Teacher] | None = None

    @property
    def skipped(self) -> dict[int, str]:
        """Reason by row, of the rows of the last training set that were left out."""
        return self._data[1].skipped if self._data else {}

    @property
    def short(self) -> dict[str, tuple[int, int]]:
        """Rows, and elements stored, of the classes of the last training set that could not fill `images_per_class`."""
        return self._short(self._data[1]) if self._data else {}

    def condense(
        self,
        dataset: Dataset,
        *,
        image_column: str = "image",
        label_column: str = "label",
        output_dir: str | Path | None = None,
        callback: Callable[[int, float], None] | None = None,
        report_to: Any = None,
    ) -> Dataset:
        """Condense a data set; with `output_dir`, a killed run continues where it stood and ends in the same pixels.

        Args:
            dataset: images or arrays (C, H, W) of one size, and labels.
            image_column, label_column: names.
            output_dir: folder for the checkpoint after each outer iteration and, at the end, `preview.png`. A damaged
                checkpoint, other data, other settings or fewer outer iterations start afresh, with a warning. One job
                at a time: the folder is locked.
            callback: called with the outer iteration and its mean matching loss.
            report_to: trackers that get that loss as `matching_loss`, and the settings: names as accelerate has them
                (`"tensorboard"` writes to `output_dir/logs`, `"wandb"`, ...), `GeneralTracker` objects, a list; default none.

        Returns:
            A plain `datasets.Dataset`: the image column, the label column, and a text column `formation` that says how each
            row is formed. A class with too few images has fewer rows (`short`). Under `accelerate launch` every process
            returns the whole set.

        Raises:
            ValueError: columns, sizes or labels do not fit, a class has no images, or a tracker is not to be had.
            TypeError: not a `datasets.Dataset`, e.g. a dictionary of splits.
            FolderInUseError: another job writes to `output_dir`.

        Source: Algorithm 5.
        """
        folder = optional(check_path, "output_dir", output_dir)
        optional(check_callable, "callback", callback)
        asked = check_trackers(report_to, folder)
        self._check_columns(dataset, image_column, label_column)
        with nullcontext() if folder is None else locked(folder):
            data = self._read(dataset, image_column, label_column)
            classes = distributed.shard(len(data.class_names))
            start = self._initial(data)
            with (
                reused_memory(self.device.type == "cpu"),
                reporting(asked, folder, {"method": self.method, **asdict(self.config)}, callback) as tell,
            ):
                images = self._optimise(data, start, list(classes), folder, tell)
            images = gather(images, list(classes), len(data.class_names))
            low, high = self.config.clamp_low, self.config.clamp_high
            images = images.clamp_(float(data.images.min()) if low is None else low, high)
            if folder is not None and distributed.is_main_process():
                save_preview(images, folder / "preview.png", self.config.images_per_class, data.class_names)
        found = images.flatten(0, 1)
        return self._dataset(found, data, (image_column, label_column), resemblance(found, start))

    def initial(self, dataset: Dataset, *, image_column: str = "image", label_column: str = "label") -> Dataset:
        """The data set a run starts from (real images or mosaics of them): what the optimisation has to beat."""
        data = self._read(dataset, image_column, label_column)
        low, high = self.config.clamp_low, self.config.clamp_high
        images = self._initial(data).clamp(float(data.images.min()) if low is None else low, high)
        return self._dataset(images, data, (image_column, label_column))

    def _dataset(
        self, images: Tensor, data: LabelledImages, columns: tuple[str, str], correlation: float = 1.0
    ) -> Dataset:
        """Images (classes * images_per_class, C, H, W) as a data set, without the places of classes that fill fewer."""
        counts = stored_counts(data, self.config)
        kept, labels = kept_rows(images, counts)
        soft = None
        if self.config.soft_labels:
            ways = [way for count in counts for way in formation_of(self.config).ways(count)]
            soft = soft_labels_of(kept, ways, self._teacher_for(data), data, self.config.soft_temperature)
        recipe = self._recipe(data, columns, correlation)
        return to_dataset(kept, labels, data.class_names, self.config.storage, columns, recipe, soft)

    def estimate(
        self,
        dataset: Dataset,
        *,
        image_column: str = "image",
        label_column: str = "label",
        clock: Callable[[], float] = time.perf_counter,
    ) -> Estimate:
        """Time and memory of `condense`, from a few timed steps of every kind on throw-away copies.

        Args:
            dataset, image_column, label_column: as for `condense`; the images are read and kept for it.
            clock: counts the seconds; `time.process_time` gives CPU-seconds.

        Returns:
            The estimate; reading is not in it.

        Cost: two to four steps of every kind; of the first images two classes' share.
        """
        check_callable("clock", clock)
        data = self._read(dataset, image_column, label_column)
        with reused_memory(self.device.type == "cpu"):
            return self._estimate(data, len(distributed.shard(len(data.class_names))), clock)

    def evaluate(
        self,
        condensed: Dataset,
        test: Dataset,
        *,
        train: Dataset | None = None,
        networks: Mapping[str, NetworkFactory] | None = None,
        seeds: int = 3,
        full_epochs: int | None = None,
    ) -> dict[str, list[Score]]:
        """Test accuracy of networks trained on the condensed set, and on random real images of the same storage.

        Args:
            condensed: result of `condense`, also when loaded again.
            test: real images under the same column names; labels are matched by name.
            train: the training set, for the random images and the whole set; default the one last condensed.
            networks: test networks by name; default the configured one.
            seeds: training runs of each.
            full_epochs: train on the whole training set too, for so many epochs; None: not.

        Returns:
            Scores under `"condensed"`, `"soft labels"` (the same images, if the set has them), and, if a training set is
            known, `"random"` and `"full"`; one per network. The first two tell DD-Ranking's figures where they can.

        Raises:
            ValueError: the data set has no recipe, or sizes differ.

        Source: section 6.5; Li et al. 2025 (DD-Ranking).
        """
        seeds = check_int("seeds", seeds, 1, 1000)
        full_epochs = optional(check_int, "full_epochs", full_epochs, 1)
        check_dataset("test", test)
        optional(check_dataset, "train", train)
        for name, factory in (optional(check_kind, "networks", networks, Mapping) or {}).items():
            check_callable(f"networks[{brief(name)}]", factory)
        found = decode(condensed)
        size = found.formed.size[0] if found.recipe.get("image_size") is not None else None
        mode, background = found.recipe.get("image_mode"), found.recipe.get("background", "white")
        reading: dict[str, Any] = {"like": found.formed, "on_error": self.on_error, "size": size}
        reading |= {"mode": mode, "background": background}
        real = read_images(test, *found.columns, **reading)
        data = (
            read_images(train, *found.columns, **reading)
            if train is not None
            else self._data[1]
            if self._data
            else None
        )
        sets = {"condensed": (found.formed.images, found.formed.labels)}
        if found.soft_labels is not None:
            sets["soft labels"] = (found.formed.images, found.soft_labels)
        if data is not None:
            plain = replace(method_config("random", self.config), images_per_class=max(found.stored))
            images = initial_images(data, plain, formation_of(plain), seeded(self.config.seed, worker=_RANDOM))
            sets["random"] = kept_rows(images, stored_counts(data, plain))
            if full_epochs is not None:
                sets["full"] = (data.pixels(torch.arange(len(data.labels))), data.labels)
        elif full_epochs is not None:
            raise ValueError("full_epochs needs the training set; give train=")
        factories = networks or {self.config.network: self.network}
        scores = {}
        with reused_memory(self.device.type == "cpu"):
            for name, (images, targets) in sets.items():
                config = replace(self.config, evaluation_epochs=full_epochs) if name == "full" else self.config
                scores[name] = score(images, targets, real, config, factories, seeds=seeds, device=self.device)
        return ranked(scores)

    @staticmethod
    def _check_columns(dataset: Any, image_column: Any, label_column: Any) -> None:
        check_dataset("dataset", dataset)
        check_text("image_column", image_column, empty=False)
        check_text("label_column", label_column, empty=False)

    def _read(self, dataset: Dataset, image_column: str, label_column: str) -> LabelledImages:
        """The data in memory, kept for the next call on the same data set."""
        self._check_columns(dataset, image_column, label_column)
        key = (dataset._fingerprint, image_column, label_column)
        if self._data is None or self._data[0] != key:
            data = read_images(
                dataset,
                image_column,
                label_column,
                size=self.config.image_size,
                mode=self.config.image_mode,
                background=self.config.background,
                on_error=self.on_error,
            )
            if data.skipped:
                row, why = next(iter(data.skipped.items()))
                logger.warning("%d rows are left out, the first: row %d %s", len(data.skipped), row, why)
            for name, (rows, count) in self._short(data).items():
                logger.warning("class %r has %d images, all are used: %d elements are stored of it", name, rows, count)
            check_range(data.images, self.config.clamp_low, self.config.clamp_high)
            channels = data.images.shape[1]
            sides = data.size[1:] if self.config.axis == "time" else data.size
            if min(sides) < self.config.factor:
                raise ValueError(
                    f"images of {data.size[0]} x {data.size[1]} cannot be cut into {self.config.factor} cells a side; "
                    "use a smaller factor or larger images"
                )
            for name in ("mean", "std"):
                values = getattr(self.config, name)
                if values is None and not self.config.normalise:
                    values = (float(name == "std"),) * channels
                if values is not None:
                    if len(values) != channels:
                        raise ValueError(f"{name} has {len(values)} entries, the images have {channels} channels")
                    setattr(data, name, torch.tensor(values))
            self._data = (key, data)
        return self._data[1]

    def _short(self, data: LabelledImages) -> dict[str, tuple[int, int]]:
        """Rows, and elements that are stored, of the classes that have too few rows for `images_per_class`."""
        counts = stored_counts(data, self.config)
        return {
            name: (len(rows), count)
            for name, rows, count in zip(data.class_names, data.rows_of_class, counts, strict=True)
            if count < self.config.images_per_class
        }

    def _initial(self, data: LabelledImages) -> Tensor:
        teacher = self._teacher_for(data) if self.config.initialisation == "patches" else self.teacher
        own = seeded(self.config.seed, worker=_INITIAL)
        return initial_images(data, self.config, formation_of(self.config), own, teacher)

    def _teacher_for(self, data: LabelledImages) -> Teacher:
        """The teacher that was given, or a network like the configured one, trained on the data once."""
        if self.teacher is not None:
            return self.teacher
        if self._trained is None or self._trained[0] is not data:
            loop = CondensationLoop(data, self.config, [], self.device)
            own = seeded(self.config.seed, worker=_LAYERS)
            with layers_draw_from(own, self.device), reused_memory(self.device.type == "cpu"):
                network = trained(loop, lambda own: self._build(data, own), self.config.teacher_images)
            shown = f"{self.config.teacher_images:,} images of the training data, seed {self.config.seed}"
            self._trained = data, Teacher(network=network, name=f"{type(network).__name__} trained on {shown}")
        return self._trained[1]

    def _estimate(self, data: LabelledImages, classes: int, clock: Callable[[], float] = time.perf_counter) -> Estimate:
        own = seeded(self.config.seed, worker=NETWORK)
        with layers_draw_from(own, self.device):
            return estimate(
                data, self.config, lambda: self._build(data, own), self.teacher, classes, self.device, clock
            )

    def _build(self, data: LabelledImages, own: torch.Generator) -> nn.Module:
        shape = (int(data.images.shape[1]), *data.size)
        return build(self.network, shape, len(data.class_names), own).to(self.device).train()

    def _optimise(
        self,
        data: LabelledImages,
        start: Tensor,
        classes: list[int],
        folder: Path | None,
        callback: Callable[[int, float], None],
    ) -> Tensor:
        """Images (classes, images_per_class, C, H, W) of this process's classes after all outer iterations."""
        config = self.config
        path = None
        if folder is not None:
            path = folder / f"checkpoint-{distributed.rank()}-of-{distributed.world_size()}.safetensors"
        network = self._build(data, seeded(config.seed, worker=NETWORK))
        # the images that a run starts from hang on a teacher's weights
        key = checkpoint_key(config, data, network, self.device, start if self.teacher is not None else None)
        checkpoint = PassCheckpoint(path, key)
        whole = start.unflatten(0, (-1, config.images_per_class))
        state, done = ImageState.start(whole[classes].to(self.device, copy=True)), 0
        self.losses = []
        kept: dict[str, Tensor] = {}
        found = checkpoint.load(config.outer_iterations, {"images": state.images, "velocity": state.velocity})
        if found is not None:
            done, kept = found
            state = ImageState.start(kept.pop("images").to(self.device))
            state.velocity = kept.pop("velocity").to(self.device)
            self.losses = kept.pop("losses").tolist()
            logger.info("continuing after %d outer iterations", done)
        loop = CondensationLoop(data, config, classes, self.device)
        if (config.outer_iterations - done) * config.inner_iterations >= _WORTH_AN_ESTIMATE:
            self._estimate(data, len(classes)).tell()
        if config.learning_rate_space == "first_step" and config.outer_iterations:
            loop.rate = loop.rate_for(whole, network)
        theta = Theta(loop, lambda own: self._build(data, own), kept)
        with bar(config.outer_iterations, "Condensing", unit="outer") as progress:
            progress.update(done)
            for outer in range(done, config.outer_iterations):
                with layers_draw_from(seeded(config.seed, epoch=outer, worker=_LAYERS), self.device):
                    network, optimiser = theta.at(outer)
                    steps = loop.outer_iteration(state, network, optimiser, outer)
                self.losses.append(sum(steps) / len(steps))
                callback(outer, self.losses[-1])
                progress.set_postfix(loss=f"{self.losses[-1]:.4g}")
                progress.update()
                last = outer + 1 == config.outer_iterations
                if last or (outer + 1) % config.checkpoint_every == 0:
                    values = {"images": state.images, "velocity": state.velocity}
                    values["losses"] = torch.tensor(self.losses, dtype=torch.float64)
                    checkpoint.save(outer + 1, {**values, **theta.tensors(outer)}, force=True)
        return state.images.cpu()

    def _recipe(self, data: LabelledImages, columns: tuple[str, str], correlation: float) -> str:
        config = self.config
        reading: dict[str, Any] = {"image_size": config.image_size, "image_mode": config.image_mode}
        reading |= {"background": config.background if config.background != "white" else None}
        used = config.initialisation == "patches" or config.initialisation.endswith("herding") or config.soft_labels
        trained_here = self._trained[1] if self._trained and self._trained[0] is data else None
        teacher = (self.teacher or trained_here) if used else None
        return recipe_text(
            formation_of(config),
            columns[0],
            label_column=columns[1],
            mean=[round(float(value), 6) for value in data.mean],
            std=[round(float(value), 6) or float(value) for value in data.std],  # 0 is refused where it is read
            match=config.match,
            metric=config.metric,
            images_per_class=config.images_per_class,
            outer_iterations=config.outer_iterations,
            seed=config.seed,
            method=self.method,
            start=config.initialisation,
            start_correlation=round(correlation, 3),
            **({"teacher": teacher.name} if teacher is not None else {}),
            **({"soft_temperature": config.soft_temperature} if config.soft_labels else {}),
            **{name: value for name, value in reading.items() if value is not None},
        )
