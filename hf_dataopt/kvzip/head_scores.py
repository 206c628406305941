"""Context-independent eviction (section 8.4.2): one importance per head, made once per model and kept in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import KVzipConfig

_FORMAT = "hf_dataopt.kvzip.head_scores.v1"


def head_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, config: KVzipConfig | None = None
) -> torch.Tensor:
    """Importance of every head: the maximum of its pair scores over one long text.

    Args:
        model, tokenizer: the language model that will use them.
        text: a long natural text; the dissertation uses one English book sample of 88K tokens.
        config: chunk size and replay.

    Returns:
        (scored layers, KV heads) float32 in [0, 1], higher is more important; for `KVzipCache.from_context(head_scores=…)`.

    Source: section 8.4.2, "Context-Independent Eviction".
    """
    from .config import KVzipConfig
    from .prompt import build_prompt
    from .scoring import prefill, score_context

    config = config or KVzipConfig()
    prefilled = prefill(model, build_prompt(tokenizer, text, config), config)
    return score_context(prefilled, config).amax(dim=-1)


def save_head_scores(scores: torch.Tensor, path: str | Path, *, model_id: str) -> None:
    """Write head scores to one safetensors file with the model's name in it."""
    save_file(
        {"head_scores": scores.contiguous()}, path, metadata={"format": _FORMAT, "model_id": json.dumps(model_id)}
    )


def load_head_scores(path: str | Path) -> tuple[torch.Tensor, str]:
    """Read a file of `save_head_scores`.

    Returns:
        Scores (scored layers, KV heads) float32, and the model they belong to.

    Raises:
        ValueError: no such file, or not a file of head scores.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no head scores (format {metadata.get('format')!r})")
            scores, model_id = file.get_tensor("head_scores"), json.loads(metadata["model_id"])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read head scores from {path}: {error}") from error
    if scores.ndim != 2 or not torch.isfinite(scores).all():
        raise ValueError(f"head scores must be finite and (layers, KV heads), got shape {tuple(scores.shape)}")
    return scores, model_id
