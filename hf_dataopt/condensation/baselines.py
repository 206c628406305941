"""What IDC is compared with: random and herded real images, DSA and DM, as settings of the same code (Table 6.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..seeding import generator as seeded
from .augment import operations
from .columns import LabelledImages
from .config import IDCConfig
from .initialise import herding

METHODS = ("random", "herding", "dsa", "dm", "idc-i", "idc")


def method_config(method: str, config: IDCConfig) -> IDCConfig:
    """Settings of a method with the storage, networks and scoring recipe of `config`.

    Args:
        method: one of `METHODS`.
        config: settings of IDC.

    Returns:
        `"idc"`: as given. `"idc-i"`: factor 1. `"dsa"`: factor 1, channel-wise cosine, networks trained on the synthetic
        images, scale and rotate too, and flip where scoring flips. `"dm"`: factor 1, features of untrained networks.
        `"random"`, `"herding"`: factor 1, no optimisation.

    Raises:
        ValueError: unknown method.

    Source: section 6.5 baselines; sections 6.2 (DSA, DM).
    Differs: DSA's and DM's learning rates are the figures of their own papers, 0.1 and 1, which step in normalised values.
    """
    if method == "idc":
        return config
    plain = replace(config, factor=1, initialisation="random")
    if method == "idc-i":
        return plain
    if method in ("random", "herding"):
        return replace(plain, outer_iterations=0, initialisation="herding" if method == "herding" else "random")
    flip = "_flip" if "flip" in operations(config.evaluation_augmentation) else ""  # digits are not flipped
    own: dict[str, Any] = {
        "scale_learning_rate": False,
        "learning_rate_space": "normalised",
        "augmentation": f"color_crop_cutout{flip}_scale_rotate",
        "match_bias": False,
    }
    if method == "dsa":
        return replace(
            plain, metric="cos", learning_rate=0.1, train_network_on="synthetic", cutmix=0.0, match_head=True, **own
        )
    if method == "dm":
        rounds = config.outer_iterations * config.inner_iterations
        return replace(
            plain,
            match="feature",
            learning_rate=1.0,
            train_network_on="nothing",
            outer_iterations=rounds,
            inner_iterations=1,
            checkpoint_every=max(1, config.inner_iterations) * config.checkpoint_every,
            **own,
        )
    raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


def random_rows(data: LabelledImages, per_class: int, seed: int = 0) -> Tensor:
    """`per_class` random rows of every class, class by class.

    Raises:
        ValueError: a class has fewer.
    """
    own = seeded(seed, worker=2**21)
    parts = []
    for label, rows in enumerate(data.rows_of_class):
        if len(rows) < per_class:
            raise ValueError(f"class {data.class_names[label]!r} has {len(rows)} images, {per_class} were asked for")
        parts.append(rows[torch.randperm(len(rows), generator=own)[:per_class]])
    return torch.cat(parts)


def herded_rows(data: LabelledImages, per_class: int, features: Tensor | None = None) -> Tensor:
    """`per_class` herded rows of every class, by `features` (n, d) or, without, by pixels."""
    parts = []
    for rows in data.rows_of_class:
        of_class = data.pixels(rows).flatten(1) if features is None else features[rows]
        parts.append(rows[herding(of_class, per_class)])
    return torch.cat(parts)
