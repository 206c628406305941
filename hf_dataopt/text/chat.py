"""Messages and chat templates, the same for every method: what may be said, and how it becomes text and ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..settings import brief, check_text, check_tokenizer, settle
from . import plain_text

Message = dict[str, Any]
# arguments of apply_chat_template that decide what comes out of it: ours to set
_OURS = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
)


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What is said beside the messages themselves, and whether special tokens written in them count.

    Args:
        template_kwargs (`dict`, optional): for `tokenizer.apply_chat_template`: `enable_thinking`, `tools`, `documents`, ...
            JSON; a function among `tools` becomes its JSON schema, as transformers makes it.
        system (`str`, optional): the system message before the first one.
        special_tokens_in_text (`bool`, default `False`): False encodes `<eos>` written in a text, message, tool or document
            as the signs it is written with; True as the token. Tokens that the tokenizer does not call special (`<think>`)
            are text with an id of its own and stay that.

    Raises:
        TypeError: a field has the wrong type, or template arguments are not JSON.
        ValueError: an empty system message, or a template argument that is not the user's to set.
    """

    template_kwargs: dict[str, Any] | None = field(default=None, hash=False)
    system: str | None = None
    special_tokens_in_text: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "template_kwargs", _json_arguments(self.template_kwargs))
        settle(self, texts=("system",), flags=("special_tokens_in_text",), optional=("system",))
        if self.system is not None and not self.system.strip():
            raise ValueError("the system message is empty; leave it out (system=None)")

    def hide(self, tokenizer: Any, value: Any) -> Any:
        """A user's text or messages, with the special tokens in them hidden from `ids` (see `plain_text.hide`)."""
        return value if self.special_tokens_in_text else plain_text.hide(tokenizer_of(tokenizer), value)

    def ids(self, tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text in which hidden special tokens are text and all others count."""
        tokenizer = tokenizer_of(check_tokenizer("tokenizer", tokenizer))
        check_text("text", text)
        if self.special_tokens_in_text:
            return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        return plain_text.encode(tokenizer, text, add_special_tokens=add_special_tokens)

    def render(self, tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """Messages (hidden) as the chat template writes them.

        Raises:
            ValueError: no chat template to take the arguments, or one that refuses these messages.
        """
        from jinja2 import TemplateError

        arguments = dict(self.template_kwargs or {})
        for name in ("tools", "documents"):
            if arguments.get(name) is not None:
                arguments[name] = self.hide(tokenizer, arguments[name])
        try:
            rendered = template_owner(tokenizer).apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"this chat template refuses the roles {roles} ({error}); pass turns as text instead"
            ) from error
        return str(rendered)

    def check(self, tokenizer: Any, messages: Sequence[Message] = ()) -> None:
        """Refuse template arguments and tool calls where no template would take them.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if getattr(template_owner(tokenizer), "chat_template", None):
            return
        if self.template_kwargs:
            raise ValueError("template_kwargs need a chat template, and this tokenizer has none; leave them out")
        if any(message.get("tool_calls") for message in messages):
            raise ValueError(
                "tool_calls need a chat template, and this tokenizer has none; write them into the content"
            )

    def begun(self, tokenizer: Any, messages: list[Message]) -> list[Message]:
        """The messages (hidden) with the system message before them.

        Raises:
            ValueError: the messages bring a system message of their own.
        """
        if self.system is None:
            return messages
        if messages and messages[0]["role"] == "system":
            raise ValueError("there are two system messages: system=... and the first message; leave one out")
        return [{"role": "system", "content": self.hide(tokenizer, self.system)}, *messages]

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON."""
        return {name: getattr(self, name) for name in ("template_kwargs", "system", "special_tokens_in_text")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChatFormat:
        """A format from `to_dict`'s fields; those missing, and fields of others, are left at their defaults."""
        return cls(**{name: values[name] for name in cls().to_dict() if name in values})


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a multimodal model's processor; a tokenizer is its own."""
    from transformers import ProcessorMixin

    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def template_owner(processor: Any) -> Any:
    """Whose chat template counts: a processor's own, or that of its tokenizer."""
    return processor if getattr(processor, "chat_template", None) else tokenizer_of(processor)


def text_of(content: Any) -> str:
    """Text of a content: `str`, or parts `{"type": "text", "text": ...}`, joined as they are.

    Raises:
        TypeError: neither.
        ValueError: a part of another type.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content or not all(isinstance(part, dict) for part in content):
        raise TypeError(f"a message's content must be text or a list of text parts, got {brief(content)}")
    for part in content:
        if part.get("type") != "text":
            raise ValueError(
                f"a content part of type {brief(part.get('type'))} cannot be read here, only text can; leave it out"
            )
        if not isinstance(part.get("text"), str):
            raise TypeError(f"a text part's content must be text, got {brief(part.get('text'))}")
    return "".join(part["text"] for part in content)


def as_message(value: Any) -> Message:
    """A message whose content is text; one that calls tools needs none.

    Raises:
        TypeError: no `role` and `content`, or content that is no text.
        ValueError: a content part that is not text.
    """
    if isinstance(value, dict) and value.get("tool_calls") and value.get("content") is None:
        value = {**value, "content": ""}
    if not isinstance(value, dict) or not {"role", "content"} <= set(value):
        got = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise TypeError(f"a message needs 'role' and 'content', got {got}")
    if not isinstance(value["role"], str) or not value["role"]:
        raise TypeError(f"a message's role must be a word such as 'user', got {brief(value['role'])}")
    return {**value, "content": text_of(value["content"])}


def said(turn: Any) -> Any:
    """One form for all that can be said: text as `str`, one or more messages as a list of them, all else as it is.

    A dict is one message. A list whose entries are all dicts is messages, one after the other, or the text parts of one
    content where no entry has a role.

    Raises:
        TypeError, ValueError: see `as_message`.
    """
    entries = [turn] if isinstance(turn, dict) else turn
    if not isinstance(entries, list | tuple) or not entries or not all(isinstance(entry, dict) for entry in entries):
        return turn
    if not any("role" in entry for entry in entries) and all("type" in entry for entry in entries):
        return text_of(entries)
    return [as_message(entry) for entry in entries]


def _json_arguments(given: Any) -> dict[str, Any] | None:
    """Template arguments as JSON: checked, copied, functions among the tools as schemas."""
    if given is None:
        return None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"template_kwargs must be a dict of names to values, got {brief(given)}")
    taken = sorted(set(given) & set(_OURS))
    if taken:
        raise ValueError(f"template_kwargs cannot set {', '.join(taken)}: that is decided here; leave it out")
    arguments = dict(given)
    if isinstance(arguments.get("tools"), list | tuple):
        arguments["tools"] = [_schema(tool) if callable(tool) else tool for tool in arguments["tools"]]
    copied = {}
    for name, value in arguments.items():
        try:
            copied[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"template_kwargs[{name!r}] must be JSON, so that it can be saved ({error}); functions are converted in "
                "'tools' only"
            ) from error
    return copied


def _schema(tool: Any) -> Any:
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:
        name = getattr(tool, "__name__", repr(tool))
        raise ValueError(
            f"tool {name!r:.80} has no JSON schema ({error}); give it type hints and a docstring with Args, or pass the schema"
        ) from error
