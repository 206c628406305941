"""Gradients of many classes: `torch.func.vmap` over classes, a loop of autograd calls, and ours one by one and together.

    OMP_NUM_THREADS=1 python benchmarks/condensation_classes.py [--smoke]

Weight gradients of ConvNet-3 (width 32) for 10 classes of 64 real images each, in CPU-seconds: the least of four calls.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import _report
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from hf_dataopt.condensation.class_gradients import ClassGradients
from hf_dataopt.condensation.matching import matched_parameters
from hf_dataopt.condensation.networks import ConvNet

CLASSES, IMAGES = 10, 64


def measure(size: int, repeats: int) -> dict[str, Any]:
    """One row: CPU-seconds of each way."""
    network = ConvNet(1, CLASSES, size=(size, size), width=32)
    images = torch.randn(CLASSES, IMAGES, 1, size, size)
    labels = torch.arange(CLASSES)[:, None].expand(CLASSES, IMAGES)
    compute = ClassGradients(network, matched_parameters(network))
    parameters = list(network.parameters())
    ways: dict[str, Callable[[], Any]] = {
        "loop of autograd": lambda: [
            torch.autograd.grad(F.cross_entropy(network(x), y), parameters) for x, y in zip(images, labels, strict=True)
        ],
        "ours, one by one": lambda: [compute(x, y, 1) for x, y in zip(images, labels, strict=True)],
        "ours, together": lambda: compute(images.flatten(0, 1), labels.reshape(-1), CLASSES),
    }
    row: dict[str, Any] = {"images": f"{size}x{size}x1"}
    for name, way in ways.items():
        row[name] = fastest(way, repeats)
    # functional transforms need PyTorch's own layers
    blocks = [part for block in range(3) for part in layers(network, block)]
    plain = torch.nn.Sequential(*blocks, torch.nn.Flatten(), network.classifier)
    values = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    each = vmap(grad(lambda w, x, y: F.cross_entropy(functional_call(plain, w, (x,)), y)), in_dims=(None, 0, 0))
    row["torch.func.vmap"] = fastest(lambda: each(values, images, labels), repeats)
    return row


def layers(network: ConvNet, block: int) -> list[torch.nn.Module]:
    """PyTorch's layers of one block."""
    held = network.layers
    return [held["conv"][block], held["norm"][block], torch.nn.ReLU(), torch.nn.AvgPool2d(2)]  # type: ignore[index]


def fastest(way: Callable[[], Any], repeats: int) -> float:
    """Least CPU-seconds of a few calls after a first one."""
    way()
    found = []
    for _ in range(repeats):
        clock = time.process_time()
        way()
        found.append(time.process_time() - clock)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest setting, once")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(size, 1 if args.smoke else 4) for size in ([16] if args.smoke else [16, 28])]
    if args.smoke:
        _report.show("gradients of many classes (smoke)", rows)
    else:
        _report.write("condensation_classes", rows, unit="CPU-seconds, 10 classes of 64 images")


if __name__ == "__main__":
    main()
