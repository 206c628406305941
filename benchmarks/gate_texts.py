"""What the packaged model's gates are fitted on, and contexts of other domains with questions about them.

Fitted on: the help topics of Python itself (prose), source files of its standard library, and made-up records. Held out:
records of Debian packages (`contexts.py`) and scikit-learn's descriptions of data sets, asked how a passage goes on.
"""

from __future__ import annotations

import inspect
import json
import random
import re
from importlib.util import find_spec
from pathlib import Path

from contexts import Question, debian_context

# help topics and modules of Python, and how many characters of each are read
TOPICS = "typesmapping specialnames numbers exceptions with imaginary calls import formatstrings"
MODULES = "textwrap fractions shlex heapq csv calendar"
PROSE, SOURCE, RECORDS = 5200, 4600, 3600
_SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo za bren clor drin fast glim holt kest marn"
_PLACES = "Oslo Lima Accra Kyoto Quito Dakar Perth Turin Minsk Osaka Delhi Cairo Tunis Malmo Leeds Genoa"
_THINGS = "lamp chair kettle ladder mirror basket candle hammer violin carpet bucket helmet anchor saddle"


def fit_texts(seed: int = 0) -> list[str]:
    """Some 20 texts of 1,000 to 1,700 tokens, of three domains, in an order that is the same for the same Python."""
    from pydoc_data.topics import topics

    known = [name for name in TOPICS.split() if len(topics.get(name, "")) > PROSE // 2]
    rng = random.Random(seed)
    texts = [topics[name][:PROSE] for name in known]
    texts += [inspect.getsource(__import__(name))[:SOURCE] for name in MODULES.split()]
    texts += [_records(form, rng) for form in range(8)]
    rng.shuffle(texts)
    return texts


def _word(rng: random.Random, syllables: int = 3) -> str:
    return "".join(rng.choice(_SYLLABLES.split()) for _ in range(rng.randint(2, syllables)))


def _records(form: int, rng: random.Random) -> str:
    """Records of one of eight layouts, cut to `RECORDS` characters: words and numbers that nobody can guess."""
    made: list[str] = []
    while sum(map(len, made)) < RECORDS:
        name, word, place, thing = (
            _word(rng).title(),
            _word(rng),
            rng.choice(_PLACES.split()),
            rng.choice(_THINGS.split()),
        )
        number, other = rng.randrange(10_000), rng.randrange(100)
        made.append(
            [
                f"{name} lives in {place} and owns {other} {thing}s. The code of the {thing} is {word}-{number}.\n",
                f"name: {name}\ncity: {place}\nbadge: {number}\npassword: {word}{other}\n\n",
                f"{name},{place},{number},{word},{other}.{number % 10}\n",
                json.dumps({"id": number, "owner": name, "item": thing, "key": word, "count": other}) + "\n",
                f"2024-{number % 12 + 1:02}-{other % 28 + 1:02} {other % 24:02}:{number % 60:02} {word}d[{number}]: "
                f"request from 10.{other}.{number % 250}.{other} for {thing} {name.lower()} took {number} ms\n",
                f"| {name} | {thing} | {number} | {place} | v{other % 9}.{number % 50}.{other} |\n",
                f"A: Where did {name} put the {thing}?\nB: In {place}, box {number}, under the {word}.\n",
                f"[{word}]\nversion = {other % 20}.{number % 100}\npath = /srv/{name.lower()}/{thing}\nsize = {number}\n\n",
            ][form]
        )
    return "".join(made)[:RECORDS]


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
    for index, text in enumerate(_prose()[-n_prose:] if n_prose else []):
        found.append(("prose", text, _passages(text, n_questions, random.Random(seed + index))))
    return found


def _prose() -> list[str]:
    """scikit-learn's descriptions of data sets, joined to pieces of some 5,000 characters."""
    spec = find_spec("sklearn.datasets")
    if spec is None or spec.origin is None:
        raise RuntimeError("the prose is part of scikit-learn; pip install scikit-learn")
    pieces, current = [], ""
    for path in sorted((Path(spec.origin).parent / "descr").glob("*.rst")):
        current += path.read_text(encoding="utf-8") + "\n"
        if len(current) > 4500:
            pieces.append(current[:6000])
            current = ""
    return pieces


def _passages(text: str, n: int, rng: random.Random) -> list[Question]:
    """How does a passage go on: eight words quoted, the next six asked for."""
    words = list(re.finditer(r"\S+", text))
    questions = []
    for start in sorted(rng.sample(range(len(words) - 16), n)):
        quoted = " ".join(word.group() for word in words[start : start + 8])
        answer = " ".join(word.group() for word in words[start + 8 : start + 14])
        questions.append(Question(f'How does the passage "{quoted}" go on?', f'"{quoted}', " " + answer))
    return questions
