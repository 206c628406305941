"""Class-incremental learning with condensed exemplars (section 6.5.3, Figure 6.7), with the package's public names only.

    OMP_NUM_THREADS=1 python benchmarks/continual_learning.py            # a few minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/continual_learning.py --smoke

Scikit-learn's digits arrive in five stages of two classes. Each stage condenses its own classes to `--per-class` stored
images, adds them to the memory, and trains one network on the memory alone: the network goes on from the stage before, its
head grows, and a distillation term (temperature 2) keeps its old answers. Accuracy is over the test images of all classes
seen so far. The dissertation uses CIFAR-100, 5 x 20 classes, 20 images per class; the figures here are not comparable.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import _report
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_dataopt import DatasetCondenser, IDCConfig, MultiFormation

Memory = tuple[Tensor, Tensor]
STAGES = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
WIDTH = 32
TEMPERATURE = 2.0
METHODS = ("random", "herding", "idc-i", "mosaic", "idc-short", "idc")


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 1, 16, 16) in [0, 1], and their labels."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear").clamp(0, 1)
    labels, order = torch.tensor(found.target), torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[360:]], labels[order[360:]], images[order[:360]], labels[order[:360]]


def as_dataset(images: Tensor, labels: Tensor) -> Dataset:
    """A plain data set of 8-bit images."""
    from PIL.Image import fromarray

    names = sorted({str(label) for label in labels.tolist()})
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    pixels = [fromarray(image) for image in (images[:, 0] * 255).round().to(torch.uint8).numpy()]
    rows = {"image": pixels, "label": [names.index(str(label)) for label in labels.tolist()]}
    return Dataset.from_dict(rows, features=features)


class Grown(nn.Module):
    """Three blocks of convolution, instance norm, ReLU and pool, and a head that grows by two classes a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[
                layer
                for channels in (1, WIDTH, WIDTH)
                for layer in (
                    nn.Conv2d(channels, WIDTH, 3, padding=1),
                    nn.GroupNorm(WIDTH, WIDTH),
                    nn.ReLU(),
                    nn.AvgPool2d(2),
                )  # fmt: skip
            ]
        )
        self.head = nn.Linear(4 * WIDTH, len(STAGES[0]))

    def grow(self, classes: int) -> None:
        old, self.head = self.head, nn.Linear(4 * WIDTH, classes)
        with torch.no_grad():
            self.head.weight[: old.out_features] = old.weight
            self.head.bias[: old.out_features] = old.bias

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).flatten(1))


def train(network: Grown, teacher: Grown | None, memory: Memory, epochs: int, own: torch.Generator) -> None:
    """Cross-entropy on the memory, and agreement with the network of the stage before on its classes."""
    images, labels = (memory[0] - 0.3) / 0.35, memory[1]
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [epochs * 3 // 5, epochs * 4 // 5], gamma=0.2)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=own).split(64):
            down, right = (int(value) for value in torch.randint(-2, 3, (2,), generator=own))
            batch = torch.roll(F.pad(images[rows], (2, 2, 2, 2), value=-0.3 / 0.35), (down, right), (2, 3))[
                :, :, 2:-2, 2:-2
            ]
            logits = network(batch)
            loss = F.cross_entropy(logits, labels[rows])
            if teacher is not None:
                with torch.no_grad():
                    old = F.log_softmax(teacher(batch) / TEMPERATURE, dim=1)
                new = F.log_softmax(logits[:, : old.shape[1]] / TEMPERATURE, dim=1)
                loss = loss + F.kl_div(new, old, log_target=True, reduction="batchmean") * TEMPERATURE**2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()


def memories(config: IDCConfig, method: str, images: Tensor, labels: Tensor) -> list[Memory]:
    """The formed images of each stage's own classes, labels counted over all classes."""
    parts = []
    for classes in STAGES:
        mine = torch.isin(labels, torch.tensor(classes))
        condensed = DatasetCondenser(config, method=method).condense(as_dataset(images[mine], labels[mine]))
        condensed.set_transform(MultiFormation.from_dataset(condensed, output="tensor"))
        formed = condensed[:]
        parts.append((torch.stack(formed["image"]), torch.tensor(classes)[torch.tensor(formed["label"])]))
    return parts


def run(parts: list[Memory], test: tuple[Tensor, Tensor], epochs: int, seed: int) -> list[float]:
    """Accuracy in per cent over all classes seen, after each stage."""
    torch.manual_seed(seed)
    own = torch.Generator().manual_seed(seed)
    network, teacher, found = Grown(), None, []
    for stage, classes in enumerate(STAGES):
        if stage:
            network.grow(classes[-1] + 1)
        images, labels = zip(*parts[: stage + 1], strict=True)
        memory = (torch.cat(images), torch.cat(labels))
        train(network, teacher, memory, epochs, own)
        seen = test[1] <= classes[-1]
        with torch.no_grad():
            guess = network((test[0][seen] - 0.3) / 0.35).argmax(1)
        found.append(100 * float((guess == test[1][seen]).float().mean()))
        teacher = copy.deepcopy(network)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one tiny run, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, labels, *test = digits()
    base = IDCConfig(
        images_per_class=args.per_class, width=WIDTH, network_images=256, learning_rate=0.002 * args.per_class,
        scale_learning_rate=False, outer_iterations=1 if args.smoke else 8, inner_iterations=2 if args.smoke else 20,
    )  # fmt: skip
    epochs, rows = 5 if args.smoke else 200, []
    for method in METHODS:
        clock = time.process_time()
        parts = memories(base, method, images, labels)
        seconds = time.process_time() - clock
        seeds = 1 if args.smoke else args.seeds
        runs = [run(parts, (test[0], test[1]), epochs, seed) for seed in range(seeds)]
        stages = [statistics.mean(values) for values in zip(*runs, strict=True)]
        averages = [statistics.mean(values) for values in runs]
        rows.append(
            {
                "method": method,
                "memory images": args.per_class * 10,
                "training images": sum(len(part[1]) for part in parts),
            }
            | {f"after {2 * n} classes": round(value, 1) for n, value in enumerate(stages, start=1)}
            | {"mean": round(statistics.mean(averages), 2)}
            | {
                "spread": round(statistics.stdev(averages), 2) if seeds > 1 else 0.0,
                "condense CPU s": round(seconds, 1),
            }
        )
    if args.smoke:
        _report.show("continual learning (smoke)", rows)
    else:
        about = {"data": "scikit-learn digits, 16x16", "seeds": args.seeds, "epochs per stage": epochs}
        _report.write("continual_learning", rows, settings=base.to_json_string(), **about)


if __name__ == "__main__":
    main()
