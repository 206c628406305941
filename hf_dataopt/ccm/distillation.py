"""The full context teaches the memory: the adapter switched off is the teacher, so no second model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..settings import brief, check_kind, check_number
from .active import ccm_config

_ROWS = 1024  # tokens whose distributions over the vocabulary exist in float32 at a time


def distillation_loss(
    model: Any, batch: Mapping[str, torch.Tensor], *, share: float = 1.0, temperature: float = 1.0
) -> torch.Tensor:
    """Loss of a batch of `DataCollatorForCCM` whose targets are what the model says of the full context.

    share * T^2 * KL(teacher || student) + (1 - share) * cross-entropy of the labels, mean over labelled tokens. The student
    reads the batch; the teacher reads the same rows without compression tokens, with the adapter off.

    Args:
        model (`PeftModel`): with an active CCM adapter.
        batch: `input_ids`, `attention_mask`, `position_ids`, `labels`, each (B, T) int64, padded right, turns or stream, not
            packed.
        share (`float`, in [0, 1], default 1): of the teacher. temperature (`float`, in (0, 1000], default 1): T.

    Returns:
        () float32.

    Raises:
        ValueError: packed rows, no label, or no active CCM adapter.
        TypeError: a batch without one of the four.

    Source: none in the text, which learns from labels alone (Algorithm 6); meant for runs of few samples.
    Cost: half as much again as a step on labels (one forward without gradients). Logits of all labelled tokens in the model's
        dtype, student's and teacher's; in float32 for 1,024 tokens at a time, made again in the backward pass.
    Example:
        >>> loss = distillation_loss(model, collator(samples))  # doctest: +SKIP
    """
    config = ccm_config(model)
    share = check_number("share", share, 0, 1)
    temperature = check_number("temperature", temperature, 0, 1e3, above=True)
    check_kind("batch", batch, Mapping, "pass what DataCollatorForCCM gives")
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    if any(not isinstance(batch.get(name), torch.Tensor) or batch[name].ndim != 2 for name in names):
        raise TypeError(f"a batch needs {', '.join(names)}, each (B, T), got {brief(sorted(map(str, batch)))}")
    labels = batch["labels"]
    if not bool((labels >= 0).any()):
        raise ValueError("this batch has no labels to learn")
    first = (config.comp_token_ids or [0])[0]
    text = (batch["input_ids"] < first) & batch["attention_mask"].bool()
    if bool(((batch["position_ids"] == 0) & text).sum(1).gt(1).any()):
        raise ValueError("a packed row has several samples, which a teacher would mix; use pack=False")
    row, column = (labels >= 0).nonzero(as_tuple=True)
    student = _logits(model, {name: batch[name] for name in names[:3]}, row, column - 1)
    teacher = None
    if share:
        with torch.no_grad(), model.disable_adapter():
            inputs, rank = _without_compression(batch, text)
            teacher = _logits(model, inputs, row, rank[row, column] - 1)
    said, total = labels[row, column], student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(said), _ROWS):
        part = slice(start, start + _ROWS)
        told = None if teacher is None else teacher[part]
        total = total + checkpoint(
            _summed, student[part], told, said[part], share, temperature, use_reentrant=False, preserve_rng_state=False
        )
    return total / len(said)


def _summed(
    student: torch.Tensor, teacher: torch.Tensor | None, said: torch.Tensor, share: float, temperature: float
) -> torch.Tensor:
    """The loss of some tokens, summed: logits (n, vocabulary) of both, labels (n,)."""
    student = student.float()
    loss = functional.cross_entropy(student, said, reduction="sum") * (1 - share)
    if teacher is None:
        return loss
    student, teacher = (torch.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return loss + share * temperature**2 * functional.kl_div(student, teacher, reduction="sum", log_target=True)


def _logits(model: Any, inputs: dict[str, torch.Tensor], row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Logits (n, vocabulary) behind the tokens (row, column), made for their columns alone."""
    kept, where = torch.unique(column, return_inverse=True)
    return model(**inputs, logits_to_keep=kept, use_cache=False).logits[row, where]


def _without_compression(
    batch: Mapping[str, torch.Tensor], text: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The batch without compression tokens, and the column that each text token now has."""
    rank = text.long().cumsum(1) - 1
    longest = int(text.sum(1).max())
    order = torch.argsort((~text).long(), dim=1, stable=True)[:, :longest]
    mask = text.gather(1, order).long()
    ids = batch["input_ids"].gather(1, order) * mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": batch["position_ids"].gather(1, order)}, rank
