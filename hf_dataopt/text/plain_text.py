"""From text to ids so that special tokens a user has written are text, and those that a chat template writes are special.

`hide` puts place holders where a user's text names a special token; `encode` takes them out again, after a template may have
written special tokens of its own around them. The tokenizer itself is called wherever nothing is hidden, and never changed:
its own `split_special_tokens` stays set on it for other threads, and lets special tokens through that the vocabulary holds as
ordinary pieces (Unigram, WordLevel).
"""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import dataclass, field
from typing import Any

_HIDDEN = "HFDOPTq{}qTPODFH"  # survives a template's trim and tojson
_SET = re.compile(_HIDDEN.format(r"(\d+)"))


@dataclass
class _Special:
    """Special tokens that a tokenizer finds in text: those it was told to add; a lone sign or white space is text."""

    names: dict[str, int]
    others: list[str]  # added, but not special: text with an id of its own
    unknown: str | None
    copy: Any = None  # made when first needed
    order: list[str] = field(init=False)
    pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        self.order = sorted(self.names)
        self.pattern = _any_of(self.order)
        self.ids = {token for name, token in self.names.items() if name != self.unknown}

    def count(self, ids: list[int]) -> int:
        return sum(token in self.ids for token in ids)

    def written(self, text: str) -> int:
        return sum(name != self.unknown for name in self.pattern.findall(text))

    def shown(self, text: str) -> str:
        """The text as the user wrote it."""
        return _SET.sub(lambda found: self._name(found), text)

    def _name(self, found: re.Match[str]) -> str:
        index = int(found[1])
        return self.order[index] if index < len(self.order) else found[0]


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[Any, _Special]] = weakref.WeakKeyDictionary()


def hide(tokenizer: Any, value: Any) -> Any:
    """Put place holders where strings name special tokens.

    Args:
        tokenizer: whose special tokens.
        value: a string, or lists and dicts of them (a message's `role` stays).

    Returns:
        The same with place holders, for `encode`.

    Raises:
        ValueError: a message's role names a special token.
    """
    special = _special(tokenizer)
    numbers = {name: index for index, name in enumerate(special.order)}

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return special.pattern.sub(lambda found: _HIDDEN.format(numbers[found[0]]), value)
        if isinstance(value, dict):
            role = value.get("role")
            if isinstance(role, str) and special.pattern.search(role):
                raise ValueError(f"the role {role!r:.80} names a special token; roles are words such as 'user'")
            return {walk(key): one if key == "role" else walk(one) for key, one in value.items()}
        return [walk(one) for one in value] if isinstance(value, list | tuple) else value

    return walk(value)


def hides(text: str) -> bool:
    """Whether `hide` put a place holder into this text."""
    return _SET.search(text) is not None


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Ids of a text: names of special tokens are special, hidden ones are text.

    Args:
        tokenizer: fast or slow.
        text: from `hide`, or rendered around what `hide` gave.
        add_special_tokens: as the tokenizer's own.

    Returns:
        Where nothing is hidden, the tokenizer's own ids, bit for bit; a special token that only the tokenizer's normaliser
        makes out of the text (`<EOS>` in lower case) counts as hidden.

    Raises:
        ValueError: a hidden name cannot be encoded as text.
    """
    special = _special(tokenizer)
    shown = special.shown(text)
    bare = list(tokenizer(shown, add_special_tokens=False)["input_ids"])
    careful = shown != text or special.count(bare) != special.written(text)
    ids = _careful(tokenizer, special, text, bare) if careful else bare
    if not add_special_tokens:
        return ids
    whole = list(tokenizer(shown, add_special_tokens=True)["input_ids"])
    if ids == bare:
        return whole
    before, after = _frame(tokenizer)
    if whole != [*before, *bare, *after]:
        raise _refusal(special, text, "it treats text at the start of a sequence in a way of its own")
    return [*before, *ids, *after]


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a sequence."""
    bare, whole = (tokenizer("a", add_special_tokens=framed)["input_ids"] for framed in (False, True))
    start = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
    return list(whole[:start]), list(whole[start + len(bare) :])


def _special(tokenizer: Any) -> _Special:
    """The tokenizer's special tokens; looked up again once it has got new ones."""
    state = (len(tokenizer), tuple(getattr(tokenizer, "all_special_tokens", ())))
    found = _KNOWN.get(tokenizer)
    if found is None or found[0] != state:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        names = {
            token.content: index
            for index, token in added.items()
            if (token.special or token.content in state[1]) and len(token.content.strip()) > 1
        }
        others = [token.content for token in added.values() if token.content not in names]
        found = state, _Special(names, others, getattr(tokenizer, "unk_token", None))
        _KNOWN[tokenizer] = found
    return found[1]


