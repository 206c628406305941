"""The demo's relation section: flip labels of handwritten digits, find them with the graph, train before and after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError

NOISE = 0.2
STEPS = 300
CHECKPOINTS = (150, 300)  # steps after which features are read: a temporal ensemble of two


def clean_digits(folder: Path, seed: int, device: str = "cpu") -> dict[str, Any]:
    """20 % of the training labels are changed at random; a small ResNet learns them; the graph finds them.

    Args:
        folder: for the HTML page, the picture of the worst rows and a relation map.
        seed: of split, flips and networks.
        device: of networks and graph.

    Returns:
        Counts, detection metrics against the known flips, the same for a ranking by loss at the same checkpoints, test accuracy
        before and after, paths.

    Raises:
        MissingExtraError: scikit-learn (the digits) is not installed.
    """
    import numpy as np

    from ..features import FeatureExtractor
    from ..metrics import average_precision, detection_metrics
    from . import baselines
    from .cleaner import RelationCleaner
    from .pages import draw_worst, write_page

    train, wrong, test = _noisy_digits(seed)
    model, data = _network(seed, device), train
    for step in _train(model, train, seed):
        data = data.map(FeatureExtractor(model, column="pixels", suffix=f"_{step}"), batched=True, desc="Features")
    before = _accuracy(model, test)
    report = RelationCleaner(device=device).fit(
        data,
        features_column=[f"features_{step}" for step in CHECKPOINTS],
        probs_column=[f"probs_{step}" for step in CHECKPOINTS],
    )  # as a user would who knows roughly how many labels are wrong
    cleaned = _network(seed, device)
    for _ in _train(cleaned, report.filter(train), seed):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    write_page(report, data, folder / "report.html")
    paths = {"report": str(folder / "report.html")}
    try:
        draw_worst(report, data).savefig(folder / "worst.png", dpi=110)
        report.relation_map(int(report.worst(1)[0])).savefig(folder / "relation_map.png", dpi=130)
        paths |= {"worst rows": str(folder / "worst.png"), "relation map": str(folder / "relation_map.png")}
    except MissingExtraError:
        pass
    flagged = report.is_label_error
    labels = np.asarray(train["label"])
    loss = np.mean([baselines.loss(np.asarray(data[f"probs_{step}"]), labels) for step in CHECKPOINTS], axis=0)
    dropped_by_loss = np.argsort(-loss, kind="stable")[: flagged.sum()]
    return {
        "rows": len(train),
        "flipped": int(wrong.sum()),
        "flagged": int(flagged.sum()),
        "flagged_and_flipped": int((flagged & wrong).sum()),
        **{key: round(value, 3) for key, value in detection_metrics(wrong, report.label_noise_score).items()},
        "loss_ap": round(average_precision(wrong, loss), 3),
        "loss_flagged_and_flipped": int(wrong[dropped_by_loss].sum()),
        "accuracy_noisy": before,
        "accuracy_cleaned": _accuracy(cleaned, test),
        "paths": paths,
    }


def show_digits(result: dict[str, Any], console: Any) -> None:
    """One table: what was found, and what it was worth."""
    from rich.table import Table

    table = Table(title="Digits with flipped labels, cleaned", show_header=False)
    table.add_row("training rows, labels flipped", f"{result['rows']:,}, {result['flipped']:,}")
    table.add_row("flagged, of them really flipped", f"{result['flagged']:,}, {result['flagged_and_flipped']:,}")
    table.add_row("average precision, AUROC", f"{result['ap']:.3f}, {result['auroc']:.3f}")
    table.add_row("test accuracy, trained on the noisy set", f"{result['accuracy_noisy']:.1%}")
    table.add_row("test accuracy, trained on the cleaned set", f"{result['accuracy_cleaned']:.1%}")
    console.print(table)
    for name, path in result["paths"].items():
        console.print(f"{name}: {path}")


def claims(result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows for the demo's last table."""
    return [
        {
            "claim": f"average precision in finding {result['flipped']:,} flipped labels of {result['rows']:,}",
            "baseline": f"loss {result['loss_ap']:.3f}",
            "ours": f"{result['ap']:.3f}",
        },
        {
            "claim": f"really flipped of {result['flagged']:,} rows that filter() drops",
            "baseline": f"highest losses, as many {result['loss_flagged_and_flipped']:,}",
            "ours": f"{result['flagged_and_flipped']:,}",
        },
        {
            "claim": "test accuracy after training",
            "baseline": f"on all rows {result['accuracy_noisy']:.1%}",
            "ours": f"on what stays {result['accuracy_cleaned']:.1%}",
        },
    ]


def _noisy_digits(seed: int) -> tuple[Any, Any, Any]:
    """Training set with flipped labels, which rows were flipped, clean test set of 500 rows."""
    import numpy as np
    from datasets import Array3D, ClassLabel, Dataset, Features, Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "the handwritten digits of the demo") from error
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    rng = np.random.default_rng(seed + 1)

    def make(index: Any, labels: Any) -> Any:
        pixels = (digits.images[index] / 16).astype(np.float32)
        columns = {
            "image": list((pixels * 255).astype(np.uint8)),
            "pixels": list(pixels[:, None]),
            "label": labels,
        }
        names = [str(k) for k in range(10)]
        kinds = Features(image=Image(), pixels=Array3D((1, 8, 8), "float32"), label=ClassLabel(names=names))
        return Dataset.from_dict(columns, features=kinds)

    train, test = order[500:], order[:500]
    wrong = rng.random(len(train)) < NOISE
    labels = np.where(wrong, (digits.target[train] + rng.integers(1, 10, len(train))) % 10, digits.target[train])
    return make(train, labels), wrong, make(test, digits.target[test])


def _network(seed: int, device: str) -> Any:
    """A ResNet of 0.3 M parameters for 8 x 8 pixels; the global RNG is left as it was."""
    from transformers import ResNetConfig, ResNetForImageClassification

    from ..seeding import generator, layers_draw_from

    with layers_draw_from(generator(seed)):
        config = ResNetConfig(
            num_channels=1, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic"
        )
        config.num_labels = 10
        network: Any = ResNetForImageClassification(config)
    return network.to(device)


def _train(model: Any, data: Any, seed: int) -> Iterator[int]:
    """Train `STEPS` steps; stops at every checkpoint, in evaluation mode, and says which."""
    import torch

    from ..progress import track
    from ..seeding import generator

    columns = data.with_format("torch")
    pixels, labels = columns["pixels"][:].to(model.device), columns["label"][:].to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    draws, rows = generator(seed), torch.empty(0, dtype=torch.long)
    for step in track(range(1, STEPS + 1), "Training", unit="step"):
        if len(rows) < 64:
            rows = torch.randperm(len(labels), generator=draws)
        batch, rows = rows[:64], rows[64:]
        loss = torch.nn.functional.cross_entropy(model.train()(pixel_values=pixels[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in CHECKPOINTS:
            model.eval()
            yield step


def _accuracy(model: Any, data: Any) -> float:
    import torch

    columns = data.with_format("torch")
    with torch.inference_mode():
        found = model(pixel_values=columns["pixels"][:].to(model.device)).logits.argmax(dim=1).cpu()
    return float((found == columns["label"][:]).float().mean())
