"""From a turn (text, chat messages or ids) to ids, the same way in training and online."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..settings import brief, check_tensor
from ..text.chat import ChatFormat, Message, said

PLAIN = ChatFormat()


def encode_turn(tokenizer: Any, turn: Any, first: bool, chat: ChatFormat = PLAIN) -> list[int]:
    """Ids of one turn.

    Args:
        tokenizer: needed for text and messages.
        turn: `str`, message `{"role", "content"}`, a list of messages (one turn: one after the other), or ids (list or 1-D
            tensor). A content is a `str` or text parts; text parts without a message around them are text.
        first: the conversation starts here: special tokens go in front, as the tokenizer has it, and the system message.
        chat: system message, arguments of the chat template, and whether special tokens written in a text count.

    Returns:
        Token ids; none for empty text, and for messages that say nothing.

    Raises:
        TypeError: another kind of turn, or ids that are not whole numbers.
        ValueError: text without a tokenizer, messages that the chat template cannot render on their own, a special token that
            cannot be encoded as text, or a system message and a first turn that is no message.
    """
    turn = said(turn)
    if first and chat.system is not None and not _is_messages(turn):
        raise ValueError(
            "the system message stands before the first message, but the first turn is no message; pass it as "
            "{'role': 'user', 'content': ...}, or write the system message into it and leave system=... out"
        )
    if isinstance(turn, torch.Tensor):
        if turn.ndim != 1 or turn.is_floating_point():
            raise TypeError(f"ids must be whole numbers of shape (n,), got {turn.dtype} {tuple(turn.shape)}")
        return check_tensor("ids", turn, floating=False).tolist()
    if isinstance(turn, list | tuple) and not _is_messages(turn):
        if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in turn):
            raise TypeError("a turn given as a list must hold token ids, or messages {'role', 'content'}")
        return list(turn)
    if not isinstance(turn, str | list):
        raise TypeError(f"a turn must be str, a message, a list of messages or ids, got {brief(turn)}")
    if tokenizer is None:
        raise ValueError("text needs a tokenizer; pass one, or pass ids")
    if isinstance(turn, list) and not any(map(_says, turn)):
        return []  # the template's own tokens around nothing would take a context's slots
    if isinstance(turn, list):
        text, special = _rendered(tokenizer, turn, first, chat)
        return _ids(tokenizer, text, special, chat)
    return _ids(tokenizer, chat.hide(tokenizer, turn), first, chat)


def answer_prompt(tokenizer: Any, chat: ChatFormat = PLAIN) -> list[int]:
    """Ids with which the chat template opens the assistant's answer; none where answers do not start with them."""
    return _ids(tokenizer, _opening(tokenizer, chat), False, chat)


def awaits_answer(turn: Any) -> bool:
    """Whether a turn is made of messages and the assistant speaks next."""
    turn = said(turn)
    return _is_messages(turn) and turn[-1]["role"] != "assistant"


def encode_answer(tokenizer: Any, turn: Any, first: bool, chat: ChatFormat = PLAIN) -> tuple[list[int], list[int]]:
    """Ids of an output turn, split into the template's opening (given, not learned) and what the model has to say.

    Args and Raises: as `encode_turn`.
    """
    ids, turn = encode_turn(tokenizer, turn, first, chat), said(turn)
    if not ids or not _is_messages(turn) or turn[0]["role"] != "assistant" or first:
        return [], ids
    opening = _opening(tokenizer, chat)
    text, _ = _rendered(tokenizer, turn, False, chat)
    if not opening:
        return [], ids
    return _ids(tokenizer, opening, False, chat), _ids(tokenizer, text[len(opening) :], False, chat)


def is_one(given: Any) -> bool:
    """Whether a list or tuple is one turn: ids, messages, or text parts."""
    return all(isinstance(entry, int) for entry in given) or all(isinstance(entry, dict) for entry in given)


def split(rows: Sequence[list[int] | None], limit: int | None, config: Any) -> list[list[list[int] | None]]:
    """Rows as steps one after the other, none of which needs more than `limit` positions with its compression tokens."""
    if limit is None or limit <= config.num_comp_tokens:
        return [list(rows)]
    most = limit - config.num_comp_tokens
    parts = []
    for row in rows:
        count = max(1, -(-len(row or []) // most))
        size = -(-len(row or []) // count) or 1
        parts.append([None] if row is None else [row[at : at + size] for at in range(0, len(row), size)])
    longest = max(map(len, parts))
    return [[part[step] if step < len(part) else None for part in parts] for step in range(longest)]


def is_said(turn: Any) -> bool:
    """Whether a turn is text or messages, not ids."""
    turn = said(turn)
    return isinstance(turn, str) or _is_messages(turn)


def left_padded(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) int64 and mask (B, T) bool."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) >= (longest - lengths)[:, None]


def _is_messages(turn: Any) -> bool:
    return isinstance(turn, list) and bool(turn) and isinstance(turn[0], dict)


def _says(message: Message) -> bool:
    """Whether there is content in a message, a call of a tool, its result, or anything else beside role and name."""
    others = (value for name, value in message.items() if name not in ("role", "name", "content"))
    return bool(message["content"].strip()) or any(others)


def _ids(tokenizer: Any, text: str, special: bool, chat: ChatFormat) -> list[int]:
    ids = chat.ids(tokenizer, text, add_special_tokens=special) if text else []
    return ids[:-1] if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _rendered(tokenizer: Any, turn: list[Message], first: bool, chat: ChatFormat) -> tuple[str, bool]:
    """Text of messages (special tokens hidden) under the chat template, and whether special tokens are still missing."""
    chat.check(tokenizer, turn)
    messages = chat.hide(tokenizer, turn)
    if not tokenizer.chat_template:
        shown = chat.begun(tokenizer, messages) if first else messages
        return "".join(f"{message['role']}: {message['content']}\n" for message in shown), first
    if first:
        messages = chat.begun(tokenizer, messages)
        text = chat.render(tokenizer, messages)
    else:  # a stand-in before it, so that the template gives no opening; what it says is cut off again
        user, assistant = {"role": "user", "content": "."}, {"role": "assistant", "content": "."}
        before = chat.begun(tokenizer, [user] if messages[0]["role"] == "assistant" else [user, assistant])
        heard, both = chat.render(tokenizer, before), chat.render(tokenizer, [*before, *messages])
        if not both.startswith(heard):
            raise ValueError("this chat template rewrites earlier turns; pass turns as text instead")
        text = both[len(heard) :]
    for message in messages:
        if message["content"].strip() not in text:
            raise ValueError(
                f"this chat template does not render a lone {message['role']!r} message; put its content into the next "
                "message, or pass turns as text"
            )
    return text, False


def _opening(tokenizer: Any, chat: ChatFormat) -> str:
    chat.check(tokenizer)
    if not tokenizer.chat_template:
        return "assistant:"
    user = chat.begun(tokenizer, [{"role": "user", "content": "."}])
    heard, opened = chat.render(tokenizer, user), chat.render(tokenizer, user, add_generation_prompt=True)
    opening = opened[len(heard) :] if opened.startswith(heard) else ""
    answered = chat.render(tokenizer, [*user, {"role": "assistant", "content": "."}])
    return opening if answered.startswith(heard + opening) else ""
