"""Methods by name (Table 6.1 and cheaper ones): settings of the same code, so that all are saved and decoded the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..settings import check_choice
from .augment import operations
from .config import IDCConfig
from .photo import PHOTO

# name: what the card calls it
METHODS = {
    "idc": "IDC (chapter 6 of the dissertation, Algorithm 5)",
    "idc-short": "IDC in twelve rounds with larger steps (Algorithm 5, from herded mosaics)",
    "idc-i": "IDC-I (Algorithm 5 without multi-formation)",
    "mosaic": "herded multi-formation (section 6.3.2, real images, no optimisation)",
    "rded": "RDED's patches (Sun et al. 2024: crops of real images that a trained network is surest of)",
    "dm": "DM (distribution matching, Zhao and Bilen 2023)",
    "dsa": "DSA (gradient matching with siamese augmentation, Zhao and Bilen 2021)",
    "herding": "herding (a choice of real images)",
    "random": "random choice of real images",
}

SHORT_STEP = 0.035  # deviations of the data


def method_config(method: str, config: IDCConfig) -> IDCConfig:
    """Settings of a method with the storage, networks and scoring recipe of `config`.

    Args:
        method: one of `METHODS`.
        config: settings of IDC.

    Returns:
        `"idc"`: as given. `"idc-short"`: four networks of three rounds each, from herded mosaics; the first step moves
        values by `SHORT_STEP` deviations of the data (root mean square), whatever the size, the width or the metric; chosen on
        images, on spectrograms it ended below its start. `"idc-i"`: factor 1, from random images. `"mosaic"`: herded images
        in a mosaic, as they are. `"rded"`: a teacher's patches in one.
        `"dsa"`: factor 1, channel-wise cosine, networks trained on the synthetic images, scale and rotate too, and flip where
        scoring flips. `"dm"`: factor 1, features of untrained networks. `"random"`, `"herding"`: factor 1, no optimisation.

    Raises:
        ValueError: unknown method.

    Source: section 6.5 baselines; sections 6.2 (DSA, DM), 6.3.2 (multi-formation); RDED.
    Differs: DSA's and DM's learning rates are the figures of their own papers, 0.1 and 1, which step in normalised values.
    """
    return _MAKE[check_choice("method", method, tuple(METHODS))](config)


def _plain(config: IDCConfig, **changes: Any) -> IDCConfig:
    return replace(config, **{"factor": 1, "formation": "single", "initialisation": "random", **changes})


def _own(config: IDCConfig) -> dict[str, Any]:
    """What DSA and DM share."""
    how = config.evaluation_augmentation
    flip = "_flip" if how == PHOTO or "flip" in operations(how) else ""  # digits are not flipped
    return {
        "scale_learning_rate": False,
        "learning_rate_space": "normalised",
        "augmentation": f"color_crop_cutout{flip}_scale_rotate",
        "match_bias": False,
    }


def _dsa(config: IDCConfig) -> IDCConfig:
    own: dict[str, Any] = {"metric": "cos", "train_network_on": "synthetic", "cutmix": 0.0, "match_head": True}
    return _plain(config, learning_rate=0.1, **own, **_own(config))


def _dm(config: IDCConfig) -> IDCConfig:
    return _plain(
        config,
        match="feature",
        learning_rate=1.0,
        train_network_on="nothing",
        outer_iterations=config.outer_iterations * config.inner_iterations,
        inner_iterations=1,
        checkpoint_every=max(1, config.inner_iterations) * config.checkpoint_every,
        **_own(config),
    )


def _short(config: IDCConfig) -> IDCConfig:
    return replace(
        config,
        initialisation="mix_herding",
        outer_iterations=4,
        inner_iterations=3,
        checkpoint_every=1,
        learning_rate=SHORT_STEP,
        learning_rate_space="first_step",
        scale_learning_rate=False,
    )


_MAKE: dict[str, Callable[[IDCConfig], IDCConfig]] = {
    "idc": lambda config: config,
    "idc-short": _short,
    "idc-i": _plain,
    "mosaic": lambda config: replace(config, initialisation="mix_herding", outer_iterations=0),
    "rded": lambda config: replace(config, initialisation="patches", outer_iterations=0),
    "dm": _dm,
    "dsa": _dsa,
    "herding": lambda config: _plain(config, initialisation="herding", outer_iterations=0),
    "random": lambda config: _plain(config, outer_iterations=0),
}
