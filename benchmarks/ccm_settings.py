"""What an adapter's settings do: rank, learning rate, targets, slots and kind of memory, each changed alone.

    python benchmarks/ccm_settings.py [--smoke] [--steps 100] [--seeds 1]

Short runs of the few-shot task of `ccm_quality.py` (sections; labels alone, batches of --batch, the base fine-tuned for
--base-steps), measured on validation episodes, whose sections neither training nor test episodes draw from: choosing here
tells a test nothing. Recovered: share of the gap in NLL between no context and full context; "minus as given" is paired with
the first row's on the same episodes; both with a 95 % bootstrap over episodes. Control: recovered with the memory of another
episode. The last rows are the packaged adapter (`fit_adapter.py`) with fewer and fewer slots (`max_slots`) on conversations of
six facts, nats per token of the answers.
Finished runs are kept in benchmarks/.data/, so a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import copy
import functools
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ccm_quality
import numpy as np
import torch
from _recovered import shares
from _report import DATA, HERE, resumed, show, write
from ccm_data import samples
from ccm_facts import Talk, ids_of, talks
from torch.nn import functional

from hf_dataopt import CompressedContextMemory, load_ccm
from hf_dataopt.text.demo_model import load_demo_model

TASK = "sections"
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
# in place of what `ccm_quality.py` takes
VARIANTS: dict[str, dict[str, Any]] = {
    "as given": {},
    "4 slots": {"slots": 4},
    "learning rate 3e-3": {"lr": 3e-3},
    "targets all linear": {"targets": ALL_LINEAR},
    "rank 32": {"rank": 32},
    "rank 2": {"rank": 2},
    "merge, a_t = 1/t": {"method": "merge"},
    "1 slot": {"slots": 1},
    "targets q, v": {"targets": "q_proj,v_proj"},
    "learning rate 3e-4": {"lr": 3e-4},
    "merge, a_t = 1/2": {"method": "merge-half"},
}
BUDGETS = (None, 16, 8, 4)  # slots; 4 a message
MANY = (6, 6)  # facts


@functools.lru_cache(1)
def fine_tuned(seed: int, base_steps: int, batch: int, smoke: bool) -> tuple[Any, Any]:
    """The model that all adapters of a seed are trained on, and its tokenizer."""
    base, tokenizer = load_demo_model()
    given = argparse.Namespace(base_steps=base_steps, batch=batch, smoke=smoke, base_seconds=0.0, dtype=torch.bfloat16)
    return ccm_quality.tuned(TASK, base.requires_grad_(False), tokenizer, given, seed).requires_grad_(False), tokenizer


def with_settings(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """What `ccm_quality.py` would be called with."""
    given = {"lr": 1e-3, "slots": 2, "rank": 8, "targets": ccm_quality.TARGETS, "share": 0.0, "method": "concat"}
    fixed = {"dtype": torch.bfloat16, "after": 0, "seconds": 0.0}
    return argparse.Namespace(**{**vars(args), **given, **fixed, **VARIANTS[name]})


def measured(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One record of `ccm_quality.py`: a setting trained, or an end of the scale ("none", "full")."""
    model, tokenizer = fine_tuned(seed, args.base_steps, args.batch, args.smoke)
    items = samples(TASK, "validation", tokenizer, args.items)
    if name not in VARIANTS:
        return {"settings": name, **ccm_quality.evaluate(TASK, name, model, tokenizer, items, args, seed)}
    settings = with_settings(args, name)
    run = ccm_quality.evaluate(TASK, settings.method, copy.deepcopy(model), tokenizer, items, settings, seed)
    return {"settings": name, **run}


