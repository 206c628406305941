"""Streaming on prose that the adapter never saw: does a compressed memory help where the window has gone on (section 7.4)?

    python benchmarks/ccm_stream.py [--smoke] [--steps 100] [--lr 1e-3] [--labels]

Trained on "An Anarchist FAQ", tested on two other works ("A Brief History of Debian", "The Jargon File"), each of them a Debian
package. An adapter learns from texts laid out as the stream compresses them (`layout="stream"`), each token from what the
model says with all of the text before it (`distillation_loss`; with --labels from the next token alone). The stream holds 160
tokens (1 sink, 8 slots of memory, the rest recent) and compresses 64 at a time. Rows, all with as many keys and values at
every token, but the first: full context; plain window; window with sinks (StreamingLLM); ours; ours with the memory of the
other work at the same place. Nats per token over what is read after the first compression, with a 95 % bootstrap of the
difference from ours over pieces between two compressions. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _report import DATA, write
from data import DataMissingError, prose
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional

from hf_dataopt import CCMConfig, DataCollatorForCCM, StreamingContextMemory
from hf_dataopt.ccm.distillation import distillation_loss
from hf_dataopt.ccm.stream_layout import stream_order
from hf_dataopt.text.demo_model import load_demo_model

TRAIN, TEST = "anarchism", ("debian-history", "jargon-text")
SINKS = 4  # StreamingLLM's
EVERY = 10


def adapted(base: Any, tokenizer: Any) -> Any:
    """The model with an untrained adapter for section 7.4's stream."""
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    config = CCMConfig(r=8, num_comp_tokens=2, stream={}, comp_init_token_ids=line, lora_dropout=0.0)
    return get_peft_model(base.requires_grad_(False), config)


def passages(work: str, tokenizer: Any, n: int, tokens: int, seed: int) -> list[list[int]]:
    """`n` passages of a work that do not overlap, as ids."""
    rng = random.Random(f"{work} {seed}")
    found = []
    for text in prose(work):
        spare = 6 * tokens  # characters: more than enough
        starts = list(range(0, len(text) - spare, spare))
        found += [text[start : start + spare] for start in starts]
    found = rng.sample(found, min(n, len(found)))
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:tokens] for text in found]


