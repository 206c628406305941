"""What a compressed context memory costs and saves at time step 16, compression factor 8 (16 tokens a context, 2 slots).

    python benchmarks/ccm_speed.py [--smoke] [--parts training,memory,throughput,streaming] [--device cuda]

training: seconds per sample, forward and backward, of the parallel form and of the recurrent one (c(1), c(2), ... one
after the other through the cache, gradients through all steps; same loss). On the language model, where a CPU is bound by
arithmetic that both do alike, and on a tiny one, where the cost is that of the calls, as on a GPU. With --device cuda the
only part: two shapes with random bfloat16 weights, which cost what trained ones do.
memory: bytes of keys and values: the peak of step 16 (its context exists in one layer at a time), what is held after it, and
the cache that reads an input of 16 tokens, whose own keys and values come on top for every method (a fork: the memory stays
beside it).
throughput: samples a second at the largest batch that fits a budget of keys and values (shape of Table 7.1); a sample reads
its newest context and input behind the memory (or the cached 15 contexts) and decodes 8 tokens.
streaming: perplexity of long conversations (chitchat, test participants) with the compressed memory, and with a plain
sliding window of the same size at every step (Figure 7.8); with the adapter that ccm_quality.py has kept, else an untrained
one, which the row says.
One thread, medians, the sides in turn. Needs transformers' packaged or named model.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _report import DATA, write
from _training import in_dtype
from ccm_data import conversations
from data import DataMissingError
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_dataopt import CCMConfig, CompressedContextMemory, DataCollatorForCCM, StreamingContextMemory
from hf_dataopt._compat import cache_keyword
from hf_dataopt.ccm.cache import MemoryCache
from hf_dataopt.text.demo_model import load_demo_model

STEPS, TURN, SLOTS, NEW = 16, 16, 2, 8
PARTS = ("training", "memory", "throughput", "streaming")
Rows = list[dict[str, Any]]


def tiny() -> Any:
    """Two layers, width 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# sizes of two released models; weights do not matter to what a step costs
SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-135M shape": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "Llama-3.2-1B shape": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    },
}  # fmt: skip


def shaped(name: str, device: str) -> Any:
    """A model of one of `SHAPES` in bfloat16, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], tie_word_embeddings=True))
    return in_dtype(model, torch.bfloat16)


def drawn(model: Any) -> dict[str, Any]:
    """A sample of random ids: 16 contexts, input, output, 16 tokens each."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (STEPS + 2, TURN), generator=draws).tolist()
    return {"contexts": ids[:STEPS], "input": ids[STEPS], "output": ids[STEPS + 1]}


def parallel_loss(model: Any, sample: dict[str, Any]) -> torch.Tensor:
    """One forward over all steps (Algorithm 6)."""
    batch = DataCollatorForCCM(None, model.peft_config["default"])([sample])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    where = (batch["labels"][0] >= 0).nonzero()[:, 0]
    labels = batch.pop("labels")[0, where]
    logits = model(**batch, logits_to_keep=where - 1, use_cache=False).logits[0]
    return functional.cross_entropy(logits.float(), labels)


def recurrent_loss(model: Any, sample: dict[str, Any]) -> torch.Tensor:
    """The same loss, step by step: each context behind the memory of the ones before, with gradients."""
    config = model.peft_config["default"]
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    seen, device = 0, model.device
    for step, context in enumerate(sample["contexts"], start=1):
        cache = MemoryCache(layers).belongs_to(model)
        ids = torch.tensor([[*context, *config.comp_token_ids]], device=device)
        _behind(model, cache, ids, seen)
        seen += len(context)
        new = cache.tail(SLOTS)
        if not layers:
            layers = new
        elif config.merges:
            share = config.update_weight(step)
            layers = [
                tuple((1 - share) * old + share * h for old, h in zip(pair, found, strict=True))
                for pair, found in zip(layers, new, strict=True)
            ]  # type: ignore[misc]
        else:
            layers = [
                tuple(torch.cat([old, h], 2) for old, h in zip(pair, found, strict=True))
                for pair, found in zip(layers, new, strict=True)
            ]  # type: ignore[misc]
    ids, n = torch.tensor([[*sample["input"], *sample["output"]]], device=device), len(sample["output"])
    logits = _behind(model, MemoryCache(layers).belongs_to(model), ids, seen, keep=n + 1)[0, :-1]
    return functional.cross_entropy(logits.float(), torch.tensor(sample["output"], device=device))


