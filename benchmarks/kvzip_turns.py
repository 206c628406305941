"""Answers about a conversation that stays within its budget: compressed again after every turn, or held there while it is read.

A conversation is a context of Debian package records and three more turns, each with as many records; then questions about
records of all four. All caches hold the same number of pairs at the end, but `turns left whole`, which compresses the context
alone. `turns laid out, compressed at once` has the ids of the conversation as one context. `at once` has all records in one
context and knows of no turns: it stands beside a full cache of that. An answer's NLL is
the mean over its tokens, teacher-forced. Finished conversations are kept in a file, so a run that was stopped goes on there.

    python benchmarks/kvzip_turns.py            # 6 conversations x 8 questions, about 10 minutes on one idle core
    python benchmarks/kvzip_turns.py --smoke
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from _report import DATA, HERE, resumed, show, write
from contexts import Question, debian_context
from kvzip_quality import interval, read_off

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates
from hf_dataopt._compat import cache_keyword
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import KVzipPrompt
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.text.demo_model import load_demo_model

MORE = "Here are more records:\n\n"


def conversation(records: int, turns: int, n_questions: int, seed: int) -> tuple[list[str], list[Question]]:
    """Records of every turn, and questions about different ones of them, as many of each turn."""
    text, questions = debian_context(records * turns, records * turns, seed)
    stanzas = text.split("\n\n")
    parts = ["\n\n".join(stanzas[at * records : (at + 1) * records]) for at in range(turns)]
    rng, chosen = random.Random(seed), []
    for part in parts:
        about = [one for one in questions if f"Package: {one.text.removesuffix('?').rsplit(' ', 1)[1]}\n" in part]
        chosen += rng.sample(about, n_questions // turns)
    return parts, chosen


def told(cache: KVzipCache, text: str) -> torch.Tensor:
    """Ids of what a user says behind a cache, (1, n), as far as the opened answer."""
    ids: torch.Tensor = cache.inputs(text)["input_ids"]
    return ids[:, cache.ids.shape[1] :]


@torch.no_grad()
def read(model: Any, cache: KVzipCache, ids: torch.Tensor) -> KVzipCache:
    """A cache that has read these ids, itself."""
    model(ids.to(model.device), logits_to_keep=1, **{cache_keyword(): cache})
    return cache


class Asker:
    """Asks a cache all questions; `one_by_one` where it takes no batches."""

    def __init__(self, model: Any, tokenizer: Any, questions: list[Question]) -> None:
        self.model, self.tokenizer, self.questions = model, tokenizer, questions

    def __call__(self, cache: KVzipCache, behind: list[torch.Tensor] | None = None) -> list[float]:
        """NLL of every answer; `behind` are the rows' ids where the cache cannot tell them itself."""
        rows = []
        for index, question in enumerate(self.questions):
            asked = told(cache, question.text)[0] if behind is None else behind[index]
            start, answer = (self._ids(part) for part in (question.start, question.answer))
            rows.append((torch.cat([asked.cpu(), start, answer]), answer.numel()))
        if cache.config.standing:
            return [read_off(self.model, cache, [row])[0][0] for row in rows]
        return [nll for nll, _ in read_off(self.model, cache, rows)]

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def scored(model: Any, tokenizer: Any, parts: list[str], questions: list[Question], ratio: float) -> dict[str, Any]:
    """NLL of each answer, by how KVzip's own scores kept the conversation; and what gates need to read the same."""
    ask, config = Asker(model, tokenizer, questions), KVzipConfig(keep_ratio=ratio)

    def made(text: str, settings: KVzipConfig) -> KVzipCache:
        return KVzipCache.from_context(model, tokenizer, text, config=settings, progress=False)

    again, best = made(parts[0], config), made(parts[0], replace(config, score="kvzip_l2"))
    left, whole, turns = again.fork(), made(parts[0], KVzipConfig(keep_ratio=1.0)), []
    for part in parts[1:]:
        turns.append(told(again, MORE + part))
        again, best = (read(model, cache.fork(), turns[-1]) for cache in (again, best))
        for cache in (again, best):
            cache.compress_again(ratio, progress=False)
    for cache in (left, whole):
        for ids in turns:
            read(model, cache, ids)
        cache.compress_again(1.0, progress=False)  # what is held stays, and forks hold it
    asked = [told(again, question.text)[0] for question in questions]
    laid_out = prefill(model, as_one_context(whole.prompt), config, progress=False)

    def in_turns(settings: KVzipConfig) -> KVzipCache:
        return KVzipCache.from_scores(
            laid_out, score_context(laid_out, settings, progress=False), settings, tokenizer=tokenizer
        )

    text = "\n\n".join(parts)
    nll = {
        "full": ask(whole, asked),
        "turns left whole": ask(left, asked),
        "compressed again after every turn": ask(again),
        "the same, by kvzip_l2": ask(best),
        "turns laid out, compressed at once": ask(in_turns(config), asked),
        "turns laid out, compressed at once, by kvzip_l2": ask(in_turns(replace(config, score="kvzip_l2")), asked),
        "full, in one context": ask(made(text, KVzipConfig(keep_ratio=1.0, score="random_eviction"))),
        "at once": ask(made(text, config)),
        "at once, by kvzip_l2": ask(made(text, replace(config, score="kvzip_l2"))),
    }
    budget = round(float(np.mean([sum(layer) / len(layer) for layer in again.stored_lengths])))
    return {
        "nll": nll,
        "budget": budget,
        "turns": [ids[0].tolist() for ids in turns],
        "asked": [ids.tolist() for ids in asked],
    }


