"""One pass, loss, gradients, memory, online logits and streams equal the recorded runs (golden/ccm)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dataopt import CCMConfig, CompressedContextMemory, StreamingContextMemory

from ..conftest import golden_params

pytestmark = pytest.mark.golden
files = pytest.mark.parametrize("golden", golden_params("ccm", "*.npz"), indirect=True)


class Case:
    """One file: the adapted model and its arrays."""

    def __init__(self, path: Path, **changes: Any) -> None:
        with np.load(path) as arrays:
            self.data: dict[str, Any] = {name: arrays[name] for name in arrays.files if name != "meta"}
            self.meta: dict[str, Any] = json.loads(str(arrays["meta"]))
        weights = load_file(path.with_suffix(".safetensors"))
        base = LlamaForCausalLM(LlamaConfig(**self.meta["config"]))
        own = {name: w for name, w in weights.items() if not name.startswith(("lora.", "comp_"))}
        base.load_state_dict(own, strict=False)
        update = self.meta["update"]
        memory = update if self.meta["recur"] or update == "gist" else f"{update}_apart"
        settings = {"r": self.meta["r"], "lora_alpha": self.meta["alpha"], "lora_dropout": 0.0, "memory": memory}
        settings |= {"num_comp_tokens": self.meta["n_tok"], "sink": self.meta["sink"]}
        self.model = get_peft_model(base, CCMConfig(**{**settings, **changes}))
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                continue
            if "comp_embeddings" in name:
                ours = "comp_embeddings"
            else:
                parts = name.split("layers.")[1].split(".")
                ours = f"lora.layers.{parts[0]}.{parts[2]}.{parts[3][-1]}"
            self.parameters[ours] = parameter
            parameter.data.copy_(weights[ours])
        self.ids = torch.from_numpy(self.data["ids"])[None]
        self.n_target = len(self.data["target_ids"])

    def labels(self) -> torch.Tensor:
        labels = torch.full_like(self.ids, -100)
        labels[0, -self.n_target :] = self.ids[0, -self.n_target :]
        return labels

    def text(self, logits: torch.Tensor) -> np.ndarray:
        return logits[0, ~torch.from_numpy(self.data["is_comp"])].detach().numpy()


def close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


@files
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_pass(golden: Path, attention: str) -> None:
    case = Case(golden)
    case.model.get_base_model().set_attn_implementation(attention)
    output = case.model(case.ids, labels=case.labels())
    close(case.text(output.logits), case.data["logits_text"])
    close(output.loss.item(), case.data["loss"])
    output.loss.backward()
    assert {f"grad_{name}" for name in case.parameters} == {name for name in case.data if name.startswith("grad_")}
    for name, parameter in case.parameters.items():
        expected = case.data[f"grad_{name}"]
        close(parameter.grad, expected, 1e-3 * np.abs(expected).max())


@files
def test_an_unconditional_lora_differs(golden: Path) -> None:
    case = Case(golden, conditional=False)
    with torch.no_grad():
        logits = case.text(case.model(case.ids).logits)
    close(logits, case.data["plain_lora_logits"])
    assert np.abs(logits - case.data["logits_text"]).max() > 0.1


@files
def test_online(golden: Path) -> None:
    case = Case(golden)
    if "online_logits" not in case.data:
        assert not case.meta["recur"] or case.meta["update"] == "gist"
        return
    memory = CompressedContextMemory(case.model)
    contexts = torch.from_numpy(case.data["contexts"]).split(case.data["context_lens"].tolist())
    for step, context in enumerate(contexts, start=1):
        memory.append(context)
        close(torch.stack([keys[0] for keys, _ in memory.layers]), case.data[f"mem_K_{step}"])
        close(torch.stack([values[0] for _, values in memory.layers]), case.data[f"mem_V_{step}"])
    question = torch.from_numpy(np.concatenate([case.data["query_ids"], case.data["target_ids"]]))
    found = memory.logits(question)[0]
    close(found, case.data["online_logits"])
    close(case.text(case.model(case.ids).logits)[-len(found) :], found)
    assert np.abs(found.numpy() - case.data["no_context_logits"]).max() > 0.1
    assert memory.peak_slots == int(case.data["peak"])


@files
def test_stream(golden: Path) -> None:
    case = Case(golden)
    if case.meta["stream"] is None:
        assert "stream_ids" not in case.data
        return
    sizes = case.meta["stream"]
    stream = StreamingContextMemory(
        case.model,
        max_kv=sizes["window"],
        compress_tokens=sizes["comp_size"],
        memory_size=sizes["memory"],
        sink=sizes["sink"],
    )
    ids = torch.from_numpy(case.data["stream_ids"])
    close(stream.feed(ids), case.data["stream_logits"])
    stream.reset()
    for token, size in zip(ids, case.data["stream_sizes"], strict=True):
        stream.feed(token[None])
        assert stream.size == size
