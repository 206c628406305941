"""Many texts of many kinds for gates to be fitted on, and contexts to choose between gates by.

Texts: Python's help topics and standard library, docstrings, documentation and data files of the packages of this environment,
and made-up records whose fields, values and layout are drawn anew for every text. Left out are scikit-learn and all that
describes packages, which `gate_texts.held_contexts` is made of. Contexts to choose by are of a third kind: subdivisions of
countries out of Debian's iso-codes, and documentation of Perl.
"""

from __future__ import annotations

import inspect
import json
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from contexts import Question
from gate_texts import PLACES, THINGS, fit_texts, made_up_word, passages

# for cards
SOURCE = (
    "help topics of Python, source files of its standard library, documentation and files of packages, and made-up records "
    "(benchmarks/gate_corpus.py)"
)
SIZES = (2600, 6200)  # characters of a text, drawn
SHARE_OF_RECORDS = 0.4
FOLDERS = "asyncio email json http importlib logging multiprocessing xml unittest urllib"
DOCUMENTED = (
    "numpy scipy.stats scipy.signal scipy.optimize scipy.linalg torch torch.nn.functional pandas transformers datasets"
)
FILES = ".md .rst .txt .json .csv .html .toml .yaml .yml .xml .js .py .pyi .c .h .css"
LEFT_OUT = (
    "sklearn scikit_learn dist-info/METADATA dist-info/RECORD package.json egg-info package-lock"  # describes packages
)
SUBDIVISIONS = Path("/usr/share/iso-codes/json/iso_3166-2.json")
PERL = Path("/usr/share/perl")
KEYS = (
    "owner colour size weight status room code phone email city country street level serial price amount team score rank "
    "year month born opened closed from until speed depth height width length type kind group label title author editor "
    "contact office desk badge license plate route gate seat floor shelf box lot batch unit model brand material origin "
    "language currency balance limit rate quota region zone port host user key token checksum branch ticket order invoice"
)
VALUES = (
    "name full word code int big decimal price date stamp time version email url phone place thing hash percent path flag "
    "phrase"
)
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"


def all_texts() -> list[str]:
    """Those of `gate_texts.py`, and 900 of `many_texts`; the first of them are as good a sample as any."""
    return [*fit_texts(), *many_texts(900)]


def many_texts(count: int, seed: int = 0) -> list[str]:
    """So many texts of 700 to 2,500 tokens, in an order that is the same for the same releases."""
    rng = random.Random(seed)
    wanted = round(count * SHARE_OF_RECORDS)
    texts = [records(rng) for _ in range(wanted)]
    kinds = [_topics(rng), _sources(rng), _docstrings(rng), _files(rng)]
    while len(texts) < count and kinds:
        for kind in list(kinds):
            text = next(kind, None)
            if text is None:
                kinds.remove(kind)
            elif len(texts) < count:
                texts.append(text)
    rng.shuffle(texts)
    return texts


def _piece(text: str, rng: random.Random) -> str | None:
    """Some of a text, from the start of a line; None where it is too short, or no text."""
    size = rng.randint(*SIZES)
    start = rng.randrange(max(len(text) - size, 1))
    start = text.rfind("\n", 0, start) + 1
    found = text[start : start + size]
    letters = sum(map(str.isalpha, found))
    if len(found) < SIZES[0] or max(map(len, found.split()), default=0) > 400 or letters < len(found) / 3:
        return None
    return found


def _pieces(texts: Iterator[str], rng: random.Random) -> Iterator[str]:
    return (piece for piece in (_piece(text, rng) for text in texts) if piece is not None)


def _topics(rng: random.Random) -> Iterator[str]:
    from pydoc_data.topics import topics

    long = [topics[name] for name in sorted(topics) if len(topics[name]) > SIZES[0]]
    rng.shuffle(long)
    return _pieces(iter(long), rng)


def _sources(rng: random.Random) -> Iterator[str]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
        path
        for folder in (
            "asyncio",
            "email",
            "json",
            "http",
            "importlib",
            "logging",
            "multiprocessing",
            "xml",
            "unittest",
            "urllib",
        )
        for path in (Path(sysconfig.get_path("stdlib")) / folder).rglob("*.py")
    )
    rng.shuffle(paths)
    return _pieces((path.read_text(encoding="utf-8", errors="ignore") for path in paths), rng)


def _docstrings(rng: random.Random) -> Iterator[str]:
    found = {}
    for name in DOCUMENTED.split():
        module = import_module(name)
        for attribute in sorted(dir(module)):
            if attribute.startswith("_"):
                continue
            text = inspect.getdoc(getattr(module, attribute, None)) or ""
            if len(text) > SIZES[0]:
                found.setdefault(text, f"{name}.{attribute}")
    texts = sorted(found, key=found.__getitem__)
    rng.shuffle(texts)
    return _pieces(iter(texts), rng)


