"""The fields of the mixing configs as keyword arguments, for type checkers: `**changes: Unpack[PuzzleMixFields]`.

The same names and types as the config's, which a test keeps so.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class PuzzleMixFields(TypedDict, total=False):
    """Fields of `PuzzleMixConfig`, as keywords: a misspelt one is caught by a type checker."""

    grid_sizes: tuple[int, ...]
    alpha: float
    n_labels: int
    beta: float
    gamma: float
    eta: float
    neighbourhood: int
    data_term: Literal["code", "text"]
    solver: Literal["exact", "pygco"]
    transport: bool
    transport_cost: float
    transport_block: int | None
    transport_rounds: int | Literal["grid"] | None
    transport_axis: Literal["both", "height", "width"]
    transport_mask: Literal["visible", "share"]
    probability: float
    clean_weight: float
    adversarial_probability: float
    adversarial_eps: float
    adversarial_step: float
    image_mean: tuple[float, ...] | None
    image_std: tuple[float, ...] | None


class CoMixupFields(TypedDict, total=False):
    """Fields of `CoMixupConfig`, as keywords: a misspelt one is caught by a type checker."""

    grid: int | tuple[int, int] | None
    part_size: int
    outputs_per_part: int | None
    beta: float
    gamma: float
    eta: float
    alpha: float | None
    tau: float
    tau_type: Literal["hard", "soft"]
    omega: float
    sweeps: int
    resolve: bool
    keep_best: bool
    distance_window: int
    distance_stride: int
    probability: float
    clean_weight: float
    image_mean: tuple[float, ...] | None
    image_std: tuple[float, ...] | None
    strict: bool
