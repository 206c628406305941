"""What the packaged model's gates are fitted on, and contexts of other domains with questions about them.

Fitted on: help topics and source files of Python, documentation that comes with scipy, numpy and this package's own
requirements, and made-up records. Held out: records of Debian packages (`contexts.py`) and scikit-learn's descriptions of
data sets, asked how a passage goes on.
"""

from __future__ import annotations

import inspect
import json
import random
import re
from importlib import import_module
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

from contexts import Question, debian_context

# help topics and modules of Python, documented functions and read-me files, and how many characters of each are read
TOPICS = (
    "typesmapping specialnames numbers exceptions with imaginary calls import formatstrings debugger execmodel compound "
    "string-methods"
)
MODULES = "textwrap fractions shlex heapq csv calendar colorsys gettext ftplib"
FUNCTIONS = (
    "scipy.optimize.linprog scipy.signal.find_peaks scipy.stats.bootstrap scipy.stats.ttest_ind numpy.einsum "
    "numpy.loadtxt"
)
READMES = "transformers datasets accelerate peft huggingface-hub torch"
PROSE, SOURCE, RECORDS = 5200, 4600, 3600
_FORMS = 18  # layouts of made-up records
_SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo za bren clor drin fast glim holt kest marn"
PLACES = "Oslo Lima Accra Kyoto Quito Dakar Perth Turin Minsk Osaka Delhi Cairo Tunis Malmo Leeds Genoa"
THINGS = "lamp chair kettle ladder mirror basket candle hammer violin carpet bucket helmet anchor saddle"


