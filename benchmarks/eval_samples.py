"""Small files with the columns of SQuAD, GSM8K and SCBench, made up from a seed: what `kvzip_eval.py` reads where no Hub is.

They show that loaders, metrics and table work on such files; a small model's marks on them say little of the sets themselves.

    python benchmarks/eval_samples.py FOLDER
"""

from __future__ import annotations

import argparse
import inspect
import random
import string
import textwrap
from pathlib import Path
from typing import Any

from gate_texts import PLACES, THINGS, made_up_word

N = 4  # contexts of each set
README = """---
configs:
- config_name: {config}
  data_files:
  - split: {split}
    path: rows.parquet
---
"""


def squad(rng: random.Random) -> list[dict[str, Any]]:
    """Paragraphs about people, each asked several times, one row a question."""
    rows = []
    for _ in range(N):
        people = [
            (made_up_word(rng).title(), rng.choice(PLACES.split()), rng.choice(THINGS.split())) for _ in range(12)
        ]
        facts = [
            f"{name} was born in {place} and became known for a {thing} of glass." for name, place, thing in people
        ]
        context = " ".join(facts)
        for name, place, thing in rng.sample(people, 4):
            for question, answer in (
                (f"Where was {name} born?", place),
                (f"What made {name} known?", f"{thing} of glass"),
            ):
                start = context.index(answer, context.index(f"{name} was"))
                rows.append(
                    {"context": context, "question": question, "answers": {"text": [answer], "answer_start": [start]}}
                )
    return rows


def gsm(rng: random.Random) -> list[dict[str, Any]]:
    """Sums of things bought, sold and given away."""
    rows = []
    for _ in range(N):
        name, thing = made_up_word(rng).title(), rng.choice(THINGS.split())
        have, steps = rng.randint(40, 90), []
        total = have
        for _ in range(7):
            other, k = made_up_word(rng).title(), rng.randint(2, 9)
            gain = rng.random() < 0.5
            total += k if gain else -k
            steps.append(f"Then {name} {'buys' if gain else 'gives'} {k} {thing}s {'from' if gain else 'to'} {other}")
        text = ". ".join(
            [f"{name} has {have} {thing}s in the house", *steps, f"How many {thing}s does {name} have now?"]
        )
        rows.append({"question": text, "answer": f"{name} adds and takes away.\n#### {total}"})
    return rows


def _key(rng: random.Random, n: int = 10) -> str:
    return "".join(rng.choice(string.ascii_lowercase + string.digits) for _ in range(n))


def _kv(rng: random.Random) -> dict[str, Any]:
    pairs = {_key(rng): _key(rng) for _ in range(24)}
    asked = rng.sample(sorted(pairs), 3)
    listed = ", ".join(f'"{key}": "{value}"' for key, value in pairs.items())
    return {
        "prompts": [f"JSON data: {{{listed}}}", *(f'Key: "{key}". The value of this key is' for key in asked)],
        "ground_truth": [pairs[key] for key in asked],
    }


def _prefix_suffix(rng: random.Random) -> dict[str, Any]:
    words = [_key(rng, 24) for _ in range(16)]
    asked = rng.sample(words, 3)
    questions = [f'Which string starts with "{word[:6]}" and ends with "{word[-6:]}"?' for word in asked]
    return {"prompts": ["Strings:\n" + "\n".join(words), *questions], "ground_truth": asked}


def _repoqa(rng: random.Random) -> dict[str, Any]:
    functions = [getattr(textwrap, name) for name in ("fill", "wrap", "indent", "shorten")]
    sources = [inspect.getsource(function).strip() for function in functions]
    asked = rng.sample(range(len(functions)), 2)
    return {
        "prompts": ["\n\n".join(sources), *(f"Repeat the function {functions[i].__name__}." for i in asked)],
        "ground_truth": [sources[i] for i in asked],
        "lang": "python",
        "repo": "textwrap",
        "func_name": [functions[i].__name__ for i in asked],
    }


