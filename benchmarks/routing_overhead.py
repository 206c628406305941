"""What an attached model costs a user who does not use our caches: a decoded token with a plain cache, attached over not.

Both sides share one set of weights and take turns token by token, in changing order; figures are medians of CPU-seconds and
of the ratios pair by pair.

    python benchmarks/routing_overhead.py              # about 6 minutes on one core
    python benchmarks/routing_overhead.py --smoke
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from _report import show, write
from transformers import DynamicCache, PreTrainedModel

from hf_dataopt._compat import cache_keyword
from hf_dataopt.kvzip.reading import USER
from hf_dataopt.routing.attach import attach
from hf_dataopt.text.demo_model import load_demo_model

_TOKEN = torch.tensor([[17]])


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own over the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


@torch.no_grad()
def decoding(model: PreTrainedModel, length: int, tokens: int) -> dict[str, Any]:
    """Milliseconds per token, unattached and attached, behind plain caches of `length` tokens."""
    models = {"unattached": model, "attached": twin_of(model)}
    attach(models["attached"], USER)
    ids = torch.randint(100, 2000, (1, length), generator=torch.Generator().manual_seed(0))
    held = {name: {cache_keyword(): DynamicCache(config=model.config)} for name in models}
    for name, one in models.items():
        one(ids, use_cache=True, **held[name])
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(tokens):
        for name in list(models) if step % 2 else reversed(models):
            start = time.process_time()
            models[name](_TOKEN, use_cache=True, **held[name])
            times[name].append(time.process_time() - start)
    ratios = sorted(a / b for a, b in zip(times["attached"], times["unattached"], strict=True))
    return {
        "tokens": length,
        "unattached ms": 1e3 * statistics.median(times["unattached"]),
        "attached ms": 1e3 * statistics.median(times["attached"]),
        "attached / unattached": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "of all tokens": sum(times["attached"]) / sum(times["unattached"]),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    model, _ = load_demo_model()
    lengths, tokens = ([32], 6) if smoke else ([128, 1024], 400)
    rows = [decoding(model, length, tokens) for length in lengths]
    if smoke:
        show("routing overhead", rows)
    else:
        write("routing_overhead", rows)


if __name__ == "__main__":
    main()