def gated(
    model: Any, tokenizer: Any, gates: KVzipGates, parts: list[str], questions: list[Question], row: dict[str, Any]
) -> dict[str, list[float]]:
    """The same by gates, with as many pairs."""
    ask, budget = Asker(model, tokenizer, questions), row["budget"]

    def made(text: str, config: KVzipConfig) -> KVzipCache:
        return KVzipCache.from_context(model, tokenizer, text, config=config, gates=gates, progress=False)

    standing = made(parts[0], KVzipConfig(max_kv_tokens=budget, standing=True)).fork()
    for ids in row["turns"]:
        standing = read(model, standing, torch.tensor([ids]))
    standing.compress_again(progress=False)
    return {
        "gates, at once": ask(made("\n\n".join(parts), KVzipConfig(max_kv_tokens=budget))),
        "gates, standing budget": ask(standing, [torch.tensor(ids) for ids in row["asked"]]),
    }


def as_one_context(prompt: KVzipPrompt) -> KVzipPrompt:
    """The same ids, the turns a part of the context: what scoring all of them in one go is worth, the layout apart."""
    ids = prompt.ids[prompt.prefix_ids.numel() :]
    return replace(prompt, context_ids=ids, turn_ids=prompt.turn_ids[:0])


def rows_of(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method, beside the full cache that has read the same: in turns, or in one context."""
    nll: dict[str, list[float]] = defaultdict(list)
    for one in done:
        for method, values in one["nll"].items():
            nll[method] += values
    rows = []
    for method, values in nll.items():
        flat = method.startswith(("at once", "gates, at once", "full, in one"))
        base = "full, in one context" if flat else "full"
        more = np.array(values) - np.array(nll[base])
        row: dict[str, Any] = {"method": method, "NLL": float(np.mean(values)), "minus full": float(more.mean())}
        rows.append({**row, "95 %": str(interval(more, len(done)))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", default=str(HERE.parent / "examples" / "gates"), help="folder or Hub name")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--questions", type=int, default=8, help="of each conversation, a multiple of 4")
    parser.add_argument("--records", type=int, default=6, help="of each turn")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--restart", action="store_true", help="forget the conversations of an earlier run")
    parser.add_argument("--no-gates", action="store_true", help="KVzip's own scores alone, nothing written")
    parser.add_argument("--smoke", action="store_true", help="one short conversation, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model()
    gates = KVzipGates.from_pretrained(args.gates)
    if args.smoke:
        parts, questions = conversation(1, 4, 4, 0)
        row = scored(model, tokenizer, parts, questions, args.ratio)
        row["nll"] |= gated(model, tokenizer, gates, parts, questions, row)
        show("turns", rows_of([row]))
        return
    file = DATA / f"kvzip_turns_{args.ratio}_{args.records}.jsonl"

    def one(seed: int) -> dict[str, Any]:
        return scored(model, tokenizer, *conversation(args.records, 4, args.questions, seed), args.ratio)

    jobs = [(f"conversation {seed}", partial(one, seed)) for seed in range(args.conversations)]
    done = resumed(file, jobs, args.restart)
    if args.no_gates:
        show("turns", rows_of(done))
        return
    for seed, row in enumerate(done):
        row["nll"] |= gated(model, tokenizer, gates, *conversation(args.records, 4, args.questions, seed), row)
        print(f"conversation {seed + 1}/{args.conversations} by gates", flush=True)
    write(
        "kvzip_turns",
        rows_of(done),
        model="SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised to float32)",
        gates=gates.about,
        keep_ratio=args.ratio,
        conversations=len(done),
        questions_per_conversation=args.questions,
        records_per_turn=args.records,
        turns=4,
    )


if __name__ == "__main__":
    main()