def _book(rng: random.Random, ask: Any) -> dict[str, Any]:
    people = [(made_up_word(rng).title(), rng.choice(PLACES.split()), rng.choice(THINGS.split())) for _ in range(14)]
    context = "\n".join(f"In {place}, {name} kept a {thing} under the stairs." for name, place, thing in people)
    prompts, answers = zip(*(ask(*one) for one in rng.sample(people, 3)), strict=True)
    return {"prompts": [context, *prompts], "ground_truth": list(answers)}


def _qa_eng(rng: random.Random) -> dict[str, Any]:
    return _book(rng, lambda name, place, thing: (f"What did {name} keep?", [f"a {thing}"]))


def _choice_eng(rng: random.Random) -> dict[str, Any]:
    return _book(rng, lambda name, place, thing: (f"Where did {name} live? Choose: {PLACES}", place))


def _summary(rng: random.Random) -> dict[str, Any]:
    row = _book(
        rng, lambda name, place, thing: ("Summarise the text in one sentence.", "People kept things under the stairs.")
    )
    return {"prompts": row["prompts"][:2], "ground_truth": row["ground_truth"][:1]}


def _vt(rng: random.Random) -> dict[str, Any]:
    lines, chains = [], {}
    for _ in range(3):
        names, number = (
            ["".join(rng.choices(string.ascii_uppercase, k=4)) for _ in range(4)],
            rng.randrange(10_000, 99_999),
        )
        chains[number] = names
        lines += [f"VAR {name} = {number if k == 0 else f'VAR {names[k - 1]}'}" for k, name in enumerate(names)]
    text = "\n".join(f"{line}\nThe grass is green. The sky is blue." for line in lines)
    questions = [f"Find all variables that are assigned the value {number}." for number in chains]
    return {"prompts": [text, *questions], "ground_truth": list(chains.values())}


def _mf(rng: random.Random) -> dict[str, Any]:
    numbers = [rng.randrange(1, 100) for _ in range(120)]
    asked = {"largest": max(numbers), "smallest": min(numbers), "second largest": sorted(set(numbers))[-2]}
    return {
        "prompts": [str(numbers), *(f"What is the {name} number of the list? Say the number only." for name in asked)],
        "ground_truth": [str(number) for number in asked.values()],
    }


def _many_shot(rng: random.Random) -> dict[str, Any]:
    kinds = {thing: rng.choice(["round", "square", "long"]) for thing in THINGS.split()}
    options = ["(A) round", "(B) square", "(C) long"]
    letter = {"round": "A", "square": "B", "long": "C"}
    shots = [f"Which kind is the {thing}?\nAnswer: ({letter[kind]}) {kind}" for thing, kind in kinds.items()]
    asked = rng.sample(sorted(kinds), 3)
    questions = ["\n".join([f"Which kind is the {thing}?", *options, "Answer:"]) for thing in asked]
    return {"prompts": ["\n\n".join(shots), *questions], "ground_truth": [letter[kinds[thing]] for thing in asked]}


SCBENCH = {
    "kv": _kv,
    "prefix_suffix": _prefix_suffix,
    "repoqa": _repoqa,
    "qa_eng": _qa_eng,
    "choice_eng": _choice_eng,
    "summary": _summary,
    "vt": _vt,
    "mf": _mf,
    "many_shot": _many_shot,
}


def write_samples(folder: Path, seed: int = 0) -> dict[str, str]:
    """Write all files.

    Args:
        folder: made if missing.
        seed: of what is made up.

    Returns:
        Folders by kind of task, as `--source` takes them.
    """
    from datasets import Dataset

    rng = random.Random(seed)
    for name, config, split, make in (("squad", "default", "train", squad), ("gsm", "main", "test", gsm)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Dataset.from_list(make(rng)).to_parquet(folder / name / "rows.parquet")
        (folder / name / "README.md").write_text(README.format(config=config, split=split))
    (folder / "scbench").mkdir(exist_ok=True)
    for name, one in SCBENCH.items():
        Dataset.from_list([one(rng) for _ in range(N)]).to_parquet(folder / "scbench" / f"scbench_{name}.parquet")
    return {name: str(folder / name) for name in ("squad", "gsm", "scbench")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(" ".join(f"--source {name}={path}" for name, path in write_samples(args.folder).items()))


if __name__ == "__main__":
    main()
