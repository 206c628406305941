"""Answers from caches that KVzip compressed in chunks of several sizes, exact and local, head by head, and in 8 or 4 bits.

Contexts are Debian package records; each is compressed once, without knowing the questions. An answer's NLL is the mean over
its tokens, teacher-forced; it matches exactly when every token is the most likely one (what greedy decoding would write).
Time: CPU-seconds of one thread. Other scores beside KVzip's: `kvzip_eval.py`.
Finished contexts are kept in a file, so a run that was stopped goes on where it was.

    python benchmarks/kvzip_quality.py --part chunks    # chunk size and replay, 1k to 8k tokens
    python benchmarks/kvzip_quality.py --part heads     # head level at 0.6 and 0.7, by scores of packaged prose
    python benchmarks/kvzip_quality.py --part storage   # 8 and 4 bits
    python benchmarks/kvzip_quality.py --smoke
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from _report import DATA, write
from contexts import Question, debian_context
from kvzip_speed import SETTINGS, cpu_seconds
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt._compat import cache_keyword
from hf_dataopt.kvzip.head_scores import head_scores
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt, question_ids
from hf_dataopt.kvzip.scores.random_eviction import RandomEviction
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.text.demo_model import load_demo_model

LOCAL = KVzipConfig(chunk_size=512, replay="local")
EXACT = KVzipConfig(chunk_size=2000, replay="exact")
UNIFORM = KVzipConfig(level="pair-uniform")
RANDOM = "random"
STATIC = replace(LOCAL, level="head")
HEADS = {
    "KVzip, pairs": LOCAL,
    "static head scores": STATIC,
    "static head scores, no windows": replace(STATIC, head_sinks=0, head_recent=0),
    "DuoAttention": KVzipConfig(score="duo_attention"),
}
STORAGES = {
    "KVzip": LOCAL,
    "KVzip, 8 bits": replace(LOCAL, storage="int8"),
    "KVzip, 4 bits": replace(LOCAL, storage="int4"),
}
PARTS = {"chunks": (SETTINGS, (0.5, 0.3, 0.1)), "heads": (HEADS, (0.7, 0.6)), "storage": (STORAGES, (1.0, 0.3))}
# records per context, some 70 to 80 tokens each
SIZES = {
    "chunks": (55, 28, 14, 110, 55, 28, 14),
    "heads": (12, 16, 20, 24),
    "storage": (14, 28) * 5,
}


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, suffix: torch.Tensor, question: Question
) -> tuple[torch.Tensor, int]:
    """Ids of a question with its right answer, as they follow the context, and how many of them are the answer's."""
    start = tokenizer(question.start, add_special_tokens=False)["input_ids"]
    answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
    asked = question_ids(tokenizer, suffix, question.text)
    return torch.cat([asked, torch.tensor([*start, *answer])]), len(answer)


def answer_nlls(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: KVzipCache, questions: list[Question]
) -> list[tuple[float, bool]]:
    """Of each answer: mean NLL of its tokens after the question, and whether each of them is the most likely one."""
    return read_off(model, cache, [answer_ids(tokenizer, cache.prompt.suffix_ids, question) for question in questions])


@torch.no_grad()
def read_off(
    model: PreTrainedModel, cache: KVzipCache, rows: list[tuple[torch.Tensor, int]]
) -> list[tuple[float, bool]]:
    """As `answer_nlls`, of the last so many of each row's ids behind the cache; all rows in one forward."""
    longest = max(ids.numel() for ids, _ in rows)
    batch = torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, (ids, _) in zip(batch, rows, strict=True):
        row[: ids.numel()] = ids  # padded behind, where no token of the row looks
    first = min(ids.numel() - size for ids, size in rows) - 1
    logits = model(batch.to(cache.device), logits_to_keep=longest - first, **{cache_keyword(): cache.fork()}).logits
    found = []
    for row, (ids, size) in zip(logits, rows, strict=True):
        said, right = row[ids.numel() - size - 1 - first :][:size].float(), ids[-size:].to(row.device)
        nll = torch.nn.functional.cross_entropy(said, right)
        found.append((nll.item(), bool((said.argmax(-1) == right).all())))
    return found