def _files(rng: random.Random) -> Iterator[str]:
    """Files of installed packages, at most three of a package and kind in turn."""
    root = Path(sysconfig.get_path("purelib"))
    by_package: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root).as_posix()
        if path.suffix not in FILES.split() or any(one in inside for one in LEFT_OUT.split()) or not path.is_file():
            continue
        by_package.setdefault((inside.split("/")[0], path.suffix), []).append(path)
    chosen = []
    for _, paths in sorted(by_package.items()):
        rng.shuffle(paths)
        chosen += paths[:3]
    rng.shuffle(chosen)
    return _pieces((path.read_text(encoding="utf-8", errors="ignore")[:400_000] for path in chosen), rng)


# -- made-up records


@dataclass
class Form:
    """One layout's fields.

    Args:
        rng: what is drawn.
        names: of the fields, that of what a record is about first.
        sentence: with a gap for each value.
    """

    rng: random.Random
    names: list[str]
    sentence: str

    def pairs(self, row: list[str]) -> list[tuple[str, str]]:
        """Names and values but the first."""
        return list(zip(self.names[1:], row[1:], strict=True))


# what stands before the records (no row), or one record
Layout = Callable[[Form, "list[str] | None"], str]


def records(rng: random.Random) -> str:
    """Records of one layout, drawn with its fields."""
    size, fields = rng.randint(*SIZES), rng.sample(KEYS.split(), rng.randint(2, 7))
    kinds = [rng.choice(VALUES.split()) for _ in fields]
    case = rng.choice((str, str.title, str.upper, lambda key: f"{key}_{fields[0]}", lambda key: made_up_word(rng)))
    named, name = [case(field) for field in fields], case(rng.choice(("name", "id", "key", "item", "title")))
    layout: Layout = rng.choice(LAYOUTS)
    form = Form(rng, [name, *named], _sentence(rng, fields))
    head, made = layout(form, None), ""
    while len(made) < size:
        row = [value(rng, kind) for kind in kinds]
        made += layout(form, [value(rng, rng.choice(("name", "word", "code", "full"))), *row])
    return (head + made)[:size]


def value(rng: random.Random, kind: str) -> str:
    """A value that nobody can guess."""
    word, n, k = made_up_word(rng), rng.randrange(10_000), rng.randrange(100)
    year, month, day = rng.randint(1950, 2030), rng.randint(1, 12), rng.randint(1, 28)
    return {
        "name": word.title(),
        "full": f"{word.title()} {made_up_word(rng).title()}",
        "word": word,
        "code": f"{word[:2].upper()}-{n}",
        "int": str(n),
        "big": f"{n}{k:02}{rng.randrange(1000):03}",
        "decimal": f"{k}.{n:04}",
        "price": f"{rng.choice('$€£')}{n}.{k:02}",
        "date": f"{year}-{month:02}-{day:02}",
        "stamp": f"{day} {MONTHS.split()[month - 1]} {year}",
        "time": f"{k % 24:02}:{n % 60:02}",
        "version": f"{k % 12}.{n % 40}.{k % 7}",
        "email": f"{word}@{made_up_word(rng, 2)}.example",
        "url": f"https://{word}.example/{made_up_word(rng, 2)}",
        "phone": f"+{k} {n:04} {rng.randrange(10_000):04}",
        "place": rng.choice(PLACES.split()),
        "thing": rng.choice(THINGS.split()),
        "hash": f"{rng.getrandbits(40):010x}",
        "percent": f"{k}.{n % 10} %",
        "path": f"/{word}/{made_up_word(rng, 2)}/{n}",
        "flag": rng.choice(("yes", "no", "open", "closed", "true", "false")),
        "phrase": f"{rng.choice(THINGS.split())} of {word} in {rng.choice(PLACES.split())}",
    }[kind]


def _sentence(rng: random.Random, fields: list[str]) -> str:
    parts = []
    for at, field in enumerate(fields, 1):
        said = (f"the {field} of {{0}} is {{{at}}}", f"its {field} is {{{at}}}", f"{{0}} has {field} {{{at}}}")
        parts.append(rng.choice((*said, f"{field} {{{at}}} belongs to {{0}}")))
    text = rng.choice((", ", "; ", ", and ")).join(parts)
    return text[0].upper() + text[1:] + "."


def _lines(mark: str, end: str = "\n") -> Layout:
    def layout(form: Form, row: list[str] | None) -> str:
        named = zip(form.names, row or (), strict=False)
        return "" if row is None else "".join(f"{key}{mark}{one}\n" for key, one in named) + end

    return layout


def _delimited(mark: str, edge: str = "") -> Layout:
    return lambda form, row: edge + mark.join(row or form.names) + edge[::-1] + "\n"


