"""Questions in whatever form they come, as ids behind a compressed context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..settings import check_tensor
from .config import KVzipConfig
from .prompt import KVzipPrompt, question_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


def ids_of_questions(
    question: Any, prompt: KVzipPrompt, tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None, config: KVzipConfig
) -> list[torch.Tensor]:
    """Ids of each question behind the context, 1-D int64.

    Args:
        question: as `KVzipCache.inputs` takes it.
        prompt, tokenizer, config: of the cache.

    Raises:
        TypeError, ValueError: see `KVzipCache.inputs`.
    """
    if isinstance(question, torch.Tensor):
        check_tensor("question ids", question, floating=False, least=0)
        row = question.reshape(-1).cpu() if question.ndim == 1 or question.shape[:1] == (1,) else None
        if row is None or row.dtype != torch.int64:
            raise TypeError(
                f"question ids must be int64 of shape (q,) or (1, q), got {question.dtype} {tuple(question.shape)}"
            )
        n = prompt.ids.numel()
        if row.numel() > n and torch.equal(row[:n], prompt.ids):
            row = row[n:]
        rows = [row]
    else:
        if tokenizer is None:
            raise ValueError("this cache has no tokenizer; pass question ids, or set `cache.tokenizer`")
        rows = question_rows(tokenizer, prompt, question, config)
    if min(row.numel() for row in rows) == 0:
        raise ValueError("the question has no tokens; ask something about the context")
    return rows


def padded_behind(context: torch.Tensor, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, context + longest) int64 of questions behind one context (n,), padded between the two."""
    longest = max(row.numel() for row in rows)
    ids = torch.zeros(len(rows), context.numel() + longest, dtype=torch.int64)
    mask = torch.ones_like(ids)
    for index, row in enumerate(rows):
        pad = longest - row.numel()
        ids[index, : context.numel()] = context
        ids[index, context.numel() + pad :] = row
        mask[index, context.numel() : context.numel() + pad] = 0
    return ids, mask
