"""Seconds per outer iteration of the condensation loop against the plain transcription of Algorithm 5.

    OMP_NUM_THREADS=1 python benchmarks/condensation_speed.py [--smoke]

The transcription (tests/reference/condensation.py) runs as the reference code does: class by class, gradients of every
parameter, real and synthetic images augmented in one graph, one optimiser step over all images per class. Both runs draw
the same random numbers; "deviation" is the largest difference of images and network weights after one inner iteration, and
the script fails where it is above 1e-4 (weights multiplied by 1 + 1e-7 at the start change the transcription's own images by
2e-4 within two inner iterations on these noise images). Times are CPU-seconds, medians over two processes of each way in
turn, so that neither sees the other's memory allocator settings; an outer iteration is 100 inner ones, `--inner` are run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _report

from hf_dataopt.condensation import pooled_norm
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.loop import CondensationLoop, ImageState
from hf_dataopt.condensation.memory import reused_memory
from hf_dataopt.condensation.networks import ConvNet
from tests.reference import condensation as reference

CLASSES = 10
INNER = 100  # inner iterations of an outer one, by default
CLOSE = 1e-4
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


def network(way: str, size: int, channels: int) -> ConvNet:
    """The same weights every time."""
    torch.manual_seed(0)
    kind = reference.PlainConvNet if way == "plain" else ConvNet
    return kind(channels, CLASSES, size=(size, size), width=32)


def one_run(way: str, setting: tuple[int, ...], inner: int, repeats: int) -> tuple[list[float], torch.Tensor]:
    """CPU-seconds per outer iteration in each repeat; images and network weights after the last."""
    size, channels, per_class, factor, seen = setting
    data = synthetic(size, channels)
    config = IDCConfig(
        images_per_class=per_class, factor=factor, width=32, inner_iterations=inner, network_images=seen,
        learning_rate=1e-3, scale_learning_rate=False,
    )  # fmt: skip
    start = torch.rand(CLASSES * per_class, channels, size, size, generator=torch.Generator().manual_seed(1))
    loop, times, images = CondensationLoop(data, config, range(CLASSES), torch.device("cpu")), [], start
    if way == "ours without numba":
        pooled_norm.loops = None
    with reused_memory(way != "plain"):
        for _ in range(repeats + 1):
            theta = network(way, size, channels)
            clock = time.process_time()
            if way == "plain":
                images = start.clone().requires_grad_()
                optimiser = torch.optim.SGD([images], lr=config.learning_rate, momentum=config.momentum)
                reference.outer_iteration(images, optimiser, theta, data, config, 0)
            else:
                state = ImageState.start(start.unflatten(0, (CLASSES, per_class)).clone())
                loop.outer_iteration(state, theta, loop.optimiser(theta), 0)
                images = state.images.flatten(0, 1)
            times.append((time.process_time() - clock) / inner * INNER)
    result = torch.cat([value.detach().flatten() for value in (images, *theta.parameters())])
    return times[1:], result  # the first prepares kernels


def measure(setting: tuple[int, ...], repeats: int, inner: int) -> dict[str, object]:
    """Times and deviation of one setting; each way in processes of its own, in turn."""
    times: dict[str, list[float]] = {"plain": [], "ours without numba": [], "ours": []}
    results = {}
    for _ in range(2):
        for way, found in times.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "result.pt"
                call = [sys.executable, __file__, "--way", way, "--setting", ",".join(map(str, setting))]
                call += ["--inner", str(inner), "--repeats", str(repeats), "--result", str(path)]
                subprocess.run(call, check=True)
                seconds, results[way] = torch.load(path)
            found += seconds
    plain, slower, ours = (statistics.median(found) for found in times.values())
    deviation = float((results["plain"] - results["ours"]).abs().max())
    if inner == 1 and deviation > CLOSE:
        raise SystemExit(f"{setting}: the results differ by {deviation:.1e}, more than {CLOSE}")
    size, channels, per_class, factor, seen = setting
    return {
        "setting": f"{size}x{size}x{channels}, {per_class} per class, factor {factor}, {seen} network images",
        "plain s": plain,
        "without numba s": slower,
        "ours s": ours,
        "faster": plain / ours,
        "deviation": f"{deviation:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest setting, once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inner", type=int, default=1)
    parser.add_argument("--way", choices=["plain", "ours without numba", "ours"], default=None, help=argparse.SUPPRESS)
    parser.add_argument("--setting", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--result", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.way:
        setting = tuple(int(value) for value in args.setting.split(","))
        torch.save(one_run(args.way, setting, args.inner, args.repeats), args.result)
        return
    settings = SETTINGS[:1] if args.smoke else SETTINGS
    rows = [measure(setting, 1 if args.smoke else args.repeats, args.inner) for setting in settings]
    if args.smoke:
        _report.show("condensation speed (smoke)", rows)
    else:
        _report.write(
            "condensation_speed",
            rows,
            unit="CPU-seconds per outer iteration of 100 inner ones",
            network="ConvNet-3, width 32",
        )


if __name__ == "__main__":
    main()