def _json(indent: int | None, end: str) -> Layout:
    def layout(form: Form, row: list[str] | None) -> str:
        return "" if row is None else json.dumps(dict(zip(form.names, row, strict=True)), indent=indent) + end

    return layout


def _xml(form: Form, row: list[str] | None) -> str:
    if row is None:
        return "<records>\n"
    inner = "".join(f"<{key.lower()}>{one}</{key.lower()}>" for key, one in form.pairs(row))
    return f'<record {form.names[0].lower()}="{row[0]}">{inner}</record>\n'


def _section(head: str) -> Layout:
    def layout(form: Form, row: list[str] | None) -> str:
        if row is None:
            return ""
        return head.format(row[0]) + "\n" + "".join(f"{key} = {one}\n" for key, one in form.pairs(row)) + "\n"

    return layout


def _yaml(form: Form, row: list[str] | None) -> str:
    if row is None:
        return "entries:\n"
    return f"  - {form.names[0]}: {row[0]}\n" + "".join(f"    {key}: {one}\n" for key, one in form.pairs(row))


def _call(form: Form, row: list[str] | None) -> str:
    if row is None:
        return ""
    return f"add({row[0]!r}, {', '.join(f'{key}={one!r}' for key, one in form.pairs(row))})\n"


def _sql(form: Form, row: list[str] | None) -> str:
    if row is None:
        return ""
    into = f"{form.names[0]} ({', '.join(form.names[1:])})"
    return f"INSERT INTO {into} VALUES ({', '.join(map(repr, row[1:]))}); -- {row[0]}\n"


def _said(form: Form, row: list[str] | None) -> str:
    return "" if row is None else form.sentence.format(*row) + form.rng.choice((" ", "\n"))


def _asked(form: Form, row: list[str] | None) -> str:
    if row is None:
        return ""
    at = form.rng.randrange(len(row) - 1) + 1
    return f"Q: What is the {form.names[at]} of {row[0]}?\nA: {row[at]}\n\n"


def _log(form: Form, row: list[str] | None) -> str:
    if row is None:
        return ""
    said, rng = " ".join(f"{key}={one}" for key, one in form.pairs(row)), form.rng
    when = f"{value(rng, 'date')} {value(rng, 'time')}:{rng.randrange(60):02}"
    return f"{when} {row[0]}[{rng.randrange(9999)}]: {said}\n"


LAYOUTS: tuple[Layout, ...] = (
    _lines(": "),
    _lines(" = "),
    _lines("\t"),
    _lines(": ", "---\n"),
    _lines(" - ", "\n\n"),
    _delimited(","),
    _delimited("\t"),
    _delimited(" | ", "| "),
    _delimited(";"),
    _delimited("</td><td>", "<tr>"),
    _json(None, "\n"),
    _json(2, ",\n"),
    _xml,
    _section("[{}]"),
    _section("## {}\n"),
    _yaml,
    _call,
    _sql,
    _said,
    _said,
    _asked,
    _log,
)


# -- contexts to choose by


def validation_contexts(
    n_records: int, n_prose: int, n_questions: int, seed: int
) -> list[tuple[str, str, list[Question]]]:
    """Domain, context and questions of each, as `gate_texts.held_contexts` has them of other domains.

    Raises:
        RuntimeError: no Debian-like machine with the packages iso-codes and perl.
    """
    if not SUBDIVISIONS.exists() or not PERL.exists():
        raise RuntimeError("contexts to choose by are of Debian's packages iso-codes and perl-modules; install both")
    rows = [row for row in json.loads(SUBDIVISIONS.read_text(encoding="utf-8"))["3166-2"] if row["name"].isascii()]
    found: list[tuple[str, str, list[Question]]] = []
    for index in range(n_records):
        rng = random.Random(seed + index)
        chosen = rng.sample(rows, 20 + 5 * index)
        text = "\n\n".join(f"Name: {row['name']}\nCode: {row['code']}\nType: {row['type']}" for row in chosen)
        questions = [
            Question(f"What is the Code of {row['name']}?", f"The Code of {row['name']} is", " " + row["code"])
            for row in rng.sample(chosen, n_questions)
        ]
        found.append(("subdivisions", text, questions))
    pods = sorted({path.resolve() for path in PERL.rglob("*.pod") if path.stat().st_size > 20_000})
    for index, path in enumerate(random.Random(seed).sample(pods, n_prose)):
        text = path.read_text(encoding="utf-8", errors="ignore")[3000:8500]
        found.append(("perl", text, passages(text, n_questions, random.Random(seed + index))))
    return found


if __name__ == "__main__":  # what is read
    for shown in many_texts(int(sys.argv[1]) if len(sys.argv) > 1 else 8):
        print("=" * 80, shown[:600], sep="\n")