def _any_of(names: list[str]) -> re.Pattern[str]:
    """Matches the longest name at each place, as tokenizers do; nothing where there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _careful(tokenizer: Any, special: _Special, text: str, bare: list[int]) -> list[int]:
    """Ids of a text with hidden names, after a proof that this way gives the tokenizer's own ids where nothing is hidden."""
    shown = special.shown(text)
    way = _by_copy if hasattr(getattr(tokenizer, "backend_tokenizer", None), "to_str") else _by_sections
    same_names = special.count(bare) == special.written(shown)  # else the tokenizer finds them in the normalised text
    if same_names and way(tokenizer, special, shown)[0] != bare:
        raise _refusal(special, text, "it does more than its parts tell")
    ids, lost = way(tokenizer, special, text)
    if lost or special.count(ids) != special.written(text):
        raise _refusal(special, text, "its vocabulary has no other pieces for that")
    return ids


def _refusal(special: _Special, text: str, why: str) -> ValueError:
    names = sorted({special.order[int(found)] for found in _SET.findall(text)}) or sorted(special.names)
    return ValueError(
        f"the text holds the special token {', '.join(map(repr, names))!s:.200}, which this tokenizer cannot encode as plain "
        f"text ({why}); take it out of the text, or let it count with special_tokens_in_text=True"
    )


def _by_copy(tokenizer: Any, special: _Special, text: str) -> tuple[list[int], bool]:
    """Encode by a copy in which special tokens have other names, and whether a hidden name became the unknown token."""
    if special.copy is None:
        special.copy = _renamed_copy(tokenizer, special)
    parts, spans, size, start = [], [], 0, 0
    for found in re.finditer(f"{special.pattern.pattern}|{_SET.pattern}", text):
        literal = special.shown(found[0])
        part = text[start : found.start()] + (_stand_in(special, found[0]) if literal == found[0] else literal)
        size, start = size + len(part), found.end()
        if literal != found[0]:
            spans.append((size - len(literal), size))
        parts.append(part)
    encoding = special.copy.encode("".join([*parts, text[start:]]), add_special_tokens=False)
    unknown = special.names.get(special.unknown or "")
    lost = any(
        token == unknown and any(begin < stop and first < end for first, stop in spans)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if spans
    )
    return encoding.ids, lost


def _stand_in(special: _Special, name: str) -> str:
    return f"\U000f0000{special.names[name]}\U000f0001" if name in special.names else name


def _renamed_copy(tokenizer: Any, special: _Special) -> Any:
    from tokenizers import Tokenizer

    try:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:
        raise ValueError(
            f"this tokenizer cannot be copied ({error}), so special tokens written in a text cannot be encoded as plain text; "
            "take them out of the text, or let them count with special_tokens_in_text=True"
        ) from error
    names = {token: _stand_in(special, name) for name, token in special.names.items()}
    for token in state["added_tokens"]:
        if token["id"] in names:
            token |= {"content": names[token["id"]], "normalized": False}
    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, piece): token for piece, token in vocab.items()}
    else:
        model["vocab"] = [[names.get(token, piece), score] for token, (piece, score) in enumerate(vocab)]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & special.names.keys()]
    if model.get("unk_token") is not None:
        model["unk_token"] = _stand_in(special, model["unk_token"])
    state |= {"post_processor": None, "truncation": None, "padding": None}
    copy = Tokenizer.from_str(json.dumps(state))
    if any(copy.token_to_id(name) != token for token, name in names.items()):
        raise _refusal(special, "", "a copy of it has other ids")
    return copy


def _by_sections(tokenizer: Any, special: _Special, text: str) -> tuple[list[int], bool]:
    """Encode as a slow tokenizer does: split at added tokens, then each section for itself."""
    every = _any_of([*special.order, *special.others])
    ids: list[int] = []
    lost, start = False, 0
    unknown = getattr(tokenizer, "unk_token_id", None)

    def section(part: str) -> None:
        nonlocal lost
        if not part:
            return
        literal = special.shown(part)
        found = tokenizer(literal, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        lost = lost or (literal != part and unknown is not None and unknown in found)
        ids.extend(found)

    for match in every.finditer(text):
        section(text[start : match.start()])
        ids.append(int(tokenizer.convert_tokens_to_ids(match[0])))
        start = match.end()
    section(text[start:])
    return ids, lost
