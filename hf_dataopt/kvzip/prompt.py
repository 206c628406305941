"""The token sequences of one compression: prefix, context, and the repeat prompts of section 8.3.4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .config import FIRST_REPEAT_PROMPT, NEXT_REPEAT_PROMPT, KVzipConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "<<KVZIP CONTEXT GOES HERE>>"


@dataclass(frozen=True)
class KVzipPrompt:
    """Token ids of one context and of everything said around it; every field is a 1-D int64 tensor.

    Args:
        prefix_ids: chat-template start, system prompt and task line: in the cache, never scored, never evicted.
        context_ids: the context, without special tokens.
        suffix_ids: end of the user's turn and start of the answer.
        first_repeat_ids: repeat prompt of the first chunk.
        next_repeat_ids: repeat prompt of a later chunk; the last tokens of the preceding chunk follow it.
    """

    prefix_ids: torch.Tensor
    context_ids: torch.Tensor
    suffix_ids: torch.Tensor
    first_repeat_ids: torch.Tensor
    next_repeat_ids: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("prefix_ids", "context_ids", "suffix_ids", "first_repeat_ids", "next_repeat_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, torch.Tensor) or ids.ndim != 1 or ids.dtype != torch.int64:
                raise TypeError(f"{name} must be a 1-D int64 tensor, got {ids!r:.80}")
        if self.context_ids.numel() == 0:
            raise ValueError("the context has no tokens; give a context with text in it")

    @property
    def ids(self) -> torch.Tensor:
        """Prefix and context, as they stand in the cache: 1-D int64."""
        return torch.cat([self.prefix_ids, self.context_ids])

    def repeat_inputs(self, chunk_size: int, overlap: int) -> list[tuple[int, int, torch.Tensor]]:
        """The repeat input of every chunk (Figure 8.7): prompt, last tokens of the chunk before, suffix, the chunk itself.

        Args:
            chunk_size: context tokens per chunk.
            overlap: tokens of the preceding chunk in the prompt.

        Returns:
            `(start, end, ids)` per chunk; `start` and `end` count context tokens.
        """
        pieces = []
        n = self.context_ids.numel()
        for start in range(0, n, chunk_size):
            end = min(start + chunk_size, n)
            chunk = self.context_ids[start:end]
            if start == 0:
                head = [self.first_repeat_ids]
            else:
                before = self.context_ids[max(start - min(overlap, chunk_size), 0) : start]
                head = [self.next_repeat_ids, before]
            pieces.append((start, end, torch.cat([*head, self.suffix_ids, chunk])))
        return pieces


def build_prompt(tokenizer: PreTrainedTokenizerBase, context: str, config: KVzipConfig) -> KVzipPrompt:
    """Token sequences for `context`, with prefix and suffix taken from the tokenizer's chat template.

    Args:
        tokenizer: the model's tokenizer; without a chat template the prefix is its BOS token (if it has one) and the task
            line, and the suffix a line break.
        context: the text to compress.
        config: gives the task line.

    Returns:
        The sequences as a `KVzipPrompt`.

    Raises:
        TypeError: `context` is no string.
        ValueError: `context` has no tokens, or the chat template rewrites the user's message.

    Source: section 8.3.4; the wording of the prompts is the reference code's.
    """
    if not isinstance(context, str):
        raise TypeError(
            f"context must be a str, got {type(context).__name__}; decode token ids first or use KVzipPrompt"
        )
    if getattr(tokenizer, "chat_template", None):
        rendered: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": config.task_line + _SENTINEL}], tokenize=False, add_generation_prompt=True
        )
        if rendered.count(_SENTINEL) != 1:
            raise ValueError("the chat template does not repeat the user's message once; build a KVzipPrompt by hand")
        prefix, suffix = rendered.split(_SENTINEL)
    else:
        prefix, suffix = (tokenizer.bos_token or "") + config.task_line, "\n"

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    return KVzipPrompt(
        prefix_ids=encode(prefix),
        context_ids=encode(context),
        suffix_ids=encode(suffix),
        first_repeat_ids=encode(FIRST_REPEAT_PROMPT),
        next_repeat_ids=encode(NEXT_REPEAT_PROMPT),
    )


def question_ids(tokenizer: PreTrainedTokenizerBase, prompt_suffix: torch.Tensor, question: str) -> torch.Tensor:
    """Ids of a question asked right after the context: `"\\n\\n"`, the question, the suffix. 1-D int64.

    Raises:
        ValueError: the question is empty.
    """
    if not question.strip():
        raise ValueError("the question is empty; ask something about the context")
    ids = tokenizer("\n\n" + question.strip(), add_special_tokens=False)["input_ids"]
    return torch.cat([torch.tensor(ids, dtype=torch.int64), prompt_suffix.cpu()])