def _behind(model: Any, cache: Any, ids: torch.Tensor, seen: int, keep: int = 1) -> torch.Tensor:
    past = cache.get_seq_length()
    positions = torch.arange(seen, seen + ids.shape[1], device=ids.device)[None]
    mask = torch.ones(1, past + ids.shape[1], dtype=torch.int64, device=ids.device)
    kwargs = {"attention_mask": mask, "position_ids": positions, cache_keyword(): cache, "logits_to_keep": keep}
    return model(input_ids=ids, use_cache=True, **kwargs).logits


def clock(device: str) -> float:
    """Seconds: of the processor, or of the wall with the GPU's work done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def training(models: dict[str, Callable[[], Any]], repeats: int, device: str) -> Iterator[dict[str, Any]]:
    """Parallel against recurrent, a row at a time."""
    second = "CPU-s" if device == "cpu" else "s"
    for name, load in models.items():
        model = load()
        for memory in ("concat", "merge"):
            config = CCMConfig(r=8, num_comp_tokens=SLOTS, memory=memory, lora_dropout=0.0)
            adapted = get_peft_model(model.requires_grad_(False), config).to(device).train()
            sample, forms = drawn(model), {"parallel": parallel_loss, "recurrent": recurrent_loss}
            times: dict[str, list[float]] = {form: [] for form in forms}
            losses = {}
            for _ in range(repeats + 1):
                for form, function in forms.items():
                    start = clock(device)
                    loss = function(adapted, sample)
                    loss.backward()
                    times[form].append(clock(device) - start)
                    print(f"{name}, {memory}, {form}: {times[form][-1]:.3f} s", flush=True)
                    losses[form] = float(loss.detach())
            parallel, recurrent = (statistics.median(times[form][1:]) for form in forms)
            yield {
                "model": name, "memory": memory, f"parallel, {second}": parallel, f"recurrent, {second}": recurrent,
                "recurrent / parallel": recurrent / parallel,
                "loss difference": abs(losses["parallel"] - losses["recurrent"]),
            }  # fmt: skip
            model = adapted.unload()


@torch.no_grad()
def filled(base: Any, memory: str, steps: int = STEPS) -> tuple[CompressedContextMemory, Any]:
    """A memory of `steps` contexts, and the model under its adapter."""
    adapted = get_peft_model(base, CCMConfig(r=8, num_comp_tokens=SLOTS, memory=memory)).eval()
    found, sample = CompressedContextMemory(adapted), drawn(base)
    for context in sample["contexts"][:steps]:
        found.append(context)
    return found, adapted


def token_bytes(base: Any) -> int:
    """Keys and values of one token."""
    config = base.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * next(base.parameters()).element_size()


@torch.no_grad()
def memory_bytes(base: Any) -> Rows:
    """Peak keys and values at step 16: of the context while it is compressed, held after it, and with an input on top."""
    sample, one = drawn(base), token_bytes(base)
    context, asked = STEPS * TURN * one, len(sample["input"]) * one
    cache = DynamicCache()
    base(torch.tensor([[*sum(sample["contexts"], []), *sample["input"]]]), **{cache_keyword(): cache}, logits_to_keep=1)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    if full != context + asked:
        raise ValueError(f"full context takes {full} bytes, expected {context + asked}")
    rows: Rows = []
    for memory in ("full context", "concat", "merge"):
        peak, held, answering = context, context, full
        if memory != "full context":
            found, adapted = filled(base, memory, STEPS - 1)
            found.peak_kv_bytes = 0
            found.append(sample["contexts"][-1])
            inputs = found.inputs(sample["input"])
            adapted(**inputs, use_cache=True, logits_to_keep=1)
            peak, held, answering = found.peak_kv_bytes, found.nbytes, inputs["past_key_values"].nbytes
            adapted.unload()
        rows.append({
            "memory": memory, "peak at step 16, bytes": peak, "of full context": peak / context,
            "held after it, bytes": held, "of full context ": held / context,
            "cache that answers an input, bytes": answering, "of full context and input": answering / full,
        })  # fmt: skip
    return rows


@torch.no_grad()
def throughput(base: Any, budget: int, repeats: int) -> Rows:
    """Samples a second at the largest batch whose keys and values fit the budget."""
    sample, one = drawn(base), token_bytes(base)
    newest, asked = sample["contexts"][-1], sample["input"]
    lengths = {
        "full context": (STEPS + 1) * TURN + NEW,
        "concat": (STEPS - 1) * SLOTS + max(TURN + SLOTS, SLOTS + TURN + NEW),
        "merge": SLOTS + max(TURN + SLOTS, TURN + NEW),
    }
    rows = []
    for method, length in lengths.items():
        batch = max(1, budget // (length * one))
        if method == "full context":
            cache = DynamicCache()
            base(torch.tensor([sum(sample["contexts"][:-1], [])]), **{cache_keyword(): cache}, logits_to_keep=1)
            cache.batch_repeat_interleave(batch)
            run = _full_run(base, cache, [*newest, *asked], batch)
        else:
            memory, adapted = filled(base, method, STEPS - 1)
            run = _memory_run(adapted, memory, newest, asked, batch)
        times = []
        for _ in range(repeats + 1):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        seconds = statistics.median(times[1:] or times)
        rows.append({
            "method": method, "context slots": {"full context": STEPS * TURN, "concat": STEPS * SLOTS}.get(method, SLOTS),
            "largest batch": batch, "CPU-s a batch": seconds, "samples / CPU-s": batch / seconds,
            "of full": None if not rows else batch / seconds / rows[0]["samples / CPU-s"],
        })  # fmt: skip
        if method != "full context":
            adapted.unload()
    return rows


def _decode(model: Any, cache: Any, ids: torch.Tensor, start: int, held: int) -> None:
    """Read `ids` (B, n) at positions from `start`, then greedy tokens, over a cache that holds `held` slots."""
    batch, positions = ids.shape[0], torch.arange(start, start + ids.shape[1])
    for _ in range(NEW):
        held += ids.shape[1]
        mask = torch.ones(batch, held, dtype=torch.int64)
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions.expand(batch, -1), **{cache_keyword(): cache},
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        ids, positions = out.logits[:, -1].argmax(-1, keepdim=True), positions[-1:] + 1


def _full_run(base: Any, cache: Any, ids: list[int], batch: int) -> Callable[[], None]:
    past = cache.get_seq_length()

    def run() -> None:
        own = DynamicCache()
        for index, layer in enumerate(cache.layers):
            own.update(layer.keys, layer.values, index)
        _decode(base, own, torch.tensor([ids] * batch), past, past)

    return run


def _memory_run(model: Any, memory: Any, newest: list[int], asked: list[int], batch: int) -> Callable[[], None]:
    state = memory.inputs([newest] * batch)["past_key_values"]
    layers = [(layer.keys.clone(), layer.values.clone()) for layer in state.layers]

    def run() -> None:
        users = CompressedContextMemory(model, batch_size=batch)
        users._layers = layers
        users._held = torch.ones(batch, layers[0][0].shape[2], dtype=torch.bool)
        users.steps, users._text = memory.steps.expand(batch), memory._text.expand(batch)
        users.append([newest] * batch)
        inputs = users.inputs([asked] * batch)
        cache = inputs["past_key_values"]
        _decode(model, cache, inputs["input_ids"], users.tokens_seen[0], cache.get_seq_length())

    return run


def streaming(base: Any, tokenizer: Any, texts: int, tokens: int) -> Rows:
    """Perplexity of the longest conversations of test participants, compressed memory against a plain window."""
    kept = sorted((DATA / "ccm_quality").glob("chitchat-concat-seed0-*/adapter_config.json"))
    bases = sorted((DATA / "ccm_quality").glob("chitchat-base-seed0-*/adapter_config.json"))
    trained = bool(kept and bases)
    if trained:
        base = PeftModel.from_pretrained(base, str(bases[-1].parent)).merge_and_unload()
        model = PeftModel.from_pretrained(base, str(kept[-1].parent)).eval()
    else:
        model = get_peft_model(base, CCMConfig(r=8, num_comp_tokens=SLOTS, sink=True)).eval()
    talks = sorted(conversations("test"), key=len, reverse=True)[:texts]
    streams = []
    for talk in talks:
        letter = dict(zip(dict(talk), "AB", strict=False))
        text = "\n".join(f"{letter[sender]}: {words}" for sender, words in talk)
        streams.append(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])
    rows = []
    for compress_tokens in (64, 16):
        nll = {}
        for compress in (True, False):
            stream = StreamingContextMemory(model, max_kv=160, compress_tokens=compress_tokens, compress=compress)
            nll[compress] = [math.log(stream.perplexity(ids)) for ids in streams]
        ours, plain = (statistics.mean(nll[key]) for key in (True, False))
        rows.append({
            "adapter": "trained on chitchat" if trained else "untrained", "tokens": sum(map(len, streams)),
            "cache": 160, "memory": 8, "compressed at a time": compress_tokens,
            "compressed memory, ppl": math.exp(ours), "plain window, ppl": math.exp(plain), "NLL difference": ours - plain,
        })  # fmt: skip
    return rows


def main() -> None:
    """Run the parts and write `results/ccm_speed_PART.json` each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--texts", type=int, default=2, help="conversations of 1,000 tokens in the streaming part")
    parser.add_argument("--budget-mib", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cuda: the training part on it")
    parser.add_argument("--smoke", action="store_true", help="tiny model where one will do, one repeat")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.device != "cpu":
        on_device(args)
        return
    parts = args.parts.split(",")
    base, tokenizer = (tiny().eval(), None) if args.smoke else load_demo_model(args.model)
    repeats, budget = (1, 2**19) if args.smoke else (args.repeats, args.budget_mib * 2**20)
    about = {
        "model": "tiny" if args.smoke else args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised to float32)"
    }
    jobs: dict[str, Callable[[], Rows]] = {
        "training": lambda: list(training({"language model": lambda: base, "tiny": tiny}, repeats, "cpu")),
        "memory": lambda: memory_bytes(base),
        "throughput": lambda: throughput(base, budget, repeats),
        "streaming": lambda: streaming(base, tokenizer, args.texts, 1000),
    }
    for part in parts:
        if part == "streaming" and tokenizer is None:
            continue
        try:
            rows = jobs[part]()
        except DataMissingError as error:
            print(f"{part} skipped: {error}")
            continue
        write(f"ccm_speed_{part}{'_smoke' if args.smoke else ''}", rows, **about)


def on_device(args: argparse.Namespace) -> None:
    """The training part on a GPU; every row is written as it comes."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("ccm_speed on a GPU skipped: there is none")
        return
    models = {name: functools.partial(shaped, name, args.device) for name in SHAPES}
    if args.smoke:
        models = {"tiny": lambda: tiny().to(args.device)}
    rows: Rows = []
    for row in training(models, 1 if args.smoke else args.repeats, args.device):
        rows.append(row)
        write(
            f"ccm_speed_gpu{'_smoke' if args.smoke else ''}",
            rows,
            quiet=True,
            dtype="float32" if args.smoke else "bfloat16",
        )
        print(row, flush=True)


if __name__ == "__main__":
    main()
