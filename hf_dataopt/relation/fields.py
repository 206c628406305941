"""The fields of `RelationConfig` as keyword arguments, for type checkers: `**changes: Unpack[RelationFields]`.

The same names and types as the config's, which a test keeps so.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class FieldsBesideLambda(TypedDict, total=False):
    """All but `threshold_value`, which `RelationConfig.dissertation` has no default for."""

    score: Literal["combined", "label_noise"]
    cut: Literal["estimated", "algorithm4"] | float
    neighbours: int
    temperature: float
    similarity: Literal["cosine", "rbf"]
    rbf_gamma: float
    compatibility: bool
    edge_cutoff: float
    diagonal: bool
    threshold: Literal["relative", "absolute", "quantile", "noise_rate"]
    max_noisy_share: float
    skip_share: float
    max_passes: int
    on_cycle: Literal["best", "last", "moves"]
    outlier_temperature: float
    outlier_reference: int | None
    outlier_share: float
    outlier_epsilon: float
    partition_size: int | None
    dtype: Literal["float32", "bfloat16", "float16"]
    device: str | None
    max_memory_gb: float
    seed: int


class RelationFields(FieldsBesideLambda, total=False):
    """Fields of `RelationConfig`, as keywords: a misspelt one is caught by a type checker."""

    threshold_value: float
