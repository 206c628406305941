"""A gallery of mixed images: Puzzle Mix and Co-Mixup on one batch, and what their settings do. A notebook as a script.

python examples/mixup_gallery.py                                   # scikit-learn's digits
python examples/mixup_gallery.py --dataset fashion_mnist           # Hub name, or a folder of `save_to_disk`
python examples/mixup_gallery.py --smoke

Pictures go to --output-dir; every `# %%` starts a cell (VS Code, Jupytext and Spyder open this file as a notebook).
"""

# %% Arguments
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch.nn.functional import interpolate, one_hot
from transformers import ResNetConfig, ResNetForImageClassification

from hf_dataopt import CoMixupConfig, PuzzleMixConfig, co_mixup, plot_mixup, puzzle_mix
from hf_dataopt.mixup.statistics import diversity, inputs_per_output, mixed_saliency, total_variation
from hf_dataopt.saliency import input_saliency

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", default=None, help="Hub name or folder with columns image and label; default: digits")
parser.add_argument("--output-dir", type=Path, default=Path("mixup_gallery"))
parser.add_argument("--steps", type=int, default=300, help="training steps of the network whose saliency is used")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--smoke", action="store_true", help="20 steps")
args = parser.parse_args()
args.output_dir.mkdir(parents=True, exist_ok=True)

# %% Images in [0, 1], 32 x 32
if args.dataset is None:
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.from_numpy(found.images / 16).float()[:, None], torch.from_numpy(found.target)
else:
    data = load_from_disk(args.dataset) if Path(args.dataset).is_dir() else load_dataset(args.dataset)
    rows: Dataset = data["train"] if isinstance(data, DatasetDict) else data
    rows = rows.shuffle(seed=args.seed).select(range(min(4000, len(rows))))
    pixels = np.stack([np.atleast_3d(np.asarray(image)) for image in rows["image"]])
    images, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.tensor(rows["label"])
images = interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
kinds = int(labels.max()) + 1

# %% A small network, so that there is a saliency to look at
torch.manual_seed(args.seed)
config = ResNetConfig(
    num_channels=images.shape[1], embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
)
config.num_labels = kinds
model = ResNetForImageClassification(config)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(20 if args.smoke else args.steps):
    picked = torch.randint(len(images), (64,))
    optimizer.zero_grad()
    model(pixel_values=images[picked], labels=labels[picked]).loss.backward()
    optimizer.step()
model.eval()

# %% One batch, its saliency (section 3.4)
batch, targets = images[-20:], one_hot(labels[-20:], kinds).float()
saliency = input_saliency(model, {"pixel_values": batch}, labels[-20:])

# %% Puzzle Mix (Eq. 3.2 to 3.5): the grid, and transport that costs little (at the paper's 0.8 few cells move)
SETTINGS = {
    "puzzle_grid_2": {"grid_sizes": (2,)},
    "puzzle_grid_4": {"grid_sizes": (4,)},
    "puzzle_grid_8": {"grid_sizes": (8,)},
    "puzzle_grid_16": {"grid_sizes": (16,)},
    "puzzle_cheap_transport": {"grid_sizes": (8,), "transport_cost": 0.1},
}
results = {}
for name, changes in SETTINGS.items():
    settings = PuzzleMixConfig.cifar100(**changes)
    results[name] = puzzle_mix(batch, targets, saliency, settings, generator=torch.Generator().manual_seed(args.seed))

# %% Co-Mixup (Eq. 4.1): outputs share the batch's inputs, and are unlike each other
results["co_mixup"] = co_mixup(
    batch, targets, saliency, CoMixupConfig.cifar100(), generator=torch.Generator().manual_seed(args.seed)
)

# %% Pictures: inputs, saliency, mask, what is shown of each input, output
for name, result in results.items():
    plot_mixup(result, batch, inputs=3 if name == "co_mixup" else 2).savefig(args.output_dir / f"{name}.png", dpi=110)

# %% The statistics of Figures 3.2 and 4.2
print(f"{'':22}{'saliency left':>14}{'variation':>11}{'inputs':>8}{'diversity':>11}")
for name, result in results.items():
    numbers = (
        mixed_saliency(result).mean(),
        total_variation(result.images).mean(),
        inputs_per_output(result).float().mean(),
    )
    print(f"{name:22}{numbers[0]:14.3f}{numbers[1]:11.4f}{numbers[2]:8.2f}{diversity(result):11.3f}")
print(f"{len(results)} pictures in {args.output_dir}")
