"""`hf-dataopt mix`: mix one batch of images with a classifier's saliency and save a picture of how it was done."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import told
from ..shell.data import check_columns, read_dataset
from ..shell.options import add_dataset, add_device, add_hub, add_seed, device_of
from ..shell.usage import check_count, only, refusing

if TYPE_CHECKING:
    import torch

HELP = "mix a batch of images by their saliency and save a picture (Puzzle Mix, Co-Mixup)"
EXAMPLES = [
    "hf-dataopt mix",
    "hf-dataopt mix --method co --rows 16 --output-dir mixed",
    "hf-dataopt mix cifar10 --column img --model me/resnet-cifar10 --method puzzle --output-dir mixed --json",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt mix`."""
    parser.add_argument("--method", choices=["puzzle", "co"], default="puzzle", help="Puzzle Mix or Co-Mixup")
    add_dataset(parser, "images", optional="scikit-learn's digits")
    parser.add_argument(
        "--model",
        default=None,
        help="image classifier (Hub name or folder); default for digits: a small network trained on the spot",
    )
    parser.add_argument("--rows", type=int, default=20, help="images in the batch")
    parser.add_argument("--shown", type=int, default=6, help="outputs in the picture")
    parser.add_argument("--grid", type=int, default=4, help="cells along each side of the mask")
    add_device(parser)
    add_seed(parser)
    add_hub(parser, "of the data set")
    parser.add_argument("--output-dir", default="mixed", metavar="DIR", help="folder for the picture, mixed.png")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Mix one batch.

    Args:
        args: the parsed command line.

    Returns:
        Path of the picture, inputs and shares of each output, statistics and seconds, ready for JSON.

    Raises:
        UsageError: a dataset without a model, missing columns, or settings out of range.
        ValueError: images or labels that cannot be used.
    """
    from .co_mixup_config import CoMixupConfig
    from .config import PuzzleMixConfig

    with refusing():
        only(
            args,
            args.dataset,
            "needs a DATASET",
            "config",
            "split",
            "column",
            "label_column",
            "model",
            "revision",
            "token",
        )
        check_count("rows", args.rows, 2)
        check_count("shown", args.shown)
        PuzzleMixConfig(grid_sizes=(args.grid,)), CoMixupConfig(grid=args.grid)
        device = device_of(args.device)
        folder = Path(args.output_dir)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output-dir: {folder} is a file; name a folder")
        dataset = None if args.dataset is None else _rows_of(args)
    if dataset is None:
        images, labels = digits()
        model = trained_network(steps=60, seed=args.seed, device=device)
        images, labels = images[-args.rows :], labels[-args.rows :]
        scale = None
    else:
        images, labels, model, scale = _from_dataset(dataset, args)
    batch = images.to(device), labels.to(device)
    picture = folder / "mixed.png"
    return mix_batch(
        model.to(device), batch, args.method, args.grid, picture, shown=args.shown, scale=scale, seed=args.seed
    )


def mix_batch(
    model: Any,
    batch: tuple[torch.Tensor, torch.Tensor],
    method: str,
    grid: int,
    picture: Path,
    *,
    shown: int = 6,
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Saliency of `model`, one mixed batch, its picture and its statistics.

    Args:
        model: an image classifier.
        batch: images (B, C, H, W) as the model takes them, labels (B,) int64.
        method: "puzzle" or "co".
        grid: cells along each side of the mask.
        picture: file to write.
        shown: outputs in the picture.
        scale: mean and standard deviation per channel; None: the images are in [0, 1].
        seed: of the draws.

    Returns:
        As `run`.
    """
    import torch

    from ..saliency import input_saliency
    from ..seeding import generator
    from .co_mixup import co_mixup
    from .co_mixup_config import CoMixupConfig
    from .config import PuzzleMixConfig
    from .plot import plot_mixup
    from .puzzle_mix import puzzle_mix
    from .statistics import diversity, inputs_per_output, mixed_saliency, total_variation

    images, labels = batch
    mean, std = scale if scale is not None else (None, None)
    config = PuzzleMixConfig(grid_sizes=(grid,), image_mean=mean, image_std=std)
    start = time.perf_counter()
    saliency = input_saliency(model, {model.main_input_name: images}, labels)
    seconds = {"saliency": round(time.perf_counter() - start, 4)}
    targets = torch.eye(model.config.num_labels, device=labels.device)[labels]
    start = time.perf_counter()
    if method == "puzzle":
        result = puzzle_mix(images, targets, saliency, config, generator(seed))
    else:
        result = co_mixup(images, targets, saliency, CoMixupConfig(grid=grid), generator(seed))
    seconds["mixing"] = round(time.perf_counter() - start, 4)
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_mixup(result, images, config, rows=shown).savefig(picture, dpi=100)
    sums: dict[int, float]
    outputs = []
    for sources, ratios in zip(result.sources.tolist(), result.ratios.tolist(), strict=True):
        sums = {}
        for source, ratio in zip(sources, ratios, strict=True):
            sums[source] = sums.get(source, 0.0) + ratio
        shares = [[source, round(share, 3)] for source, share in sorted(sums.items(), key=lambda kv: -kv[1]) if share]
        outputs.append(shares)
    return {
        "method": method,
        "picture": str(picture),
        "images": len(images),
        "unmixed": int(result.unmixed.sum()),
        "mixed_saliency": round(float(mixed_saliency(result).mean()), 4),
        "total_variation": round(float(total_variation(result.images).mean()), 4),
        "diversity": round(diversity(result), 4),
        "inputs_per_output": round(float(inputs_per_output(result).float().mean()), 3),
        "outputs": outputs,
        "seconds": seconds,
    }


