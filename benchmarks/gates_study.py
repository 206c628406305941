"""Which target, loss, width and texts make the best gates: fits them side by side on texts that are read once.

Gates are compared by answers on contexts of two domains that are neither fitted on nor held out (`gate_corpus.py`), at budgets
of 0.5 to 0.1 beside exact KVzip (chunks of 2,000, the whole cache in sight); then they answer about the held-out contexts of
`kvzip_gates.py`. Every fit and every answered set of contexts is a line of `OUT/study.jsonl` as it ends; `OUT/gates_TARGET`
holds the gates that were best on the contexts to choose by. Fits go on until `--seconds` are over.

    python benchmarks/gates_study.py --prepare DATA              # texts and contexts into a folder: needs a Debian-like machine
    python benchmarks/gates_study.py --data DATA --target kvzip_l2 --out OUT --device cuda --seconds 440
    python benchmarks/gates_study.py --data DATA --target kvzip --out OUT --smoke
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contexts import Question
from gate_corpus import SOURCE
from kvzip_quality import EXACT, answer_nlls, interval

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates
from hf_dataopt.kvzip.gate_fit import GateConfig, fit_read
from hf_dataopt.kvzip.gate_reading import BUDGETS, read_texts
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.publishing.identity import identity
from hf_dataopt.text.demo_model import load_demo_model

BASE: dict[str, Any] = {
    "hidden": 64,
    "steps": 1500,
    "tokens_per_step": 4096,
    "held_share": 0.04,
    "most_tokens": 250_000,
}
# in the order in which they are tried
FITS: dict[str, dict[str, Any]] = {
    "squared": {},
    "cut": {"loss": "cut"},
    "squared, 192 hidden": {"hidden": 192},
    "cut, 192 hidden": {"hidden": 192, "loss": "cut"},
    "squared, 4000 steps": {"steps": 4000},
    "squared, 25k tokens": {"most_tokens": 25_000},
    "cut, 4000 steps": {"steps": 4000, "loss": "cut"},
    "squared, another seed": {"seed": 1},
}
SMOKE: dict[str, Any] = {"hidden": 4, "steps": 4, "tokens_per_step": 64, "most_tokens": 300}
SAVED_UP_TO = 64  # hidden units of gates that are kept: files stay small
Context = tuple[str, str, list[Question]]


def prepare(folder: Path, questions: int) -> None:
    """Texts and contexts as files, so that a machine without their packages can use them."""
    from gate_corpus import all_texts, validation_contexts
    from gate_texts import held_contexts

    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "texts.jsonl.gz", "wt", encoding="utf-8") as file:
        for text in all_texts():
            file.write(json.dumps(text) + "\n")
    for name, contexts in (
        ("choose", validation_contexts(5, 3, questions, 0)),
        ("held", held_contexts(10, 2, questions, 0)),
    ):
        rows = [
            {"domain": domain, "context": text, "questions": [vars(question) for question in asked]}
            for domain, text, asked in contexts
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def contexts_of(folder: Path, name: str) -> list[Context]:
    rows = map(json.loads, (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["domain"], row["context"], [Question(**one) for one in row["questions"]]) for row in rows]


def texts_of(folder: Path) -> list[str]:
    with gzip.open(folder / "texts.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Judge:
    """Answers about some contexts by any gates; those by exact KVzip are found once.

    Args:
        model, tokenizer: the language model.
        contexts: with their questions.
        target: name of the score that gates were fitted to, answered by too.
    """

    def __init__(self, model: Any, tokenizer: Any, contexts: list[Context], target: str) -> None:
        self.model, self.tokenizer, self.contexts = model, tokenizer, contexts
        self.base: dict[tuple[str, float], list[list[float]]] = {}
        self.target = KVzipConfig(score=target)

    def answered(self, gates: KVzipGates) -> dict[tuple[str, float], list[list[float]]]:
        """NLL of each answer, by score and ratio, a list a context."""
        known, found = bool(self.base), {("gates", ratio): [] for ratio in BUDGETS}
        for _, text, questions in self.contexts:
            prompt = build_prompt(self.tokenizer, text, KVzipConfig())
            prefilled, learned = gates.prefill(self.model, prompt, progress=False)
            todo = [("gates", learned, found)]
            if not known:
                exact = score_context(prefilled, EXACT, progress=False)
                ours = score_context(prefilled, self.target, progress=False)
                todo += [("exact", exact, self.base), ("target", ours, self.base)]
                self._ask(prefilled, exact, 1.0, questions, self.base.setdefault(("full", 1.0), []))
            for name, scores, into in todo:
                for ratio in BUDGETS:
                    self._ask(prefilled, scores, ratio, questions, into.setdefault((name, ratio), []))
        return {**self.base, **found}

    def _ask(self, prefilled: Any, scores: torch.Tensor, ratio: float, questions: Any, into: list[list[float]]) -> None:
        cache = KVzipCache.from_scores(prefilled, scores, KVzipConfig(keep_ratio=ratio))
        into.append([nll for nll, _ in answer_nlls(self.model, self.tokenizer, cache, questions)])


def more(found: dict[tuple[str, float], list[list[float]]], name: str) -> dict[str, Any]:
    """By ratio: mean NLL over exact KVzip's, and its 95 % interval over contexts."""
    rows = {}
    for ratio in BUDGETS:
        ours, theirs = np.array(found[name, ratio]), np.array(found["exact", ratio])
        rows[str(ratio)] = [round(float((ours - theirs).mean()), 4), interval((ours - theirs).ravel(), len(ours))]
    return rows


