"""What the derivatives written out (`pooled_norm`) bring on the presets, beside PyTorch's own layers, in CPU-seconds.

    OMP_NUM_THREADS=1 python benchmarks/condensation_derivatives.py [--smoke]

One class step and one network batch of each preset at its own width, on noise images (the arithmetic does not depend on the
values); an inner iteration is ten of one and as many of the other as the preset has. ResNet-AP (ImageNet) has no such block.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import _report
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dataopt.condensation import networks, pooled_norm
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.loop import CondensationLoop, ImageState, RealBatches
from hf_dataopt.condensation.memory import reused_memory
from hf_dataopt.condensation.networks import factory_of

CLASSES = 10
PRESETS: dict[str, tuple[IDCConfig, int, int]] = {  # settings, side, channels
    "cifar10, 10 a class": (IDCConfig.cifar10(), 32, 3),
    "mnist, 1 a class": (IDCConfig.mnist(images_per_class=1), 28, 1),
    "README's quick start (width 32)": (IDCConfig(images_per_class=10, width=32), 32, 3),
}
WAYS = ("PyTorch's layers", "written out", "written out, numba")
LAYERS, LOOPS = networks._norm_and_pool, pooled_norm.loops


def plain(images: Tensor, norm: nn.GroupNorm) -> Tensor:
    """The block in PyTorch's layers."""
    return F.avg_pool2d(F.relu(norm(images)), 2)


def choose(way: str) -> None:
    """Make ConvNets use one of the ways."""
    networks._norm_and_pool = plain if way == WAYS[0] else LAYERS
    pooled_norm.loops = LOOPS if way == WAYS[2] else None


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median CPU-seconds after a first call."""
    found = []
    for _ in range(repeats + 1):
        clock = time.process_time()
        action()
        found.append(time.process_time() - clock)
    return statistics.median(found[1:])


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One row: an inner iteration in every way."""
    config, side, channels = PRESETS[name]
    own = torch.Generator().manual_seed(0)
    data = LabelledImages(
        images=(torch.rand(640, channels, side, side, generator=own) * 255).to(torch.uint8),
        labels=torch.arange(640) % CLASSES,
        class_names=[str(i) for i in range(CLASSES)],
        mean=torch.full((channels,), 0.5),
        std=torch.full((channels,), 0.3),
    )
    torch.manual_seed(0)
    network = factory_of(config)(channels, CLASSES, (side, side))
    loop = CondensationLoop(data, config, range(1), torch.device("cpu"))
    optimiser, batches = loop.optimiser(network), -(-config.network_images // config.network_batch)
    state = ImageState.start(torch.rand(1, config.images_per_class, channels, side, side, generator=own))
    real = [RealBatches(data.rows_of_class[0], config.real_batch, own)]
    row: dict[str, Any] = {"preset": name}
    for way in WAYS:
        choose(way)
        with reused_memory():
            step = seconds(lambda: loop.update_images(state, network, real, [own]), repeats)
            update = seconds(lambda: loop.train_steps(network, optimiser, own, 1), repeats)
        row[way] = round(CLASSES * step + batches * update, 3)
    choose(WAYS[2])
    return row | {f"{way} faster": round(row[WAYS[0]] / row[way], 2) for way in WAYS[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest setting, once")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.smoke:
        _report.show("derivatives (smoke)", [measure(list(PRESETS)[2], 1)])
    else:
        rows = [measure(name, 3) for name in PRESETS]
        _report.write("condensation_derivatives", rows, unit="CPU-seconds of an inner iteration of 10 classes")


if __name__ == "__main__":
    main()
