"""A dataset doctor's visit: examine the labels, show the evidence, prescribe. A notebook as a script.

python examples/dataset_doctor.py                                  # scikit-learn's digits with 8 % confusable wrong labels
python examples/dataset_doctor.py --dataset fashion_mnist          # Hub name, or a folder of `save_to_disk`
python examples/dataset_doctor.py --smoke

A small network is trained on the labels as they are, and looked at three times on the way: the relation maps (Figure 5.1)
show how rows relate over that process. Pictures go to --output-dir; every `# %%` starts a notebook cell.
"""

# %% Arguments
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from matplotlib.figure import Figure
from torch.nn.functional import interpolate
from transformers import ResNetConfig, ResNetForImageClassification

from hf_dataopt import RelationCleaner

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", default=None, help="Hub name or folder with columns image and label; default: digits")
parser.add_argument("--rows", type=int, default=4000, help="rows examined at most")
parser.add_argument("--output-dir", type=Path, default=Path("dataset_doctor"))
parser.add_argument("--steps", type=int, default=240, help="training steps of the network, looked at three times")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--smoke", action="store_true", help="400 rows, 60 steps")
args = parser.parse_args()
args.output_dir.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(args.seed)

# %% The patient: rows with labels; digits get wrong labels that are easily confused with the right ones
flipped = None
if args.dataset is None:
    from sklearn.datasets import load_digits

    found, confused = load_digits(), np.array([8, 7, 3, 8, 1, 9, 8, 1, 3, 3])
    truth = found.target
    flipped = rng.random(len(truth)) < 0.08
    names = [str(k) for k in range(10)]
    rows = Dataset.from_dict(
        {"image": list((found.images * 15.9).astype(np.uint8)), "label": np.where(flipped, confused[truth], truth)},
        features=Features(image=Image(), label=ClassLabel(names=names)),
    )
else:
    data = load_from_disk(args.dataset) if Path(args.dataset).is_dir() else load_dataset(args.dataset)
    rows = data["train"] if isinstance(data, DatasetDict) else data
    names = rows.features["label"].names
order = rng.permutation(len(rows))[: 400 if args.smoke else args.rows]
rows, flipped = rows.select(order), None if flipped is None else flipped[order]

# %% Examination: train on the labels as they are, keep features and probabilities of three moments
pixels = torch.from_numpy(np.stack([np.atleast_3d(np.asarray(image)) for image in rows["image"]]))
pixels = interpolate(pixels.permute(0, 3, 1, 2).float() / 255, size=(32, 32), mode="bilinear", align_corners=False)
labels = torch.tensor(rows["label"])
torch.manual_seed(args.seed)
config = ResNetConfig(
    num_channels=pixels.shape[1], embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic"
)
config.num_labels = len(names)
model = ResNetForImageClassification(config)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
steps = 60 if args.smoke else args.steps
moments = []
for step in range(1, steps + 1):
    picked = torch.randint(len(pixels), (64,))
    optimizer.zero_grad()
    model(pixel_values=pixels[picked], labels=labels[picked]).loss.backward()
    optimizer.step()
    if step % (steps // 3) == 0:
        model.eval()
        with torch.no_grad():
            pooled = [model.resnet(part).pooler_output.flatten(1) for part in pixels.split(256)]
            moments.append((torch.cat(pooled), torch.cat([model.classifier(part).softmax(1) for part in pooled])))
        model.train()
for number, (features, probs) in enumerate(moments):
    rows = rows.add_column(f"features_{number}", list(features.numpy()))
    rows = rows.add_column(f"probs_{number}", list(probs.numpy()))

# %% Diagnosis: one relation graph per moment, averaged (Table 5.5)
count = range(len(moments))
report = RelationCleaner(temperature=4).fit(
    rows, features_column=[f"features_{k}" for k in count], probs_column=[f"probs_{k}" for k in count]
)
print(
    f"{len(rows)} rows, {int(report.is_label_error.sum())} labels look wrong, {int(report.is_outlier.sum())} outliers"
)
if flipped is not None:
    right = int((report.is_label_error & flipped).sum())
    print(f"{int(flipped.sum())} labels were made wrong; {right} of them are among the flagged ones")

# %% Evidence: the worst labels, and the rows that speak against them (Figure 5.3)
worst = report.worst(5)
figure = Figure(figsize=(9, 1.45 * len(worst) + 0.4), layout="constrained")
for line, axes in zip(worst, figure.subplots(len(worst), 7), strict=True):
    proof = report.evidence(int(line), 3)
    shown = [int(line), *proof.conflicting.tolist(), *proof.supporting.tolist()]
    values = [0.0, *proof.conflicting_relations, *proof.supporting_relations]
    for axis in axes:
        axis.set_axis_off()
    for axis, row, value in zip(axes, shown, values, strict=False):
        axis.imshow(rows[row]["image"], cmap="gray")
        title = names[int(labels[row])] + (f"  {value:+.2f}" if value else "?")
        axis.set_title(title, fontsize=9, color="crimson" if value < 0 else "black", parse_math=False)
figure.suptitle("label in doubt  |  rows that contradict it  |  rows that support it", fontsize=10)
figure.savefig(args.output_dir / "evidence.png", dpi=110)

# %% Relation maps of a wrong label, an outlier and an ordinary row (Figure 5.1)
ordinary = int(np.argmin(report.label_noise_score))
strange = int(np.argmax(report.outlier_score))
for name, row in (("doubtful", int(worst[0])), ("outlier", strange), ("ordinary", ordinary)):
    report.relation_map(row).savefig(args.output_dir / f"map_{name}.png", dpi=110)

# %% Prescription
clean = report.filter(rows)
clean.remove_columns([n for n in clean.column_names if n not in ("image", "label")]).save_to_disk(
    args.output_dir / "clean"
)
print(f"{len(clean)} rows kept; pictures and the cleaned set are in {args.output_dir}")