def one_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: int,
    seed: int,
    n_questions: int,
    part: str = "chunks",
    heads: torch.Tensor | None = None,
) -> dict[str, object]:
    """All methods and ratios on one context; every method evicts from the same prefill."""
    context, questions = debian_context(records, n_questions, seed)
    prefilling, prefilled = cpu_seconds(
        lambda: prefill(model, build_prompt(tokenizer, context, EXACT), EXACT, progress=False)
    )
    methods, ratios = PARTS[part]
    chance = replace(UNIFORM, score=RandomEviction(seed))
    rows, scored = [], {}
    for method, config in {"full": chance, RANDOM: chance, **methods}.items():
        plain = replace(config, storage="model")
        if heads is not None and config.level == "head":
            seconds, values = 0.0, heads[..., None].expand(*heads.shape, prefilled.n_context)
        else:
            if plain not in scored:
                scored[plain] = cpu_seconds(lambda plain=plain: score_context(prefilled, plain, progress=False))
            seconds, values = scored[plain]
        for ratio in (1.0,) if method == "full" else ratios:
            cache = KVzipCache.from_scores(prefilled, values, replace(config, keep_ratio=ratio))
            results = answer_nlls(model, tokenizer, cache, questions)
            rows.append(
                {
                    "method": method,
                    "ratio": ratio,
                    "bytes": cache.context_nbytes / cache.full_context_nbytes,
                    "held": cache.context_nbytes,
                    "full": cache.full_context_nbytes,
                    "seconds": seconds,
                    "nll": [r[0] for r in results],
                    "match": [r[1] for r in results],
                }
            )
    return {"seed": seed, "records": records, "tokens": prefilled.n_context, "prefill": prefilling, "rows": rows}


def heads_of_prose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[torch.Tensor, int]:
    """Static scores of heads from Python's own help topics, kept in a file.

    In pieces of 5,500 tokens: a piece, and what repeats it, stay inside the model's 8,192 positions. As the authors score, with
    chunks of 2,000 and the whole piece in sight.
    """
    from pydoc_data.topics import topics

    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)["input_ids"]
    ids = ids[:tokens]
    file = DATA / f"heads_exact_{len(ids)}.pt"
    if not file.exists():
        pieces = [tokenizer.decode(ids[start : start + 5500]) for start in range(0, len(ids), 5500)]
        file.parent.mkdir(exist_ok=True)
        torch.save(head_scores(model, tokenizer, pieces, EXACT).cpu(), file)
    return torch.load(file, weights_only=True), len(ids)


def interval(difference: np.ndarray, n_contexts: int, base: np.ndarray | None = None) -> list[float]:
    """95 % bootstrap interval of a mean, or of its ratio to another mean.

    Whole contexts are drawn, since questions on one context are not independent.

    Args:
        difference: (contexts * questions,) values, context by context.
        n_contexts: contexts.
        base: same shape as `difference`, the denominator's values, optional.

    Returns:
        Lower and upper end.
    """
    chosen = np.random.default_rng(0).integers(n_contexts, size=(2000, n_contexts))
    draws = difference.reshape(n_contexts, -1).mean(axis=1)[chosen].mean(axis=1)
    if base is not None:
        below = base.reshape(n_contexts, -1).mean(axis=1)[chosen].mean(axis=1)
        # nothing is over 0: such draws are left out
        draws = np.divide(draws, below, out=np.full_like(draws, np.nan), where=below != 0)
    return [round(float(value), 3) for value in np.nanpercentile(draws, [2.5, 97.5])]


