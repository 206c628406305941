"""Seconds per inner iteration of the condensation loop against the plain transcription of Algorithm 5.

    OMP_NUM_THREADS=1 python benchmarks/condensation_speed.py [--smoke]

The transcription (tests/reference/condensation.py) runs as the reference code does: class by class, gradients of every
parameter, real and synthetic images augmented in one graph, one optimiser step over all images per class. Both runs draw
the same random numbers; "deviation" is the largest difference of the images after the timed iterations. Times are
CPU-seconds, medians over repeats that alternate between the two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _report
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.loop import CondensationLoop, ImageState
from hf_dataopt.condensation.networks import ConvNet
from tests.reference import condensation as reference

CLASSES = 10
# size, channels, images per class, factor, network images
SETTINGS = [(16, 1, 1, 2, 256), (28, 1, 1, 2, 500), (28, 1, 10, 2, 500), (32, 3, 10, 2, 500)]


def synthetic(size: int, channels: int) -> LabelledImages:
    """Seeded noise images: the arithmetic does not depend on the values."""
    own = torch.Generator().manual_seed(0)
    return LabelledImages(
        images=(torch.rand(2000, channels, size, size, generator=own) * 255).to(torch.uint8),
        labels=torch.arange(2000) % CLASSES,
        class_names=[str(i) for i in range(CLASSES)],
        mean=torch.full((channels,), 0.5),
        std=torch.full((channels,), 0.3),
    )


def network(size: int, channels: int) -> ConvNet:
    """The same weights every time."""
    torch.manual_seed(0)
    return ConvNet(channels, CLASSES, size=(size, size), width=32)


def measure(setting: tuple[int, int, int, int, int], repeats: int, inner: int) -> dict[str, object]:
    """Times and deviation of one setting."""
    size, channels, per_class, factor, seen = setting
    data = synthetic(size, channels)
    config = IDCConfig(
        images_per_class=per_class, factor=factor, width=32, inner_iterations=inner, network_images=seen,
        learning_rate=1e-3, scale_learning_rate=False,
    )  # fmt: skip
    start = torch.rand(CLASSES * per_class, channels, size, size, generator=torch.Generator().manual_seed(1))
    times: dict[str, list[float]] = {"plain": [], "ours": [], "plain images": [], "ours images": []}
    loop = CondensationLoop(data, config, range(CLASSES), torch.device("cpu"))
    without = replace(config, train_network_on="nothing")
    images_only = CondensationLoop(data, without, range(CLASSES), torch.device("cpu"))
    deviation = 0.0
    for repeat in range(repeats + 1):
        theta, leaf = network(size, channels), start.clone().requires_grad_()
        optimiser = torch.optim.SGD([leaf], lr=config.learning_rate, momentum=config.momentum)
        clock = time.process_time()
        reference.outer_iteration(leaf, optimiser, theta, data, config, 0)
        plain = time.process_time() - clock
        theta, state = network(size, channels), ImageState.start(start.unflatten(0, (CLASSES, per_class)).clone())
        clock = time.process_time()
        list(loop.outer_iteration(state, theta, loop.optimiser(theta), 0))
        ours = time.process_time() - clock
        deviation = max(deviation, float((state.images.flatten(0, 1) - leaf.detach()).abs().max()))
        theta, state = network(size, channels), ImageState.start(start.unflatten(0, (CLASSES, per_class)).clone())
        clock = time.process_time()
        list(images_only.outer_iteration(state, theta, images_only.optimiser(theta), 0))
        ours_images = time.process_time() - clock
        if repeat:  # the first prepares kernels
            times["plain"].append(plain / inner)
            times["ours"].append(ours / inner)
            times["ours images"].append(ours_images / inner)
            times["plain images"].append((plain - (ours - ours_images)) / inner)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "setting": f"{size}x{size}x{channels}, {per_class} per class, factor {factor}",
        "plain s": middle["plain"],
        "ours s": middle["ours"],
        "faster": middle["plain"] / middle["ours"],
        "class steps plain s": middle["plain images"],
        "class steps ours s": middle["ours images"],
        "class steps faster": middle["plain images"] / middle["ours images"],
        "deviation": f"{deviation:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest setting, once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--inner", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = SETTINGS[:1] if args.smoke else SETTINGS
    rows = [measure(setting, 1 if args.smoke else args.repeats, args.inner) for setting in settings]
    if args.smoke:
        _report.show("condensation speed (smoke)", rows)
    else:
        _report.write("condensation_speed", rows, unit="CPU-seconds per inner iteration", network="ConvNet-3, width 32")


if __name__ == "__main__":
    main()
