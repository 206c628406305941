"""A training step with mixing over a plain one: full and half-size saliency, maps made before, the clean pass as saliency pass.

ResNet-18 (3 x 3 stem, width 64) on 100 images of 3 x 32 x 32, SGD; CPU time of forward, backward and update, the kinds in turn,
medians, grids of 2, 4, 8, 16 as they are drawn. With a GPU: wall time between synchronisations; the masks are solved on the
CPU while the GPU waits, since they need this step's saliency, and are part of the time.

    python benchmarks/mixup_step.py              # about 5 minutes on one core
    python benchmarks/mixup_step.py --smoke
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from _report import show, write
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_dataopt import CoMixupConfig, DataCollatorForCoMixup, DataCollatorForPuzzleMix, PuzzleMixConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def resnet18(width: int) -> Any:
    """HF's ResNet with basic blocks [2, 2, 2, 2] and the stem for small images."""
    sizes = [width, 2 * width, 4 * width, 8 * width]
    config = ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[2, 2, 2, 2], layer_type="basic")
    config.num_labels = 100
    model = ResNetForImageClassification(config)
    model.resnet.embedder.embedder.convolution = nn.Conv2d(3, width, 3, padding=1, bias=False)
    model.resnet.embedder.pooler = nn.Identity()
    return model.to(DEVICE).train()


def kinds(model: Any, maps: torch.Tensor) -> dict[str, Any]:
    """The collators that are compared; None mixes nothing."""
    full, clean = PuzzleMixConfig.cifar100(), PuzzleMixConfig.cifar100(clean_weight=1.0)

    def made_before(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return maps

    return {
        "plain": None,
        "Puzzle Mix, full saliency": DataCollatorForPuzzleMix(model, full),
        "Puzzle Mix, 0.7-size saliency": DataCollatorForPuzzleMix(model, full, saliency_scale=0.7),
        "Puzzle Mix, half-size saliency": DataCollatorForPuzzleMix(model, full, saliency_scale=0.5),
        "Puzzle Mix, maps made before": DataCollatorForPuzzleMix(model, full, saliency=made_before),
        "Puzzle Mix + clean loss": DataCollatorForPuzzleMix(model, clean),
        "Co-Mixup + clean loss": DataCollatorForCoMixup(model, CoMixupConfig.cifar100()),
    }


def seconds(model: Any, optimizer: Any, batch: dict[str, torch.Tensor]) -> float:
    """One step."""
    clock = time.process_time
    if DEVICE == "cuda":
        clock = time.perf_counter
        torch.cuda.synchronize()
    start = clock()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    """Measure and write `results/mixup_step.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a narrow network, one step each; nothing is written")
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet18(8 if args.smoke else 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.nn.functional.interpolate(torch.rand(100, 3, 8, 8), size=(32, 32), mode="bilinear").to(DEVICE)
    batch = {"pixel_values": images, "labels": torch.randint(100, (100,)).to(DEVICE)}
    collators = kinds(model, torch.rand(100, 32, 32, device=DEVICE))
    times: dict[str, list[float]] = {name: [] for name in collators}
    seconds(model, optimizer, batch)  # warms up
    for _ in range(1 if args.smoke else args.steps):
        for name, collator in collators.items():
            if collator is None:
                taken = seconds(model, optimizer, batch)
            else:
                with collator.mixing(model):
                    taken = seconds(model, optimizer, batch)
            times[name].append(taken)
    plain = statistics.median(times["plain"])
    rows = [
        {
            "step": name,
            "ms": 1000 * statistics.median(found),
            "over plain": statistics.median(found) / plain,
        }
        for name, found in times.items()
    ]
    if args.smoke:
        show("mixup_step (smoke)", rows)
    else:
        write(
            "mixup_step_gpu" if DEVICE == "cuda" else "mixup_step",
            rows,
            unit=f"{'wall' if DEVICE == 'cuda' else 'CPU'} time, ResNet-18, 100x3x32x32",
        )


if __name__ == "__main__":
    main()
