"""Learned gates beside the scores they were fitted to: answers, cost, and the bytes of a long context read within a budget.

Contexts are of domains that the gates were not fitted on (`gate_texts.py`). An answer's NLL is the mean over its tokens,
teacher-forced; gates, exact KVzip and random eviction cut the same full cache. Cost: what scoring and eviction add to a
prefill, in CPU-seconds. Bytes: the most keys and values alive at once while a context is read with `max_kv_tokens`, over the
budget's. Finished contexts are kept in a file, so a run that was stopped goes on where it was.

    python benchmarks/kvzip_gates.py            # 12 contexts x 4 questions, about 8 minutes on one idle core
    python benchmarks/kvzip_gates.py --smoke
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import DATA, HERE, resumed, show, write
from contexts import Question
from gate_texts import held_contexts
from kvzip_quality import EXACT, answer_nlls, interval
from kvzip_speed import context_of, cpu_seconds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.scores.random_eviction import RandomEviction
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.text.demo_model import load_demo_model
from tests.kvzip.peak import PeakOfPairs

RATIOS = (0.5, 0.3, 0.2, 0.1)
RANDOM_AT = 0.3
RECORDS, PROSE = 10, 2
PARTS = ["quality", "cost", "bytes"]


class TimedGates(KVzipGates):
    """Gates that count the CPU-seconds they take."""

    seconds = 0.0

    def score(self, layer: int, given: torch.Tensor) -> torch.Tensor:
        seconds, found = cpu_seconds(lambda: KVzipGates.score(self, layer, given))
        self.seconds += seconds
        return found


def one_context(model: Any, tokenizer: Any, gates: KVzipGates, text: str, questions: list[Question], seed: int) -> Any:
    """All methods and ratios on one context; every method evicts from the same prefill."""
    prompt = build_prompt(tokenizer, text, KVzipConfig())
    prefilled, ours = gates.prefill(model, prompt, progress=False)
    exact = score_context(prefilled, EXACT, progress=False)
    chance = score_context(prefilled, KVzipConfig(score=RandomEviction(seed)), progress=False)
    todo = [("full", 1.0, exact), ("random", RANDOM_AT, chance)]
    todo += [(name, ratio, scores) for ratio in RATIOS for name, scores in (("exact KVzip", exact), ("gates", ours))]
    rows = []
    for method, ratio, scores in todo:
        cache = KVzipCache.from_scores(prefilled, scores, KVzipConfig(keep_ratio=ratio))
        results = answer_nlls(model, tokenizer, cache, questions)
        nll, match = [one[0] for one in results], [one[1] for one in results]
        rows.append({"method": method, "ratio": ratio, "nll": nll, "match": match})
    return {"seed": seed, "tokens": prefilled.n_context, "rows": rows}


def quality(contexts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and ratio, with the difference from exact KVzip at the same ratio and its interval."""
    nll, match = defaultdict(list), defaultdict(list)
    for context in contexts:
        for row in context["rows"]:
            nll[row["method"], row["ratio"]] += row["nll"]
            match[row["method"], row["ratio"]] += row["match"]
    rows = []
    for (method, ratio), values in nll.items():
        base = nll.get(("exact KVzip", ratio))
        more = None if base is None or method == "exact KVzip" else np.array(values) - np.array(base)
        rows.append(
            {
                "method": method,
                "keep_ratio": ratio,
                "NLL": float(np.mean(values)),
                "exact match": float(np.mean(match[method, ratio])),
                "minus exact KVzip": None if more is None else float(more.mean()),
                "95 %": None if more is None else str(interval(more, len(contexts))),
            }
        )
    return rows


def cost(model: Any, tokenizer: Any, gates: KVzipGates, lengths: list[int], exact_up_to: int) -> list[dict[str, Any]]:
    """CPU-seconds of scoring and evicting over those of the prefill alone, in the same process."""
    rows = []
    timed = TimedGates(gates.weights, gates.config, gates.made_by, gates.about)
    timed.check(model)
    for n in lengths:
        prompt, config = context_of(tokenizer, n), KVzipConfig()
        plain, prefilled = cpu_seconds(lambda prompt=prompt: prefill(model, prompt, progress=False))
        if n <= exact_up_to:
            scoring, scores = cpu_seconds(lambda full=prefilled: score_context(full, EXACT, progress=False))
            evicting, _ = cpu_seconds(lambda full=prefilled, s=scores: KVzipCache.from_scores(full, s, KVzipConfig()))
            rows.append(_cost(n, "exact KVzip", plain, scoring + evicting))
        timed.seconds = 0.0
        prefilled, scores = timed.prefill(model, prompt, progress=False)
        evicting, _ = cpu_seconds(lambda full=prefilled, s=scores: KVzipCache.from_scores(full, s, config, free=True))  # noqa: B023
        rows.append(_cost(n, "gates", plain, timed.seconds + evicting))
    return rows


