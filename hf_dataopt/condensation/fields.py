"""The fields of `IDCConfig` as keyword arguments, for type checkers: `**changes: Unpack[IDCFields]`.

The same names and types as the config's, which a test keeps so.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class IDCFields(TypedDict, total=False):
    """Fields of `IDCConfig`, as keywords: a misspelt one is caught by a type checker."""

    images_per_class: int
    factor: int
    formation: Literal["single", "multi", "bound"]
    axis: Literal["image", "time"]
    pad_value: float
    image_size: int | None
    image_mode: Literal["RGB", "L"] | None
    background: str
    initialisation: Literal["random", "herding", "mix", "mix_herding", "patches", "noise"]
    patches_per_image: int
    teacher_images: int
    soft_labels: bool
    soft_temperature: float
    network: Literal["convnet", "resnet_ap"]
    width: float
    depth: int
    match: Literal["gradient", "feature"]
    metric: Literal["mse", "l1", "l1_mean", "cos"]
    match_bias: bool
    match_head: bool
    learning_rate: float
    scale_learning_rate: bool
    learning_rate_space: Literal["stored", "normalised", "first_step"]
    learning_rate_size: float
    momentum: float
    outer_iterations: int
    inner_iterations: int
    real_batch: int
    formed_batch: int
    augmentation: str
    train_network_on: Literal["real", "synthetic", "nothing"]
    network_images: int
    network_batch: int
    network_learning_rate: float
    network_momentum: float
    network_weight_decay: float
    cutmix: float
    early_epochs: int
    reinitialise_every: int
    pretrained_networks: int
    clamp_low: float | None
    clamp_high: float | None
    normalise: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    storage: Literal["uint8", "float16", "float32"]
    evaluation_epochs: int | None
    evaluation_augmentation: str
    evaluation_cutmix: float
    evaluation_learning_rate: float
    evaluation_batch: int
    dtype: Literal["float32", "bfloat16"]
    compile: bool | str
    checkpoint_every: int
    seed: int
