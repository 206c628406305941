"""What a compressed context memory keeps: CCM against no context, full context and other ways to compress (section 7.4).

    python benchmarks/ccm_quality.py [--smoke] [--tasks chitchat,sections] [--methods none,full,concat] [--seeds 3]

As in the text, the model is first fine-tuned on each task (LoRA of rank 8 on full contexts, merged); every compression
adapter is trained on top of it, with the same samples, steps and learning rate. All keep the first token as attention sink
and start compression tokens at the embedding of a line break (without these an untrained memory does harm), and all learn
from every turn (chitchat) or every demonstration's label (sections), not the last alone: from what the fine-tuned model says
with all of the context (--share 1), from the tokens themselves (--share 0), or both. 8 contexts of 17 and 15 tokens on
average, --slots each (Gisting: as many for all), AdamW, cosine. "none" and "full" are the fine-tuned model without and with
all of the context, "not-tuned" the model as it comes. "other memory": the same adapter reads the memory of another item;
what that recovers is not about the context but about the domain. "pooling" averages keys and values of equal parts of a
context (Compressive Transformer), untrained. Recovered: share of the NLL gap between none and full, means over seeds, with a
95 % bootstrap over test conversations (or episodes). Bases are read in --dtype while training and in float32 while measuring.
Finished runs are kept in benchmarks/.data/, so a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _recovered import shares
from _report import DATA, show, write
from _training import Descent, Pace, in_dtype
from ccm_data import STEPS, TASKS, Sample, samples
from data import DataMissingError
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import DynamicCache

from hf_dataopt import CCMConfig, CompressedContextMemory, DataCollatorForCCM
from hf_dataopt._compat import cache_keyword
from hf_dataopt.ccm.distillation import distillation_loss
from hf_dataopt.text.demo_model import load_demo_model

BASE_LR = 1e-3
CONFIGS: dict[str, dict[str, Any]] = {
    "concat": {"memory": "concat"},
    "merge": {"memory": "merge"},
    "gisting-online": {"memory": "concat_apart"},
    "concat-plain-lora": {"memory": "concat", "conditional": False},
    "gisting": {"memory": "gist"},
    "merge-plain-lora": {"memory": "merge", "conditional": False},
    "merge-half": {"memory": "merge", "merge_weight": 0.5},
}
FROZEN = ("none-not-tuned", "full-not-tuned")
PER_ITEM = ("nll", "tokens", "right", "group", "other")
TRAINED = "trained.json"
OTHER = ", other memory"
POOL = 40  # batches drawn at a time
AT_A_TIME = 25  # test items
SETTINGS = ("steps", "lr", "share", "slots", "rank", "targets")  # of an adapter's run
TARGETS = "q_proj,k_proj,v_proj,o_proj"
METHODS = (*FROZEN, "none", "full", "pooling", *CONFIGS)
# logits (n, vocabulary) of the outputs of some items, the outputs, and which item each of them is of
Score = Callable[[list[Sample]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def kept(task: str, method: str, seed: int, args: argparse.Namespace) -> Path:
    """Folder of a trained adapter; the fine-tuned model is the same for all learning rates of the adapters."""
    folder = DATA / ("ccm_quality_smoke" if args.smoke else "ccm_quality")
    size = f"{args.base_steps}x{args.batch}"
    if method != "base":
        size = f"{args.steps}x{args.batch}-{args.lr:g}-{args.share:g}-slots{args.slots}-rank{args.rank}"
        size += "" if args.targets == TARGETS else f"-{args.targets.replace('_proj', '').replace(',', '-')}"
    return folder / f"{task}-{method}-seed{seed}-{size}"


def schedule(task: str, tokenizer: Any, batch: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of training samples, without end."""
    for part in itertools.count():
        pool = samples(task, "train", tokenizer, POOL * batch, 1000 * seed + part)
        yield from (pool[start : start + batch] for start in range(0, POOL * batch, batch))


