"""What Figures 3.2 and 4.2 measure of mixed batches; every function takes the result of any mixup method of this house."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings import check_kind, check_tensor
from .cells import Axis, cell_pixels
from .result import MixResult

logger = logging.getLogger(__name__)
_TOO_SINGLE = 0.9  # share of single-input outputs that is worth a word
_ENOUGH = (
    500  # outputs seen before that word: with an untrained model's saliency there may be hardly any mixing at first
)


def mixed_saliency(result: MixResult) -> Tensor:
    """How much saliency of the inputs is left in each output: `|h(s(x_0), s(x_1), ...)|_1`.

    Args:
        result: with `saliency`, which is normalised here to sum to 1 per input.

    Returns:
        (B,) float32 between 0 and the number of inputs of an output.

    Raises:
        ValueError: the result carries no saliency.

    Source: Figures 3.2 (a) and 4.2 (c).

    Example:
        >>> import torch
        >>> halves = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]).expand(2, 2, 1, 2)
        >>> result = MixResult(images=torch.zeros(2, 1, 2, 4), targets=torch.eye(2), masks=halves, plans=None,
        ...     sources=torch.tensor([[0, 1], [1, 0]]), ratios=torch.full((2, 2), 0.5), unmixed=torch.zeros(2) > 0,
        ...     saliency=torch.tensor([[[3.0, 1.0]], [[1.0, 1.0]]]))
        >>> mixed_saliency(result).tolist()
        [1.25, 0.75]
    """
    _check(result)
    if result.saliency is None:
        raise ValueError("this result carries no saliency; mix with puzzle_mix or co_mixup to get it")
    flat = result.saliency.flatten(1).float()
    flat = flat / flat.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    shown = flat[result.sources]
    if result.plans is not None:
        shown = shown.gather(2, result.plans)
    return (result.masks.flatten(2) * shown).sum((1, 2))


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring pixels, down plus right.

    Args:
        images: (B, C, H, W).

    Returns:
        (B,) float32 in units of the pixels.

    Source: Figure 3.2 (b); the text gives no normalisation, this one does not depend on the size.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])).tolist()
        [1.0]
    """
    check_tensor("images", images, ("batch", "channels", "height", "width"), floating=None)
    images = images.float()
    total = torch.zeros(len(images), device=images.device)
    for axis in (2, 3):
        if images.shape[axis] > 1:
            total = total + images.diff(dim=axis).abs().mean((1, 2, 3))
    return total


@dataclass(frozen=True, kw_only=True)
class MixupStatistics:
    """How much mixing there is in mixed batches.

    Args:
        outputs: outputs counted.
        inputs_per_output: mean number of different inputs seen in an output (Figure 4.2 (b)).
        largest_share: mean share of an output's largest input, in (0, 1]; 1 is no mixing.
        single_input: share of outputs that show one input only, in [0, 1].
        label_entropy: mean entropy of the outputs' labels, in nats; log 2 for two classes in halves.
    """

    outputs: int
    inputs_per_output: float
    largest_share: float
    single_input: float
    label_entropy: float


class Tally:
    """Running sums of `MixupStatistics`.

    They stay on the device of the results until they are read, or, `shared`, lie in memory that loader workers share.
    """

    def __init__(self) -> None:
        self._outputs = 0
        self._sums: Tensor | None = None
        self._slots: Tensor | None = None
        self._read: tuple[int, Tensor] = (0, torch.zeros(4, dtype=torch.float64))
        self._warned = False

    @classmethod
    def shared(cls, slots: int) -> Tally:
        """Sums with a slot for every process that adds to them."""
        made = cls()
        made._slots = torch.zeros(slots, 5, dtype=torch.float64).share_memory_()
        return made

    @property
    def outputs(self) -> int:
        """Outputs counted."""
        return self._outputs if self._slots is None else int(self._slots[:, 0].sum())

    @property
    def unmixed(self) -> int:
        """Outputs of one input."""
        return round(float(self._total()[2]))

    def add(self, result: MixResult, inputs: int, slot: int = 0) -> None:
        """Count a mixed batch, made of so many inputs."""
        sums = batch_sums(result, inputs)
        if self._slots is not None:
            self._slots[slot] += torch.cat([torch.tensor([len(result.sources)]), sums.cpu()])
            return
        self._outputs += len(result.sources)
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums

    def statistics(self, *, since_last: bool = False) -> MixupStatistics | None:
        """Of everything counted, or of what came since this was last asked with `since_last`; None: nothing."""
        total, outputs = self._total(), self.outputs
        if since_last:
            (before, sums), self._read = self._read, (outputs, total)
            total, outputs = total - sums, outputs - before
        if not outputs:
            return None
        seen, largest, single, entropy = (total / outputs).tolist()
        return MixupStatistics(
            outputs=outputs,
            inputs_per_output=seen,
            largest_share=largest,
            single_input=single,
            label_entropy=entropy,
        )

    def warn(self) -> None:
        """Once: nearly every output shows one input only, so that saliency is paid for and nothing is mixed."""
        found = None if self._warned else self.statistics()
        if found is not None and found.outputs >= _ENOUGH and found.single_input > _TOO_SINGLE:
            self._warned = True
            logger.warning(
                "%.0f %% of %d mixed outputs show one input only: nothing is mixed, at the price of the saliency. "
                "Co-Mixup mixes more with a larger tau or a smaller beta, Puzzle Mix with a larger eta or alpha",
                100 * found.single_input,
                found.outputs,
            )

    def _total(self) -> Tensor:
        if self._slots is not None:
            return self._slots[:, 1:].sum(0)
        return torch.zeros(4, dtype=torch.float64) if self._sums is None else self._sums.double().cpu()