def train(model: Any, tokenizer: Any, args: argparse.Namespace, file: Path) -> list[dict[str, float]]:
    """AdamW with 3 % warm-up and a cosine; the losses of every `EVERY` steps."""
    collate = DataCollatorForCCM(tokenizer, model.peft_config["default"], layout="stream", max_length=args.tokens)
    texts = passages(TRAIN, tokenizer, args.steps * args.batch, args.tokens, 0)
    first = model.peft_config["default"].stream["max_kv"] + 1
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    curve, spent, recent, begin = [], 0.0, [], 0
    if file.exists():
        kept = torch.load(file, weights_only=True)
        set_peft_model_state_dict(model, kept["adapter"])
        optimizer.load_state_dict(kept["optimizer"])
        curve, spent, begin = kept["curve"], kept["spent"], kept["step"]
    begun = time.process_time()
    model.train()
    for step in range(begin, args.steps):
        scale = min((step + 1) / max(1, 0.03 * args.steps), 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        batch = collate([{"input_ids": ids} for ids in texts[step * args.batch : (step + 1) * args.batch]])
        batch["labels"][:, :first] = -100  # no memory yet: nothing to learn
        loss = distillation_loss(model, batch, share=0.0 if args.labels else 1.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(float(loss.detach()))
        if (step + 1) % EVERY == 0 or step + 1 == args.steps:
            cpu = spent + time.process_time() - begun
            curve.append({"step": step + 1, "loss": round(statistics.mean(recent), 4), "cpu_s": round(cpu, 1)})
            print(curve[-1], flush=True)
            recent = []
            state = {"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}
            torch.save({**state, "curve": curve, "spent": cpu, "step": step + 1}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    model.eval()
    return curve


@torch.no_grad()
def full_context(model: Any, ids: list[int]) -> list[float]:
    """Loss of every token but the first, with everything before it."""
    whole = torch.tensor([ids])
    with model.disable_adapter():
        hidden = model.get_base_model().get_decoder()(whole, use_cache=False).last_hidden_state[0]
    head = model.get_base_model().get_output_embeddings()
    losses: list[float] = []
    for start in range(0, len(ids) - 1, 256):
        targets = whole[0, start + 1 : start + 257]
        logits = head(hidden[start : start + len(targets)]).float()
        losses += functional.cross_entropy(logits, targets, reduction="none").tolist()
    return losses


def streamed(stream: StreamingContextMemory, ids: list[int], edges: list[int], other: Any = None) -> list[float]:
    """Loss of every token but the first, in a stream; with the memory of the stream `other` where that is given.

    Args:
        stream: fresh.
        ids: of the text.
        edges: tokens read before each compression, and the text's length.
        other: another text's ids, read along.
    """
    beside = StreamingContextMemory(stream.model) if other else None
    losses: list[float] = []
    for start, end in zip([0, *edges[:-1]], edges, strict=True):
        own = stream._layers
        if beside is not None and start:
            held = slice(stream.sink, stream.sink + stream.memory_slots)
            swapped = [(keys.clone(), values.clone()) for keys, values in own]
            for mine, theirs in zip(swapped, beside._layers, strict=True):
                for here, there in zip(mine, theirs, strict=True):
                    here[:, :, held] = there[:, :, held]
            logits, _ = stream._forward(torch.tensor(ids[start:end]), swapped)
            stream.feed(ids[start:end])
        else:
            logits = stream.feed(ids[start:end])
        if beside is not None:
            beside.feed(other[start:end])
        targets = torch.tensor(ids[start + 1 : end + 1])
        losses += functional.cross_entropy(logits[: len(targets)].float(), targets, reduction="none").tolist()
    return losses


@torch.no_grad()
def measured(model: Any, works: dict[str, list[list[int]]]) -> tuple[dict[str, list[np.ndarray]], dict[str, list[str]]]:
    """Losses per piece between two compressions, by row; and the work that each piece is from."""
    sizes = model.peft_config["default"].stream
    found: dict[str, list[np.ndarray]] = {}
    names: list[str] = []
    for work, texts in works.items():
        others = next(texts for name, texts in works.items() if name != work)
        for ids, other in zip(texts, others, strict=True):
            edges = [*stream_order(len(ids), sizes, 2), len(ids)]
            rows = {
                "full context": full_context(model, ids),
                "plain window": streamed(_window(model, 0), ids, edges),
                "window with sinks": streamed(_window(model, SINKS), ids, edges),
                "ours": streamed(StreamingContextMemory(model), ids, edges),
                "ours, memory of the other work": streamed(StreamingContextMemory(model), ids, edges, other),
            }
            for name, losses in rows.items():
                parts = np.split(np.array(losses), [edge - 1 for edge in edges[:-1]])
                found.setdefault(name, []).extend(parts[1:])
            names += [work] * (len(edges) - 1)
    return found, {"work": names}


def _window(model: Any, sink: int) -> StreamingContextMemory:
    """As many keys and values as our stream at every token, nothing compressed."""
    return StreamingContextMemory(model, sink=sink, compress=False)


def table(found: dict[str, list[np.ndarray]], works: list[str]) -> list[dict[str, Any]]:
    """Nats per token, perplexity and the difference from ours, over all pieces and by work."""
    rows = []
    for work in ("both", *dict.fromkeys(works)):
        chosen = [k for k, name in enumerate(works) if work in ("both", name)]
        tokens = np.array([len(found["ours"][k]) for k in chosen])
        sums = {name: np.array([pieces[k].sum() for k in chosen]) for name, pieces in found.items()}
        draws = np.random.default_rng(0).integers(len(chosen), size=(2000, len(chosen)))
        for name, each in sums.items():
            nats = each.sum() / tokens.sum()
            apart = each - sums["ours"]
            spread = np.percentile(apart[draws].sum(1) / tokens[draws].sum(1), [2.5, 97.5])
            row = {"text": work, "method": name, "tokens": int(tokens.sum()), "nats": round(float(nats), 4)}
            row["perplexity"] = round(math.exp(nats), 2)
            row["minus ours"] = round(float(apart.sum() / tokens.sum()), 4)
            row["95 %"] = None if name == "ours" else str([round(float(end), 4) for end in spread])
            rows.append(row)
    return rows


def main() -> None:
    """Train what is missing, measure, write `results/ccm_stream.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1, help="texts a step")
    parser.add_argument("--tokens", type=int, default=480, help="of a training text")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--labels", action="store_true", help="learn from the next token alone")
    parser.add_argument("--texts", type=int, default=4, help="test passages of each work")
    parser.add_argument("--test-tokens", type=int, default=1000, help="of a test passage")
    parser.add_argument("--smoke", action="store_true", help="two steps, short texts, nothing kept")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.tokens, args.texts, args.test_tokens = 2, 240, 1, 240
    torch.set_num_threads(1)
    try:
        if args.smoke:
            with TemporaryDirectory() as scratch:
                run(args, Path(scratch), "ccm_stream_smoke")
        else:
            DATA.mkdir(exist_ok=True)
            run(args, DATA, "ccm_stream")
    except DataMissingError as error:
        print(f"skipped: {error}")


def run(args: argparse.Namespace, kept: Path, name: str) -> None:
    """Train in bfloat16, measure in float32."""
    base, tokenizer = load_demo_model(dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = adapted(base, tokenizer)
    kind = "labels" if args.labels else "distilled"
    curve = train(
        model, tokenizer, args, kept / f"{name}_{kind}_{args.steps}x{args.batch}x{args.tokens}-{args.lr:g}.pt"
    )
    trained = get_peft_model_state_dict(model)
    base, tokenizer = load_demo_model()
    model = adapted(base, tokenizer)
    set_peft_model_state_dict(model, trained)
    model.eval()
    works = {work: passages(work, tokenizer, args.texts, args.test_tokens, 1) for work in TEST}
    found, pieces = measured(model, works)
    write(name, table(found, pieces["work"]), settings=vars(args), curve=curve)


if __name__ == "__main__":
    main()
