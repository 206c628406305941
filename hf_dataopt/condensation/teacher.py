"""A trained classifier beside the condensation: features for herding, losses for patches, soft labels for training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..progress import told
from ..settings import brief, check_text
from .columns import LabelledImages
from .formation import Way, form_rows
from .matching import logits_of

logger = logging.getLogger(__name__)
_BATCH = 256


@dataclass(kw_only=True)
class Teacher:
    """A classifier, and how it wants its images.

    Args:
        network: maps (n, C, H, W) to logits; any module, a transformers or a timm model.
        name: what the recipe calls it: a Hub name, or how it was made.
        mean, std: what its inputs are normalised with; None: the training data's.
        size: height and width of its inputs; None: the training images'.
        channels: of its inputs; grey images are repeated up to 3. None: the training images'.
        labels: its classes by column; None: column k is class k of the training data.
    """

    network: nn.Module
    name: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None
    labels: tuple[str, ...] | None = None

    @classmethod
    def of(cls, given: Any) -> Teacher:
        """What a user gave as a teacher.

        Args:
            given: a `Teacher`; a transformers or timm model, or any module; or a Hub name or folder of an image classifier
                (names of timm models too), which is loaded with the normalisation of its image processor.

        Raises:
            TypeError: none of these.
        """
        if isinstance(given, Teacher):
            return given
        if isinstance(given, str):
            return cls._named(check_text("teacher", given, empty=False))
        if not isinstance(given, nn.Module) or isinstance(given, type):
            raise TypeError(f"teacher must be a trained module or a name of one on the Hub, got {brief(given)}")
        about: Any = getattr(given, "pretrained_cfg", None) or getattr(given, "default_cfg", None) or {}
        config: Any = getattr(given, "config", None)
        values: dict[str, Any] = {"name": getattr(config, "_name_or_path", "") or type(given).__name__}
        if about:  # timm says how its models were trained
            values["name"] = str(about.get("architecture") or values["name"])
            values |= {"mean": about.get("mean"), "std": about.get("std")} if about.get("tag") else {}
            first = next((one for one in given.modules() if isinstance(one, nn.Conv2d)), None)
            values["channels"] = first.in_channels if first is not None and first.groups == 1 else None
            sizes = getattr(getattr(given, "patch_embed", None), "img_size", None)
            values["size"] = tuple(sizes) if sizes else None
        if config is not None:
            side = getattr(config, "image_size", None)
            values["size"] = (side, side) if isinstance(side, int) else tuple(side) if side else None
            values["channels"] = getattr(config, "num_channels", None)
            values["labels"] = _labels_of(config)
        return cls(network=given, **values)

    @classmethod
    def _named(cls, name: str) -> Teacher:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            made = cls.of(AutoModelForImageClassification.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"teacher {name!r:.80} cannot be loaded as an image classifier: {told(error, 200)}"
            ) from error
        made.name = name
        try:
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            logger.warning("%s has no image processor (%s); its images get the data's own normalisation", name, error)
            return made
        if getattr(processor, "do_normalize", True):
            made.mean, made.std = tuple(processor.image_mean), tuple(processor.image_std)
        size = getattr(processor, "crop_size", None) or getattr(processor, "size", None)
        if made.size is None and size and "height" in size:
            made.size = (size["height"], size["width"])
        return made

    def logits(self, images: Tensor, data: LabelledImages) -> Tensor:
        """Logits (n, classes) over the classes of the training data, on the CPU.

        Args:
            images: (n, C, H, W) stored values.
            data: whose classes, mean and std they are.

        Raises:
            ValueError: the network has other classes.
        """
        with torch.no_grad(), _evaluating(self.network) as device:
            found = torch.cat(
                [logits_of(self.network, self._input(part, data, device)).cpu() for part in self._parts(images)]
            )
        return found[:, self._columns(found.shape[1], data.class_names)]

    def features(self, images: Tensor, data: LabelledImages) -> Tensor:
        """What the network's last linear layer receives, (n, d); its logits where it has none."""
        layers = [one for one in self.network.modules() if isinstance(one, nn.Linear)]
        if not layers:
            return self.logits(images, data)
        found: list[Tensor] = []

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0].detach().float().flatten(1).cpu())

        handle = layers[-1].register_forward_pre_hook(keep)
        try:
            self.logits(images, data)
        finally:
            handle.remove()
        return torch.cat(found)

    def _parts(self, images: Tensor) -> Iterator[Tensor]:
        yield from images.split(_BATCH)

    def _input(self, images: Tensor, data: LabelledImages, device: torch.device) -> Tensor:
        images = images.to(device)
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        shape = (1, -1, 1, 1)
        mean = data.mean if self.mean is None else torch.tensor(self.mean)
        std = data.std if self.std is None else torch.tensor(self.std)
        return (images - mean.to(images).reshape(shape)) / std.to(images).reshape(shape)

    def _columns(self, count: int, names: list[str]) -> list[int]:
        """The network's column of every class: by name where it has them, else by number."""
        if self.labels is not None:
            place = {label.lower(): column for column, label in enumerate(self.labels)}
            if all(name.lower() in place for name in names):
                return [place[name.lower()] for name in names]
        if count != len(names):
            raise ValueError(
                f"the teacher {self.name!r} has {count} classes, the data {len(names)}, and they do not agree by name; give "
                "one that was trained on these classes"
            )
        return list(range(count))


def _labels_of(config: Any) -> tuple[str, ...] | None:
    """Names of a transformers classifier's classes, unless nobody set them."""
    names = getattr(config, "id2label", None) or {}
    found = tuple(str(names[key]) for key in sorted(names))
    return None if all(name == f"LABEL_{key}" for key, name in enumerate(found)) else found


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode for the block; gives the network's device."""
    training = network.training
    network.eval()
    try:
        yield next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    finally:
        network.train(training)


def soft_labels_of(
    stored: Tensor, ways: Sequence[Way], teacher: Teacher, data: LabelledImages, temperature: float = 1.0
) -> list[Tensor]:
    """What a teacher says of every cell of stored images, as they will be formed.

    Args:
        stored: (n, C, H, W) stored values.
        ways: how each is formed, see `Formation.ways`.
        teacher: the classifier.
        data: whose classes they are.
        temperature: of the softmax.

    Returns:
        One (cells, classes) float16 per stored image; shares sum to 1 up to rounding.

    Source: soft labels of RDED and its kind, one per training image.
    Cost: 2 bytes per class and formed image, one forward pass.
    """
    formed, rows, places = form_rows(stored, ways)
    shares = (teacher.logits(formed, data) / temperature).softmax(1).to(torch.float16)
    counts = Counter(rows)
    found: list[list[Tensor]] = [[shares[0]] * counts[row] for row in range(len(stored))]
    for share, row, place in zip(shares, rows, places, strict=True):
        found[row][place] = share
    return [torch.stack(values) for values in found]