def fit_texts(seed: int = 0) -> list[str]:
    """Some 50 texts of 800 to 1,700 tokens, of five kinds, in an order that is the same for the same releases."""
    from pydoc_data.topics import topics

    rng = random.Random(seed)
    texts = [topics[name][:PROSE] for name in TOPICS.split() if len(topics.get(name, "")) > PROSE // 2]
    texts += [inspect.getsource(import_module(name))[:SOURCE] for name in MODULES.split()]
    for name in FUNCTIONS.split():
        module, function = name.rsplit(".", 1)
        texts.append((inspect.getdoc(getattr(import_module(module), function)) or "")[:SOURCE])
    texts += [str(metadata(name).get_payload())[2000 : 2000 + SOURCE] for name in READMES.split()]
    texts += [_records(form, rng) for form in range(_FORMS)]
    texts = [text for text in texts if len(text) > RECORDS // 2]
    rng.shuffle(texts)
    return texts


def made_up_word(rng: random.Random, syllables: int = 3) -> str:
    return "".join(rng.choice(_SYLLABLES.split()) for _ in range(rng.randint(2, syllables)))


def _records(form: int, rng: random.Random) -> str:
    """Records of one layout, cut to `RECORDS` characters: words and numbers that nobody can guess."""
    made: list[str] = []
    while sum(map(len, made)) < RECORDS:
        words = {
            "name": made_up_word(rng).title(),
            "other": made_up_word(rng).title(),
            "word": made_up_word(rng),
            "key": made_up_word(rng, 2),
            "place": rng.choice(PLACES.split()),
            "thing": rng.choice(THINGS.split()),
        }
        made.append(_record(form, words, rng.randrange(10_000), rng.randrange(100)))
    return "".join(made)[:RECORDS]


def _record(form: int, words: dict[str, str], n: int, k: int) -> str:
    """One record of a layout, with a number up to 9,999 and one up to 99."""
    name, other, word, key, place, thing = words.values()
    return [
        f"{name} lives in {place} and owns {k} {thing}s. The code of the {thing} is {word}-{n}.\n",
        f"name: {name}\ncity: {place}\nbadge: {n}\npassword: {word}{k}\n\n",
        f"{name},{place},{n},{word},{k}.{n % 10}\n",
        json.dumps({"id": n, "owner": name, "item": thing, "key": word, "count": k}) + "\n",
        f"2024-{n % 12 + 1:02}-{k % 28 + 1:02} {k % 24:02}:{n % 60:02} {word}d[{n}]: request from 10.{k}.{n % 250}.{k} for "
        f"{thing} {name.lower()} took {n} ms\n",
        f"| {name} | {thing} | {n} | {place} | v{k % 9}.{n % 50}.{k} |\n",
        f"A: Where did {name} put the {thing}?\nB: In {place}, box {n}, under the {word}.\n",
        f"[{word}]\nversion = {k % 20}.{n % 100}\npath = /srv/{name.lower()}/{thing}\nsize = {n}\n\n",
        f"From: {name} {other} <{key}@{word}.example>\nSubject: {thing} no. {n}\nDate: {k % 28 + 1} May 20{k % 30:02}\n\n"
        f"The {thing} for {place} weighs {k} kg and costs {n} crowns.\n\n",
        f'<tr><td>{word}</td><td>{n}</td><td>{name} {other}</td><td><a href="https://{key}.example/{word}">{place}</a></td></tr>\n',
        f"  - id: {word}-{k}\n    title: {thing.title()} of {place}\n    author: {name} {other}\n"
        f"    released: {n % 10}.{k}.{n % 7}\n    url: https://www.{key}.example/{word}/\n    bytes: {n}{k}\n",
        f'{k + 1}. {name} {other} ({place}): {n} points, {k % 7} faults, best with the {thing} "{word}".\n',
        f'class {name}{other}:\n    {key}_limit = {n}\n    {word} = "{place.lower()}-{k}"\n\n    def {thing}(self):\n'
        f"        return self.{key}_limit + {k}\n\n",
        f"On the {k % 28 + 1}th {name} {other} of {place} sold a {thing} called {word.title()} for {n} crowns to "
        f"{key.title()}, who had waited {k} days for it.\n",
        f"Ticket: {n}\nOpened by: {name} {other} <{word}@{key}.example>\nPart: {thing}\n"
        f"Release: {k % 12}:{n % 30}.{k}-{n % 9}\nRoom: {place} {k}\nNotes: https://{word}.example/{key}\n\n",
        f"{word.upper()}_{key.upper()}={n}.{k}   # {thing} of {name}, {place}\n",
        f"{name.lower()}.{key}({word}, {thing}={n}, {place.lower()}={k / 100})\n",
        f"Q{k}: Which number does the {thing} of {other} in {place} have?\nAnswer: {n}, and its colour is {word}.\n\n",
    ][form]


def held_contexts(n_debian: int, n_prose: int, n_questions: int, seed: int) -> list[tuple[str, str, list[Question]]]:
    """Contexts of domains that gates are not fitted on.

    Args:
        n_debian: contexts of package records, 8 to 16 records each.
        n_prose: contexts of prose about data sets, at most 4.
        n_questions: of each context.
        seed: chooses records and passages.

    Returns:
        Domain, context and questions of each.
    """
    found = []
    for index in range(n_debian):
        context, questions = debian_context(8 + index * 8 // max(n_debian - 1, 1), n_questions, seed + index)
        found.append(("records", context, questions))
    for index, text in enumerate(_pieces()[-n_prose:] if n_prose else []):
        found.append(("prose", text, passages(text, n_questions, random.Random(seed + index))))
    return found


def prose() -> str:
    """scikit-learn's descriptions of data sets, some 12,000 tokens."""
    return "".join(text + "\n" for text in _descriptions())


def _descriptions() -> list[str]:
    spec = find_spec("sklearn.datasets")
    if spec is None or spec.origin is None:
        raise RuntimeError("the prose is part of scikit-learn; pip install scikit-learn")
    return [path.read_text(encoding="utf-8") for path in sorted((Path(spec.origin).parent / "descr").glob("*.rst"))]


def _pieces() -> list[str]:
    """The same in pieces of some 5,000 characters."""
    pieces, current = [], ""
    for text in _descriptions():
        current += text + "\n"
        if len(current) > 4500:
            pieces.append(current[:6000])
            current = ""
    return pieces


def passages(text: str, n: int, rng: random.Random) -> list[Question]:
    """How does a passage go on: eight words quoted, the next six asked for."""
    words = list(re.finditer(r"\S+", text))
    questions = []
    for start in sorted(rng.sample(range(len(words) - 16), n)):
        quoted = " ".join(word.group() for word in words[start : start + 8])
        answer = " ".join(word.group() for word in words[start + 8 : start + 14])
        questions.append(Question(f'How does the passage "{quoted}" go on?', f'"{quoted}', " " + answer))
    return questions
