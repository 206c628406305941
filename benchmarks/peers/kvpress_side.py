"""kvpress's side of `kvzip_peers.py`, in an environment of its own (`make peers`): it needs transformers below 5.3.

Reads one job per line from standard input, answers with one line of JSON each. Nothing of hf_dataopt is imported here;
token ids, questions and weights are those of the other side. Compression is what the press does when its `with` block
closes (KVzip and KVgrad), or the time that its hooks add to a plain prefill of the same ids (the others).
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from typing import Any

import kvpress
import torch
from kvpress.presses.kvzip_press import KVzipPress
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
disable_progress_bar()


def press_of(name: str, n_prefix: int, options: dict[str, Any]) -> Any:
    """A press by its class's name; `n_sink="prefix"` keeps the whole prompt in front of the context."""
    options = {key: n_prefix if value == "prefix" else value for key, value in options.items()}
    return getattr(kvpress, name)(**options)


class ScoresKept:
    """Keeps a KVzip press's scores, so that a second ratio needs no second pass: their top shares are nested."""

    def __init__(self, press: KVzipPress) -> None:
        self.press, self.scores, self.cut = press, None, press.compress_post
        press.compress_post = self._keep

    def _keep(self, model: Any) -> None:
        self.scores = self.press.score_val.clone()
        self.cut(model)

    def again(self, model: Any, ratio: float) -> None:
        """Evict down to a smaller share of what is held."""
        self.press.score_val, self.press.compression_ratio = self.scores.clone(), 1 - ratio
        self.cut(model)


def held(cache: Any) -> int:
    """Bytes of keys and values."""
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def kept_pairs(model: Any, cache: Any) -> int:
    """Pairs that attention sees: held ones less those that are masked."""
    masked = 0
    for layer in model.model.layers:
        indices = getattr(layer.self_attn, "masked_key_indices", None)
        masked += 0 if indices is None else len(indices[0])
    return sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers) - masked


@torch.no_grad()
def answers(model: Any, cache: Any, n: int, questions: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """NLL of each right answer, mean over its tokens, and whether every token is the most likely one."""
    lengths, nll, match = [layer.keys.shape[2] for layer in cache.layers], [], []
    for question in questions:
        ids, size = torch.tensor([question["ids"]]), question["answer"]
        positions = torch.arange(n, n + ids.shape[1])[None]
        logits = model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=size + 1).logits[0, :-1]
        nll.append(torch.nn.functional.cross_entropy(logits.float(), ids[0, -size:]).item())
        match.append(bool((logits.argmax(-1) == ids[0, -size:]).all()))
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return {"nll": nll, "match": match}


@torch.no_grad()
def plain(model: Any, ids: torch.Tensor) -> tuple[float, Any]:
    """CPU-seconds of a prefill, and its cache."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    start, cache = time.process_time(), DynamicCache()
    model.model(input_ids=ids, past_key_values=cache)
    return time.process_time() - start, cache


def pressed(model: Any, job: dict[str, Any], ids: torch.Tensor, prefill: float) -> list[dict[str, Any]]:
    """One press at its ratios."""
    replays, rows = issubclass(getattr(kvpress, job["press"]), KVzipPress), []
    kept = None
    for ratio in sorted(job["ratios"], reverse=True):
        if kept is None:
            press = press_of(job["press"], job["n_prefix"], {**job["options"], "compression_ratio": 1 - ratio})
            if replays:
                kept = ScoresKept(press)
            for layer in model.model.layers:
                layer.self_attn.masked_key_indices = None
            cache = DynamicCache()
            with torch.no_grad():
                start = time.process_time()
                with press(model):
                    model.model(input_ids=ids, past_key_values=cache)
                    read = time.process_time()
            ended = time.process_time()
            seconds = ended - read if replays else ended - start - prefill
        else:
            kept.again(model, ratio)
        row = {"ratio": ratio, "compress": seconds, "bytes": held(cache), "pairs": kept_pairs(model, cache)}
        rows.append({**row, **answers(model, cache, ids.shape[1], job["questions"])})
    return rows


def main() -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    folder = sys.argv[1]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain(model, torch.arange(16)[None])  # first-call buffers
    out, sys.stdout = sys.stdout, sys.stderr  # what packages print must not be taken for an answer
    import transformers

    hello = {"kvpress": _version("kvpress"), "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(hello), file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        ids = torch.tensor([job["ids"]])
        if job["press"] is None:
            seconds, cache = plain(model, ids)
            row = {"ratio": 1.0, "compress": 0.0, "bytes": held(cache), "pairs": kept_pairs(model, cache)}
            answer = {"prefill": seconds, "rows": [{**row, **answers(model, cache, ids.shape[1], job["questions"])}]}
        else:
            answer = {"rows": pressed(model, job, ids, job["prefill"])}
        print(json.dumps(answer), file=out, flush=True)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