def summarise(contexts: list[dict]) -> list[dict]:
    """One row per method and ratio, with the NLL's excess over the full cache and its share of random eviction's."""
    nll, match, held, cost = defaultdict(list), defaultdict(list), defaultdict(list), defaultdict(list)
    for context in contexts:
        for row in context["rows"]:
            key = (row["method"], row["ratio"])
            nll[key] += row["nll"]
            match[key] += row["match"]
            held[key].append(row["bytes"])
            cost[key].append(row["seconds"])
    full, read = np.array(nll["full", 1.0]), sum(context["prefill"] for context in contexts)
    rows = []
    for (method, ratio), values in nll.items():
        excess = np.array(values) - full
        random_excess = np.array(nll[RANDOM, ratio]) - full if ratio < 1 else None
        against_random = None if random_excess is None else excess.mean() / random_excess.mean()
        spread = None if random_excess is None else str(interval(excess, len(contexts), random_excess))
        rows.append(
            {
                "method": method,
                "keep_ratio": ratio,
                "bytes": float(np.mean(held[method, ratio])),
                "scoring / prefill": float(np.sum(cost[method, ratio]) / read),
                "NLL": float(np.mean(values)),
                "exact match": float(np.mean(match[method, ratio])),
                "excess NLL": float(excess.mean()),
                "95 %": str(interval(excess, len(contexts))),
                "excess / random's": None if against_random is None else float(against_random),
                "its 95 %": spread,
            }
        )
    return rows


def by_storage(contexts: list[dict]) -> list[dict]:
    """One row per storage and ratio, beside pairs as the model makes them; bytes are over a cache of 16 bits, here 32."""
    found: dict[tuple[str, float], list[dict]] = defaultdict(list)
    for context in contexts:
        for row in context["rows"]:
            found[row["method"], row["ratio"]].append(row)
    rows = []
    for row in summarise(contexts):
        same = found[row["method"], row["keep_ratio"]]
        share = [one["held"] / one["full"] * (2 if "bits" in row["method"] else 1) for one in same]
        base = found["KVzip", row["keep_ratio"]]
        more = np.array([one["nll"] for one in same]).ravel() - np.array([one["nll"] for one in base]).ravel()
        kept = {name: row[name] for name in ("method", "keep_ratio", "NLL", "exact match", "excess NLL", "95 %")}
        rows.append(
            {
                **kept,
                "bytes over 16 bits": float(np.mean(share)),
                "most": max(share),
                "NLL minus KVzip's": float(more.mean()),
                "of it, 95 %": str(interval(more, len(contexts))),
            }
        )
    return rows


def by_length(contexts: list[dict]) -> list[dict]:
    """The rows of contexts of every length on their own."""
    lengths: dict[int, list[dict]] = defaultdict(list)
    for context in contexts:
        lengths[context["records"]].append(context)
    return [
        {"tokens": round(float(np.mean([one["tokens"] for one in same]))), "contexts": len(same), **row}
        for _, same in sorted(lengths.items())
        for row in summarise(same)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--part", default="chunks", choices=list(PARTS))
    parser.add_argument("--contexts", type=int, default=12, help="at most")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--restart", action="store_true", help="forget the contexts of an earlier run")
    parser.add_argument("--smoke", action="store_true", help="one short context, nothing written")
    parser.add_argument("--prose", type=int, default=88_000, help="tokens of prose that heads are scored by")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model(args.model)
    heads, tokens = heads_of_prose(model, tokenizer, args.prose) if args.part == "heads" else (None, 0)
    if args.smoke:
        from _report import show

        show("smoke", summarise([one_context(model, tokenizer, 3, 0, 2, args.part)]))
        return
    done_file = DATA / f"kvzip_quality_{args.part}_{(args.model or 'smollm2').replace('/', '_')}.jsonl"
    if args.restart:
        done_file.unlink(missing_ok=True)
    done = [json.loads(line) for line in done_file.read_text().splitlines()] if done_file.exists() else []
    for seed, records in list(enumerate(SIZES[args.part][: args.contexts]))[len(done) :]:
        start = time.time()
        done.append(one_context(model, tokenizer, records, seed, args.questions, args.part, heads))
        with done_file.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"context {seed + 1}: {done[-1]['tokens']} tokens, {time.time() - start:.0f} s", flush=True)
    about = {"prose_tokens": tokens} if heads is not None else {}
    lengths = [context["tokens"] for context in done]
    write(
        f"kvzip_quality_{args.part}",
        {"chunks": by_length, "heads": summarise, "storage": by_storage}[args.part](done),
        model=args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised to float32)",
        contexts=len(done),
        questions_per_context=args.questions,
        context_tokens=[min(lengths), max(lengths)],
        seeds=list(range(len(done))),
        **about,
    )


if __name__ == "__main__":
    main()
