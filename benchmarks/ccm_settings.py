"""What an adapter's settings do: rank, learning rate, targets, slots and kind of memory, each changed alone.

    python benchmarks/ccm_settings.py [--smoke] [--steps 40] [--seeds 2]

Short runs of the packaged adapter's training (`fit_adapter.py`, `ccm_facts.py`: a user tells one to three facts, questions
about them), the base out of the package in bfloat16, measured in float32 on test conversations whose values training never
saw: nats per token of the answers behind the memory, behind another conversation's, and without any; the difference between
the first two is what the memory says of this conversation. Means over seeds, in brackets the lowest and highest. The first
rows are the packaged adapter itself, trained in full, with fewer and fewer slots (`max_slots`) on conversations of six facts;
"as packaged" has its settings.
Finished runs are kept in benchmarks/.data/, so a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _report import DATA, HERE, resumed, write
from _training import Descent, Pace, in_dtype
from ccm_facts import Talk, ids_of, talks
from fit_adapter import FEW, adapted, batch_of, loss_of
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional

from hf_dataopt import CompressedContextMemory, load_ccm
from hf_dataopt.text.demo_model import load_demo_model

LR = 1e-3
# fields of `CCMConfig`, and the learning rate, in place of the packaged adapter's
VARIANTS: dict[str, dict[str, Any]] = {
    "as packaged": {},
    "learning rate 3e-4": {"lr": 3e-4},
    "learning rate 3e-3": {"lr": 3e-3},
    "rank 2": {"r": 2, "lora_alpha": 4},
    "rank 32": {"r": 32, "lora_alpha": 64},
    "1 slot": {"num_comp_tokens": 1},
    "2 slots": {"num_comp_tokens": 2},
    "8 slots": {"num_comp_tokens": 8},
    "targets q, v": {"target_modules": ["q_proj", "v_proj"]},
    "targets all linear": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    },
    "merge, a_t = 1/t": {"memory": "merge"},
    "merge, a_t = 1/2": {"memory": "merge", "merge_weight": 0.5},
}
BUDGETS = (None, 16, 8, 4)  # slots; 4 a message
MANY = (6, 6)  # facts


def of_others(items: list[Talk]) -> list[Talk]:
    """The same questions behind the messages of the conversation before."""
    return [replace(item, messages=items[index - 1].messages) for index, item in enumerate(items)]


@torch.no_grad()
def nats(model: Any, tokenizer: Any, items: list[Talk]) -> float:
    """Mean loss per token of the answers, one parallel forward a conversation."""
    config = model.peft_config["default"]
    return statistics.mean(float(loss_of(model, batch_of([item], tokenizer, config))) for item in items)


@torch.no_grad()
def unread(model: Any, tokenizer: Any, items: list[Talk]) -> float:
    """The same without any memory."""
    losses = []
    for item in items:
        for (asked, _), (answer, _) in ids_of(item, tokenizer)[1]:
            logits = model(torch.tensor([[*asked, *answer]])).logits[0, len(asked) - 1 : -1]
            losses.append(float(functional.cross_entropy(logits, torch.tensor(answer))))
    return statistics.mean(losses)


def trained(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One short run, measured."""
    settings = {"lr": LR, **VARIANTS[name]}
    lr = settings.pop("lr")
    base, tokenizer = load_demo_model()
    torch.manual_seed(seed)
    model = adapted(in_dtype(base, torch.bfloat16), tokenizer, **settings).train()
    config, descent, pace = model.peft_config["default"], Descent(model, lr), Pace(args.steps)
    pool = talks("train", args.steps * args.batch, seed, FEW)
    for step in range(args.steps):
        rows = pool[step * args.batch : (step + 1) * args.batch]
        descent.take(loss_of(model, batch_of(rows, tokenizer, config)), pace.scale(step))
    weights = get_peft_model_state_dict(model)
    model = adapted(base, tokenizer, **settings).eval()
    set_peft_model_state_dict(model, weights)
    items = talks("test", args.items, 0, FEW)
    size = sum(weight.numel() for weight in descent.weights)
    found = {"memory": nats(model, tokenizer, items), "other": nats(model, tokenizer, of_others(items))}
    return {"settings": name, "seed": seed, "weights": size, **found}


@torch.no_grad()
def bounded(most: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """The packaged adapter with a budget of slots."""
    base, tokenizer = load_demo_model()
    model = load_ccm(HERE.parent / "examples" / "adapters" / "facts", base=base).model
    items, found = talks("test", args.items, 1, MANY, asked=6), {}
    for kind, rows in (("memory", items), ("other", of_others(items))):
        losses = []
        for item in rows:
            contexts, questions = ids_of(item, tokenizer)
            memory = CompressedContextMemory(model, tokenizer, max_slots=most)
            for context in contexts:
                memory.append(context)
            for (asked, _), (answer, _) in questions:
                logits = memory.logits([*asked, *answer])[0, len(asked) - 1 : -1]
                losses.append(float(functional.cross_entropy(logits, torch.tensor(answer))))
        found[kind] = statistics.mean(losses)
    slots = "all" if most is None else str(most)
    return {"settings": f"packaged adapter, {slots} slots", "seed": 0, "weights": 0, **found}


def table(found: list[dict[str, Any]], none: float) -> list[dict[str, Any]]:
    """One row per settings."""
    rows = []
    for name in dict.fromkeys(run["settings"] for run in found):
        runs = [run for run in found if run["settings"] == name]
        about = [run["other"] - run["memory"] for run in runs]
        rows.append({
            "settings": name, "seeds": len(runs), "trained weights": runs[0]["weights"] or None,
            "memory": round(statistics.mean(run["memory"] for run in runs), 3),
            "another's memory": round(statistics.mean(run["other"] for run in runs), 3),
            "no memory": None if name.startswith("packaged") else round(none, 3),
            "difference": round(statistics.mean(about), 3), "of seeds": f"[{min(about):.3f}, {max(about):.3f}]",
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2, help="conversations a step")
    parser.add_argument("--items", type=int, default=24, help="test conversations")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=None, help="do so many of all runs, a later call the others")
    parser.add_argument("--restart", action="store_true", help="forget an earlier run")
    parser.add_argument("--smoke", action="store_true", help="two settings, a step, nothing kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names, budgets = list(VARIANTS), BUDGETS
    if args.smoke:
        args.steps, args.batch, args.items, args.seeds = 1, 1, 2, 1
        names, budgets = ["as packaged", "merge, a_t = 1/2"], (4,)
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"budget {most}", lambda most=most: bounded(most, args))  # type: ignore[misc]
        for most in budgets
    ]
    jobs += [
        (f"{name}, seed {seed}", lambda name=name, seed=seed: trained(name, seed, args))  # type: ignore[misc]
        for seed in range(args.seeds)
        for name in names
    ]
    with TemporaryDirectory() as scratch:
        kept = Path(scratch) if args.smoke else DATA
        kept.mkdir(exist_ok=True)
        found = resumed(
            kept / f"ccm_settings_{args.steps}x{args.batch}-{args.items}.jsonl", jobs[: args.jobs], args.restart
        )
    base, tokenizer = load_demo_model()
    rows = table(found, unread(base, tokenizer, talks("test", args.items, 0, FEW)))
    write("ccm_settings_smoke" if args.smoke else "ccm_settings", rows, steps=args.steps, batch=args.batch, runs=found)


if __name__ == "__main__":
    main()
