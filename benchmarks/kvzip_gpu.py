"""KVzip at the sizes of Figure 8.8 on a GPU: Llama shapes of 1B and 8B with random weights, 32k and 124k tokens, bf16.

    python benchmarks/kvzip_gpu.py                              # needs torch and transformers only, and no network
    python benchmarks/kvzip_gpu.py --shapes 1b --lengths 32768
    python benchmarks/kvzip_gpu.py --smoke                      # a tiny shape, seconds on a CPU; nothing is kept

A row: seconds of a prefill; scoring and eviction over that; a decoded token's attention (what a layer's cache adds and the
attention over it, all layers) at 0.3 over torch's flash attention on the full keys and values, and over our own cache with
nothing evicted; the same of the kernels alone (a replayed CUDA graph: what a compiled decoder would pay); the whole token,
over one with transformers' own cache, and over our 1.0; the peak of memory, of prefilling alone and of compressing, and bytes
kept. Times are what the device took (synchronised); medians. Random weights cost what trained ones do; how far budgets differ
between heads is drawn like the packaged model's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import _report
import torch
from kvzip_speed import Attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt._compat import cache_keyword
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import KVzipPrompt
from hf_dataopt.kvzip.scoring import score_context

# hidden size, its inner size, layers, heads, KV heads, width of a head
SHAPES = {
    "1b": (2048, 8192, 16, 32, 8, 64),
    "8b": (4096, 14336, 32, 32, 8, 128),
    "tiny": (64, 128, 2, 4, 2, 16),
}


def llama(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A Llama of that shape with random weights, made where it runs."""
    hidden, inner, layers, heads, kv_heads, width = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=1024 if shape == "tiny" else 128_256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        max_position_embeddings=262_144,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def prompt_of(tokens: int, vocabulary: int, device: str) -> KVzipPrompt:
    """Random ids with the lengths of the chat template of Llama 3."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"prefix_ids": 40, "context_ids": tokens, "suffix_ids": 6, "first_repeat_ids": 8, "next_repeat_ids": 12}
    return KVzipPrompt(**{name: torch.randint(vocabulary, (size,), generator=draw) for name, size in sizes.items()})


def seconds(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Until the device has done it, and what it gave."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    found = work()
    wait()
    return time.perf_counter() - start, found


def flash(shape: str, tokens: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """torch's own attention of one token over the full keys and values, all layers."""
    _, _, layers, heads, kv_heads, width = SHAPES[shape]
    query = torch.randn(1, heads, 1, width, device=device, dtype=dtype)
    keys, values = (torch.randn(1, kv_heads, tokens, width, device=device, dtype=dtype) for _ in range(2))

    def work() -> None:
        for _ in range(layers):
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return work


