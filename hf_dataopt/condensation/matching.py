"""The matching objective D of Algorithm 5: distances between network gradients of real and synthetic images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..settings import brief, check_choice, check_flag, check_kind, check_tensor

Metric = Literal["mse", "l1", "l1_mean", "cos"]
_COS_EPSILON = 1e-6


def distance(real: Tensor, synthetic: Tensor, metric: Metric) -> Tensor:
    """Distance between two gradients of one parameter: a SUM over its entries or output filters.

    Args:
        real, synthetic: gradients of one shape.
        metric: `"mse"` sum of squares, `"l1"` sum of absolute values, `"l1_mean"` mean per output filter, summed;
            `"cos"` 1 - cosine per output filter, summed.

    Returns:
        A scalar.

    Raises:
        ValueError: unknown metric or unequal shapes.

    Source: `D` of Algorithm 5, `Cos` of Eq. 6.1 (channel-wise).
    Differs: the text's D is one norm over all parameters; the reference code adds these sums over layers.
    """
    check_tensor("real", real)
    check_tensor("synthetic", synthetic)
    check_choice("metric", metric, ("mse", "l1", "l1_mean", "cos"))
    if real.shape != synthetic.shape or not real.numel():
        raise ValueError(f"gradients have shapes {tuple(real.shape)} and {tuple(synthetic.shape)}; they must be equal")
    return class_distance(real[None], synthetic[None], metric)[0]


def class_distance(real: Tensor, synthetic: Tensor, metric: Metric) -> Tensor:
    """`distance` of many classes: gradients (classes, *shape) give (classes,)."""
    if metric == "mse":
        return (real - synthetic).square().flatten(1).sum(1)
    if metric == "l1":
        return (real - synthetic).abs().flatten(1).sum(1)
    # vectors and scalars are one filter of one entry each for l1_mean, one filter for cos
    filters = real.ndim - 1
    if metric == "l1_mean":
        if filters > 1:
            return (real - synthetic).abs().flatten(2).mean(2).sum(1)
        return (real - synthetic).abs().flatten(1).sum(1)
    if metric == "cos":
        real, synthetic = (g.flatten(2) if filters > 1 else g.flatten(1)[..., None] for g in (real, synthetic))
        norms = real.norm(dim=-1) * synthetic.norm(dim=-1)
        return (1 - (real * synthetic).sum(-1) / (norms + _COS_EPSILON)).sum(1)
    raise ValueError(f"metric must be mse, l1, l1_mean or cos, got {metric!r}")


def matched_parameters(network: nn.Module, *, bias: bool = False, head: bool = False) -> list[str]:
    """Names of the parameters whose gradients are compared.

    Args:
        network: any classifier.
        bias: compare vectors too (biases, norm weights).
        head: compare matrices too (the linear head).

    Returns:
        Convolution weights (rank 3 and up) always, in the network's order; for a network without any, its matrices.
    """
    ranks = {name: parameter.ndim for name, parameter in network.named_parameters() if parameter.requires_grad}
    head = head or not any(rank > 2 for rank in ranks.values())
    return [name for name, rank in ranks.items() if rank > 2 or (rank == 2 and head) or (rank == 1 and bias)]


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Logits, at least float32, of a plain module or of a transformers model (its output object's `logits`)."""
    return logits_from(network(images))


def logits_from(output: Any) -> Tensor:
    """Logits, at least float32, out of what a classifier returned."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def gradients(
    network: nn.Module, images: Tensor, labels: Tensor, names: Sequence[str], *, differentiable: bool = False
) -> list[Tensor]:
    """Gradients of the mean cross-entropy, one per name; with a graph back to the images if `differentiable`."""
    parameters = dict(network.named_parameters())
    loss = F.cross_entropy(logits_of(network, images), labels)
    found = torch.autograd.grad(loss, [parameters[name] for name in names], create_graph=differentiable)
    return list(found)


def match_gradients(
    network: nn.Module,
    real: tuple[Tensor, Tensor],
    synthetic: tuple[Tensor, Tensor],
    metric: Metric = "mse",
    *,
    bias: bool = False,
    head: bool = False,
) -> Tensor:
    """Gradient matching of one class: sum over layers of the distance between two gradients.

    Args:
        network: classifier in the state theta_i.
        real: images (n, C, H, W) and labels (n,) of a class; no gradient flows into them.
        synthetic: images (m, C, H, W) and labels (m,); the result can be differentiated by the images.
        metric: see `distance`.
        bias, head: see `matched_parameters`.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not fit, labels that the network does not know, or a network with no weights to match.
        TypeError: no module, or no pair of images and labels.

    Source: Eq. 6.1 and `D` of Algorithm 5.
    Cost: two backward passes, and a third through the second when differentiated.
    """
    check_kind("network", network, nn.Module)
    check_choice("metric", metric, ("mse", "l1", "l1_mean", "cos"))
    real, synthetic = _pair("real", real), _pair("synthetic", synthetic)
    names = matched_parameters(network, bias=check_flag("bias", bias), head=check_flag("head", head))
    if not names:
        raise ValueError(
            f"{type(network).__name__} has no weights to match; give a network with convolutions, or head=True"
        )
    try:
        wanted = gradients(network, *real, names)
        got = gradients(network, *synthetic, names, differentiable=True)
    except IndexError as error:  # of torch's cross entropy
        raise ValueError(f"labels must be classes of the network ({error!s:.80})") from error
    total: Tensor = sum(
        (distance(a.detach(), b, metric) for a, b in zip(wanted, got, strict=True)),
        torch.zeros((), device=got[0].device),
    )
    return total


def _pair(name: str, value: Any) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of images (n, C, H, W) and labels (n,), got {brief(value)}")
    images = check_tensor(f"{name} images", value[0], ("n", "C", "H", "W"))
    return images, check_tensor(f"{name} labels", value[1], (len(images),), floating=False).long()


def match_features(network: nn.Module, real: Tensor, synthetic: Tensor, block: int | None = None) -> Tensor:
    """Feature matching (DM): squared distance between the mean features of two batches.

    Args:
        network: has `features(images, block)`, or gives hidden states through its logits only (then those are matched).
        real, synthetic: images of one class.
        block: layer, default the last.

    Returns:
        A scalar.

    Source: section 6.2 "match the hidden features", the DM baseline of Table 6.1.
    """
    features = getattr(network, "features", None)
    with torch.no_grad():
        wanted = (features(real, block) if features else logits_of(network, real)).mean(0)
    got = (features(synthetic, block) if features else logits_of(network, synthetic)).mean(0)
    return (got - wanted).square().sum()
