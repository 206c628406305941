"""How far a model's positions reach, and a warning where a text goes beyond them."""

from __future__ import annotations

import warnings
from typing import Any

from .._compat import positions_of


def positions_alike(config: Any, n_tokens: int) -> int | None:
    """Positions that mean what those of the first `n_tokens` mean; None where the config does not say.

    Rotary embeddings that change with the length (dynamic, longrope) turn every key otherwise once a text passes the length
    they were stretched from.
    """
    limit = positions_of(config)
    rope = getattr(config, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
    if limit is None or rope.get("rope_type") not in ("longrope", "dynamic") or not first or n_tokens > first:
        return limit
    return min(limit, first)


def warn_beyond_positions(config: Any, n_tokens: int, what: str) -> bool:
    """Warn where a text needs more positions than the model has.

    Args:
        config: of the language model.
        n_tokens: positions needed, from 0.
        what: needs them, for the message.

    Returns:
        Whether it warned, so that a caller can do it once.
    """
    limit = positions_of(config)
    if limit is None or n_tokens <= limit:
        return False
    warnings.warn(
        f"{what} needs {n_tokens:,} positions, the model was made for {limit:,} (max_position_embeddings): answers from beyond "
        "them can be anything; use a shorter text, or a model for longer ones",
        UserWarning,
        stacklevel=3,
    )
    return True
