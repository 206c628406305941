"""The fields of `KVzipConfig` as keyword arguments, for type checkers: `**changes: Unpack[KVzipFields]`.

The same names and types as the config's, which a test keeps so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict


class KVzipFields(TypedDict, total=False):
    """Fields of `KVzipConfig`, as keywords: a misspelt one is caught by a type checker."""

    keep_ratio: float
    max_kv_tokens: int | None
    standing: bool
    level: Literal["pair", "pair-uniform", "head"]
    head_sinks: int
    head_recent: int
    score: str | Callable[..., Any]
    chunk_size: int
    overlap: int
    replay: Literal["exact", "local"]
    softmax_keys: Literal["chunk", "all"]
    ties: Literal["position", "reference"]
    storage: Literal["model", "int8", "int4"]
    prefill_chunk_size: int
    task_line: str
    system: str | None
    template_kwargs: dict[str, Any] | None
    special_tokens_in_text: bool
