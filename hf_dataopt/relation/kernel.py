"""The similarity kernel and the signed relation between two sets of rows (section 5.3.4, Eqs. 5.1, 5.4, 5.5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..settings import brief, check_config, check_shares, check_tensor
from .config import RelationConfig


def normalise(features: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of length 1; the cosine of Eq. 5.4 becomes a product.

    Args:
        features: (n, d) float32, no zero rows.
        dtype: of the result; float16 rounds first and divides in float16, as the reference code does, where that does
            not overflow.

    Returns:
        (n, d) in `dtype`.
    """
    unit = features / torch.linalg.vector_norm(features, dim=1, keepdim=True)
    if dtype != torch.float16:
        return unit.to(dtype)
    half = features.to(dtype)
    squares = (half**2).sum(dim=1, keepdim=True)
    return torch.where(torch.isfinite(squares) & (squares > 0), half / squares.sqrt(), unit.to(dtype))


def base_kernel(
    features_i: Tensor,
    features_j: Tensor,
    probs_i: Tensor | None,
    probs_j: Tensor | None,
    config: RelationConfig,
    buffers: tuple[Tensor, Tensor] | None = None,
    look: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """`s(f, f') c(p, p')` after the edge cut-off and before the power: the inside of Eq. 5.4, with Eq. 5.5.

    Args:
        features_i, features_j: (a, d) and (b, d), unit-length rows, in the dtype of the products.
        probs_i, probs_j: (a, C) and (b, C) class probabilities, or None without compatibility.
        config: similarity, cut-off.
        buffers: two of (a, b) and the same dtype to reuse.
        look: is shown `f f'^T` before anything is done to it, and must leave it as it is.

    Returns:
        (a, b), in [0, 1], the dtype of the inputs. The first buffer where they were given.

    Source: Eqs. 5.4 and 5.5; the cut-off is the reference code's. max(0, s) c = max(0, s c) as c >= 0, so the hinge and
        the cut-off are one pass.
    Cost: 2 a b (d + C) operations.
    """
    out, scratch = buffers or (None, None)
    kernel = torch.mm(features_i, features_j.T, out=out)
    if look is not None:
        look(kernel)
    if config.similarity == "rbf":
        kernel.sub_(1).mul_(2 * config.rbf_gamma).exp_()
    if probs_i is not None and probs_j is not None:
        kernel.mul_(torch.mm(probs_i, probs_j.T, out=scratch))
    return torch.nn.functional.threshold(kernel, config.edge_cutoff, 0.0, inplace=True)


def power_(kernel: Tensor, temperature: float) -> Tensor:
    """`kernel ** temperature` in place: Eq. 5.4's power; 1, 2, 4, 8 ... by squaring."""
    exponent = round(temperature)
    if exponent == temperature and exponent & (exponent - 1) == 0:
        for _ in range(exponent.bit_length() - 1):
            kernel.mul_(kernel)
        return kernel
    return kernel.pow_(temperature)


def sign_(kernel: Tensor, labels_i: Tensor, labels_j: Tensor) -> Tensor:
    """Turn a kernel into a relation in place: + where the labels agree, - where they do not (Eq. 5.1).

    Args:
        kernel: (a, b).
        labels_i, labels_j: (a,), (b,) integers; negative: unlabelled, related to nothing.
    """
    differs = labels_i[:, None] != labels_j[None, :]
    kernel.mul_(1 - 2 * differs.to(kernel.dtype))
    if bool((labels_i < 0).any()) or bool((labels_j < 0).any()):
        kernel.mul_((labels_i >= 0)[:, None]).mul_((labels_j >= 0)[None, :])
    return kernel


def relation(
    features_i: Tensor,
    features_j: Tensor,
    probs_i: Tensor | None,
    probs_j: Tensor | None,
    labels: tuple[Tensor, Tensor] | None = None,
    config: RelationConfig | None = None,
) -> Tensor:
    """The relation values between two sets of rows, as a dense matrix: for a few rows, evidence and plots.

    Args:
        features_i, features_j: (a, d), (b, d) raw features; rows are normalised here.
        probs_i, probs_j: (a, C), (b, C) probabilities, or None (also ignored when `config.compatibility` is off).
        labels: (a,) and (b,) labels; None gives the unsigned kernel.
        config: kernel settings; the diagonal is not touched.

    Returns:
        (a, b) float32 in [-1, 1].

    Source: Eqs. 5.1, 5.4, 5.5.
    Cost: 2 a b (d + C) operations, 8 a b bytes.

    Example:
        >>> f = torch.eye(2); relation(f, f, None, None, (torch.tensor([0, 1]),) * 2)
        tensor([[1., -0.],
                [-0., 1.]])
    """
    config = check_config(config, RelationConfig)
    check_tensor("features_i", features_i, ("a", "d"), finite=True)
    check_tensor("features_j", features_j, ("b", features_i.shape[1]), finite=True)
    for name, rows in (("features_i", features_i), ("features_j", features_j)):
        if bool((rows == 0).all(1).any()):
            raise ValueError(f"{name} hold a row of zeros, which has no direction; drop it")
    if (probs_i is None) != (probs_j is None):
        raise ValueError("probs_i and probs_j go together; give both or neither")
    if probs_i is not None and probs_j is not None:
        check_shares("probs_i", probs_i, (len(features_i), "classes"))
        check_shares("probs_j", probs_j, (len(features_j), probs_i.shape[1]))
    if labels is not None:
        both = labels if isinstance(labels, tuple | list) else ()
        if len(both) != 2:
            raise TypeError(f"labels must be two tensors, (a,) and (b,), got {brief(labels)}")
        for name, one, count in zip("ij", both, (len(features_i), len(features_j)), strict=True):
            check_tensor(f"labels of {name}", one, (count,), floating=False)
    dtype = getattr(torch, config.dtype)
    f_i, f_j = normalise(features_i, dtype), normalise(features_j, dtype)
    p_i = None if probs_i is None or not config.compatibility else probs_i.to(dtype)
    p_j = None if probs_j is None or not config.compatibility else probs_j.to(dtype)
    kernel = power_(base_kernel(f_i, f_j, p_i, p_j, config).float(), config.temperature)
    return kernel if labels is None else sign_(kernel, *labels)
