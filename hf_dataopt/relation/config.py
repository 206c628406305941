"""Settings of the relation graph, each with its range and the place it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from ..settings import LARGEST, MOST, MOST_SEED, Settings, check_choice, check_device, check_number, optional, settle

if TYPE_CHECKING:
    from .fields import FieldsBesideLambda, RelationFields

_CHOICES = {
    "score": ("combined", "label_noise"),
    "similarity": ("cosine", "rbf"),
    "threshold": ("relative", "absolute", "quantile", "noise_rate"),
    "on_cycle": ("best", "last", "moves"),
    "dtype": ("float32", "bfloat16", "float16"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (1e-3, 64.0),
    "outlier_temperature": (1e-3, 64.0),
    "rbf_gamma": (1e-6, 1e6),
    "edge_cutoff": (0.0, 1.0),
    "max_noisy_share": (0.0, 1.0),
    "skip_share": (0.0, 1.0),
    "outlier_share": (0.0, 0.999),
    "outlier_epsilon": (0.0, 1.0),
    "max_memory_gb": (1e-3, 1e4),
    "threshold_value": (0.0, LARGEST),
}
_COUNTS = {
    "neighbours": (1, MOST),
    "max_passes": (1, MOST),
    "outlier_reference": (1, MOST),
    "partition_size": (2, MOST),
    "seed": (0, MOST_SEED),
}
_CUT = "give 'estimated', 'algorithm4', or the share of the labels to flag"
_OPTIONAL = ("outlier_reference", "partition_size", "device")


@dataclass(frozen=True, kw_only=True)
class RelationConfig(Settings):
    """How the relation graph is built, cut and scored.

    Args:
        score (`str`, default `"combined"`): what `label_noise_score` holds: the probability that a label is wrong, from
            the model's probabilities and the labels of the nearest rows (ours; see `posterior.py`), or `"label_noise"`, the
            score s of Algorithm 4.
        cut (`str` or `float`, default `"estimated"`): which rows are flagged. `"estimated"`: as many of the highest scores
            as have the largest expected F1 under those probabilities; a number in [0, 1]: that share of the labelled rows;
            `"algorithm4"`: the noisy set N of Algorithm 4, whatever the score.
        neighbours (`int`, >= 1, default 30): nearest rows that vote on a label.
        temperature (`float`, > 0, default 4): `t` of Eq. 5.4 for label errors (reference code; the text saturates at 6).
        similarity (`str`, default `"cosine"`): `s` of Eq. 5.4: truncated cosine, or `"rbf"`,
            `exp(-rbf_gamma |f - f'|^2)` on unit-length features (Table 5.7; the text gives neither scale nor gamma).
        rbf_gamma (`float`, > 0, default 1): width of the RBF similarity.
        compatibility (`bool`, default True): multiply by `c = p.p'` (Eq. 5.5).
        edge_cutoff (`float`, [0, 1], default 0.03): edges with `s c` at or below it are dropped, before the power
            (reference code; the text has none: 0).
        diagonal (`bool`, default False): keep `r(i, i)` as the reference code does; the text sets it to 0.
        threshold (`str`, default `"relative"`): how lambda of Eq. 5.2 is set. `"absolute"`: lambda itself (text);
            `"relative"`: share of the largest |score|, taken anew at every pass (reference code); `"quantile"`: quantile
            of the initial scores, at least 0.5; `"noise_rate"`: the expected share of wrong labels is taken at every pass,
            positive scores only.
        threshold_value (`float`, default 0.05): the number that `threshold` reads.
        max_noisy_share (`float`, [0, 1], default 0.3): Algorithm 4's noisy set never holds more than this share of the rows.
        skip_share (`float`, [0, 1], default 0.5): when more than this share of the initial scores speaks against its
            own label, no set is formed (a warning says so) and the initial scores stand. 1 never skips.
        max_passes (`int`, >= 1, default 100): most passes of Algorithm 4; 1 is the reference code.
        on_cycle (`str`, default `"best"`): set-level updates may cycle; `"best"` takes the set of the cycle with the
            largest objective (at the mean of its lambdas), `"moves"` goes on from there one row at a time until none gains
            (Proposition 9), `"last"` takes the set that the loop would hold after `max_passes`.
        outlier_temperature (`float`, > 0, default 1): `t` of the outlier score's kernel.
        outlier_reference (`int`, >= 1, default 5000): size of the uniform random reference set S of section 5.3.3; None:
            all rows.
        outlier_share (`float`, [0, 1), default 0.01): part of the rows that `is_outlier` marks; ours, the text ranks only.
        outlier_epsilon (`float`, default 1e-6): added to the sum before it is inverted (reference code; text 0).
        partition_size (`int`, >= 2, optional): rows of one random partition, `k` of section 5.3.2: O(n k) work.
        dtype (`str`, default `"float32"`): of the two products; sums are float32 within a tile and float64 over tiles.
        device (`str`, optional): where tiles are computed; default CPU.
        max_memory_gb (`float`, default 0.06): working memory of one process on top of inputs and per-row vectors; picks
            the tile.
        seed (`int`, >= 0, default 0): draws reference set and partitions.

    Raises:
        ValueError: a field is out of its range.
        TypeError: a field has the wrong type.

    Source: chapter 5; defaults of the graph from the reference code where it and the text differ, except `diagonal`, the
        bounds on the noisy set, and passes until convergence.
    Differs: score and cut are ours by default; `score="label_noise", cut="algorithm4"` are the dissertation's.

    Example:
        >>> RelationConfig(temperature=6).temperature
        6
    """

    METHOD: ClassVar[str] = "relation"
    score: Literal["combined", "label_noise"] = "combined"
    cut: Literal["estimated", "algorithm4"] | float = "estimated"
    neighbours: int = 30
    temperature: float = 4.0
    similarity: Literal["cosine", "rbf"] = "cosine"
    rbf_gamma: float = 1.0
    compatibility: bool = True
    edge_cutoff: float = 0.03
    diagonal: bool = False
    threshold: Literal["relative", "absolute", "quantile", "noise_rate"] = "relative"
    threshold_value: float = 0.05
    max_noisy_share: float = 0.3
    skip_share: float = 0.5
    max_passes: int = 100
    on_cycle: Literal["best", "last", "moves"] = "best"
    outlier_temperature: float = 1.0
    outlier_reference: int | None = 5000
    outlier_share: float = 0.01
    outlier_epsilon: float = 1e-6
    partition_size: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    max_memory_gb: float = 0.06
    seed: int = 0

    def __post_init__(self) -> None:
        flags = ("compatibility", "diagonal")
        settle(self, choices=_CHOICES, numbers=_RANGES, counts=_COUNTS, flags=flags, optional=_OPTIONAL)
        if isinstance(self.cut, str):
            check_choice("cut", self.cut, ("estimated", "algorithm4"))
        else:
            object.__setattr__(self, "cut", check_number("cut", self.cut, 0.0, 1.0, todo=_CUT))
        object.__setattr__(self, "device", optional(check_device, "device", self.device))
        if self.threshold == "quantile" and self.threshold_value < 0.5:
            raise ValueError(
                f"threshold='quantile' with threshold_value={self.threshold_value} calls more than half of the labels wrong; "
                "give a quantile of the scores such as 0.9"
            )
        if self.threshold != "absolute":
            check_number("threshold_value", self.threshold_value, 0.0, 1.0)

    @classmethod
    def dissertation(cls, threshold_value: float, **changes: Unpack[FieldsBesideLambda]) -> RelationConfig:
        """The text read literally: absolute lambda (no value is given there), no cut-off, no bound, until convergence."""
        text: dict[str, Any] = {
            "score": "label_noise",
            "cut": "algorithm4",
            "threshold": "absolute",
            "edge_cutoff": 0.0,
            "max_noisy_share": 1.0,
            "skip_share": 1.0,
            "on_cycle": "last",
            "outlier_epsilon": 0.0,
        }
        return cls(**{**text, "threshold_value": threshold_value, **changes})

    @classmethod
    def reference(cls, **changes: Unpack[RelationFields]) -> RelationConfig:
        """The reference code: diagonal kept, one refinement, relative lambda of 0.05, no bound on the noisy set."""
        code: dict[str, Any] = {
            "score": "label_noise",
            "cut": "algorithm4",
            "diagonal": True,
            "max_passes": 1,
            "max_noisy_share": 1.0,
            "skip_share": 1.0,
            "on_cycle": "last",
        }
        return cls(**{**code, **changes})
