"""What an adapter's settings do: rank, learning rate, targets, slots and kind of memory, each changed alone.

    python benchmarks/ccm_settings.py [--smoke] [--steps 50] [--seeds 1]

Short runs of the packaged adapter's training (`fit_adapter.py`, `ccm_facts.py`: a user tells one to three facts, questions
about them), the base out of the package in bfloat16, measured in float32 on test conversations whose values training never
saw: nats per token of the answers behind the memory, and behind another conversation's; the difference is what the memory
says of this conversation. "minus as packaged" is paired with the first row's loss on the same conversations; both with a 95 %
bootstrap over conversations, of means over seeds. The budget rows are the packaged adapter itself, trained in full, with fewer
and fewer slots (`max_slots`) on conversations of six facts.
Finished runs are kept in benchmarks/.data/, so a killed benchmark goes on; --report writes the table of what is kept.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _report import DATA, resumed, show, write
from _training import Descent, Pace, in_dtype
from ccm_facts import Talk, ids_of, talks
from fit_adapter import FEW, RECIPES, adapted, batch_of, beside, loss_of
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional

from hf_dataopt import CompressedContextMemory, load_ccm
from hf_dataopt.text.demo_model import load_demo_model

LR = 1e-3
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# fields of `CCMConfig`, and the learning rate, in place of the packaged adapter's; what matters most comes first
VARIANTS: dict[str, dict[str, Any]] = {
    "as packaged": {},
    "learning rate 3e-3": {"lr": 3e-3},
    "2 slots": {"num_comp_tokens": 2},
    "rank 2": {"r": 2, "lora_alpha": 4},
    "targets all linear": {"target_modules": ALL_LINEAR},
    "8 slots": {"num_comp_tokens": 8},
    "learning rate 3e-4": {"lr": 3e-4},
    "rank 32": {"r": 32, "lora_alpha": 64},
    "targets q, v": {"target_modules": ["q_proj", "v_proj"]},
    "merge, a_t = 1/t": {"memory": "merge"},
    "merge, a_t = 1/2": {"memory": "merge", "merge_weight": 0.5},
    "1 slot": {"num_comp_tokens": 1},
}
BUDGETS = (None, 16, 8, 4)  # slots; 4 a message
MANY = (6, 6)  # facts


def of_others(items: list[Talk]) -> list[Talk]:
    """The same questions behind the messages of the conversation before."""
    return [replace(item, messages=items[index - 1].messages) for index, item in enumerate(items)]


@torch.no_grad()
def nats(model: Any, tokenizer: Any, items: list[Talk]) -> list[float]:
    """Loss per token of the answers, one parallel forward a conversation."""
    config = model.peft_config["default"]
    return [float(loss_of(model, batch_of([item], tokenizer, config))) for item in items]


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


def bounded(most: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """The packaged adapter with a budget of slots."""
    base, tokenizer = load_demo_model()
    model = load_ccm(RECIPES["concat"].folder, base=base).model
    items = talks("test", args.talks, 1, MANY, asked=6)
    found = {
        kind: of_answers(model, tokenizer, rows, most)
        for kind, rows in (("memory", items), ("other", of_others(items)))
    }
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


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per settings."""

    def of(name: str, kind: str, seeds: list[int]) -> list[float]:
        runs = [run[kind] for run in found if run["settings"] == name and run["seed"] in seeds]
        return [statistics.mean(values) for values in zip(*runs, strict=True)]

    rows = []
    for name in dict.fromkeys(run["settings"] for run in found):
        seeds = [run["seed"] for run in found if run["settings"] == name]
        mine, other = (of(name, kind, seeds) for kind in ("memory", "other"))
        given = of("as packaged", "memory", seeds)
        rows.append({
            "settings": name, "seeds": len(seeds), "n": len(mine),
            "trained weights": next(run["weights"] for run in found if run["settings"] == name),
            "memory": round(statistics.mean(mine), 3), "another's memory": round(statistics.mean(other), 3),
            "difference": beside(other, mine), "minus as packaged": "-" if name == "as packaged" else beside(mine, given),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2, help="conversations a step")
    parser.add_argument("--items", type=int, default=24, help="test conversations")
    parser.add_argument("--talks", type=int, default=6, help="test conversations of the rows with a budget of slots")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=None, help="do so many of all runs, a later call the others")
    parser.add_argument("--report", action="store_true", help="only write the table of what is kept")
    parser.add_argument("--restart", action="store_true", help="forget an earlier run")
    parser.add_argument("--smoke", action="store_true", help="two settings, a step, nothing kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names, budgets = list(VARIANTS), BUDGETS
    if args.smoke:
        args.steps, args.batch, args.items, args.talks, args.seeds = 1, 1, 3, 2, 1
        names, budgets = ["as packaged", "merge, a_t = 1/2"], (4,)
    few = [(f"budget {most}", functools.partial(bounded, most, args)) for most in budgets]
    jobs = [
        (f"{name}, seed {seed}", functools.partial(trained, name, seed, args))
        for seed in range(args.seeds)
        for name in names
    ]
    with TemporaryDirectory() as scratch:
        kept = Path(scratch) if args.smoke else DATA
        kept.mkdir(exist_ok=True)
        file = kept / f"ccm_settings_facts_{args.steps}x{args.batch}-{args.items}.jsonl"
        if args.report:
            jobs = jobs[: len(file.read_text().splitlines())]
        slots = resumed(kept / f"ccm_settings_slots-{args.talks}.jsonl", few, args.restart)
        found = resumed(file, jobs[: args.jobs], args.restart)
    show("packaged adapter, slots at most", slots)
    runs = [{key: value for key, value in run.items() if key not in ("memory", "other")} for run in found]
    name = "ccm_settings_smoke" if args.smoke else "ccm_settings"
    write(name, table(found), steps=args.steps, batch=args.batch, runs=runs, budgets=slots)


if __name__ == "__main__":
    main()
