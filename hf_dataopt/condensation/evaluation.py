"""The scoring protocol: networks trained from scratch on formed images, tested on real ones, several seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import bar
from ..seeding import generator as seeded
from ..seeding import layers_draw_from
from ..settings import check_int
from .columns import LabelledImages
from .config import IDCConfig
from .devices import sent
from .networks import NetworkFactory, build
from .photo import PHOTO, photo_augment
from .training import Updates, accuracy, compiled, sgd, train_on

_TEST_BATCH = 500
FIGURES = ("hard-label recovery", "improvement over random")  # DD-Ranking's


@dataclass(frozen=True, kw_only=True)
class Score:
    """Test accuracy of networks trained on a few images.

    Args:
        accuracies: per cent, one per seed, in the last epoch.
        network: name of the test network.
        epochs: of training.
        images: training images after forming.
        hard_label_recovery: points of accuracy that the whole training set is ahead by, with the same recipe; lower is better.
        improvement_over_random: points ahead of random real images of the same storage.
    """

    accuracies: tuple[float, ...]
    network: str
    epochs: int
    images: int
    hard_label_recovery: float | None = None
    improvement_over_random: float | None = None

    @property
    def mean(self) -> float:
        """Mean accuracy in per cent."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds (0 for one seed)."""
        values = torch.tensor(self.accuracies, dtype=torch.float64)
        return float(values.std()) if len(values) > 1 else 0.0


def score(
    images: Tensor,
    labels: Tensor,
    test: LabelledImages,
    config: IDCConfig,
    factories: Mapping[str, NetworkFactory],
    *,
    seeds: int = 3,
    device: torch.device | None = None,
) -> list[Score]:
    """Train on images and test, for every network and seed.

    Args:
        images: (n, C, H, W) training images in stored values, formed already.
        labels: (n,) classes, or (n, classes) float shares.
        test: the test set; its mean and std normalise both.
        config: recipe (`evaluation_*`, network momentum and weight decay, `compile`).
        factories: test networks by name.
        seeds: runs per network.
        device: default CPU.

    Returns:
        One score per network.

    Raises:
        ValueError: no images, or unequal counts.

    Source: section 6.5 "Experimental settings"; epochs, CutMix and learning-rate steps of the reference code.
    Differs: reports the last epoch (the reference also prints the best of four on the test set).
    Cost: epochs x n images, per network and seed.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"got {len(images)} images and {len(labels)} labels; give one label per image, at least one")
    seeds = check_int("seeds", seeds, 1)
    device = device or torch.device("cpu")
    classes = len(test.class_names)
    epochs = config.epochs_of_evaluation(classes)
    test, values = test.on(device), images.float().to(device)
    values = values if config.evaluation_augmentation == PHOTO else test.normalised(values)
    train = (values, labels.to(device))
    results = []
    for name, factory in factories.items():
        found = []
        for seed in range(seeds):
            own = seeded(config.seed, epoch=seed, worker=2**20)
            shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
            network = build(factory, shape, classes, own).to(device)
            with layers_draw_from(own, device):
                found.append(_run(network, train, test, config, epochs, own))
        results.append(Score(accuracies=tuple(found), network=name, epochs=epochs, images=len(images)))
    return results


def ranked(scores: Mapping[str, list[Score]]) -> dict[str, list[Score]]:
    """DD-Ranking's figures in the scores of condensed images, of the sets that they need.

    Args:
        scores: by what was trained on, one per network; `"full"` and `"random"` are compared with.

    Source: Li et al. 2025 (DD-Ranking): HLR = full - condensed on hard labels, IOR = condensed - random.
    """
    found = {name: list(values) for name, values in scores.items()}
    for name in ("condensed", "soft labels"):
        for place, one in enumerate(found.get(name, ())):
            behind = scores["full"][place].mean - one.mean if "full" in scores and name == "condensed" else None
            ahead = one.mean - scores["random"][place].mean if "random" in scores else None
            found[name][place] = replace(one, hard_label_recovery=behind, improvement_over_random=ahead)
    return found


def _run(
    network: nn.Module,
    train: tuple[Tensor, Tensor],
    test: LabelledImages,
    config: IDCConfig,
    epochs: int,
    own: torch.Generator,
) -> float:
    images, labels = train
    photo = config.evaluation_augmentation == PHOTO
    optimiser = sgd(network, config.evaluation_learning_rate, config.network_momentum, config.network_weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [2 * epochs // 3, 5 * epochs // 6], gamma=0.2)
    called = compiled(network, config.compile)
    updates = Updates(
        batch=config.evaluation_batch,
        augmentation="none" if photo else config.evaluation_augmentation,
        mix=config.evaluation_cutmix,
        dtype=getattr(torch, config.dtype),
    )
    # a photo's numbers are drawn right before its batch's
    each = updates.batch if photo else updates.ahead(images[0].numel())
    with bar(epochs, "Scoring", unit="epoch") as progress:
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=own).split(each):
                picked = sent(rows, images.device)
                shown = test.normalised(photo_augment(images[picked], own)) if photo else images[picked]
                train_on(called, optimiser, (shown, labels[picked]), own, updates)
            schedule.step()
            progress.update()
    return accuracy(network, _test_batches(test))


def _test_batches(test: LabelledImages) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.arange(len(test.labels)).split(_TEST_BATCH):
        yield test.batch(rows)


def scores_as_rows(scores: Mapping[str, list[Score]]) -> list[dict[str, Any]]:
    """Scores as flat rows, for JSON and cards."""
    return [
        {
            "trained on": name,
            "network": one.network,
            "images": one.images,
            "epochs": one.epochs,
            "accuracy": round(one.mean, 2),
            "spread": round(one.spread, 2),
            "seeds": len(one.accuracies),
            "hard-label recovery": _rounded(one.hard_label_recovery),
            "improvement over random": _rounded(one.improvement_over_random),
        }
        for name, found in scores.items()
        for one in found
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
