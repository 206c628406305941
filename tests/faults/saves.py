"""Everything that is saved, twice over: two states of it, how each is written into a folder, and what a folder holds."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_dataopt import CompressedContextMemory, KVzipCache, RelationCleaner, RelationReport, StreamingContextMemory
from hf_dataopt.ccm.saved import load_adapter, save_adapter
from hf_dataopt.cli import main
from hf_dataopt.condensation.columns import to_dataset
from hf_dataopt.condensation.multi_formation import Formation, recipe_text
from hf_dataopt.condensation.saved import load_condensed, save_condensed
from hf_dataopt.kvzip.gate_fit import GateConfig
from hf_dataopt.kvzip.gate_network import GateWeights
from hf_dataopt.kvzip.gates import KVzipGates
from hf_dataopt.kvzip.head_scores import load_head_scores, save_head_scores
from hf_dataopt.publishing.artifacts import fetch
from hf_dataopt.publishing.dataset_files import read_parquet

from ..hub.everything import STREAM, TURNS, adapted, digest
from ..kvzip.conftest import CONTEXT
from ..models import byte_tokenizer, tiny_model
from ..relation.data import make


@dataclass(frozen=True)
class Saved:
    """Two saves into one folder, and a reader that tells which of the two it found."""

    first: Callable[[Path], Any]
    second: Callable[[Path], Any]
    read: Callable[[Path], str]


def cache(scratch: Path) -> Saved:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    made = [KVzipCache.from_context(model, tokenizer, CONTEXT, ratio, progress=False) for ratio in (0.3, 0.6)]
    read = lambda folder: str(KVzipCache.from_pretrained(folder, model).stored_lengths)  # noqa: E731
    return Saved(made[0].save_pretrained, made[1].save_pretrained, read)


def memory(scratch: Path) -> Saved:
    model = adapted(tiny_model("llama"))
    made = CompressedContextMemory(model, byte_tokenizer())
    made.append(TURNS[0])
    other = made.fork()
    other.append(TURNS[1])
    read = lambda folder: str(CompressedContextMemory.from_pretrained(model, folder).tokens_seen)  # noqa: E731
    return Saved(made.save_pretrained, other.save_pretrained, read)


def stream(scratch: Path) -> Saved:
    model = adapted(tiny_model("llama"))
    made = [StreamingContextMemory(model, max_kv=40, compress_tokens=16, memory_size=6) for _ in range(2)]
    for one, length in zip(made, (30, 80), strict=True):
        one.feed(STREAM[:length])
    read = lambda folder: str(StreamingContextMemory.from_pretrained(model, folder).tokens_seen)  # noqa: E731
    return Saved(made[0].save_pretrained, made[1].save_pretrained, read)


def heads(scratch: Path) -> Saved:
    def save(value: float) -> Callable[[Path], Any]:
        return lambda folder: save_head_scores(torch.full((2, 3), value), folder, model_id="a/model")

    return Saved(save(0.0), save(1.0), lambda folder: digest(load_head_scores(folder)[0]))


def gates(scratch: Path) -> Saved:
    def save(seed: int) -> Callable[[Path], Any]:
        own = torch.Generator().manual_seed(seed)
        weights = GateWeights.start(2, 8, 4, 2, own).on_plain(torch.zeros(2, 1, 8), torch.ones(2, 1, 8), 0.0, 1.0)
        made_by = {"name": "a/model", "dtype": "float32"}
        return KVzipGates(weights, GateConfig(hidden=4), made_by).save_pretrained

    return Saved(save(0), save(1), lambda folder: digest(*KVzipGates.from_pretrained(folder).weights.tensors.values()))


def adapter(scratch: Path) -> Saved:
    made = [adapted(tiny_model("llama"), memory=kind) for kind in ("concat", "merge")]

    def read(folder: Path) -> str:
        return str(load_adapter(tiny_model("llama"), folder).peft_config["default"].memory)

    return Saved(lambda folder: save_adapter(made[0], folder), lambda folder: save_adapter(made[1], folder), read)


def report(scratch: Path) -> Saved:
    made = RelationCleaner().fit(make(n=120).dataset(), quiet=True)
    other = made.rethreshold(noise_rate=0.5)
    return Saved(made.save, other.save, lambda folder: digest(RelationReport.load(folder).is_label_error))


def condensed(scratch: Path) -> Saved:
    recipe = recipe_text(Formation(factor=2), "image", label_column="label")

    def save(count: int) -> Callable[[Path], Any]:
        labels = torch.arange(2).repeat_interleave(count)
        images = torch.linspace(0, 1, 2 * count * 64).reshape(2 * count, 1, 8, 8)
        made = to_dataset(images, labels, ["a", "b"], "float32", ("image", "label"), recipe)
        return lambda folder: save_condensed(made, folder)

    return Saved(save(3), save(40), lambda folder: digest(np.asarray(load_condensed(folder)["image"][:])))


def cleaned(scratch: Path) -> Saved:
    make(n=120).dataset().save_to_disk(scratch / "rows")

    def save(rate: float) -> Callable[[Path], Any]:
        call = ["clean", str(scratch / "rows"), "--rows", "1", "--noise-rate", str(rate), "--json", "--output-dir"]

        def run(folder: Path) -> None:
            said = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = main([*call, str(folder)])
            if code == 130:
                raise KeyboardInterrupt
            if code:
                raise OSError(said.getvalue())

        return run

    def read(folder: Path) -> str:
        fetch(folder, "cleaned_dataset")
        return f"{len(read_parquet(folder))} {int(RelationReport.load(folder / 'report').is_label_error.sum())}"

    return Saved(save(0.05), save(0.2), read)


SAVES = {made.__name__: made for made in (cache, memory, stream, heads, gates, adapter, report, condensed, cleaned)}
