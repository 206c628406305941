"""The tensor part of Algorithm 2: noise before the saliency pass, an attack step after it, at no extra network pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings import check_generator, check_kind, check_tensor
from .config import PuzzleMixConfig


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What Algorithm 2 drew for one batch.

    Args:
        images: (B, C, H, W) inputs of the saliency pass: noise added where the sample is chosen in either role.
        noise: (B, C, H, W) kappa in units of pixels in [0, 1]; 0 where not chosen.
        chosen: (B, 2) bool: nu_0 and nu_1, whether each sample is attacked as itself, and as a partner.
        share: (B, 2) in [0, 1]: delta of each, how much of the attack is shown.
    """

    images: Tensor
    noise: Tensor
    chosen: Tensor
    share: Tensor


def start_attack(images: Tensor, config: PuzzleMixConfig, generator: torch.Generator) -> Attack:
    """Draw who is attacked, and add uniform noise to them before the saliency pass.

    Algorithm 2, first half: `nu ~ B(1, p)`, `kappa ~ Uniform(-eps, eps)`, `x <- x_clean + kappa`.

    Args:
        images: (B, C, H, W) floating point, normalised as `config.image_mean` and `image_std` say.
        config: adversarial_probability, adversarial_eps, image_mean, image_std.
        generator: CPU generator.

    Returns:
        `Attack`; give `attack.images` to the network for the saliency, then call `finish_attack`.

    Source: chapter 3, Algorithm 2.

    Differs: the reference code draws nu and delta once per batch and adds noise to the whole batch; here, as in the text,
        every sample has draws for each of its two roles. Noisy pixels stay in [0, 1] as in the reference code.

    Cost: one copy of the batch.
    """
    check_tensor("images", images, ("B", "C", "H", "W"))
    check_kind("config", config, PuzzleMixConfig)
    check_generator("generator", generator)
    _check_channels(images, config)
    chosen = torch.rand(len(images), 2, generator=generator) < config.adversarial_probability
    share = torch.rand(len(images), 2, generator=generator)
    noise = (2 * torch.rand(images.shape, generator=generator) - 1) * config.adversarial_eps
    chosen, share = chosen.to(images.device), share.to(images.device)
    either = chosen.any(1)
    noise = noise.to(images.device, images.dtype) * either[:, None, None, None].to(images.dtype)
    return Attack(images=_shifted(images, noise, either, config), noise=noise, chosen=chosen, share=share)


def finish_attack(images: Tensor, attack: Attack, gradient: Tensor, config: PuzzleMixConfig) -> tuple[Tensor, Tensor]:
    """The two batches that are mixed: clean images, and where chosen `x_clean + delta clip(kappa + tau sign(gradient), +-eps)`.

    Args:
        images: (B, C, H, W) the clean images given to `start_attack`.
        attack: its draws.
        gradient: (B, C, H, W) gradient of the loss at `attack.images`.
        config: adversarial_step, adversarial_eps, image_mean, image_std.

    Returns:
        Two (B, C, H, W), every sample as itself and as a partner: `puzzle_mix(images, ..., shown=this)`; the masks see
        the clean pixels (reference code).

    Raises:
        ValueError: the gradient has another shape.

    Source: chapter 3, Algorithm 2, second half.

    Cost: two copies of the batch.
    """
    check_tensor("images", images, ("B", "C", "H", "W"))
    check_kind("attack", attack, Attack, "give what start_attack returned")
    check_kind("config", config, PuzzleMixConfig)
    check_tensor("gradient", gradient)
    _check_channels(images, config)
    if attack.noise.shape != images.shape:
        raise ValueError(
            f"the attack is on {tuple(attack.noise.shape)}, images are {tuple(images.shape)}; start it anew"
        )
    if gradient.shape != images.shape:
        raise ValueError(
            f"gradient is {tuple(gradient.shape)}; it must have the shape of images, {tuple(images.shape)}"
        )
    step = attack.noise + config.adversarial_step * gradient.sign().to(images.dtype)
    step = step.clamp(-config.adversarial_eps, config.adversarial_eps)
    share = attack.share.to(images.dtype)
    own, partner = (
        _shifted(images, share[:, role, None, None, None] * step, attack.chosen[:, role], config) for role in (0, 1)
    )
    return own, partner


def _check_channels(images: Tensor, config: PuzzleMixConfig) -> None:
    if config.image_std is not None and len(config.image_std) != images.shape[1]:
        raise ValueError(f"image_std has {len(config.image_std)} channels, the images have {images.shape[1]}")


def _shifted(images: Tensor, shift: Tensor, chosen: Tensor, config: PuzzleMixConfig) -> Tensor:
    """Add `shift` (pixels in [0, 1]) to the chosen images and keep their pixels in [0, 1]; the others stay as they are."""
    mean = torch.zeros(1) if config.image_mean is None else torch.tensor(config.image_mean)
    std = torch.ones(1) if config.image_std is None else torch.tensor(config.image_std)
    mean, std = (value.to(images.device, images.dtype)[:, None, None] for value in (mean, std))
    moved = ((images * std + mean + shift).clamp(0, 1) - mean) / std
    return torch.where(chosen[:, None, None, None], moved, images)
