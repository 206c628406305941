"""The sets of Figure 8.9 as examples of one context and its questions, by `datasets.load_dataset` from the Hub or a folder.

What is read, asked and counted follows KVzip's reference code (its `data/load.py`, `data/wrapper.py`, `utils/func.py`). Two
more sets come out of packages and need no Hub: Debian package records, and prose about data sets. `--source squad=FOLDER`
reads files of the same columns from a folder; `eval_samples.py` writes small ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from contexts import debian_context
from eval_metrics import (
    contains,
    contains_share,
    exact,
    f1_or_contains,
    first_line_contains,
    number_after_answer,
    option,
    right_function,
    rouge_l,
)

from hf_dataopt.kvzip.config import TASK_LINE

SOURCES = {"squad": "rajpurkar/squad", "gsm": "openai/gsm8k", "scbench": "Jang-Hyun/SCBench-preprocessed", "needle": ""}
REASONING = "Given the context, answer to the following reasoning question.\n\n"
REASON = (
    "Reason and answer the question. You must say the answer in the last sentence beginning with 'The answer is'. Q: {}"
)
NEEDLE = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
NEEDLE_QUESTION = "Based on the content of the book, the best thing to do in San Francisco is: "
NEEDLE_ANSWER = "Eat a sandwich and sit in Dolores Park on a sunny day."
LEAST_GSM = 72  # tokens of a context, shorter ones are passed over


@dataclass
class Example:
    """One context and what is asked about it.

    Args:
        context: compressed before any question is known.
        questions: as many as `answers`.
        answers: right answers, as the metric reads them.
        begins: how each answer begins (given to the model), where the set says so.
        functions: RepoQA's functions of the repository, among which the right one must be found.
    """

    context: str
    questions: list[str]
    answers: list[str]
    begins: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A set of Figure 8.9.

    Args:
        group: row of the figure.
        load: (source, tokenizer, most examples, seed) to examples.
        metric: (prediction, answer) to a number.
        max_new_tokens: length of an answer.
        ask: how a question is put.
        task_line: said before the context.
    """

    group: str
    load: Callable[[str, Any, int, int], list[Example]]
    metric: Callable[[str, str], float] = contains
    max_new_tokens: int = 96
    ask: str = "Q: {}"
    task_line: str = TASK_LINE

    def mark(self, prediction: str, answer: str, example: Example) -> float:
        """The metric; an empty prediction is wrong, an end-of-text mark is not part of it."""
        prediction = prediction.removesuffix("</s>")
        if not prediction.strip():
            return 0.0
        if example.functions:
            return right_function(prediction, answer, example.functions)
        return self.metric(prediction, answer)


def _rows(source: str, *config: str, split: str, **options: Any) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    yield from load_dataset(source, *config, split=split, **options)


def load_squad(source: str, tokenizer: Any, n: int, seed: int) -> list[Example]:
    """The first `n` contexts of SQuAD's train split, each with all its questions."""
    found: dict[str, Example] = {}
    for row in _rows(source, split="train"):
        if row["context"] not in found:
            if len(found) == n:
                break
            found[row["context"]] = Example(row["context"], [], [])
        found[row["context"]].questions.append(row["question"])
        found[row["context"]].answers.append(row["answers"]["text"][0])
    return list(found.values())


def load_gsm(source: str, tokenizer: Any, n: int, seed: int) -> list[Example]:
    """GSM8K's test split: the last sentence of a problem is the question, what stands before it the context."""

    def examples() -> Iterator[Example]:
        for row in _rows(source, "main", split="test"):
            *before, last = row["question"].split(". ")
            context = ". ".join(before).strip() + "."
            if len(tokenizer.encode(context, add_special_tokens=False)) >= LEAST_GSM:
                yield Example(context, [last.strip()], [row["answer"]])

    return list(islice(examples(), n))


def load_needle(
    source: str, tokenizer: Any, n: int, seed: int, lengths: tuple[int, ...] = (500, 2000, 8000)
) -> list[Example]:
    """One sentence in long text, at depths of 0 to 100 % and three lengths.

    The text is that of the `.txt` files of a folder, or else the help topics of Python.
    """
    if source:
        rows = _rows("text", split="train", data_files=str(Path(source) / "*.txt"), sample_by="document")
        text = "\n".join(row["text"] for row in rows)
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    hay = tokenizer.encode(text, add_special_tokens=False)
    needle = tokenizer.encode(NEEDLE, add_special_tokens=False)
    found = []
    for length in lengths:
        straw = hay[: length - len(needle)]
        for depth in range(0, 101, 10):
            place = int(len(straw) * depth / 100)
            while depth < 100 and place and not tokenizer.decode(straw[place - 1]).rstrip().endswith("."):
                place -= 1  # at the end of a sentence
            context = tokenizer.decode(straw[:place] + needle + straw[place:]).strip()
            found.append(Example(context, [NEEDLE_QUESTION], [NEEDLE_ANSWER]))
    return found if n >= len(found) else random.Random(seed).sample(found, n)


def load_scbench(name: str, source: str, tokenizer: Any, n: int, seed: int) -> list[Example]:
    """A set of SCBench as the authors preprocessed it: context and questions in `prompts`, answers in `ground_truth`."""

    def one(row: dict[str, Any]) -> Example:
        context, *questions = row["prompts"]
        answers = [", ".join(a) if isinstance(a, list) else str(a) for a in row["ground_truth"]]
        if "many_shot" in name:
            answers = [_option(question, answer) for question, answer in zip(questions, answers, strict=True)]
        functions = answers if "repoqa" in name else []
        return Example(context, questions, answers, functions=functions)

    return [one(row) for row in islice(_rows(source, split="train", data_files=f"{name}.parquet"), n)]