def summary(found: dict[tuple[str, float], list[list[float]]]) -> dict[str, Any]:
    means = {f"{name} {ratio}": round(float(np.mean(values)), 4) for (name, ratio), values in found.items()}
    return {"gates minus exact": more(found, "gates"), "target minus exact": more(found, "target"), "NLL": means}


def texts_within(model: Any, tokenizer: Any, texts: list[str], scoring: KVzipConfig, seconds: float) -> list[str]:
    """As many texts as can be read and scored in that time, by how long the first ones take."""

    def read(some: Iterable[str]) -> None:
        for text in some:
            score_context(
                prefill(model, build_prompt(tokenizer, text, scoring), scoring, progress=False), scoring, progress=False
            )

    read(texts[:2])  # kernels are ready
    start, tried = time.monotonic(), min(12, len(texts))
    read(texts[:tried])
    each = (time.monotonic() - start) / tried
    return texts[: max(int(seconds / each), 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DATA", help="write texts and contexts, and nothing else")
    parser.add_argument("--data", type=Path, help="a folder that --prepare made")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--target", default="kvzip_l2", help="score that is learned")
    parser.add_argument("--out", type=Path, default=Path("build/gates_study"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no fit is begun")
    parser.add_argument("--reading", type=float, default=0.3, help="share of the time for reading and scoring texts")
    parser.add_argument("--gigabytes", type=float, default=None, help="most memory of the accelerator")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    start = time.monotonic()
    if args.prepare:
        prepare(args.prepare, args.questions)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.gigabytes and args.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            args.gigabytes * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model()
    model.to(args.device)
    study(model, tokenizer, args, start)


def study(model: Any, tokenizer: Any, args: argparse.Namespace, start: float) -> None:
    """Read, fit in turn, answer."""
    scoring = KVzipConfig(score=args.target)
    texts, choose, held = texts_of(args.data), contexts_of(args.data, "choose"), contexts_of(args.data, "held")
    fits = {name: {**BASE, **more} for name, more in FITS.items()}
    if args.smoke:
        texts = [text[:600] for text in texts[:4]]
        choose, held = (
            [(domain, text[:900], asked[:2]) for domain, text, asked in some[:2]] for some in (choose, held)
        )
        fits = {name: {**one, **SMOKE, "loss": one.get("loss", "squared")} for name, one in list(fits.items())[:2]}

    def tell(kind: str, **row: Any) -> None:
        row = {"kind": kind, "target": args.target, "at": round(time.monotonic() - start, 1), **row}
        with (args.out / "study.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    tell("loaded", device=str(model.device), weights=identity(model)["weights"])
    if not args.smoke:
        texts = texts_within(model, tokenizer, texts, scoring, args.reading * args.seconds)
    made_by, first = identity(model), GateConfig(**next(iter(fits.values())))
    sizes = {"held_share": first.held_share, "most_tokens": first.most_tokens, "seed": first.seed}
    read = read_texts(model, tokenizer, texts, scoring, **sizes, made_by=made_by["weights"], progress=False)
    tell("read", given=len(texts), **read.about, where=str(read.fitted.inputs.device))
    judges = {
        "choose": Judge(model, tokenizer, choose, args.target),
        "held": Judge(model, tokenizer, held, args.target),
    }
    best, longest = float("inf"), 0.0
    for name, settings in fits.items():
        began = time.monotonic()
        if began - start + longest > args.seconds:
            break
        config, given = GateConfig(**settings), read
        if config.most_tokens < read.fitted.count:
            about = {**read.about, "tokens": config.most_tokens}
            given = replace(read, fitted=read.fitted.some(config.most_tokens), about=about)
        fit = fit_read(given, config, model.device, progress=False)
        gates = KVzipGates(fit.weights, config, made_by, {**fit.about, "source": SOURCE})
        tell("fit", name=name, seconds=round(time.monotonic() - began, 1), config=settings, about=fit.about)
        chosen = summary(judges["choose"].answered(gates))
        tell("choose", name=name, contexts=len(choose), **chosen)
        total = sum(more for more, _ in chosen["gates minus exact"].values())
        if total < best:
            best = total
            if config.hidden <= SAVED_UP_TO:
                gates.save_pretrained(args.out / f"gates_{args.target}", license="apache-2.0")
            found = judges["held"].answered(gates)
            values = {f"{kind} {ratio}": np.round(nll, 4).tolist() for (kind, ratio), nll in found.items()}
            tell("held", name=name, contexts=len(held), **summary(found), values=values)
        longest = max(longest, time.monotonic() - began)
    tell("done")


if __name__ == "__main__":
    main()
