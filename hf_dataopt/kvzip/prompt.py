"""The token sequences of one compression: prefix, context, and the repeat prompts of section 8.3.4."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..settings import brief, check_int, check_kind, check_tensor, check_tokenizer
from ..text.chat import Message, as_message, said, template_owner, tokenizer_of
from .config import FIRST_REPEAT_PROMPT, NEXT_REPEAT_PROMPT, KVzipConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    AnyTokenizer = PreTrainedTokenizerBase | ProcessorMixin

_SENTINEL, _ANSWER = "<<KVZIP CONTEXT GOES HERE>>", "<<KVZIP ANSWER GOES HERE>>"


@dataclass(frozen=True)
class KVzipPrompt:
    """Token ids of one context and of everything said around it; every field is a 1-D int64 tensor.

    Args:
        prefix_ids: chat-template start, system prompt and task line: in the cache, never scored, never evicted.
        context_ids: the context, without special tokens.
        suffix_ids: end of the user's turn and start of the answer.
        first_repeat_ids: repeat prompt of the first chunk.
        next_repeat_ids: repeat prompt of a later chunk; the last tokens of the preceding chunk follow it.
        turn_ids: what was said about the context since, once it is part of the compressed cache.
    """

    prefix_ids: torch.Tensor
    context_ids: torch.Tensor
    suffix_ids: torch.Tensor
    first_repeat_ids: torch.Tensor
    next_repeat_ids: torch.Tensor
    turn_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        for name in ("prefix_ids", "context_ids", "suffix_ids", "first_repeat_ids", "next_repeat_ids", "turn_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, torch.Tensor) or ids.ndim != 1 or ids.dtype != torch.int64:
                raise TypeError(f"{name} must be a 1-D int64 tensor, got {brief(ids)}")
            check_tensor(name, ids, floating=False, least=0)
        if self.context_ids.numel() == 0:
            raise ValueError("the context has no tokens; give a context with text in it")

    @property
    def ids(self) -> torch.Tensor:
        """Prefix, context and turns, as they stand in the cache: 1-D int64."""
        return torch.cat([self.prefix_ids, self.context_ids, self.turn_ids])

    def repeat_inputs(
        self, chunk_size: int, overlap: int, before: torch.Tensor | None = None
    ) -> list[tuple[int, int, torch.Tensor]]:
        """The repeat input of every chunk (Figure 8.7): prompt, last tokens of the chunk before, suffix, the chunk itself.

        Args:
            chunk_size: context tokens per chunk.
            overlap: tokens of the preceding chunk in the prompt.
            before: (n,) int64, what stands between prefix and context and is not repeated: then no chunk is the first one.

        Returns:
            `(start, end, ids)` per chunk; `start` and `end` count context tokens.
        """
        chunk_size, overlap = check_int("chunk_size", chunk_size, 1), check_int("overlap", overlap, 0)
        if before is not None:
            check_tensor("before", before, ("tokens",), floating=False, least=0)
        pieces = []
        n = self.context_ids.numel()
        earlier = self.context_ids if before is None else torch.cat([before, self.context_ids])
        skipped = earlier.numel() - n
        for start in range(0, n, chunk_size):
            end = min(start + chunk_size, n)
            chunk = self.context_ids[start:end]
            if start + skipped == 0:
                head = [self.first_repeat_ids]
            else:
                at = start + skipped
                head = [self.next_repeat_ids, earlier[max(at - min(overlap, chunk_size), 0) : at]]
            pieces.append((start, end, torch.cat([*head, self.suffix_ids, chunk])))
        return pieces


def build_prompt(tokenizer: AnyTokenizer, context: Any, config: KVzipConfig) -> KVzipPrompt:
    """Token sequences for `context`, with prefix and suffix taken from the tokenizer's chat template.

    Args:
        tokenizer: the model's tokenizer or processor; without a chat template the prefix is its BOS token (if it has one),
            system message and task line, and the suffix a line break.
        context: the text to compress, `str`, text parts, or a user's message with them; see `images.build_context` for more.
        config: gives task line, system message and arguments of the template.

    Returns:
        The sequences as a `KVzipPrompt`.

    Raises:
        TypeError: `context` is no text.
        ValueError: `context` has no tokens, the chat template rewrites the user's message or leaves the system message out,
            or a special token in a text cannot be encoded as text.

    Source: section 8.3.4; the wording of the prompts is the reference code's.
    """
    check_tokenizer("tokenizer", tokenizer)
    check_kind("config", config, KVzipConfig)
    if isinstance(context, dict) and context.get("role") == "user":
        context = as_message(context)["content"]
    elif isinstance(context, list | tuple | dict):
        context = said(context)
    if not isinstance(context, str):
        raise TypeError(f"context must be a str, got {brief(context)}; decode token ids first or use KVzipPrompt")
    chat = config.chat
    prefix, suffix = _around(tokenizer, config, [])

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(chat.ids(tokenizer, text), dtype=torch.int64)

    return KVzipPrompt(
        prefix_ids=encode(prefix),
        context_ids=encode(chat.hide(tokenizer, context)),
        suffix_ids=encode(suffix),
        first_repeat_ids=encode(FIRST_REPEAT_PROMPT),
        next_repeat_ids=encode(NEXT_REPEAT_PROMPT),
    )


def question_ids(
    tokenizer: AnyTokenizer, prompt_suffix: torch.Tensor, question: str, config: KVzipConfig | None = None
) -> torch.Tensor:
    """Ids of a question asked right after the context: `"\\n\\n"`, the question, the suffix. 1-D int64.

    Raises:
        ValueError: the question is empty, or a special token in it cannot be encoded as text.
    """
    if not question.strip():
        raise ValueError("the question is empty; ask something about the context")
    chat = (config or KVzipConfig()).chat
    ids = chat.ids(tokenizer, chat.hide(tokenizer, "\n\n" + question.strip()))
    return torch.cat([torch.tensor(ids, dtype=torch.int64), prompt_suffix.cpu()])


def conversation_ids(
    tokenizer: AnyTokenizer, prompt: KVzipPrompt, messages: list[Message], config: KVzipConfig
) -> torch.Tensor:
    """Ids of a conversation about the context, up to the start of the next answer. 1-D int64.

    Args:
        tokenizer: the model's tokenizer; without a chat template each later user message is asked as the first one is.
        prompt: of the compressed context.
        messages: the first goes on with the user's turn in which the context stands (as `question_ids`), the others are
            rendered by the chat template.
        config: that `prompt` was built with.

    Raises:
        ValueError: a conversation that does not start with the user's question or ends with an answer, a tokenizer or config
            with another start of the prompt, or a template that rewrites it once more is said.
    """
    first, later = messages[0], messages[1:]
    _check_conversation(messages)
    if not later:
        return question_ids(tokenizer, prompt.suffix_ids, first["content"], config)
    chat = config.chat
    begin = question_ids(tokenizer, prompt.suffix_ids[:0], first["content"], config)
    prefix, rest = _around(tokenizer, config, chat.hide(tokenizer, later))
    if chat.ids(tokenizer, prefix) != prompt.prefix_ids.tolist():
        raise ValueError(
            "with these messages the prompt starts unlike the compressed one: the chat template rewrites earlier turns, or "
            "tokenizer, system message or template_kwargs are not those of the cache; ask one question at a time"
        )
    return torch.cat([begin, torch.tensor(chat.ids(tokenizer, rest), dtype=torch.int64)])


def next_turn_ids(
    tokenizer: AnyTokenizer, prompt: KVzipPrompt, messages: list[Message], config: KVzipConfig
) -> torch.Tensor:
    """Ids of messages behind turns that the cache holds: the end of the last answer, then what the template makes of them.

    Args:
        tokenizer, config: as `conversation_ids`.
        prompt: with turns, which end in an answer.
        messages: the next ones, from the user's on.

    Raises:
        ValueError: see `conversation_ids`.
    """
    _check_conversation(messages)
    chat = config.chat
    given: list[Message] = [{"role": "assistant", "content": _ANSWER}, *chat.hide(tokenizer, messages)]
    rest = _around(tokenizer, config, given)[1]
    if rest.count(_ANSWER) != 1:
        raise ValueError("the chat template does not repeat an answer once; give the ids of the whole conversation")
    ids = torch.tensor(chat.ids(tokenizer, rest.partition(_ANSWER)[2]), dtype=torch.int64)
    return ids[1:] if torch.equal(prompt.turn_ids[-1:].cpu(), ids[:1]) else ids  # the answer's end was read already


def _check_conversation(messages: list[Message]) -> None:
    first = messages[0]
    if first["role"] != "user":
        raise ValueError(
            f"a conversation about the context starts with the user's question, got a message of {first['role']!r}; "
            "a system message belongs into KVzipConfig(system=...)"
        )
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; end with the question that is to be answered")
    if any(message["role"] == "user" and not message["content"].strip() for message in messages):
        raise ValueError("the question is empty; ask something about the context")


def question_rows(
    tokenizer: AnyTokenizer, prompt: KVzipPrompt, question: Any, config: KVzipConfig
) -> list[torch.Tensor]:
    """Ids of one question or of a batch, each 1-D int64.

    Args:
        tokenizer: the model's tokenizer.
        prompt: of the compressed context.
        question: a `str`, a message (dict), or a list: entries that are all dicts are ONE conversation (or the text parts of
            one question); otherwise each entry is a question of the batch, a `str` or a list of messages.
        config: that `prompt` was built with.

    Raises:
        TypeError: something else, or a batch in which a message stands beside texts.
        ValueError: see `question_ids` and `conversation_ids`.
    """
    needs = (
        "a question must be a str, a message, a list of messages (one conversation), a non-empty list of these (a batch; a "
        "single message in it is written [message]), or a tensor of ids"
    )
    try:
        entries = [question] if isinstance(question, str | dict) else list(question)
    except TypeError:
        entries = [question]
    if entries and not isinstance(question, dict):
        messages = [isinstance(entry, dict) for entry in entries]
        if any(messages) and not all(messages):
            raise TypeError(f"{needs}, got texts and messages in one list: {brief(question)}")
        entries = [entries] if all(messages) else entries
    if not entries:
        raise TypeError(f"{needs}, got an empty one")
    rows = []
    for entry in map(said, entries):
        if isinstance(entry, str) and prompt.turn_ids.numel():
            rows.append(next_turn_ids(tokenizer, prompt, [{"role": "user", "content": entry}], config))
        elif isinstance(entry, str):
            rows.append(question_ids(tokenizer, prompt.suffix_ids, entry, config))
        elif isinstance(entry, list) and entry and isinstance(entry[0], dict):
            asked = next_turn_ids if prompt.turn_ids.numel() else conversation_ids
            rows.append(asked(tokenizer, prompt, entry, config))
        else:
            raise TypeError(f"{needs}, got {brief(entry)}")
    return rows


def _around(tokenizer: Any, config: KVzipConfig, later: list[Message]) -> tuple[str, str]:
    """Text before the context, and after what the user says about it: to the end of the turn, or of later messages (hidden)."""
    chat = config.chat
    chat.check(tokenizer, later)
    task = chat.hide(tokenizer, config.task_line)
    if not getattr(template_owner(tokenizer), "chat_template", None):
        system = f"{chat.hide(tokenizer, config.system)}\n\n" if config.system else ""
        ends = [f"\n\n{one['content'].strip()}\n" if one["role"] != "assistant" else one["content"] for one in later]
        begin = getattr(tokenizer_of(tokenizer), "bos_token", None) or ""
        return begin + system + task, "".join(["\n", *ends])
    messages = chat.begun(tokenizer, [{"role": "user", "content": task + _SENTINEL}, *later])
    rendered = chat.render(tokenizer, messages, add_generation_prompt=True)
    if rendered.count(_SENTINEL) != 1 and tokenizer_of(tokenizer) is not tokenizer:  # some processors read parts only
        parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        rendered = chat.render(tokenizer, parts, add_generation_prompt=True)
    if rendered.count(_SENTINEL) != 1:
        raise ValueError("the chat template does not repeat the user's message once; build a KVzipPrompt by hand")
    checked = [message for message in messages if message["role"] == "system"] + [
        message for message in later if message["role"] == "user"
    ]  # what an assistant thought aloud may be left out
    if any(message["content"].strip() not in rendered for message in checked):
        raise ValueError("the chat template leaves the system message or a question out; put it into the user's words")
    prefix, suffix = rendered.split(_SENTINEL)
    return prefix, suffix
