"""KVzip here beside kvpress: the same weights, token ids, contexts and questions, one after the other in one job.

kvpress needs transformers below 5.3, so its side (`peers/kvpress_side.py`) runs in an environment of its own,
`build/peers`, and is asked context by context; the two never compute at the same time. An answer's NLL is the mean over its
tokens, teacher-forced. Time: CPU-seconds of one thread beyond those of each side's own prefill. Bytes: keys and values held
while questions are answered. Contexts are Debian package records. Finished contexts are kept in a file, so a run that was
stopped goes on where it was.

    make peers                                      # makes the environment, then 12 contexts x 8 questions
    python benchmarks/kvzip_peers.py --equal        # in an environment that is there already: KVzip alone, in chunks of 512
    python benchmarks/kvzip_peers.py --contexts 2
    python benchmarks/kvzip_peers.py --smoke
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import DATA, HERE, resumed, show, write
from contexts import debian_context
from kvzip_quality import answer_ids, answer_nlls, interval
from kvzip_speed import cpu_seconds

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.scores.random_eviction import RandomEviction
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.text.demo_model import load_demo_model

PEERS = HERE.parent / "build" / "peers"
RATIOS = (0.3, 0.1)
# records per context, some 75 tokens each: 1k to 4k tokens, mixed so that the first few span them
SIZES = (14, 14, 28, 20, 16, 42, 24, 56, 15, 18, 22, 28)
OURS = {
    "KVzip, chunk 512": KVzipConfig(chunk_size=512, replay="exact"),
    "KVzip, chunk 2048": KVzipConfig(chunk_size=2048, replay="exact"),
    "KVzip, local, chunk 512": KVzipConfig(chunk_size=512, replay="local"),
}
# kvpress keeps 4 tokens of the prompt in front of the context as it ships; `prefix` keeps all of it, as we do
THEIRS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "KVzip, chunk 512": ("KVzipPress", {"chunk_size": 512}, RATIOS),
    "KVzip, chunk 512, prompt kept": ("KVzipPress", {"chunk_size": 512, "n_sink": "prefix"}, RATIOS),
    "KVzip, chunk 2048": ("KVzipPress", {"chunk_size": 2048}, (0.3,)),
    "KVzip+, chunk 512": ("KVzipPress", {"chunk_size": 512, "kvzip_plus_normalization": True}, RATIOS),
    "KVgrad, chunk 512": ("KVgradPress", {"chunk_size": 512}, RATIOS),
}
# without a second pass, far behind: on the first contexts only
OTHERS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "Compactor": ("CompactorPress", {}, (0.3,)),
    "ExpectedAttention": ("ExpectedAttentionPress", {}, (0.3,)),
    "SnapKV": ("SnapKVPress", {}, (0.3,)),
    "PyramidKV": ("PyramidKVPress", {}, (0.3,)),
    "StreamingLLM": ("StreamingLLMPress", {}, (0.3,)),
}
ALONE = "KVzip, chunk 512"  # of `--equal`
# ours and theirs at equal settings, the first as they ship
EQUAL = [
    ("KVzip, chunk 512", "KVzip, chunk 512"),
    ("KVzip, chunk 512, their pairs", "KVzip, chunk 512"),
    ("KVzip, chunk 512", "KVzip, chunk 512, prompt kept"),
    ("KVzip, chunk 2048", "KVzip, chunk 2048"),
]


class Peer:
    """kvpress in its own environment, a process that answers one job after the other.

    Args:
        python: interpreter of that environment.
        folder: the model both sides load.
    """

    def __init__(self, python: Path, folder: Path) -> None:
        keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [str(python), str(HERE / "peers" / "kvpress_side.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**keep, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.versions = self._answer()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send a job and wait."""
        assert self.process.stdin is not None  # noqa: S101 - piped above
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101 - piped above
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"kvpress's side ended with {self.process.wait()}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Sides:
    """What runs on each side of a context.

    Args:
        ours: settings by method.
        theirs: press, options and ratios by method.
        more: ours with as many pairs as they keep, and random eviction, besides.
    """

    ours: dict[str, KVzipConfig]
    theirs: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]]
    more: bool = True