def _cost(n: int, method: str, plain: float, more: float) -> dict[str, Any]:
    row = {"tokens": n, "method": method, "prefill CPU-s": plain, "compress CPU-s": more}
    return {**row, "compress / prefill": more / plain}


def peak(model: Any, tokenizer: Any, gates: KVzipGates, n: int, budget: int) -> dict[str, Any]:
    """Bytes of keys and values while a context is read within a budget."""
    text = tokenizer.decode(context_of(tokenizer, n).context_ids)
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    start = time.process_time()
    with PeakOfPairs(width, heads) as seen:
        config = KVzipConfig(max_kv_tokens=budget)
        cache = KVzipCache.from_context(model, tokenizer, text, config=config, gates=gates, progress=False)
    tokens = budget * gates.weights.layers * heads
    return {
        "tokens": cache.ids.shape[1],
        "max_kv_tokens": budget,
        "kept pairs": sum(map(sum, cache.stored_lengths)),
        "budget's pairs": tokens,
        "MB of the full cache": cache.full_context_nbytes / 1e6,
        "MB of the budget": tokens * width * 2 * 4 / 1e6,
        "MB at the peak": seen.bytes / 1e6,
        "peak / budget": seen.bytes / (tokens * width * 2 * 4),
        "CPU-s": time.process_time() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--gates", default=str(HERE.parent / "examples" / "gates"), help="folder or Hub name")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096], help="of the table of costs")
    parser.add_argument("--exact-up-to", type=int, default=4096, help="longest context that exact KVzip is timed on")
    parser.add_argument("--long", type=int, default=16_384, help="tokens read within a budget")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--restart", action="store_true", help="forget the contexts of an earlier run")
    parser.add_argument("--smoke", action="store_true", help="short contexts, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model(args.model)
    gates = KVzipGates.from_pretrained(args.gates)
    if args.smoke:
        [(_, text, questions)] = held_contexts(1, 0, 1, 0)
        show("quality", quality([one_context(model, tokenizer, gates, text[:600], questions, 0)]))
        show("cost", cost(model, tokenizer, gates, [128], 128))
        show("bytes", [peak(model, tokenizer, gates, 600, 150)])
        return
    about: dict[str, Any] = {
        "model": args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised to float32)",
        "gates": {"folder": Path(args.gates).name, **gates.about},
    }
    if "quality" in args.parts:
        done = answers(model, tokenizer, gates, args)
        contexts = [{"domain": one["domain"], "tokens": one["tokens"]} for one in done]
        write("kvzip_gates_quality", quality(done), **about, contexts=contexts, questions_per_context=args.questions)
    if "cost" in args.parts:
        write("kvzip_gates_cost", cost(model, tokenizer, gates, args.lengths, args.exact_up_to), **about)
    if "bytes" in args.parts:
        write("kvzip_gates_bytes", [peak(model, tokenizer, gates, args.long, args.budget)], **about)


def answers(model: Any, tokenizer: Any, gates: KVzipGates, args: argparse.Namespace) -> list[dict[str, Any]]:
    """`one_context` of all contexts, those of an earlier run as they were."""
    done_file = DATA / f"kvzip_gates_{(args.model or 'smollm2').replace('/', '_')}.jsonl"

    def one(seed: int, domain: str, text: str, questions: list[Question]) -> dict[str, Any]:
        return {"domain": domain, **one_context(model, tokenizer, gates, text, questions, seed)}

    contexts = held_contexts(RECORDS, PROSE, args.questions, 0)
    jobs = [(f"context {seed}, {context[0]}", partial(one, seed, *context)) for seed, context in enumerate(contexts)]
    return resumed(done_file, jobs, args.restart)


if __name__ == "__main__":
    main()