def ragged(shape: str, cache: Any, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Our attention of one token over what a cache kept and a tail of 16 tokens, all layers."""
    _, _, _, heads, kv_heads, width = SHAPES[shape]
    query = torch.randn(1, heads, 1, width, device=device, dtype=dtype)
    key, value = (torch.randn(1, kv_heads, 16, width, device=device, dtype=dtype) for _ in range(2))

    def work() -> None:
        for layer in cache.layers:
            layer.attend(query, key, value, None, width**-0.5, False)

    return work


def timed(work: Callable[[], None], device: str, repeats: int) -> float:
    """Seconds, median."""
    seconds(work, device)
    return statistics.median(seconds(work, device)[0] for _ in range(repeats))


def kernels_alone(work: Callable[[], None], device: str, repeats: int) -> float | None:
    """Seconds without what Python and launches take: a replayed CUDA graph; None on a CPU."""
    if device != "cuda":
        return None
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return timed(graph.replay, device, repeats)


def plain_cache(model: Any, prefilled: Any) -> DynamicCache:
    """transformers' own cache of the same context."""
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(prefilled.cache.layers):
        cache.update(layer.keys, layer.values, index)
    return cache


def decoded(model: Any, cache: Any, device: str, repeats: int, watch: bool = True) -> tuple[float, float]:
    """Seconds of a decoded token, and with `watch` of the attention in it."""
    token = torch.tensor([[17]], device=device)

    def step() -> Any:
        return model(token, **{cache_keyword(): cache}).logits[0, -1, 0]

    for _ in range(3):
        seconds(step, device)
    whole = [seconds(step, device)[0] for _ in range(repeats)]
    inside = [0.0]
    with Attention(partial(seconds, device=device)) as watched:
        for _ in range(repeats * watch):
            watched.spent = 0.0
            seconds(step, device)
            inside.append(watched.spent)
    return statistics.median(whole), statistics.median(inside[1:] or inside)


def peak(device: str) -> float:
    """GiB since the last call, which starts anew; 0 on a CPU."""
    if device != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


def over(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


@torch.no_grad()
def measure(
    shape: str, tokens: int, device: str, dtype: torch.dtype, repeats: int, chunk: int | None
) -> dict[str, Any]:
    """One row."""
    took, model = seconds(lambda: llama(shape, device, dtype), device)
    print(f"{shape}: made in {took:.1f} s", flush=True)
    config = KVzipConfig(keep_ratio=0.3)
    config = replace(config, chunk_size=chunk or config.chunk_size)
    prompt = prompt_of(tokens, model.config.vocab_size, device)
    small = replace(prompt, context_ids=prompt.context_ids[:256])
    score_context(prefill(model, small, config, progress=False), config, progress=False)  # kernels are ready
    peak(device)
    filled, prefilled = seconds(lambda: prefill(model, prompt, config, progress=False), device)
    alone = peak(device)
    print(f"{shape}, {tokens} tokens: prefill {filled:.2f} s", flush=True)
    scored, scores = seconds(lambda: score_context(prefilled, config, progress=False), device)
    print(f"scoring {scored:.2f} s", flush=True)
    most = peak(device)
    plain_token = decoded(model, plain_cache(model, prefilled), device, repeats, watch=False)[0]
    peak(device)  # another cache beside ours is not ours
    layers, heads = scores.shape[:2]
    draw = torch.Generator().manual_seed(0)
    spread = torch.exp(0.5 * torch.randn(layers, heads, 1, generator=draw)).to(scores.device)
    times: dict[float, tuple[float, float]] = {}
    kernels: dict[float, float | None] = {}
    evicted, kept = 0.0, 0.0
    for ratio in (1.0, 0.3):
        settings = replace(config, keep_ratio=ratio)
        took, cache = seconds(lambda s=settings: KVzipCache.from_scores(prefilled, scores * spread, s), device)
        if ratio < 1:
            evicted, kept = took, cache.context_nbytes / cache.full_context_nbytes
        most = max(most, peak(device))
        times[ratio] = decoded(model, cache, device, repeats)
        kernels[ratio] = kernels_alone(ragged(shape, cache.fork(), device, dtype), device, repeats)
        print(f"kept {ratio}: eviction {took:.2f} s, token and attention {times[ratio]}", flush=True)
        del cache
    work = flash(shape, tokens, device, dtype)
    plain, alone_plain = timed(work, device, repeats), kernels_alone(work, device, repeats)
    return {
        "shape": shape,
        "tokens": tokens,
        "chunk": config.chunk_size,
        "prefill s": filled,
        "scoring / prefill": scored / filled,
        "eviction / prefill": evicted / filled,
        "attention at 0.3 / flash on all": times[0.3][1] / plain,
        "attention at 0.3 / our 1.0": times[0.3][1] / times[1.0][1],
        "kernels at 0.3 / flash's": over(kernels[0.3], alone_plain),
        "kernels at 0.3 / our 1.0": over(kernels[0.3], kernels[1.0]),
        "token at 0.3 ms": 1e3 * times[0.3][0],
        "token at 0.3 / plain cache": times[0.3][0] / plain_token,
        "token at 0.3 / our 1.0": times[0.3][0] / times[1.0][0],
        "peak of prefill GiB": alone,
        "peak of all GiB": most,
        "bytes kept": kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["1b", "8b"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32_768, 124_000], help="context tokens")
    parser.add_argument("--chunk", type=int, help="tokens repeated at a time; default: KVzipConfig's")
    parser.add_argument("--repeats", type=int, default=20, help="decoded tokens of each kind")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape; nothing is kept")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.smoke:
        _report.show("KVzip, a tiny shape", [measure("tiny", 1200, device, torch.float32, 2, args.chunk)])
        return
    if device == "cpu":
        print("skipped: no GPU; kvzip_speed.py measures the packaged model on a CPU")
        return
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for tokens in args.lengths:
            try:
                rows.append(measure(shape, tokens, device, torch.bfloat16, args.repeats, args.chunk))
            except torch.cuda.OutOfMemoryError as error:
                print(f"{shape} at {tokens}: {error!s:.120}")
            torch.cuda.empty_cache()
            if rows:
                _report.write("kvzip_gpu", rows)  # after each row: what was measured stays


if __name__ == "__main__":
    main()
