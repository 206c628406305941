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
        ValueError: text without a tokenizer, or a message that the chat template cannot render on its own.
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
        _check_message(turn)
        text, special = _message(tokenizer, turn, first)
        return _ids(tokenizer, text, special)
    return _ids(tokenizer, turn, first)


def answer_prompt(tokenizer: Any) -> list[int]:
    """Ids with which the chat template opens the assistant's answer; none where answers do not start with them."""
    return _ids(tokenizer, _opening(tokenizer), False)


def encode_answer(tokenizer: Any, turn: Any, first: bool) -> tuple[list[int], list[int]]:
    """Ids of an output turn, split into the template's opening (given, not learned) and what the model has to say.

    Args and Raises: as `encode_turn`.
    """
    ids = encode_turn(tokenizer, turn, first)
    if not isinstance(turn, dict) or turn["role"] != "assistant" or first:
        return [], ids
    opening = _opening(tokenizer)
    text, _ = _message(tokenizer, turn, False)
    return (_ids(tokenizer, opening, False), _ids(tokenizer, text[len(opening) :], False)) if opening else ([], ids)


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"]) if text else []
    return ids[:-1] if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _check_message(message: dict[str, Any]) -> None:
    if not {"role", "content"} <= set(message):
        raise TypeError(f"a message needs 'role' and 'content', got {sorted(message)}")
    if not isinstance(message["content"], str):
        raise TypeError(f"a message's content must be text, got {type(message['content']).__name__}")


def _message(tokenizer: Any, message: dict[str, str], first: bool) -> tuple[str, bool]:
    """Text of one message under the chat template, and whether special tokens are still missing."""
    if not tokenizer.chat_template:
        return f"{message['role']}: {message['content']}\n", first
    if first:
        text = _render(tokenizer, [message])
    else:  # a stand-in before it, so that the template gives no opening; what it says is cut off again
        user, assistant = {"role": "user", "content": "."}, {"role": "assistant", "content": "."}
        before = [user] if message["role"] == "assistant" else [user, assistant]
        said, both = _render(tokenizer, before), _render(tokenizer, [*before, message])
        if not both.startswith(said):
            raise ValueError("this chat template rewrites earlier turns; pass turns as text instead")
        text = both[len(said) :]
    if message["content"].strip() not in text:
        raise ValueError(
            f"this chat template does not render a lone {message['role']!r} message; put its content into the next message, "
            "or pass turns as text"
        )
    return text, False


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"this chat template refuses the roles {roles} ({error}); pass turns as text instead"
        ) from error


def _opening(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return "assistant:"
    user, assistant = {"role": "user", "content": "."}, {"role": "assistant", "content": "."}
    said, opened = _render(tokenizer, [user]), _render(tokenizer, [user], add_generation_prompt=True)
    opening = opened[len(said) :] if opened.startswith(said) else ""
    return opening if _render(tokenizer, [user, assistant]).startswith(said + opening) else ""