def batch_sums(result: MixResult, inputs: int) -> Tensor:
    """(4,) sums over the outputs of one batch: inputs seen, largest shares, outputs of one input, entropies of labels.

    Labels are those of one class a sample; for several labels at once, or maps, the entropy is that of the inputs' shares.
    """
    shares = torch.zeros(len(result.sources), inputs, device=result.ratios.device)
    shares.scatter_add_(1, result.sources, result.ratios.float())
    single = result.targets.ndim == 2 and torch.allclose(
        result.targets.sum(1), torch.ones(()).to(result.targets), atol=1e-3
    )
    labels = result.targets if single else shares
    entropy = -torch.special.xlogy(labels, labels).sum(1)
    parts = ((shares > 0).sum(1).float(), shares.amax(1), result.unmixed.float(), entropy)
    return torch.stack([part.sum() for part in parts])


def source_shares(result: MixResult) -> Tensor:
    """How much of each output comes from each input: `o_j / |o_j|_1` of chapter 4.

    Args:
        result: of any method.

    Returns:
        (outputs, inputs) float32, rows sum to 1; inputs are counted up to the largest one used.

    Source: section 4.4.1; Figure 4.3.
    """
    _check(result)
    inputs = int(result.sources.max()) + 1 if result.saliency is None else len(result.saliency)
    shares = torch.zeros(len(result.sources), inputs, device=result.ratios.device)
    return shares.scatter_add_(1, result.sources, result.ratios.float())


def inputs_per_output(result: MixResult) -> Tensor:
    """Number of different inputs seen in each output.

    Args:
        result: of any method.

    Returns:
        (B,) int64, at least 1.

    Source: Figure 4.2 (b).
    """
    return (source_shares(result) > 0).sum(1)


def diversity(result: MixResult) -> float:
    """How little the outputs of a batch share inputs: `1 - sum_j sum_(j' != j) o_j . o_j' / m`, 1 when none do.

    Args:
        result: of any method; m outputs.

    Returns:
        At most 1; negative when most outputs use the same inputs.

    Source: Figure 4.2 (d).
    """
    shares = source_shares(result)
    products = shares @ shares.T
    return float(1 - (products.sum() - products.diagonal().sum()) / len(shares))


def transported_inputs(images: Tensor, result: MixResult) -> Tensor:
    """The inputs of every output after transport, before they are mixed.

    Args:
        images: (inputs, C, H, W) as given to the method.
        result: what it returned.

    Returns:
        (B, M, C, H, W): `sum over m of mask_m * this[:, m]` are the mixed images.

    Source: chapter 3, Eq. 3.2: `Pi_k^T x_k`.
    """
    _check(result)
    check_tensor("images", images, ("inputs", *result.images.shape[1:]), floating=None)
    if int(result.sources.max()) >= len(images):
        raise ValueError(
            f"the result mixes {int(result.sources.max()) + 1} inputs, got {len(images)} images: another batch?"
        )
    return moved_pixels(images, result)


def moved_pixels(images: Tensor, result: MixResult) -> Tensor:
    """`transported_inputs` of anything that lies on the same pixels, (inputs, K, H, W), unchecked."""
    moved = images[result.sources]
    if result.plans is None:
        return moved
    rows, columns = (
        Axis(pixels, count) for pixels, count in zip(images.shape[-2:], result.masks.shape[-2:], strict=True)
    )
    home = torch.arange(result.plans.shape[-1], device=images.device)
    output, which, cell = (result.plans != home).nonzero(as_tuple=True)
    flat, pixels = moved.flatten(3), images.flatten(2)
    read = cell_pixels(result.plans[output, which, cell], cell, rows, columns)
    write = cell_pixels(cell, cell, rows, columns)
    flat[output[:, None], which[:, None], :, write] = pixels[result.sources[output, which][:, None], :, read]
    return flat.reshape(moved.shape)


def _check(result: MixResult) -> None:
    check_kind("result", result, MixResult, "give what puzzle_mix or co_mixup returned")