def ours(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    questions: list[Any],
    seed: int,
    methods: dict[str, KVzipConfig],
    shares: dict[float, float] | None,
) -> list[dict[str, Any]]:
    """Our side of one context: every method evicts from the same prefill; with kvpress's shares of the pairs, also at these."""
    seconds, prefilled = cpu_seconds(lambda: prefill(model, prompt, progress=False))
    rows = []

    def answered(method: str, scores: torch.Tensor, ratio: float, spent: float | None, label: float) -> None:
        config = KVzipConfig(keep_ratio=ratio)
        evicting, cache = cpu_seconds(lambda: KVzipCache.from_scores(prefilled, scores, config))
        results = answer_nlls(model, tokenizer, cache, questions)
        rows.append(
            {
                "side": "ours",
                "method": method,
                "ratio": label,
                "prefill": seconds,
                "compress": None if spent is None else spent + evicting,
                "bytes": cache.context_nbytes,
                "pairs": sum(map(sum, cache.stored_lengths)),
                "nll": [one[0] for one in results],
                "match": [one[1] for one in results],
            }
        )

    for name, config in methods.items():
        spent, scores = cpu_seconds(lambda config=config: score_context(prefilled, config, progress=False))  # type: ignore[misc]
        if not rows:
            answered("full", scores, 1.0, None, 1.0)
            for ratio, share in (shares or {}).items():
                if share <= 0:  # they hold less than our prompt, on a very short context
                    continue
                answered(f"{name}, their pairs", scores, share, spent, ratio)
        for ratio in RATIOS:
            answered(name, scores, ratio, spent, ratio)
    if shares is None:
        return rows
    chance = score_context(prefilled, KVzipConfig(score=RandomEviction(seed)), progress=False)
    answered("random", chance, 0.3, None, 0.3)
    return rows


def one_context(
    model: Any, tokenizer: Any, peer: Peer, records: int, n_questions: int, seed: int, sides: Sides
) -> dict[str, Any]:
    """Both sides on one context; theirs first, so that ours can hold as many pairs as they do."""
    context, questions = debian_context(records, n_questions, seed)
    prompt = build_prompt(tokenizer, context, KVzipConfig())
    asked = [answer_ids(tokenizer, prompt.suffix_ids, question) for question in questions]
    job = {
        "ids": prompt.ids.tolist(),
        "n_prefix": prompt.prefix_ids.numel(),
        "questions": [{"ids": ids.tolist(), "answer": size} for ids, size in asked],
    }
    full = peer.ask({**job, "press": None})
    rows = [{"side": "kvpress", "method": "full", "prefill": full["prefill"], **row} for row in full["rows"]]
    for method, (press, options, ratios) in sides.theirs.items():
        todo = {**job, "press": press, "options": options, "ratios": ratios, "prefill": full["prefill"]}
        found = peer.ask(todo)["rows"]
        rows += [{"side": "kvpress", "method": method, "prefill": full["prefill"], **row} for row in found]
    heads = rows[0]["pairs"] / prompt.ids.numel()
    n, n_prefix = prompt.context_ids.numel(), prompt.prefix_ids.numel()
    # a tiny amount on top, so that rounding down to whole pairs does not lose one
    share = {
        row["ratio"]: (row["pairs"] - heads * n_prefix) / (heads * n) + 1e-9
        for row in rows
        if row["side"] == "kvpress" and row["method"] == ALONE
    }
    rows += ours(model, tokenizer, prompt, questions, seed, sides.ours, share if sides.more else None)
    return {"seed": seed, "tokens": n, "full_bytes": rows[0]["bytes"], "full_pairs": rows[0]["pairs"], "rows": rows}


def by_method(contexts: list[dict[str, Any]]) -> dict[tuple[str, str, float], list[dict[str, Any]]]:
    """Rows of all contexts by side, method and ratio, in the contexts' order."""
    found = defaultdict(list)
    for context in contexts:
        for row in context["rows"]:
            shares = {f"{kind} share": row[kind] / context[f"full_{kind}"] for kind in ("bytes", "pairs")}
            whole = next(one for one in context["rows"] if one["side"] == row["side"] and one["method"] == "full")
            shares["excess"] = float(np.mean(row["nll"]) - np.mean(whole["nll"]))
            found[row["side"], row["method"], row["ratio"]].append({**row, **shares})
    return found