def show(result: dict[str, Any], console: Any) -> None:
    """The statistics as a table, and where the picture is."""
    from rich.table import Table

    table = Table(title=f"{result['images']} images mixed by {_NAMES[result['method']]}")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    rows = {
        "saliency left in an output (one whole input: 1)": result["mixed_saliency"],
        "inputs per output": result["inputs_per_output"],
        "total variation": result["total_variation"],
        "diversity (1: outputs share no input)": result["diversity"],
        "left unmixed": result["unmixed"],
        "seconds for saliency, for mixing": f"{result['seconds']['saliency']}, {result['seconds']['mixing']}",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)
    console.print(f"picture: {result['picture']}", soft_wrap=True)


_NAMES = {"puzzle": "Puzzle Mix", "co": "Co-Mixup"}


def demo(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The demo's section: a small network's saliency, and how both methods mix one batch by it, in pictures.

    No accuracy: a minute's training on digits is no place where mixing pays; benchmarks/mixup_accuracy.py measures that.
    """
    steps = 40 if args.smoke else 150
    args.console.print(f"a small network, {steps} steps on {TRAIN} of scikit-learn's digits, for its saliency ...")
    model = trained_network(steps=steps, seed=args.seed, device=args.device)
    images, labels = (one[-20:].to(model.device) for one in digits())
    result: dict[str, Any] = {}
    for method in _NAMES:
        picture = output_dir / f"mixup_{method}.png"
        result[method] = mix_batch(model, (images, labels), method, 4, picture, seed=args.seed)
        show(result[method], args.console)
    return {**result, "claims": _claims(result, model, (images, labels))}


def _claims(found: dict[str, Any], model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> list[dict[str, str]]:
    """Rows for the demo's last table: both methods beside a blend in halves of the same images and saliency."""
    import torch

    from ..saliency import input_saliency
    from .co_mixup import cell_saliency
    from .result import MixResult
    from .statistics import inputs_per_output, mixed_saliency, total_variation

    images, labels = batch
    size, device = len(images), images.device
    own, partner = torch.arange(size, device=device), torch.arange(size, device=device).flip(0)
    targets = torch.eye(model.config.num_labels, device=labels.device)[labels]
    blend = MixResult(
        images=(images + images[partner]) / 2,
        targets=(targets + targets[partner]) / 2,
        sources=torch.stack([own, partner], 1),
        masks=torch.full((size, 2, 4, 4), 0.5, device=device),
        ratios=torch.full((size, 2), 0.5, device=device),
        unmixed=partner == own,
        saliency=cell_saliency(input_saliency(model, {model.main_input_name: images}, labels), (4, 4)),
    )
    measured = {
        "mixed_saliency": float(mixed_saliency(blend).mean()),
        "inputs_per_output": float(inputs_per_output(blend).float().mean()),
        "total_variation": float(total_variation(blend.images).mean()),
    }
    names = {
        "mixed_saliency": "saliency shown in a mixed image (one whole image: 1)",
        "inputs_per_output": "images in a mixed image",
        "total_variation": "total variation of a mixed image",
    }
    return [
        {
            "claim": claim,
            "baseline": f"blend in halves {measured[key]:.2f}",
            "ours": "; ".join(f"{name} {found[method][key]:.2f}" for method, name in _NAMES.items()),
        }
        for key, claim in names.items()
    ]


TRAIN = 200
_NETWORK: dict[str, Any] = {
    "num_channels": 1,
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 10,
}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 digits as (n, 1, 32, 32) float32 in [0, 1], and their labels (n,) int64."""
    import torch

    from ..errors import MissingExtraError

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "the digits") from error
    found = load_digits()
    images = torch.from_numpy(found.images / 16).float()[:, None]
    images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(found.target).long()


def trained_network(*, steps: int, seed: int = 0, device: str = "cpu") -> Any:
    """A small HF ResNet in eval mode after `steps` steps of a stock Trainer on the first digits.

    Args:
        steps: optimizer steps of 20 images.
        seed: of weights and order.
        device: to train on.
    """
    import torch
    from transformers import PrinterCallback, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    from ..seeding import global_streams_kept

    images, labels = digits()
    rows: Any = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels.tolist(), strict=True)]
    # Trainer takes no generator: it seeds the global streams, which are lent to it here and given back
    with global_streams_kept(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        model = ResNetForImageClassification(ResNetConfig(**_NETWORK))
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=20,
            max_steps=steps,
            learning_rate=3e-3,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            seed=seed,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=rows[:TRAIN])
        trainer.remove_callback(PrinterCallback)  # standard output belongs to the result
        trainer.train()
    return model.eval().to(device)


def _rows_of(args: argparse.Namespace) -> Any:
    """The rows of a batch, drawn from a user's dataset."""
    if args.model is None:
        raise ValueError("DATASET needs --model: whose saliency shall be used?")
    dataset = read_dataset(args.dataset, args.split, args.config, revision=args.revision, token=args.token)
    check_columns(dataset, column=args.column or "image", label_column=args.label_column or "label")
    if len(dataset) < 2:
        raise ValueError(f"DATASET: {args.dataset} has {len(dataset)} rows; mixing needs at least 2 images")
    return dataset.shuffle(seed=args.seed).select(range(min(args.rows, len(dataset))))


def _from_dataset(picked: Any, args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Images, labels, model and pixel scale of a user's rows and classifier."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from ..decoding import read_picture, read_rows

    try:
        processor = AutoImageProcessor.from_pretrained(args.model, token=args.token)
        model = AutoModelForImageClassification.from_pretrained(args.model, token=args.token).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {args.model}: cannot be loaded ({told(error)})") from error
    shown = read_rows(picked[args.column or "image"], lambda value: read_picture(value, "RGB"))[0]
    made = processor(shown, return_tensors="pt")
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    scale = (tuple(mean), tuple(std)) if getattr(processor, "do_normalize", False) and mean and std else None
    return made["pixel_values"], torch.tensor(picked[args.label_column or "label"]), model, scale