def bounded(most: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """The packaged adapter with a budget of slots."""
    base, tokenizer = load_demo_model()
    model = load_ccm(HERE.parent / "examples" / "adapters" / "facts", base=base).model
    items = talks("test", args.talks, 1, MANY, asked=6)
    others = [replace(item, messages=items[index - 1].messages) for index, item in enumerate(items)]
    found = {"memory": of_answers(model, tokenizer, items, most), "other": of_answers(model, tokenizer, others, most)}
    return {"slots": "all" if most is None else str(most), **found}


@torch.no_grad()
def of_answers(model: Any, tokenizer: Any, items: list[Talk], most: int | None) -> float:
    """Nats per token of the answers behind a memory of at most so many slots."""
    losses = []
    for item in items:
        contexts, questions = ids_of(item, tokenizer)
        memory = CompressedContextMemory(model, tokenizer, max_slots=most)
        for context in contexts:
            memory.append(context)
        for (asked, _), (answer, _) in questions:
            logits = memory.logits([*asked, *answer])[0, len(asked) - 1 : -1]
            losses.append(float(functional.cross_entropy(logits, torch.tensor(answer))))
    return statistics.mean(losses)


def difference(runs: list[dict[str, Any]], given: list[dict[str, Any]], ends: list[list[dict[str, Any]]]) -> str:
    """Recovered share minus that of the settings as given, the same episodes drawn for both."""
    none, full, mine, theirs = (np.mean([run["nll"] for run in part], 0) for part in (*ends, runs, given))

    def of(rows: Any) -> float:
        return float((theirs - mine)[rows].sum() / (none - full)[rows].sum())

    draws = np.random.default_rng(0).integers(len(none), size=(2000, len(none)))
    low, high = np.percentile([of(rows) for rows in draws], [2.5, 97.5])
    return f"{of(slice(None)):.3f} [{low:.3f}, {high:.3f}]"


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per setting."""

    def of(name: str, seeds: list[int]) -> list[dict[str, Any]]:
        return [run for run in found if run["settings"] == name and run["seed"] in seeds]

    rows = []
    for name in (name for name in VARIANTS if any(run["settings"] == name for run in found)):
        seeds = [run["seed"] for run in found if run["settings"] == name]
        runs, ends, given = of(name, seeds), [of("none", seeds), of("full", seeds)], of("as given", seeds)
        share, spread = shares(runs, *ends)
        rows.append({
            "settings": name, "seeds": len(seeds), "n": len(runs[0]["nll"]),
            "nll": round(statistics.mean(sum(run["nll"]) / sum(run["tokens"]) for run in runs), 3),
            "recovered": round(share, 3), "95 %": str(spread),
            "minus as given": "-" if name == "as given" else difference(runs, given, ends),
            "right": round(statistics.mean(statistics.mean(run["right"]) for run in runs), 3),
            "control": round(shares([run["other"] for run in runs], *ends)[0], 3) if "other" in runs[0] else None,
            "training CPU-s": round(statistics.mean(run["training_cpu_s"] for run in runs)),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of an adapter")
    parser.add_argument("--base-steps", type=int, default=150, help="of the fine-tuning")
    parser.add_argument("--batch", type=int, default=2, help="episodes a step")
    parser.add_argument("--items", type=int, default=60, help="validation episodes")
    parser.add_argument("--talks", type=int, default=6, help="test conversations of the rows with a budget of slots")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=None, help="do so many of all runs, a later call the others")
    parser.add_argument("--restart", action="store_true", help="forget an earlier run")
    parser.add_argument("--smoke", action="store_true", help="two settings, a step, nothing kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names, budgets = list(VARIANTS), BUDGETS
    if args.smoke:
        args.steps, args.base_steps, args.items, args.talks, args.seeds = 1, 1, 3, 2, 1
        names, budgets = ["as given", "merge, a_t = 1/2"], (4,)
        shutil.rmtree(DATA / "ccm_quality_smoke", ignore_errors=True)
    jobs = [
        (f"{name}, seed {seed}", functools.partial(measured, name, seed, args))
        for seed in range(args.seeds)
        for name in ("none", "full", *names)
    ]
    few = [(f"budget {most}", functools.partial(bounded, most, args)) for most in budgets]
    with TemporaryDirectory() as scratch:
        kept = Path(scratch) if args.smoke else DATA
        kept.mkdir(exist_ok=True)
        size = f"{args.steps}x{args.batch}-{args.items}"
        slots = resumed(kept / f"ccm_settings_slots-{args.talks}.jsonl", few, args.restart)
        found = resumed(kept / f"ccm_settings_{size}.jsonl", jobs[: args.jobs], args.restart)
    show("packaged adapter, slots at most", slots)
    runs = [{key: value for key, value in run.items() if key not in ccm_quality.PER_ITEM} for run in found]
    name = "ccm_settings_smoke" if args.smoke else "ccm_settings"
    write(name, table(found), steps=args.steps, batch=args.batch, runs=runs, budgets=slots)


if __name__ == "__main__":
    main()