def summarise(contexts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per side, method and ratio."""
    rows = []
    for (side, method, ratio), found in by_method(contexts).items():
        times = [row["compress"] / row["prefill"] for row in found if row["compress"] is not None]
        rows.append(
            {
                "side": side,
                "method": method,
                "keep_ratio": ratio,
                "contexts": len(found),
                "NLL": float(np.mean([row["nll"] for row in found])),
                "minus full": float(np.mean([row["excess"] for row in found])),
                "exact match": float(np.mean([row["match"] for row in found])),
                "compress / prefill": statistics.median(times) if times and method != "full" else None,
                "bytes held": float(np.mean([row["bytes share"] for row in found])),
                "pairs seen": float(np.mean([row["pairs share"] for row in found])),
            }
        )
    return rows


def compared(contexts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against theirs at equal settings, context by context: NLL with its interval, compression time, bytes."""
    found, rows = by_method(contexts), []
    for our_name, their_name in EQUAL:
        for ratio in RATIOS:
            a, b = found.get(("ours", our_name, ratio)), found.get(("kvpress", their_name, ratio))
            if a is None or b is None or len(a) != len(b):
                continue
            less = np.array([row["nll"] for row in a]) - np.array([row["nll"] for row in b])
            rows.append(
                {
                    "ours": our_name,
                    "kvpress": their_name,
                    "keep_ratio": ratio,
                    "contexts": len(a),
                    "NLL, ours minus theirs": float(less.mean()),
                    "95 %": str(interval(less.reshape(-1), len(a))),
                    "compression time, ours / theirs": statistics.median(
                        one["compress"] / two["compress"] for one, two in zip(a, b, strict=True)
                    ),
                    "bytes, ours / theirs": float(
                        np.mean([one["bytes"] / two["bytes"] for one, two in zip(a, b, strict=True)])
                    ),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--peers", default=str(PEERS), help="environment with kvpress (`make peers` makes it)")
    parser.add_argument("--contexts", type=int, default=len(SIZES), choices=range(1, len(SIZES) + 1), metavar="N")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--others", type=int, default=2, help="contexts on which presses without a second pass run too")
    parser.add_argument("--equal", action="store_true", help=f"only {ALONE} of both sides, with results of its own")
    parser.add_argument("--restart", action="store_true", help="forget the contexts of an earlier run")
    parser.add_argument("--smoke", action="store_true", help="one short context, nothing written")
    args = parser.parse_args()
    python = Path(args.peers) / "bin" / "python"
    if not python.exists():
        print(f"skipped: no kvpress in {python.parent.parent.name}/ (`make peers` makes its environment)")
        return
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model(args.model)
    name = (args.model or "smollm2").replace("/", "_")
    folder = DATA / f"peers_{name}"
    if not (folder / "config.json").exists():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    peer = Peer(python, folder)
    prefill(model, build_prompt(tokenizer, "A short text.", KVzipConfig()), progress=False)  # first-call buffers
    if args.smoke:
        done = [one_context(model, tokenizer, peer, 3, 2, 0, Sides(OURS, {**THEIRS, **OTHERS}))]
        show("smoke", summarise(done))
        show("at equal settings", compared(done))
        return
    kind = "kvzip_peers_equal" if args.equal else "kvzip_peers"
    done_file = DATA / f"{kind}_{name}_{args.questions}.jsonl"

    def one(seed: int) -> dict[str, Any]:
        sides = Sides(OURS, {**THEIRS, **(OTHERS if seed < args.others else {})})
        if args.equal:
            sides = Sides({ALONE: OURS[ALONE]}, {ALONE: THEIRS[ALONE]}, more=False)
        return one_context(model, tokenizer, peer, SIZES[seed], args.questions, seed, sides)

    done = resumed(done_file, [(f"context {seed}", partial(one, seed)) for seed in range(args.contexts)], args.restart)
    equal = compared(done)
    write(
        kind,
        summarise(done),
        model=args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised to float32)",
        peer_versions=peer.versions,
        context_tokens=[context["tokens"] for context in done[: args.contexts]],
        questions_per_context=args.questions,
        equal_settings=equal,
    )
    show("at equal settings", equal)


if __name__ == "__main__":
    main()
