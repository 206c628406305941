"""Puzzle Mix, chapter 3: cut two images along the mask that shows most saliency, move what the mask would hide, mix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..settings import (
    brief,
    check_array,
    check_config,
    check_kind,
    check_number,
    check_shares,
    check_tensor,
    check_together,
    optional,
    settle,
)
from .cells import Axis, border_strips, cell_means, cell_pixels, upsample
from .config import PuzzleMixConfig
from .graph_cut import grid_energy, solve_masks, solve_masks_pygco
from .result import MixResult
from .transport import masked_transport

_PRIOR_EPSILON = 1e-8  # inside the logarithm, as in the reference code


@dataclass(frozen=True, kw_only=True)
class PuzzleDraws:
    """What is random about one batch.

    Args:
        partner: (B,) int64: whom each sample is mixed with.
        grid: cells along each side of the mask, >= 1.
        lam: mixing weight in [0, 1]: prior share of the sample itself.
    """

    partner: Tensor
    grid: int
    lam: float

    def __post_init__(self) -> None:
        check_tensor("partner", self.partner, ("B",), floating=False, least=0)
        settle(self, numbers={"lam": (0.0, 1.0)}, counts={"grid": 1})


@dataclass(frozen=True, kw_only=True)
class MaskProblem:
    """Eq. 3.4 for B pairs, before the prior: `mask = 1` shows the sample, `mask = 0` its partner.

    Args:
        show: (B, h, w) float64 cost of mask = 1: the partner's saliency, which is hidden, and linear data terms.
        hide: (B, h, w) float64 cost of mask = 0.
        down: (B, h-1, w) float64 data smoothness added to beta on vertical edges; 0 under Definition 3.
        right: (B, h, w-1) float64 the same on horizontal edges.
        beta: label smoothness of an edge, beta / (16 grid).
    """

    show: NDArray[np.float64]
    hide: NDArray[np.float64]
    down: NDArray[np.float64]
    right: NDArray[np.float64]
    beta: float


def puzzle_mix(
    images: Tensor,
    targets: Tensor,
    saliency: Tensor,
    config: PuzzleMixConfig | None = None,
    generator: torch.Generator | None = None,
    *,
    draws: PuzzleDraws | None = None,
    shown: tuple[Tensor, Tensor] | None = None,
) -> MixResult:
    """Mix every sample of a batch with another one.

    Eq. 3.3 by one cycle of alternating minimisation: mask (Eq. 3.4) with nothing moved, then transport (Eq. 3.5,
    Algorithm 1) under that mask, then `h(x0, x1) = M * moved(x) + (1 - M) * moved(x[partner])`.

    Args:
        images: (B, C, H, W) floating point, any size and channel count; normalised as `config.image_std` says.
        targets: (B, classes) soft or one-hot labels.
        saliency: (B, H, W) >= 0, size of the loss gradient at each pixel.
        config: settings, default `PuzzleMixConfig()`.
        generator: CPU generator that draws partners, grid and lam; needed unless `draws` is given.
        draws: fixed draws instead of random ones.
        shown: two (B, C, H, W) batches mixed in place of `images`: what stands for each sample, and what stands for it
            where it is someone's partner (`finish_attack`, or any augmentation of the inputs); masks see `images`.

    Returns:
        `MixResult` with M = 2: the sample, then its partner. Samples with all-zero or non-finite saliency are left
        as they are, and nobody is mixed with them; `unmixed` marks them and every other output that shows one input only.

    Raises:
        ValueError: shapes do not fit, the batch is empty, or neither generator nor draws are given.
        TypeError: images or targets are not floating point.

    Source: chapter 3, Eqs. 3.2 to 3.5, Algorithm 1.

    Differs: the reference code's swap cut is a local optimum, its transport stops early and may leave visible cells black;
        its mask of 1 shows x0 (the text's shows x1), which is kept.

    Cost: the mask cut dominates on small images (a few 0.1 ms per sample at 16 x 16 cells), one copy and one blend of the
        batch on large ones.

    Example:
        >>> import torch
        >>> images, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
        >>> mixed = puzzle_mix(images, targets, images.mean(1), generator=torch.Generator().manual_seed(0))
        >>> mixed.images.shape, mixed.targets.sum(1).tolist()
        (torch.Size([4, 3, 8, 8]), [1.0, 1.0, 1.0, 1.0])
    """
    config = check_config(config, PuzzleMixConfig)
    optional(check_kind, "generator", generator, torch.Generator)
    optional(check_kind, "draws", draws, PuzzleDraws)
    _check_batch(images, targets, saliency, shown, config)
    with torch.no_grad():
        saliency = saliency.detach().float()
        total = saliency.sum((1, 2))
        usable = torch.isfinite(total) & (total > 0) & (saliency.amin((1, 2)) >= 0)
        if draws is None:
            draws = draw(usable.cpu(), config, generator)
        partner = draws.partner
        if partner.shape != (len(images),) or int(partner.min()) < 0 or int(partner.max()) >= len(images):
            raise ValueError(f"draws.partner must hold {len(images)} places in the batch, got {partner.tolist()}")
        partner = partner.to(images.device)
        mixable = usable & usable[partner] & (usable.sum() > 1)
        rows, columns = (Axis(size, min(draws.grid, size)) for size in images.shape[-2:])
        problem = mask_problem(images, saliency, draws, config)
        weights = (problem.show, problem.hide, problem.down, problem.right)
        finite = np.logical_and.reduce([np.isfinite(part).all((1, 2)) for part in weights])
        mixable &= torch.from_numpy(finite).to(images.device)
        mask, energies = solve(problem, draws.lam, config, mixable.cpu().numpy())
        return mix_under(
            shown or (images, images), targets, saliency, (mask, energies, mixable), (partner, rows, columns), config
        )


def draw(usable: Tensor, config: PuzzleMixConfig, generator: torch.Generator | None) -> PuzzleDraws:
    """Partners (a random permutation of the usable samples), grid and lam of one batch.

    Args:
        usable: (B,) bool: samples whose saliency can be used; the others keep to themselves.
        config: settings.
        generator: CPU generator.

    Returns:
        `PuzzleDraws`.

    Raises:
        ValueError: no generator.

    Source: chapter 3, section 3.5: grid from {2, 4, 8, 16}, lam ~ Beta(alpha, alpha) per batch.
    """
    if generator is None:
        raise ValueError("puzzle_mix needs a torch.Generator for its draws; pass generator= or draws=")
    check_kind("generator", generator, torch.Generator)
    check_kind("config", config, PuzzleMixConfig)
    if not isinstance(usable, Tensor) or usable.dtype != torch.bool or usable.ndim != 1:
        raise TypeError(f"usable must be a bool tensor (B,), got {brief(usable)}")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    random = np.random.default_rng(seed)
    partner = torch.arange(len(usable))
    members = partner[usable]
    partner[usable] = members[torch.from_numpy(random.permutation(len(members)))]
    grid = config.grid_sizes[int(random.integers(len(config.grid_sizes)))]
    return PuzzleDraws(partner=partner, grid=grid, lam=float(random.beta(config.alpha, config.alpha)))


def mask_problem(images: Tensor, saliency: Tensor, draws: PuzzleDraws, config: PuzzleMixConfig) -> MaskProblem:
    """Unary and pairwise terms of Eq. 3.4 for every pair.

    Saliency is averaged over cells and divided by its sum. Data smoothness compares the means of border strips of
    `config.neighbourhood` pixels: `phi(a, b) = mean |x_a - x_b|` across the border, a, b in {sample, partner}. Its linear
    part joins the unaries; its cross term `(phi10 + phi01 - phi11 - phi00) / 2` joins the edge weight (reference code) or
    vanishes (Definition 3).

    Args:
        images: (B, C, H, W) normalised pixels.
        saliency: (B, H, W) float32.
        draws: partners and grid.
        config: beta, gamma, neighbourhood, data_term, image_std.

    Returns:
        `MaskProblem` on the CPU.

    Source: chapter 3, Eq. 3.4, Definitions 1 to 3, Proposition 2.

    Differs: `data_term="code"` by the cross term; edge weights below 0 (pixels outside [0, 1], gamma above 1) become 0.

    Cost: reads only the pixels along cell borders.
    """
    check_kind("config", config, PuzzleMixConfig)
    check_kind("draws", draws, PuzzleDraws)
    _check_images(images, config)
    check_tensor("saliency", saliency, (len(images), *images.shape[2:]))
    check_together(images=images, saliency=saliency)
    if draws.partner.shape != (len(images),):
        raise ValueError(f"draws.partner must hold {len(images)} places in the batch, got {len(draws.partner)}")
    rows, columns = (Axis(size, min(draws.grid, size)) for size in images.shape[-2:])
    beta = config.beta / (16 * draws.grid)
    pooled = _normalised(cell_means(saliency, rows, columns))
    own, partner = pooled, pooled[draws.partner.to(pooled.device)]
    show, hide = partner.double().cpu().numpy(), own.double().cpu().numpy()
    edges = []
    for axis, (x, cut, along) in enumerate(((images, rows, columns), (images.mT, columns, rows))):
        shape = (len(images), cut.count - 1, along.count)
        cross = np.zeros(shape)
        if config.gamma > 0 and config.beta > 0 and cut.count > 1:
            phi11, phi10, phi01, phi00 = beta * config.gamma * _border_distances(x, along, cut, draws.partner, config)
            first, second = (np.s_[:, :-1], np.s_[:, 1:])
            unary = [part if axis == 0 else part.swapaxes(1, 2) for part in (show, hide)]
            unary[0][first] += (phi10 + phi11) / 2
            unary[1][first] += (phi01 + phi00) / 2
            unary[0][second] += (phi01 + phi11) / 2
            unary[1][second] += (phi10 + phi00) / 2
            if config.data_term == "code":
                cross = np.maximum((phi10 + phi01 - phi11 - phi00) / 2, -beta)
        edges.append(cross if axis == 0 else cross.swapaxes(1, 2))
    return MaskProblem(show=show, hide=hide, down=edges[0], right=edges[1], beta=beta)


def _border_distances(
    images: Tensor, along: Axis, cut: Axis, partner: Tensor, config: PuzzleMixConfig
) -> NDArray[np.float64]:
    """(4, B, cut.count - 1, along.count): phi11, phi10, phi01, phi00 across every border; 1 is the sample, 0 its partner."""
    before, after, strips = border_strips(images, along, cut, config.neighbourhood)
    if config.image_std is not None:
        std = torch.tensor(config.image_std, device=images.device, dtype=before.dtype)[:, None, None]
        before, after = before * std, after * std
    partner = partner.to(images.device)
    pairs = ((before, after), (before, after[partner]), (before[partner], after))
    found = [(a - b).abs().mean(1).unflatten(-1, (along.count, strips)).mean(-1) for a, b in pairs]
    return torch.stack([*found, found[0][partner]]).double().cpu().numpy()


def solve(
    problem: MaskProblem, lam: float, config: PuzzleMixConfig, rows: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Masks of least energy (Eq. 3.4) and their energies.

    The prior is binomial: `p(mask = t / (K-1)) = C(K-1, t) lam^t (1 - lam)^(K-1-t)` in every cell.

    Args:
        problem: B pairs.
        lam: prior mean of the mask, [0, 1].
        config: n_labels, eta, solver.
        rows: (B,) bool: pairs to solve; the others get mask 1 and energy 0.

    Returns:
        Masks (B, h, w) float32 and energies (B,) float64.

    Raises:
        ValueError: lam is outside [0, 1].
        MissingExtraError: `solver="pygco"` without gco-wrapper.

    Source: chapter 3, Eq. 3.4 and the prior of section 3.4.1.
    """
    lam = check_number("lam", lam, 0, 1)
    check_kind("problem", problem, MaskProblem)
    check_kind("config", config, PuzzleMixConfig)
    size, h, w = problem.show.shape
    top = config.n_labels - 1
    chosen = np.ones(size, dtype=bool) if rows is None else check_array("rows", rows, 1, kinds="b", rows=size)
    labels, energies = np.zeros((size, h, w), dtype=np.int64), np.zeros(size)
    if chosen.any():
        label = np.arange(config.n_labels)
        value = 1 - label / top
        odds = np.array([math.comb(top, k) * lam ** (top - k) * (1 - lam) ** k for k in label])
        prior = -config.eta / (h * w) * np.log(odds + _PRIOR_EPSILON)
        show, hide, down, right = (p[chosen] for p in (problem.show, problem.hide, problem.down, problem.right))
        terms = (
            show[..., None] * value + hide[..., None] * (1 - value) + prior,
            problem.beta + down,
            problem.beta + right,
        )
        solver = solve_masks if config.solver == "exact" else solve_masks_pygco
        labels[chosen] = solver(*terms)
        energies[chosen] = grid_energy(*terms, labels[chosen])
    return (1 - labels / top).astype(np.float32), energies


def mix_under(
    images: tuple[Tensor, Tensor],
    targets: Tensor,
    saliency: Tensor,
    found: tuple[NDArray[np.float32], NDArray[np.float64], Tensor],
    layout: tuple[Tensor, Axis, Axis],
    config: PuzzleMixConfig,
) -> MixResult:
    """Transport under given masks, and the mixed batch.

    Args:
        images: two (B, C, H, W): every sample as itself, and as a partner.
        targets: (B, classes).
        saliency: (B, H, W) float32.
        found: masks (B, h, w), energies (B,), and which pairs are mixed (B,) bool.
        layout: partners (B,), vertical and horizontal cuts of the masks.
        config: transport settings.

    Returns:
        `MixResult`; masks, plans and saliency on the grid of the transport where that is finer than the mask's.

    Source: chapter 3, Eq. 3.2 (mixing), Eq. 3.5 and Algorithm 1 (transport).
    """
    masks, energies, mixable = found
    partner, rows, columns = layout
    own, other = images
    size, device = len(own), own.device
    partner = torch.where(mixable, partner, torch.arange(size, device=device))
    mask = torch.from_numpy(masks).to(device)
    mask = torch.where(mixable[:, None, None], mask, torch.ones_like(mask))
    # by area: cells of unequal size count by their pixels; whole numbers and halves, so that all is 1 and nothing is 0
    area = torch.outer(*(torch.tensor(axis.edges, device=device).diff().float() for axis in (rows, columns)))
    ratio = (mask * area).sum((1, 2)) / area.sum()
    if config.transport:
        finer = rows.finer(config.transport_block), columns.finer(config.transport_block)
        down, across = (fine.count // coarse.count for fine, coarse in zip(finer, (rows, columns), strict=True))
        mask = mask.repeat_interleave(down, 1).repeat_interleave(across, 2)
        rows, columns = finer
    pooled = _normalised(cell_means(saliency, rows, columns))
    weight = upsample(mask, rows, columns)[:, None].to(own.dtype)
    mixed = other[partner].lerp_(own, weight)
    if not mixable.all():
        mixed[~mixable] = own[~mixable]
    plans = None
    if config.transport:
        plans = _plans(mask, pooled, partner, mixable, config)
        _move(mixed, images, (mask, plans, partner), rows, columns)
    share = torch.stack([ratio, 1 - ratio], 1)
    targets = targets.float()
    soft = share[:, :1] * targets + share[:, 1:] * targets[partner]
    return MixResult(
        images=mixed,
        targets=torch.where(mixable[:, None], soft, targets),
        sources=torch.stack([torch.arange(size, device=device), partner], 1),
        masks=torch.stack([mask, 1 - mask], 1),
        ratios=share,
        plans=plans,
        energies=torch.from_numpy(energies),
        unmixed=(partner == torch.arange(size, device=device)) | (ratio == 0) | (ratio == 1),
        saliency=pooled,
    )


def _plans(mask: Tensor, pooled: Tensor, partner: Tensor, mixable: Tensor, config: PuzzleMixConfig) -> Tensor:
    """(B, 2, h w) int64: which cell of the sample, and of its partner, is shown at each cell."""
    size, h, w = mask.shape
    both = torch.stack([mask, 1 - mask], 1)
    sources = torch.stack([pooled, pooled[partner]], 1)
    if config.transport_mask == "visible":
        both = (both > 0).float()
    plans = torch.arange(h * w).expand(size, 2, h * w).clone()
    chosen = mixable.cpu()
    if not chosen.any():
        return plans.to(mask.device)
    s, z = (part[mixable].flatten(0, 1).cpu().numpy() for part in (sources, both))
    if config.transport_axis == "both":
        lines, shape = (s.reshape(len(s), -1), z.reshape(len(z), -1)), (h, w)
    else:
        along = (0, 2, 1) if config.transport_axis == "height" else (0, 1, 2)
        length = h if config.transport_axis == "height" else w
        s, z = (np.ascontiguousarray(part.transpose(along)).reshape(-1, length) for part in (s, z))
        lines, shape = (s, z), (1, length)
    rounds = max(shape) if config.transport_rounds == "grid" else config.transport_rounds
    moved = masked_transport(*lines, shape, cost=config.transport_cost, rounds=rounds)
    if config.transport_axis == "height":
        moved = moved.reshape(-1, w, h).transpose(0, 2, 1) * w + np.arange(w)
    elif config.transport_axis == "width":
        moved = moved.reshape(-1, h, w) + w * np.arange(h)[:, None]
    plans[chosen] = torch.from_numpy(np.ascontiguousarray(moved.reshape(-1, 2, h * w)))
    return plans.to(mask.device)


def _move(
    mixed: Tensor, images: tuple[Tensor, Tensor], under: tuple[Tensor, Tensor, Tensor], rows: Axis, columns: Axis
) -> None:
    """Rewrite, in place, the visible cells of the blend whose content comes from elsewhere."""
    mask, plans, partner = under
    flat = mask.flatten(1)
    home = torch.arange(flat.shape[1], device=mask.device)
    moved = ((plans[:, 0] != home) & (flat > 0)) | ((plans[:, 1] != home) & (flat < 1))
    sample, cell = moved.nonzero(as_tuple=True)
    if not len(sample):
        return
    blocks = []
    for image, source, which in zip(images, (sample, partner[sample]), (0, 1), strict=True):
        places = cell_pixels(plans[sample, which, cell], cell, rows, columns)
        blocks.append(image.flatten(2)[source[:, None], :, places])
    weight = flat[sample, cell][:, None, None].to(mixed.dtype)
    target = cell_pixels(cell, cell, rows, columns)
    mixed.flatten(2)[sample[:, None], :, target] = torch.lerp(blocks[1], blocks[0], weight)


def _normalised(pooled: Tensor) -> Tensor:
    """Cells of every sample sum to 1; samples that cannot be normalised become uniform (they are never mixed)."""
    total = pooled.sum((-2, -1), keepdim=True)
    fine = torch.isfinite(total) & (total > 0)
    return torch.where(fine, pooled / torch.where(fine, total, torch.ones_like(total)), 1.0 / pooled[0].numel())


def _check_batch(
    images: Tensor, targets: Tensor, saliency: Tensor, shown: tuple[Tensor, Tensor] | None, config: PuzzleMixConfig
) -> None:
    _check_images(images, config)
    check_shares("targets", targets, (len(images), "classes"))
    check_tensor("saliency", saliency, floating=None)
    check_together(images=images, targets=targets, saliency=saliency)
    if shown is not None and (not isinstance(shown, tuple | list) or len(shown) != 2):
        raise TypeError(f"shown must be two batches like images, got {brief(shown)}")
    if saliency.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"saliency is {tuple(saliency.shape)}; images {tuple(images.shape)} need "
            f"{(len(images), *images.shape[2:])}: take the norm over channels"
        )
    for one in shown or ():
        check_tensor("shown", one)
        if one.shape != images.shape or one.dtype != images.dtype:
            raise ValueError(
                f"shown is {one.dtype} {tuple(one.shape)}; each of the two must be like images, "
                f"{images.dtype} {tuple(images.shape)}"
            )


def _check_images(images: Tensor, config: PuzzleMixConfig) -> None:
    todo = "scale pixels to [0, 1], add a channel axis to spectrograms"
    check_tensor("images", images, ("batch", "channels", "height", "width"), todo=todo)
    if config.image_std is not None and len(config.image_std) != images.shape[1]:
        raise ValueError(f"image_std has {len(config.image_std)} channels, the images have {images.shape[1]}")
