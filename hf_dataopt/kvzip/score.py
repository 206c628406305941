"""What a score is: a function from what the queries of one layer see of the context's pairs to how much each pair matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from .rules import AttentionRules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# whose queries a score is shown: those that repeat the context, those that read it, or none
Looks = Literal["repeat", "context", "nothing"]


@dataclass(frozen=True)
class Positions:
    """Where queries and keys stand, in tokens from the start of the cache.

    Args:
        queries: (q,) int64.
        keys: (n,) int64; the context's first token stands at the length of the prefix.
    """

    queries: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class ScoredLayer:
    """One layer in one pass, for a score.

    Args:
        index: in the model.
        place, count: among the layers that are scored, and how many these are.
        rules: how logits become weights.
        lse: (H, q) float32, the log-sum-exp that turns logits of these queries into weights: `exp(logit - lse)`.
        decoder: the model's, for its rotary embedding.
        module: the attention module, for scores with `modules`; None otherwise.
        given: (q, width), what the attention module was given, for scores with `modules`; None otherwise.
        gradient: (q,) float32, how much the last hidden states depend on what the layer's attention wrote for each query, for
            scores with `gradients`; None otherwise.
    """

    index: int
    place: int
    count: int
    rules: AttentionRules
    lse: torch.Tensor
    decoder: PreTrainedModel
    module: Any = None
    given: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


# (layer, queries (H, q, d), keys (KV heads, n, d), values (KV heads, n, v), positions) -> (KV heads, n), higher stays
ScoreFunction = Callable[[ScoredLayer, torch.Tensor, torch.Tensor, torch.Tensor, Positions], torch.Tensor]


class Score:
    """Base of the scores in `scores/`: a frozen dataclass whose fields are the method's hyperparameters.

    It is called once for every scored layer and piece of a pass with `(layer, queries, keys, values, positions)`: queries
    (H, q, d) and keys (KV heads, n, d) behind the rotary embedding, query head `h` belonging to KV head `h // (H / KV heads)`,
    values (KV heads, n, v). It gives (KV heads, n) finite floats, higher stays. Any function of these arguments will do for
    `KVzipConfig(score=...)`; one without the attributes below is shown the queries that repeat the context.

    Attributes:
        looks_at: `"repeat"`: the keys are those of one chunk, the queries all of its repeat input (section 8.3.4).
            `"context"`: keys and queries are those of the whole context, as it was read (the query-agnostic setting of
            section 8.4.1). `"nothing"`: no queries (q = 0), and no pass over the model.
        last: of the context's queries only so many at its end; None for all.
        modules: `layer.module` and `layer.given` are needed.
        gradients: `layer.gradient` is needed.
    """

    looks_at: ClassVar[Looks] = "repeat"
    modules: ClassVar[bool] = False
    gradients: ClassVar[bool] = False

    @property
    def last(self) -> int | None:
        """See the class."""
        return None

    def __call__(
        self,
        layer: ScoredLayer,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: Positions,
    ) -> torch.Tensor:
        """(KV heads, n), higher stays."""
        raise NotImplementedError(f"{type(self).__name__} has no score of its own")
