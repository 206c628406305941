"""From a turn (text, chat message or ids) to ids, the same way in training and online."""

from __future__ import annotations

from typing import Any

import torch


def encode_turn(tokenizer: Any, turn: Any, first: bool) -> list[int]:
    """Ids of one turn.

    Args:
        tokenizer: needed for text and messages.
        turn: `str`, message `{"role", "content"}`, or ids (list or 1-D tensor).
        first: the conversation starts here: special tokens go in front, as the tokenizer has it.

    Returns:
        Token ids.

    Raises:
        TypeError: another kind of turn, or ids that are not whole numbers.
        ValueError: text without a tokenizer.
    """
    if isinstance(turn, torch.Tensor):
        if turn.ndim != 1 or turn.is_floating_point():
            raise TypeError(f"ids must be whole numbers of shape (n,), got {turn.dtype} {tuple(turn.shape)}")
        return turn.tolist()
    if isinstance(turn, list | tuple):
        if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in turn):
            raise TypeError("a turn given as a list must hold token ids")
        return list(turn)
    if not isinstance(turn, str | dict):
        raise TypeError(f"a turn must be str, a message or ids, got {type(turn).__name__}")
    if tokenizer is None:
        raise ValueError("text needs a tokenizer; pass one, or pass ids")
    if isinstance(turn, dict):
        if not {"role", "content"} <= set(turn):
            raise TypeError(f"a message needs 'role' and 'content', got {sorted(turn)}")
        text, special = _message(tokenizer, turn, first)
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    return _without_eos(tokenizer, list(tokenizer(turn, add_special_tokens=first)["input_ids"]), first)


def _without_eos(tokenizer: Any, ids: list[int], special: bool) -> list[int]:
    return ids[:-1] if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _message(tokenizer: Any, message: dict[str, str], first: bool) -> tuple[str, bool]:
    """Text of one message under the chat template, and whether special tokens are still missing."""
    if not tokenizer.chat_template:
        return f"{message['role']}: {message['content']}\n", first
    if first:
        return tokenizer.apply_chat_template([message], tokenize=False), False
    # a stand-in before it, so that the template gives no opening; what it says is cut off again
    other = {"role": "user" if message["role"] == "assistant" else "assistant", "content": "."}
    opening = [other] if other["role"] == "user" else [{"role": "user", "content": "."}, other]
    before = tokenizer.apply_chat_template(opening, tokenize=False)
    both = tokenizer.apply_chat_template([*opening, message], tokenize=False)
    if not both.startswith(before):
        raise ValueError("this chat template rewrites earlier turns; pass turns as text instead")
    return both[len(before) :], False
