"""What of each training image the mixing methods show, epoch after epoch, beside how hard their mixed images are.

    python benchmarks/mixup_shown.py            # about a CPU minute
    python benchmarks/mixup_shown.py --smoke

1,000 CIFAR-10 images of 16 x 16 in 8 shuffled epochs of batches of 100, mixed with the saliency of a network
(`mixup_accuracy.py`) that was trained on them without mixing for 3 and for 30 epochs. Per method: share of an image's pixels
that are seen in one epoch and in 8; correlation of what is seen of an image between two epochs (0: other parts every time, or
everything equally; 1: always the same); share of images seen nowhere in an epoch, and the most that one is seen (1: one whole
image); saliency seen in an output (1: one whole image's); entropy of the labels; loss of the network on the mixed images above
that entropy. Transport is left out of what is seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _report import show, write
from data import DataMissingError, cifar10
from mixup_accuracy import Setting, train
from mixup_rows import MEAN, STD, Rows, rows
from torch import Tensor, nn

from hf_dataopt import CoMixupConfig, PuzzleMixConfig, seeding
from hf_dataopt.mixup.co_mixup import co_mixup
from hf_dataopt.mixup.peers import TimmMixer
from hf_dataopt.mixup.puzzle_mix import puzzle_mix
from hf_dataopt.mixup.result import MixResult
from hf_dataopt.saliency import input_saliency

Mixer = Callable[[Tensor, Tensor, Tensor, torch.Generator], MixResult]


def mixers() -> dict[str, Mixer]:
    """Every method with its preset."""
    puzzle = PuzzleMixConfig.cifar100(grid_sizes=(2, 4, 8), image_mean=MEAN, image_std=STD)
    co = CoMixupConfig.cifar100()
    return {
        "input mixup": TimmMixer("mixup"),
        "CutMix": TimmMixer("cutmix"),
        "Puzzle Mix": lambda *given: puzzle_mix(*given[:3], puzzle, given[3]),
        "Co-Mixup": lambda *given: co_mixup(*given[:3], co, given[3]),
    }


def seen_of(
    mixer: Mixer, result: MixResult, given: tuple[Tensor, Tensor, Tensor], generator: torch.Generator
) -> Tensor:
    """(outputs, inputs, H, W): how much of each input is seen where; timm draws its boxes once more."""
    size, side = len(given[0]), given[0].shape[-1]
    if isinstance(mixer, TimmMixer):
        places = torch.eye(size)[:, :, None, None].expand(-1, -1, side, side)
        return mixer(places, given[1], given[2], generator).images
    masks = nn.functional.interpolate(result.masks, size=(side, side), mode="nearest")
    seen = torch.zeros(size, size, side, side)
    return seen.scatter_add_(1, result.sources[:, :, None, None].expand_as(masks), masks)


def profile(mixer: Mixer, model: nn.Module, data: Rows, epochs: int) -> dict[str, float]:
    """The figures of one method."""
    size, side = data.images.shape[0], data.images.shape[-1]
    seen = torch.zeros(epochs, size, side, side)
    salient, entropy, loss = [], [], []
    for epoch in range(epochs):
        order = torch.randperm(size, generator=seeding.generator(0, epoch=epoch))
        for place, batch in enumerate(order.split(100)):
            images, targets = data.images[batch], nn.functional.one_hot(data.labels[batch], 10).float()
            saliency = input_saliency(model, {"pixel_values": images}, data.labels[batch])
            given = images, targets, saliency
            result = mixer(*given, seeding.generator(1, epoch=epoch, worker=place))
            parts = seen_of(mixer, result, given, seeding.generator(1, epoch=epoch, worker=place))
            seen[epoch, batch] = parts.sum(0)
            salient.append((parts * (saliency / saliency.sum((1, 2), keepdim=True))).sum((1, 2, 3)))
            own = -torch.special.xlogy(result.targets, result.targets).sum(1)
            entropy.append(own)
            with torch.no_grad():
                logits = model(pixel_values=result.images)["logits"]
            loss.append(nn.functional.cross_entropy(logits, result.targets, reduction="none") - own)
    return {
        "seen in 1 epoch": float((seen > 0).float().mean()),
        f"seen in {epochs}": float((seen > 0).any(0).float().mean()),
        "correlation of epochs": correlation(seen),
        "images unseen": float((seen.mean((2, 3)) == 0).float().mean()),
        "most of one image": float(seen.mean((2, 3)).max()),
        "saliency seen": float(torch.cat(salient).mean()),
        "label entropy": float(torch.cat(entropy).mean()),
        "loss above it": float(torch.cat(loss).mean()),
    }


def correlation(seen: Tensor) -> float:
    """Mean over pairs of epochs of the correlation of what is seen at each place of each image."""
    flat = seen.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    norms = flat.norm(dim=1)
    if bool((norms < 1e-3 * flat.shape[1] ** 0.5).any()):
        return 0.0  # everything is seen equally
    products = torch.corrcoef(flat)
    return float(products[~torch.eye(len(flat), dtype=torch.bool)].mean())


def main() -> None:
    """Train the two networks, profile the methods, write `results/mixup_shown.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="200 images, 2 epochs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        cifar10(0, 10)
    except DataMissingError as error:
        print(f"skipped: {error}")
        return
    images, epochs = (200, 2) if args.smoke else (1_000, 8)
    data, lines = rows(images, 16), []
    for trained in (1,) if args.smoke else (3, 30):
        model, _ = train("plain", 0, 0.1, data, Setting(images=images, epochs=trained))
        for name, mixer in mixers().items():
            found: dict[str, Any] = profile(mixer, model, data, epochs)
            lines.append({"trained epochs": trained, "method": name, **{key: round(found[key], 3) for key in found}})
    if args.smoke:
        show("mixup_shown (smoke)", lines)
    else:
        write("mixup_shown", lines)


if __name__ == "__main__":
    main()
