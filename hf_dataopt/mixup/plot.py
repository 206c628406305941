"""A picture of what a mixup method did to a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MissingExtraError
from ..settings import check_int, check_kind, check_tensor, optional
from .co_mixup_config import CoMixupConfig
from .config import PuzzleMixConfig
from .result import MixResult
from .statistics import transported_inputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_mixup(
    result: MixResult,
    images: Tensor,
    config: PuzzleMixConfig | CoMixupConfig | None = None,
    *,
    rows: int = 4,
    inputs: int = 2,
) -> Figure:
    """Inputs, saliency, mask, transported inputs and output of the first samples of a batch.

    Args:
        result: of `puzzle_mix` or `co_mixup`.
        images: (inputs, C, H, W) as given to the method.
        config: its settings; `image_mean` and `image_std`, where it has them, bring the pixels back to [0, 1]. Otherwise
            the picture is scaled to the range of `images`.
        rows: outputs to show, default 4.
        inputs: inputs shown of each output, by their share, default 2.

    Returns:
        A matplotlib figure: `plot_mixup(result, images).savefig("mixup.png")`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: images do not fit the result.

    Source: Figure 3.3.

    Cost: a second or so; for looking at, not for training.

    Example:
        >>> from hf_dataopt import PuzzleMixConfig, puzzle_mix
        >>> images, saliency = torch.rand(4, 3, 16, 16), torch.rand(4, 16, 16)
        >>> result = puzzle_mix(images, torch.eye(4), saliency, PuzzleMixConfig(), torch.Generator())
        >>> plot_mixup(result, images, rows=2).savefig("mixed.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "plot_mixup") from error
    check_kind("result", result, MixResult, "give what puzzle_mix or co_mixup returned")
    check_tensor("images", images, floating=None)
    optional(check_kind, "config", config, (PuzzleMixConfig, CoMixupConfig))
    rows, inputs = check_int("rows", rows, 1), check_int("inputs", inputs, 1)
    if images.ndim != 4 or images.shape[1:] != result.images.shape[1:] or int(result.sources.max()) >= len(images):
        raise ValueError(f"images are {tuple(images.shape)}, mixed images {tuple(result.images.shape)}: another batch?")
    if isinstance(config, PuzzleMixConfig) and config.image_std and len(config.image_std) not in (1, images.shape[1]):
        raise ValueError(f"image_std has {len(config.image_std)} channels, the images have {images.shape[1]}")
    rows, inputs = min(rows, len(result.images)), min(inputs, result.sources.shape[1])
    picture = _pictures(images, config)
    moved = transported_inputs(images, _first(result, rows))
    groups = ["input", "saliency", "mask", "shown of input"]
    height, width = images.shape[-2:]
    side = 1.35
    columns = len(groups) * inputs + 1
    figure = Figure(
        figsize=(side * columns * width / max(height, width), side * rows * height / max(height, width) + 0.5)
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(linewidth=0.4, color="0.6")
    for row in range(rows):
        order = result.ratios[row].argsort(descending=True, stable=True)[:inputs].tolist()
        order = sorted(order)
        for place, which in enumerate(order):
            source, share = int(result.sources[row, which]), float(result.ratios[row, which])
            if share == 0:  # an output of fewer inputs than there is room for
                for group in range(len(groups)):
                    axes[row, group * inputs + place].set_axis_off()
                continue
            axes[row, place].imshow(picture(images[source]), cmap="gray", vmin=0, vmax=1)
            if result.saliency is not None:
                axes[row, inputs + place].imshow(result.saliency[source].float().cpu(), cmap="magma", aspect="auto")
            mask = result.masks[row, which].float().cpu()
            shaded = axes[row, 2 * inputs + place]
            shaded.imshow(mask, cmap="gray", vmin=0, vmax=1, aspect="auto")
            shaded.set_title(f"{100 * share:.0f} %", fontsize=7, pad=2)
            seen = _veiled(picture(moved[row, which]), mask, height, width)
            axes[row, 3 * inputs + place].imshow(seen, vmin=0, vmax=1)
        axes[row, -1].imshow(picture(result.images[row]), cmap="gray", vmin=0, vmax=1)
        if bool(result.unmixed[row]):
            axes[row, -1].set_title("unmixed", fontsize=7, pad=2)
    for number, name in enumerate(groups):
        figure.text((number * inputs + inputs / 2) / columns, 0.995, name, ha="center", va="top", fontsize=9)
    figure.text((columns - 0.5) / columns, 0.995, "output", ha="center", va="top", fontsize=9)
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=0.01, top=1 - 0.45 / figure.get_figheight(), wspace=0.06, hspace=0.2
    )
    return figure


def _first(result: MixResult, rows: int) -> MixResult:
    """The first outputs; the saliency of all inputs."""
    kept = {
        name: value if value is None or name == "saliency" else value[:rows] for name, value in vars(result).items()
    }
    return MixResult(**kept)


def _pictures(images: Tensor, config: Any) -> Any:
    """(C, H, W) to something `imshow` takes, in [0, 1]."""
    mean, std = getattr(config, "image_mean", None), getattr(config, "image_std", None)
    if mean is None or std is None:
        low, high = float(images.min()), float(images.max())
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        shift, scale = torch.tensor([low]), torch.tensor([max(high - low, 1e-12)])
    else:
        shift, scale = torch.tensor(mean), torch.tensor(std)
        shift, scale = -shift / scale, 1 / scale

    def convert(image: Tensor) -> Any:
        pixels = (image.detach().float().cpu() - shift[:, None, None]) / scale[:, None, None]
        pixels = pixels.clamp(0, 1)
        return pixels[:3].permute(1, 2, 0).numpy() if len(pixels) >= 3 else pixels[0].numpy()

    return convert


def _veiled(pixels: Any, mask: Tensor, height: int, width: int) -> Any:
    """What the mask shows, on white."""
    from .cells import Axis, upsample

    share = upsample(mask, Axis(height, mask.shape[0]), Axis(width, mask.shape[1])).numpy()[..., None]
    colour = pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, -1)
    return share * colour + (1 - share)
