"""Small synthetic image sets: two well separated kinds of bars per class, seeded."""

from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch import Tensor

from hf_dataopt.condensation.columns import LabelledImages, read_images
from hf_dataopt.condensation.multi_formation import to_images

CLASSES = ("across", "down", "dots")


def synthetic_images(n: int, seed: int = 0, size: int = 12, channels: int = 1) -> tuple[Tensor, Tensor]:
    """(n, channels, size, size) in [0, 1] and labels: horizontal bars, vertical bars, a dot, all with noise."""
    own = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(CLASSES)
    images = torch.rand(n, channels, size, size, generator=own) * 0.4
    for image, label in zip(images, labels.tolist(), strict=True):
        place = int(torch.randint(2, size - 3, (), generator=own))
        if label == 0:
            image[:, place : place + 2] += 0.6
        elif label == 1:
            image[:, :, place : place + 2] += 0.6
        else:
            image[:, place - 1 : place + 2, place - 1 : place + 2] += 0.6
    return images.clamp(0, 1), labels


def as_dataset(images: Tensor, labels: Tensor) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    return Dataset.from_dict({"image": to_images(images), "label": labels.tolist()}, features=features)


@pytest.fixture(scope="session")
def train() -> Dataset:
    return as_dataset(*synthetic_images(90))


@pytest.fixture(scope="session")
def test_split() -> Dataset:
    return as_dataset(*synthetic_images(60, seed=1))


@pytest.fixture(scope="session")
def data(train: Dataset) -> LabelledImages:
    return read_images(train)