def _option(question: str, letter: str) -> str:
    """The line of a question that holds the option with this letter."""
    return next((line.strip() for line in question.split("\n") if f"({letter})" in line), letter)


def load_records(source: str, tokenizer: Any, n: int, seed: int) -> list[Example]:
    """Debian package records, 14 to 28 of them a context (1k to 2k tokens), eight questions each."""
    return [_packaged(*debian_context(14 + 5 * index % 15, 8, seed + index)) for index in range(n)]


def load_prose(source: str, tokenizer: Any, n: int, seed: int) -> list[Example]:
    """Prose about data sets, asked how a passage goes on (at most four contexts)."""
    from gate_texts import held_contexts

    return [_packaged(context, questions) for _, context, questions in held_contexts(0, min(n, 4), 8, seed)]


# of contexts from 1k to 7.5k tokens, in turn: records, or else characters of prose
LENGTHS = (24, 5000, 68, 14, 42, 10_000, 90, 18, 55, 18_000, 32, 80)


def load_lengths(source: str, tokenizer: Any, n: int, seed: int) -> list[Example]:
    """Twelve contexts of 1k to 7.5k tokens, nine of records and three of prose, eight questions each.

    A source is a file of rows with `context`, `questions`, `answers` and `begins`, as `save_examples` writes it.
    """
    if source:
        return [Example(**json.loads(line)) for line in Path(source).read_text(encoding="utf-8").splitlines()[:n]]
    from gate_texts import passages, prose

    found = []
    for index, size in enumerate(LENGTHS[:n]):
        if size < 1000:
            found.append(_packaged(*debian_context(size, 8, seed + index)))
        else:
            text = prose()[size // 4 : size // 4 + size]
            found.append(_packaged(text, passages(text, 8, random.Random(seed + index))))
    return found


def save_examples(examples: list[Example], path: Path) -> None:
    """As `load_lengths` reads them where their packages are missing."""
    path.write_text("".join(json.dumps(vars(one)) + "\n" for one in examples), encoding="utf-8")


def _packaged(context: str, questions: list[Any]) -> Example:
    asked, begins, answers = zip(*((one.text, one.start, one.answer) for one in questions), strict=True)
    return Example(context, list(asked), list(answers), begins=list(begins))


def _scbench(name: str, group: str, **options: Any) -> Task:
    return Task(group, partial(load_scbench, f"scbench_{name}"), **options)


RETRIEVAL, UNDERSTANDING, REDUNDANCY = "retrieval-intensive", "contextual understanding", "high context redundancy"
# in the order of Figure 8.9
TASKS = {
    "scbench_kv": _scbench("kv", RETRIEVAL),
    "needle": Task(RETRIEVAL, load_needle, max_new_tokens=32),
    "scbench_prefix_suffix": _scbench("prefix_suffix", RETRIEVAL),
    "scbench_repoqa": _scbench("repoqa", RETRIEVAL, max_new_tokens=512),
    "squad": Task(UNDERSTANDING, load_squad, max_new_tokens=256),
    "gsm": Task(UNDERSTANDING, load_gsm, number_after_answer, max_new_tokens=512, ask=REASON, task_line=REASONING),
    "scbench_qa_eng": _scbench("qa_eng", UNDERSTANDING, metric=f1_or_contains),
    "scbench_choice_eng": _scbench("choice_eng", UNDERSTANDING, metric=first_line_contains),
    "scbench_summary": _scbench("summary", REDUNDANCY, metric=rouge_l, max_new_tokens=256),
    "scbench_vt": _scbench("vt", REDUNDANCY, metric=contains_share),
    "scbench_mf": _scbench("mf", REDUNDANCY, metric=exact, max_new_tokens=32),
    "scbench_many_shot": _scbench("many_shot", REDUNDANCY, metric=option),
    "records": Task(RETRIEVAL, load_records, max_new_tokens=16, ask="{}"),
    "prose": Task(UNDERSTANDING, load_prose, max_new_tokens=24, ask="{}"),
    "lengths": Task(RETRIEVAL, load_lengths, max_new_tokens=24, ask="{}"),
}


def task_of(name: str) -> Task:
    """A task by name; SCBench's short forms (`scbench_kv_tiny`, `_short`, `_mid`) too.

    Raises:
        ValueError: no such task.
    """
    base = name
    for tag in ("_tiny", "_short", "_mid"):
        base = base.removesuffix(tag)
    if base not in TASKS:
        raise ValueError(f"no task {name!r}; known are {', '.join(TASKS)}")
    task = TASKS[base]
    return task if base == name else replace(task, load=partial(load_scbench, name))


def examples_of(name: str, sources: dict[str, str], tokenizer: Any, n: int, seed: int) -> list[Example]:
    """At most `n` examples of a task, from the folder in `sources` (by task, or `scbench`) or else from the Hub."""
    task, kind = task_of(name), "scbench" if name.startswith("scbench") else name
    source = sources.get(name, sources.get(kind, SOURCES.get(kind, "")))
    return task.load(source, tokenizer, n, seed)