def learned(labels: torch.Tensor, rows: list[Sample]) -> torch.Tensor:
    """Labels without those of the task's questions: the words of a choice, or all text."""
    if not rows[0].options:
        return labels
    return labels.masked_fill(~torch.isin(labels, torch.tensor(rows[0].options)), -100)


def fit(
    model: Any, batches: Iterator[list[Sample]], collate: Any, pace: Pace, lr: float, share: float
) -> dict[str, float]:
    """AdamW with 3 % warm-up and a cosine; `share` of the loss is distilled. Returns steps, seconds and the last loss."""
    descent = Descent(model, lr)
    recent, step, mean, over = [], 0, 0.0, False
    model.train()
    while not over:
        scale = pace.scale(step)
        rows = next(batches)
        batch = collate(rows)
        batch["labels"] = learned(batch["labels"], rows)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        if share:
            loss = distillation_loss(model, batch, share=share)
        else:
            logits, said, _ = predicted(model, batch)
            loss = functional.cross_entropy(logits.float(), said)
        recent.append(descent.take(loss, scale))
        step += 1
        over = pace.progress(step) >= 1
        if over or step % 20 == 0:
            mean = float(torch.stack(recent[-20:]).mean())
            print(f"step {step}, {pace.spent:.0f} s: {mean:.3f}", flush=True)
    model.eval()
    return {"steps": step, "seconds": round(pace.spent, 1), "loss": round(mean, 4)}


def predicted(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary) of the labelled tokens, these tokens, and their rows."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    row, column = (batch["labels"] >= 0).nonzero(as_tuple=True)
    kept, where = torch.unique(column - 1, return_inverse=True)
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    return logits[row, where], batch["labels"][row, column], row


def plain_batch(rows: list[Sample]) -> dict[str, torch.Tensor]:
    """[c(1) .. c(t) I O] without compression tokens, padded right, labels on all text behind other text."""
    texts = [[*sum(row.contexts, []), *row.input, *row.output] for row in rows]
    longest = max(map(len, texts))
    batch = {name: torch.full((len(rows), longest), fill) for name, fill in
             (("input_ids", 0), ("attention_mask", 0), ("labels", -100))}  # fmt: skip
    for k, text in enumerate(texts):
        batch["input_ids"][k, : len(text)] = torch.tensor(text)
        batch["attention_mask"][k, : len(text)] = 1
        batch["labels"][k, 1 : len(text)] = torch.tensor(text[1:])
    return batch


def tuned(task: str, base: Any, tokenizer: Any, args: argparse.Namespace, seed: int) -> Any:
    """The model fine-tuned on the task: a plain LoRA of the same size, merged into the weights."""
    folder = kept(task, "base", seed, args)
    if not (folder / "adapter_config.json").exists():
        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        model = get_peft_model(in_dtype(base, args.dtype), config)
        pace = Pace(args.base_steps, args.base_seconds)
        fit(model, schedule(task, tokenizer, args.batch, seed), plain_batch, pace, BASE_LR, 0.0)
        model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload().eval()


def compressor(task: str, method: str, model: Any, tokenizer: Any, args: argparse.Namespace, seed: int) -> Any:
    """The model with the method's trained adapter, out of the kept ones if there."""
    folder = kept(task, method, seed, args)
    if not (folder / "adapter_config.json").exists():
        torch.manual_seed(seed)
        slots = args.slots * (STEPS if method == "gisting" else 1)
        line = tokenizer("\n", add_special_tokens=False)["input_ids"]
        config = CCMConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules=args.targets.split(","),
            num_comp_tokens=slots,
            sink=True,
            comp_init_token_ids=line,
            **CONFIGS[method],
        )
        found, before = in_dtype(model, args.dtype), argparse.Namespace(**{**vars(args), "steps": args.after})
        if args.after:
            found = PeftModel.from_pretrained(found, str(kept(task, method, seed, before)), is_trainable=True)
        found = (found if args.after else get_peft_model(found, config)).to(model.device)
        collator = DataCollatorForCCM(None, found.peft_config["default"], max_length=4096, completion_only_loss=False)

        def collate(rows: list[Sample]) -> dict[str, torch.Tensor]:
            return collator([row.feature() for row in rows])

        pace = Pace(args.steps - args.after, args.seconds)
        batches = itertools.islice(schedule(task, tokenizer, args.batch, seed), args.after, None)
        trained = fit(found, batches, collate, pace, args.lr, args.share)
        trained["steps"] += args.after
        found.save_pretrained(str(folder))
        (folder / TRAINED).write_text(json.dumps(trained))
    return PeftModel.from_pretrained(model, str(folder)).eval()


