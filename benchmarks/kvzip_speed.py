"""What compression costs and what the compressed cache saves, against a plain `DynamicCache` of the same model.

Compression: CPU-seconds of scoring and eviction over those of prefilling, at 1k, 2k and 4k context tokens; default: the same of
the default setting alone, at 2k, 4k and 8k. Decoding: time per token with the compressed cache over the full one and over our
own with nothing evicted, at 2k, 4k and 8k. Payback: after how many questions compressing has paid, at 2k. Memory: peak of
compression over the peak of prefilling, each in a process of its own. One thread, medians, the sides in turn. kvpress beside
it: `kvzip_peers.py`.

    python benchmarks/kvzip_speed.py              # about 30 minutes on one core
    python benchmarks/kvzip_speed.py --part default
    python benchmarks/kvzip_speed.py --smoke
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _report import HERE, show, write
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates, payback
from hf_dataopt._compat import cache_keyword
from hf_dataopt.kvzip.decode_cpu import loops
from hf_dataopt.kvzip.layers import KVzipLayer
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import KVzipPrompt, build_prompt
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.text.demo_model import load_demo_model

_TOKEN = torch.tensor([[17]])
_HELD: tuple[tuple[float, Any], ...] = ((0.3, "model"), (0.1, "model"), (0.3, "int8"), (0.3, "int4"))
SETTINGS = {
    f"{replay}, chunk {chunk}": KVzipConfig(chunk_size=chunk, replay=replay)
    for replay, chunk in (
        ("exact", 2000),
        ("exact", 512),
        ("local", 2000),
        ("local", 1000),
        ("local", 512),
        ("local", 256),
    )
}


def context_of(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> KVzipPrompt:
    """Made-up records, cut to exactly `n_tokens` context tokens."""
    rng = random.Random(0)
    lines = []
    while len(lines) * 12 < n_tokens:
        lines.append(f"item {rng.randrange(10_000)}: shelf {rng.randrange(100)}, price {rng.randrange(1_000)}.")
    prompt = build_prompt(tokenizer, "\n".join(lines), KVzipConfig())
    return replace(prompt, context_ids=prompt.context_ids[:n_tokens])


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call, and what it returned."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def compression(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: list[int],
    repeats: int,
    settings: dict[str, KVzipConfig] = SETTINGS,
) -> list[dict[str, Any]]:
    """Scoring and eviction over prefill; the settings take turns so that all see the same machine."""
    rows = []
    for n in lengths:
        prompt = context_of(tokenizer, n)
        times: dict[str, list[float]] = {name: [] for name in ["prefill", *settings]}
        for _ in range(repeats):
            seconds, prefilled = cpu_seconds(lambda prompt=prompt: prefill(model, prompt, progress=False))
            times["prefill"].append(seconds)
            for name, config in settings.items():
                seconds, _ = cpu_seconds(
                    lambda prefilled=prefilled, config=config: KVzipCache.from_scores(
                        prefilled, score_context(prefilled, config, progress=False), config
                    )
                )
                times[name].append(seconds)
        base = statistics.median(times["prefill"])
        for name in settings:
            seconds = statistics.median(times[name])
            ratio = statistics.median(a / b for a, b in zip(times[name], times["prefill"], strict=True))
            rows.append(
                {
                    "tokens": n,
                    "setting": name,
                    "prefill CPU-s": base,
                    "compress CPU-s": seconds,
                    "compress / prefill": ratio,
                }
            )
    return rows


class Attention:
    """Seconds that KVzip's layers take within a forward: what they append, and their attention.

    Args:
        clock: of a call: its seconds, and what it returned.
    """

    def __init__(self, clock: Callable[[Callable[[], Any]], tuple[float, Any]] = cpu_seconds) -> None:
        self.clock, self.spent = clock, 0.0
        self._plain = {name: getattr(KVzipLayer, name) for name in ("update", "attend")}

    def __enter__(self) -> Attention:
        for name, plain in self._plain.items():

            def timed(*args: Any, _plain: Any = plain, **options: Any) -> Any:
                took, found = self.clock(lambda: _plain(*args, **options))
                self.spent += took
                return found

            setattr(KVzipLayer, name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        for name, plain in self._plain.items():
            setattr(KVzipLayer, name, plain)


@torch.no_grad()
def decoding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: list[int], tokens: int
) -> list[dict[str, Any]]:
    """Milliseconds per decoded token; full and compressed caches take turns token by token."""
    rows = []
    for n in lengths:
        prefilled = prefill(model, context_of(tokenizer, n), progress=False)
        # real scores, so that the budgets differ between heads as they do in use
        scores = score_context(prefilled, SETTINGS["local, chunk 512"], progress=False)
        caches: dict[Any, Any] = {"full": copy.deepcopy(prefilled.cache)}
        for held in ((1.0, "model"), *_HELD):
            config = KVzipConfig(keep_ratio=held[0], storage=held[1])
            caches[held] = KVzipCache.from_scores(prefilled, scores, config)
        times: dict[Any, list[float]] = {name: [] for name in caches}
        inside: dict[Any, list[float]] = {name: [] for name in caches}
        for at in range(2 * tokens):
            for name, cache in caches.items():
                with Attention() if at % 2 else nullcontext() as watched:
                    seconds, _ = cpu_seconds(lambda cache=cache: model(_TOKEN, **{cache_keyword(): cache}))
                if watched is None:
                    times[name].append(seconds)
                else:
                    inside[name].append(watched.spent)
        full, whole = statistics.median(times["full"]), statistics.median(times[1.0, "model"])
        within = statistics.median(inside[1.0, "model"])
        for ratio, storage in _HELD:
            ms = statistics.median(times[ratio, storage])
            rows.append(
                {
                    "tokens": n,
                    "keep_ratio": ratio,
                    "storage": storage,
                    "full ms": 1e3 * full,
                    "our 1.0 ms": 1e3 * whole,
                    "compressed ms": 1e3 * ms,
                    "compressed / full": ms / full,
                    "compressed / our 1.0": ms / whole,
                    "attention ms": 1e3 * statistics.median(inside[ratio, storage]),
                    "attention / our 1.0": statistics.median(inside[ratio, storage]) / within,
                    "bytes": caches[ratio, storage].context_nbytes / caches[ratio, storage].full_context_nbytes,
                }
            )
    return rows


def paid_back(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: list[int], gates: KVzipGates | None, steps: int
) -> list[dict[str, Any]]:
    """Questions of 32 decoded tokens after which each setting has paid, at keep_ratio 0.3."""
    rows = []
    for n in lengths:
        text = tokenizer.decode(context_of(tokenizer, n).context_ids)
        settings: dict[str, tuple[KVzipConfig, KVzipGates | None]] = {
            name: (one, None) for name, one in SETTINGS.items()
        }
        if gates is not None:
            settings["gates"] = (KVzipConfig(), gates)
        for name, (config, learned) in settings.items():
            found = payback(
                model, tokenizer, text, config, gates=learned, steps=steps, clock=time.process_time, progress=False
            )
            rows.append(
                {
                    "tokens": found.tokens,
                    "setting": name,
                    "compress / prefill": found.compress / found.prefill,
                    "token / full": found.token_compressed / found.token_full,
                    "token / our 1.0": found.token_compressed / found.token_whole,
                    "questions of 32 tokens": found.break_even(32),
                    "seconds saved, 8 of 32": found.saved(8, 32),
                    "seconds saved, 100 of 32": found.saved(100, 32),
                }
            )
    return rows


def peak_memory(n: int, setting: str | None, model_name: str | None) -> float:
    """Peak resident megabytes of a fresh process that prefills and, with a setting, compresses."""
    command = [sys.executable, __file__, "--child", str(n)]
    command += ["--setting", setting] if setting else []
    command += ["--model", model_name] if model_name else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["peak_mb"])


def child(n: int, setting: str | None, model_name: str | None) -> None:
    """One side of `peak_memory`: the peak counts from after the model is loaded."""
    model, tokenizer = load_demo_model(model_name)
    prompt = context_of(tokenizer, n)
    prefill(model, context_of(tokenizer, 16), progress=False)  # first-call buffers
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = _status("VmRSS")
    config = SETTINGS[setting] if setting else KVzipConfig()
    prefilled = prefill(model, prompt, config, progress=False)
    if setting:
        scores = score_context(prefilled, config, progress=False)
        KVzipCache.from_scores(prefilled, scores, config, free=True)
    print(json.dumps({"peak_mb": (_status("VmHWM") - before) / 1024}))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def memory(lengths: list[int], model_name: str | None) -> list[dict[str, Any]]:
    """Peak of prefill alone and of prefill with compression, in megabytes above the loaded model."""
    rows = []
    for n in lengths:
        base = peak_memory(n, None, model_name)
        for setting in SETTINGS:
            peak = peak_memory(n, setting, model_name)
            rows.append(
                {
                    "tokens": n,
                    "setting": setting,
                    "prefill MB": base,
                    "with compression MB": peak,
                    "over MB": peak - base,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--part", choices=["compression", "default", "decoding", "payback", "memory", "all"], default="all"
    )
    parser.add_argument(
        "--gates", default=str(HERE.parent / "examples" / "gates"), help="folder or Hub name, for payback"
    )
    parser.add_argument("--without-numba", action="store_true", help="as where it is not installed: decoding, payback")
    parser.add_argument("--smoke", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.without_numba:
        sys.modules["numba"] = None  # type: ignore[assignment]
    if args.child:
        child(args.child, args.setting, args.model)
        return
    model, tokenizer = load_demo_model(args.model)
    if args.smoke:
        show("compression", compression(model, tokenizer, [128], 1))
        show("decoding", decoding(model, tokenizer, [128], 3))
        show("payback", paid_back(model, tokenizer, [128], None, 2))
        return
    about = {"model": args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised to float32)", "seed": 0}
    about["decoded_tokens"] = "one compiled loop a layer" if loops() else "a fused kernel for each head of a layer"
    way = "" if loops() else "_without_numba"
    if args.part in ("compression", "all"):
        write("kvzip_speed_compression", compression(model, tokenizer, [1024, 2048, 4096], args.repeats), **about)
    if args.part in ("default", "all"):
        default = {name: one for name, one in SETTINGS.items() if one == KVzipConfig()}
        rows = compression(model, tokenizer, [2048, 4096, 8000], args.repeats, default)
        write("kvzip_speed_default", rows, **about)
    if args.part in ("decoding", "all"):
        write(f"kvzip_speed_decoding{way}", decoding(model, tokenizer, [2048, 4096, 8000], 24), **about)
    if args.part in ("payback", "all"):
        gates = KVzipGates.from_pretrained(args.gates)
        write(f"kvzip_speed_payback{way}", paid_back(model, tokenizer, [2048], gates, 12), **about)
    if args.part in ("memory", "all"):
        write("kvzip_speed_memory", memory([2048], args.model), **about)


if __name__ == "__main__":
    main()
