"""The two tasks of the compressed-memory benchmarks, as ids: [c(1) ... c(t)], input I and output O.

`chitchat`: the next turn of a dialogue, each earlier turn is a context. Split by participant: two people take part in
hundreds of conversations, so a random split would leak their style; conversations across splits are dropped.
`sections`: the archive section of a package from its one-line description, few-shot; each demonstration is a context.
An episode draws four sections, two demonstrations of each, and asks for one of the four. Every episode names its sections
by words drawn anew from sixteen, so nothing but the demonstrations tells which words are in play and what they stand for.
Test episodes draw from sections that training never sees.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import data

TASKS = ("chitchat", "sections")
SPLITS = ("train", "validation", "test")
STEPS = 8  # contexts of an evaluated sample
TURN = 24  # tokens of a turn or of a demonstration at most
CLASSES = 4
SECTIONS = {
    "train": ["libs", "perl", "haskell", "net", "rust", "science", "ruby", "admin", "x11", "text", "graphics", "ocaml"],
    "validation": ["php", "editors", "kde", "javascript", "lisp", "math", "mail"],
    "test": ["games", "python", "fonts", "sound", "doc", "web", "java", "golang"],
}
WORDS = ["red", "blue", "green", "yellow", "black", "white", "gold", "silver"]
WORDS += ["apple", "bread", "milk", "stone", "river", "moon", "bird", "horse"]  # a token each


@dataclass(frozen=True)
class Sample:
    """One item, in ids.

    Args:
        contexts: c(1) .. c(t).
        input: I(t).
        output: O(t), the only tokens with a loss.
        options: first tokens of all possible outputs, where the task is a choice; the right one is `output[0]`.
        group: items of one conversation share it; episodes have one each.
    """

    contexts: list[list[int]]
    input: list[int]
    output: list[int]
    options: tuple[int, ...] = ()
    group: int = 0

    def alone(self) -> Sample:
        """The same item without contexts."""
        return replace(self, contexts=[])

    def feature(self) -> dict[str, Any]:
        """What `DataCollatorForCCM` takes."""
        return {"contexts": self.contexts, "input": self.input, "output": self.output}


def samples(task: str, split: str, tokenizer: Any, n: int, seed: int = 0) -> list[Sample]:
    """At most `n` samples of a split, the same ones for the same seed.

    Args:
        task: one of `TASKS`.
        split: one of `SPLITS`.
        tokenizer: of the model.
        n: samples.
        seed: chooses windows and episodes; who is in which split does not depend on it.

    Returns:
        Samples with `STEPS` contexts.
    """
    if task not in TASKS or split not in SPLITS:
        raise ValueError(f"task must be one of {TASKS} and split one of {SPLITS}, got {task!r}, {split!r}")
    rng = random.Random(f"{task} {split} {seed}")
    return (_dialogues if task == "chitchat" else _episodes)(split, tokenizer, n, rng)


@functools.cache
def conversations(split: str) -> list[list[tuple[str, str]]]:
    """Conversations, as turns (sender, text), between people of this split."""
    talks = data.chitchat(STEPS + 2)
    people = sorted({sender for talk in talks for sender, _ in talk})
    random.Random(0).shuffle(people)
    share = {
        who: "test" if i < 0.3 * len(people) else "validation" if i < 0.45 * len(people) else "train"
        for i, who in enumerate(people)
    }
    return [talk for talk in talks if {share[sender] for sender, _ in talk} == {split}]


def _dialogues(split: str, tokenizer: Any, n: int, rng: random.Random) -> list[Sample]:
    """Windows of conversations that do not overlap; for training, other windows of the same ones once these are used up."""
    talks, width = conversations(split), STEPS + 2
    found: list[Sample] = []
    while len(found) < n:
        windows = []
        for group, talk in enumerate(talks):
            first = rng.randrange(min(width, len(talk) - width + 1))
            windows += [(group, talk[start : start + width]) for start in range(first, len(talk) - width + 1, width)]
        rng.shuffle(windows)
        samples = (_dialogue(group, window, tokenizer) for group, window in windows)
        found += itertools.islice((one for one in samples if one), n - len(found))
        if split != "train":
            break
    return found


def _dialogue(group: int, window: list[tuple[str, str]], tokenizer: Any) -> Sample | None:
    letter = dict(zip(dict(window), "AB", strict=False))
    turns = [_ids(tokenizer, f"{letter[sender]}: {text}")[:TURN] + _ids(tokenizer, "\n") for sender, text in window]
    tag = len(_ids(tokenizer, "A:"))
    if len(turns[-1]) - tag < 5:  # "yes" and "haha" tell nothing
        return None
    return Sample(turns[:STEPS], turns[-2] + turns[-1][:tag], turns[-1][tag:], group=group)


def _episodes(split: str, tokenizer: Any, n: int, rng: random.Random) -> list[Sample]:
    by_section = _summaries()
    words = [_ids(tokenizer, f" {word}") for word in WORDS]
    line = _ids(tokenizer, "\n")
    found = []
    for _ in range(n):
        chosen = dict(zip(rng.sample(SECTIONS[split], CLASSES), rng.sample(words, CLASSES), strict=True))
        order = [name for name in chosen for _ in range(STEPS // CLASSES)]
        rng.shuffle(order)
        rows = []
        for name in [*order, rng.choice(list(chosen))]:
            asked = _ids(tokenizer, rng.choice(by_section[name]))[: TURN - 5] + _ids(tokenizer, "\nLabel:")
            rows.append((asked, chosen[name]))
        said = [q + a + line for q, a in rows[:-1]]
        found.append(Sample(said, *rows[-1], options=tuple(word[0] for word in words), group=len(found)))
    return found


@functools.cache
def _summaries() -> dict[str, list[str]]:
    found = defaultdict(list)
    for section, text in data.package_summaries():
        found[section].append(text)
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(_tokens(tokenizer, text))


@functools.cache
def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
