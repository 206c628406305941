"""Contexts with many exact questions: records of Debian packages (names, versions, sizes), of any length.

Version and Installed-Size cannot be guessed from a package's name, so a right answer has come out of the context.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from dataclasses import dataclass

from _report import DATA

FIELDS = ("Package", "Version", "Installed-Size", "Section", "Maintainer", "Homepage")
ASKED = ("Version", "Installed-Size")


@dataclass(frozen=True)
class Question:
    """A question, how its answer begins, and the answer itself."""

    text: str
    start: str
    answer: str


def debian_records() -> list[dict[str, str]]:
    """All package records of the stable release, fetched once into a private list folder (19 MB).

    Raises:
        RuntimeError: not a Debian-like machine, or the package lists cannot be reached.
    """
    packages = DATA / "apt" / "Packages"
    if not packages.exists():
        if shutil.which("apt-get") is None:
            raise RuntimeError("Debian package lists need apt-get; run this benchmark on a Debian or Ubuntu machine")
        lists = DATA / "apt" / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        update = ["apt-get", "update", "-q", "-o", f"Dir::State::lists={lists}", "-o", "Acquire::Languages=none"]
        subprocess.run(update, check=True, capture_output=True)
        found = sorted(lists.glob("*main_binary-*_Packages*"), key=lambda path: path.stat().st_size)
        if not found:
            raise RuntimeError("apt-get update fetched no package lists; is a Debian mirror configured?")
        text = subprocess.run(
            ["/usr/lib/apt/apt-helper", "cat-file", found[-1]], check=True, capture_output=True
        ).stdout
        packages.write_bytes(text)
    records = []
    for stanza in packages.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        pairs = (line.split(": ", 1) for line in stanza.splitlines() if ": " in line and not line.startswith(" "))
        record = dict(pairs)
        if all(field in record for field in FIELDS):
            records.append({field: record[field] for field in FIELDS})
    return records


def debian_context(n_records: int, n_questions: int, seed: int) -> tuple[str, list[Question]]:
    """A context of `n_records` random records and questions about different ones of them.

    Args:
        n_records: records in the context, some 70 tokens each.
        n_questions: at most `n_records`.
        seed: chooses records and questions.

    Returns:
        The context and its questions.
    """
    rng = random.Random(seed)
    chosen = rng.sample(debian_records(), n_records)
    context = "\n\n".join("\n".join(f"{field}: {record[field]}" for field in FIELDS) for record in chosen)
    questions = []
    for index, record in enumerate(rng.sample(chosen, n_questions)):
        field = ASKED[index % len(ASKED)]
        name = record["Package"]
        questions.append(
            Question(f"What is the {field} of the package {name}?", f"The {field} of {name} is", " " + record[field])
        )
    return context, questions