def reading(model: Any, with_context: bool) -> Score:
    """Logits of O behind all of the context, or none of it."""

    def score(rows: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = rows if with_context else [row.alone() for row in rows]
        batch = plain_batch(rows)
        for labels, row in zip(batch["labels"], rows, strict=True):
            end = int((labels >= 0).nonzero().max()) + 1
            labels[: end - len(row.output)] = -100
        return predicted(model, {name: tensor.to(model.device) for name, tensor in batch.items()})

    return score


def compressing(model: Any) -> Score:
    """Logits of O behind the compressed memory, in one parallel forward."""
    collator = DataCollatorForCCM(None, model.peft_config["default"])

    def score(rows: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = collator([row.feature() for row in rows])
        return predicted(model, {name: tensor.to(model.device) for name, tensor in batch.items()})

    return score


def pooling(model: Any, slots: int) -> Score:
    """Logits of O behind the mean keys and values of equal parts of every context (Compressive Transformer's mean pooling)."""

    def one(sample: Sample) -> torch.Tensor:
        memory, seen = DynamicCache(), 0
        for context in sample.contexts:
            past = memory.get_seq_length() or 1  # the first token of all stays, as the sink of the other methods
            positions = torch.arange(seen, seen + len(context), device=model.device)[None]
            model(
                torch.tensor([context], device=model.device),
                **{cache_keyword(): memory},
                position_ids=positions,
                logits_to_keep=1,
            )
            for layer in memory.layers:
                for name in ("keys", "values"):
                    states = getattr(layer, name)
                    parts = states[:, :, past:].tensor_split(slots, dim=2)
                    pooled = [part.mean(2, keepdim=True) for part in parts]
                    setattr(layer, name, torch.cat([states[:, :, :past], *pooled], dim=2))
            seen += len(context)
        ids = torch.tensor([[*sample.input, *sample.output]], device=model.device)
        positions = torch.arange(seen, seen + ids.shape[1], device=model.device)[None]
        mask = torch.ones(1, memory.get_seq_length() + ids.shape[1], dtype=torch.int64, device=model.device)
        n = len(sample.output)
        out = model(ids, **{cache_keyword(): memory}, position_ids=positions, attention_mask=mask, logits_to_keep=n + 1)
        return out.logits[0, :-1]

    def score(rows: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        said = [torch.tensor(row.output, device=model.device) for row in rows]
        item = [torch.full_like(ids, k) for k, ids in enumerate(said)]
        return torch.cat([one(row) for row in rows]), torch.cat(said), torch.cat(item)

    return score


@torch.no_grad()
def measure(score: Score, items: list[Sample]) -> dict[str, list[float]]:
    """Per item: summed NLL of O, its tokens, and whether the right option got the most."""
    found: dict[str, list[float]] = {"nll": [], "tokens": [], "right": [], "group": [item.group for item in items]}
    for start in range(0, len(items), AT_A_TIME):
        rows = items[start : start + AT_A_TIME]
        logits, said, item = (tensor.cpu() for tensor in score(rows))
        losses = functional.cross_entropy(logits.float(), said, reduction="none")
        for k, row in enumerate(rows):
            found["nll"].append(float(losses[item == k].sum()))
            found["tokens"].append(len(row.output))
            if row.options:
                best = row.options[int(logits[item == k][0, list(row.options)].argmax())]
                found["right"].append(float(best == row.output[0]))
    return found


def elsewhere(items: list[Sample]) -> list[Sample]:
    """Every item with the contexts of the last one before it from another conversation."""
    found = []
    for k, item in enumerate(items):
        other = next(items[k - back] for back in range(1, len(items)) if items[k - back].group != item.group)
        found.append(replace(item, contexts=other.contexts))
    return found


@torch.no_grad()
def online_gap(model: Any, items: list[Sample]) -> float:
    """Largest difference in NLL between the step-by-step memory and the parallel forward, over a few items."""
    gaps = []
    for item in items[:3]:
        memory = CompressedContextMemory(model)
        for context in item.contexts:
            memory.append(context)
        logits = memory.logits([*item.input, *item.output])[0, len(item.input) - 1 : -1].float()
        online = functional.cross_entropy(logits, torch.tensor(item.output, device=logits.device), reduction="sum")
        gaps.append(abs(float(online) - measure(compressing(model), [item])["nll"][0]))
    return max(gaps)


def evaluate(
    task: str, method: str, model: Any, tokenizer: Any, items: list[Sample], args: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """One record: everything measured for a method."""
    start = time.process_time()
    record: dict[str, Any] = {"task": task, "method": method, "seed": seed}
    if method not in CONFIGS:
        score = pooling(model, args.slots) if method == "pooling" else reading(model, method.startswith("full"))
        record |= measure(score, items)
        if method == "full":
            record["other"] = measure(score, elsewhere(items))
    else:
        record |= {name: getattr(args, name) for name in SETTINGS}
        adapted = compressor(task, method, model, tokenizer, args, seed)
        record["training_cpu_s"] = time.process_time() - start
        record["trained"] = json.loads((kept(task, method, seed, args) / TRAINED).read_text())
        record |= measure(compressing(adapted), items)
        if method in ("concat", "merge"):
            record["online_gap"] = online_gap(adapted, items)
        if method in ("concat", "merge", "merge-half", "concat-plain-lora"):
            record["other"] = measure(compressing(adapted), elsewhere(items))
        adapted.unload()
    record["cpu_s"] = time.process_time() - start
    return record


def table(done: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """One row per method of a task."""
    named: dict[str, list[dict[str, Any]]] = {}

    def setting(run: dict[str, Any]) -> tuple[Any, ...]:
        return METHODS.index(run["method"]), *(run.get(name, 0) for name in SETTINGS[:-1]), run.get("targets", "")

    for one in sorted({setting(run) for run in done if run["task"] == task}):
        runs = [run for run in done if run["task"] == task and setting(run) == one]
        name = METHODS[one[0]]
        if trained := [run["trained"]["steps"] for run in runs if "trained" in run]:
            lr, slots, rank = (runs[0][name] for name in ("lr", "slots", "rank"))
            name += f", {round(statistics.mean(trained))} steps, lr {lr:g}, {slots} slots, rank {rank}"
            name += "" if runs[0]["targets"] == TARGETS else f", on {runs[0]['targets']}"
        named[name] = runs
        if all("other" in run for run in runs):
            named[name + OTHER] = [run["other"] for run in runs]
    rows = []
    for method, runs in named.items():
        nll = [sum(run["nll"]) / sum(run["tokens"]) for run in runs]
        row: dict[str, Any] = {"task": task, "method": method, "seeds": len(runs), "n": len(runs[0]["nll"])}
        row["nll"] = round(statistics.mean(nll), 4)
        right = [statistics.mean(run["right"]) for run in runs if run["right"]]
        row["accuracy"] = round(statistics.mean(right), 4) if right else None
        row["recovered"] = row["95 %"] = row["by seed"] = row["recovered, accuracy"] = None
        seeds = [run["seed"] for run in named[method.removesuffix(OTHER)]]
        ends = [[run for run in named.get(end, []) if run["seed"] in seeds] for end in ("none", "full")]
        if len(seeds) == len(ends[0]) == len(ends[1]):
            share, spread = shares(runs, *ends)
            row["recovered"], row["95 %"] = round(share, 3), str(spread)
            triples = zip(runs, *ends, strict=True)
            row["by seed"] = str([round(shares([run], [none], [full])[0], 3) for run, none, full in triples])
            if right:
                low, high = (statistics.mean(statistics.mean(run["right"]) for run in end) for end in ends)
                row["recovered, accuracy"] = round((statistics.mean(right) - low) / (high - low), 3)
        rows.append(row)
    return rows


def arguments() -> argparse.Namespace:
    """Command line, with the sizes of the machine filled in."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=400 if gpu else 200)
    parser.add_argument("--seconds", type=float, default=0.0, help="of an adapter's training at most; 0: no such end")
    parser.add_argument(
        "--after", type=int, default=0, help="go on from the kept adapter of so many steps, a new cosine"
    )
    parser.add_argument("--base-steps", type=int, default=150, help="of the fine-tuning")
    parser.add_argument("--base-seconds", type=float, default=0.0, help="of the fine-tuning at most")
    parser.add_argument("--batch", type=int, default=24 if gpu else 2)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the adapters")
    parser.add_argument("--slots", type=int, default=2, help="compression tokens of a context")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--targets", default=TARGETS, help="names of the modules that the adapters act in")
    parser.add_argument("--share", type=float, default=1.0, help="of the full context's say; the rest: next token's")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the base, in training")
    parser.add_argument("--seeds", type=int, default=3 if gpu else 1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=300, help="test items at most")
    parser.add_argument("--split", default="test", choices=["test", "validation"], help="validation: for choosing")
    parser.add_argument("--report", action="store_true", help="only write the table of what is kept")
    parser.add_argument("--smoke", action="store_true", help="2 steps, 3 items, nothing kept")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.base_steps, args.items = 2, 2, 3
    args.dtype = getattr(torch, args.dtype)
    return args


def run_task(task: str, args: argparse.Namespace, done: list[dict[str, Any]], folder: Path) -> None:
    """Everything of a task that is not in `done` yet, into a file of the folder."""
    asked = [method for method in METHODS if method in args.methods.split(",")]
    base, tokenizer = load_demo_model(args.model)
    base = base.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    asked_for = {name: getattr(args, name) for name in SETTINGS}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        mine = [run for run in done if (run["task"], run["seed"]) == (task, seed)]
        have = {run["method"] for run in mine if {**run, **asked_for} == {**asked_for, **run}}
        missing = [method for method in asked if method not in have]
        if not missing:
            continue
        model, items, is_tuned = copy.deepcopy(base), samples(task, args.split, tokenizer, args.items), False
        for method in missing:
            if method not in FROZEN and not is_tuned:
                model, is_tuned = tuned(task, model, tokenizer, args, seed).requires_grad_(False), True
            run = evaluate(task, method, model, tokenizer, items, args, seed)
            done.append(run)
            print(task, method, round(sum(run["nll"]) / sum(run["tokens"]), 4), f"{run['cpu_s']:.0f} s", flush=True)
            with (folder / f"{task}-{args.split}-batch{args.batch}.jsonl").open("a") as sink:
                sink.write(json.dumps(run) + "\n")


def main() -> None:
    """Run what is missing, write `results/ccm_quality.json`."""
    args = arguments()
    torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every shape
    folder = DATA / ("ccm_quality_smoke" if args.smoke else "ccm_quality")
    if args.smoke and not args.report:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{task}-{args.split}-batch{args.batch}.jsonl" for task in TASKS]

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]

    try:
        for task in () if args.report else args.tasks.split(","):
            run_task(task, args, read(), folder)
    except DataMissingError as error:
        print(f"skipped: {error}")
        return
    done = read()  # other processes' too
    rows = [row for task in TASKS for row in table(done, task)]
    about = {
        "model": args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised to float32)",
        "base steps": args.base_steps, "batch": args.batch,
        "runs": [{name: value for name, value in run.items() if name not in PER_ITEM} for run in done],
    }  # fmt: skip
    if args.split == "test":
        name = ["ccm_quality", *(["gpu"] if torch.cuda.is_available() else []), *(["smoke"] if args.smoke else [])]
        write("_".join(name), rows, **about)
    else:
        show("ccm_quality, validation", rows)


if __name__ == "__main__":
    main()
